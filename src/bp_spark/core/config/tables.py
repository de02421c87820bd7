"""Settings of the lakehouse: where tables live."""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from bp_spark.core.config.base import Section


class TablesConfig(Section):
    """Where tables live."""

    namespace: str = Field(
        "bp", pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_]+)?$", description="`schema` or `catalog.schema` of every table."
    )
    path: str | None = Field(
        "lakehouse",
        pattern="^[^`]+$",
        description="Folder or object-store prefix of path-based tables, without a backtick, which Delta takes for the "
        "end of a path. Null: the metastore manages the tables.",
    )

    @field_validator("path")
    @classmethod
    def _without_password(cls, path: str | None) -> str | None:
        # logs and messages show the path
        if path is not None and re.match(r"[\w+.-]+://[^/]*:.*@", path):
            raise ValueError("must hold no password or key: conf/object-stores.md says how jobs sign in to stores")
        return path
