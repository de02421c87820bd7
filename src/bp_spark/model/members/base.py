"""The interface of members of a bundle: predictions from columns, and plain files.

Files are JSON or safetensors; nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from bp_spark.core.errors import BundleError, DataError
from bp_spark.model.columns import Columns

TABLE = "training_set"
LABEL = "label_spend"
SPLIT = "split"
KEY = ("user_key", "as_of_date")


class Member(Protocol):
    """A fitted model of a user's spend. A prediction depends on its own row only."""

    @property
    def name(self) -> str:
        """Short name, unique in a bundle: ``linear``, ``btyd``, ``trees``, ``sqrt_trees``, ``transformer``."""
        ...

    @property
    def features(self) -> tuple[str, ...]:
        """Tabular features that it reads."""
        ...

    def predict(self, columns: Columns) -> np.ndarray:
        """Return the expected spend, ``float64[rows]``, finite and >= 0, in the currency of the labels.

        Args:
            columns: one array of ``rows`` values for each input column; NaN is a missing value.

        Raises:
            BundleError: a column the member needs is missing.
        """
        ...

    def set_threads(self, threads: int) -> None:
        """Use that many threads in predictions from now on, if a prediction can use several."""
        ...

    def save(self, folder: Path) -> None:
        """Write the member's files, each named after it, into an existing folder."""
        ...

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read the member that :meth:`save` wrote.

        Raises:
            BundleError: a file is missing, cut short or not this member's; the message names it.
        """
        ...


@runtime_checkable
class HistoryMember(Protocol):
    """A member that reads the user's last events, too."""

    @property
    def history(self) -> tuple[str, ...]:
        """Columns of the history that it reads."""
        ...


@runtime_checkable
class HorizonsMember(Protocol):
    """A member that predicts other horizons too."""

    def predict_horizons(self, columns: Columns) -> dict[str, np.ndarray]:
        """Return the expected spend over each horizon, ``float64[rows]`` each.

        The main horizon stands under the member's name, the others as
        :func:`bp_spark.features.labels.horizon_column` names them.
        """
        ...


@runtime_checkable
class ActivityMember(Protocol):
    """A member that predicts whether a user will buy at all, too."""

    def predict_activity(self, columns: Columns) -> dict[str, np.ndarray]:
        """Return :data:`bp_spark.model.columns.ACTIVE` and :data:`bp_spark.model.columns.SILENT`, ``float64[rows]`` each."""
        ...


def predict_all(members: Iterable[Member], columns: Columns) -> dict[str, np.ndarray]:
    """Return the predictions of members, ``float64[rows]`` each.

    Keys are the members' names, names with days for other horizons (``transformer_30d``), and those of
    :class:`ActivityMember`.

    Raises:
        BundleError: a column a member needs is missing.
    """
    predictions: dict[str, np.ndarray] = {}
    for member in members:
        if isinstance(member, HorizonsMember):
            predictions |= member.predict_horizons(columns)
        else:
            predictions[member.name] = member.predict(columns)
        if isinstance(member, ActivityMember):
            predictions |= member.predict_activity(columns)
    return predictions


def spend() -> Column:
    """Return the spend over the horizon as a double, never below 0."""
    return F.greatest(F.col(LABEL).cast("double"), F.lit(0.0))


def signed_log(name: str) -> Column:
    """Return ``sign(v) * log1p(|v|)`` of a column."""
    value = F.col(name).cast("double")
    return F.signum(value) * F.log1p(F.abs(value))


def require(df: DataFrame, names: Iterable[str]) -> None:
    """Make sure that the training set has these columns.

    Raises:
        DataError: one is missing; the message names it.
    """
    for name in names:
        if name not in df.columns:
            raise DataError(TABLE, "column is missing", column=name)


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a JSON object for :func:`read_json`; floats come back bit for bit."""
    path.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a member's file.

    Raises:
        BundleError: the file can't be read or holds no JSON object.
    """
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(f"{path}: can't be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path}: not JSON or cut short ({error})") from None
    if not isinstance(document, dict):
        raise BundleError(f"{path}: must hold a JSON object, not a {type(document).__name__}")
    return document
