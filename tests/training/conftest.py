"""Fixtures of all trainings."""

from tests.support.ranks import single_rank  # noqa: F401 - a fixture
