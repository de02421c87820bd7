"""Loading of saved members by their names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bp_spark.core.errors import BundleError
from bp_spark.model.members.base import Member
from bp_spark.model.members.btyd import BtydMember
from bp_spark.model.members.linear import LinearMember
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember

_LOADERS: dict[str, Callable[[Path], Member]] = {
    member.name: member.load for member in (LinearMember, TreesMember, SqrtTreesMember, BtydMember)
}


def load_member(name: str, folder: Path) -> Member:
    """Load a saved member.

    Raises:
        BundleError: there is no such member, or its files can't be used.
    """
    load = _LOADERS.get(name)
    if load is not None:
        return load(folder)
    if name == "transformer":
        # Only here: torch takes seconds to import, and bundles without a sequence model need none.
        from bp_spark.model.members.transformer import TransformerMember

        return TransformerMember.load(folder)
    raise BundleError(f"{folder}: unknown member {name!r}")
