"""Load a saved member by its name."""

from __future__ import annotations

from pathlib import Path

from bp_spark.core.errors import BundleError
from bp_spark.model.members.base import Member
from bp_spark.model.members.btyd import BtydMember
from bp_spark.model.members.linear import LinearMember
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember


def load_member(name: str, folder: Path) -> Member:
    """The saved member of that name.

    Raises:
        BundleError: there is no such member, or its files can't be used.
    """
    kinds: tuple[type[Member], ...] = (LinearMember, TreesMember, SqrtTreesMember, BtydMember)
    for kind in kinds:
        if name == kind.name:
            return kind.load(folder)
    if name == "transformer":
        # torch takes seconds to import: bundles without a sequence model don't pay for it.
        from bp_spark.model.members.transformer import TransformerMember

        return TransformerMember.load(folder)
    raise BundleError(f"{folder}: unknown member {name!r}")
