"""The base class of all sections, and the types of values that several of them share."""

from __future__ import annotations

import re
import zoneinfo
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


def zone_name(name: str) -> str:
    """Return the name of a time zone, or raise ``ValueError`` if it is none."""
    if not re.fullmatch(r"[+-]\d\d:\d\d", name) and name not in zoneinfo.available_timezones():
        raise ValueError("must be a time zone such as Asia/Shanghai or +08:00")
    return name


Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(ge=1)]
Zone = Annotated[str, AfterValidator(zone_name)]
Folder = Annotated[str, Field(min_length=1)]
SecretAddress = Annotated[str, Field(pattern=r"^(env:[A-Za-z_][A-Za-z0-9_]*|file:.+|databricks:[^/]+/[^/]+)$")]
"""Where a secret is, never the secret itself: ``env:NAME`` of an environment variable, ``file:PATH`` of a file, or
``databricks:SCOPE/KEY``."""


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error, as is a number that isn't finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def distinct(values: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the values, or raise ``ValueError`` if there are none or one stands twice."""
    if not values or len(set(values)) < len(values):
        raise ValueError("must be at least one, each once")
    return values
