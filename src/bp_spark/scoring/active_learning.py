"""Whose label would help most, and labels as people give them: active learning with an ensemble.

In: features of one date and a bundle. Out: the users to ask, as many as can be asked. Of most use is the label of whom the
members of the bundle disagree on (query by committee: Seung, Opper and Sompolinsky 1992), but the users of most disagreement
are often much alike, and tell the same many times over. So more of them are taken than can be asked, and of these the ones
that stand for the others (Zhdanov 2019, "Diverse mini-batch Active Learning", arXiv:1901.05954).

Disagreement is computed on the executors, and Spark keeps the users of most of it: the driver sees as many users as can be
asked, times ``labelling.candidates_per_label``, whatever the number of users.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from sklearn.cluster import KMeans
from threadpoolctl import threadpool_limits

from bp_spark.core.config import LabellingConfig
from bp_spark.core.errors import BundleError, DataError
from bp_spark.core.session import checkpointed
from bp_spark.features.catalogue import Catalogue
from bp_spark.model.columns import from_arrow
from bp_spark.model.members.base import predict_all
from bp_spark.registry.bundle import Bundle
from bp_spark.scoring.prediction import distribute, load_once

SEED = 7
"""Of the first centres: the same users and bundle, the same selection."""
MAX_BUDGET = 5_000
"""Labels that are asked for at once, at most: clustering several times as many users takes minutes then."""
ASKED = ("user_key", "as_of_date", "rank", "spend")
"""Columns of the file for whoever asks; ``spend`` is to be filled in."""
GIVEN = ("user_key", "user_id", "as_of_date", "spend", "source", "given_at", "rank")
"""Columns that a file of given labels may have."""


# --- who is asked ------------------------------------------------------------------------------------------------------


def disagreement(predictions: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> np.ndarray:
    """How far members are apart on each user: the weighted standard deviation of the square roots of what they expect.

    The root steadies the variance of spend, as in the stack; in money the largest spenders would always be first.

    Args:
        predictions: member -> expected spend, ``float64[users]``.
        weights: member -> its weight; a member without any has no say.

    Returns:
        ``float64[users]``.

    >>> disagreement({"a": np.array([4.0, 9.0]), "b": np.array([16.0, 9.0])}, {"a": 0.5, "b": 0.5})
    array([1., 0.])
    """
    total = sum(weights.values())
    roots = {name: np.sqrt(np.maximum(predictions[name], 0.0)) for name in weights}
    # member by member, as in the stack: the order of a sum must not depend on who shares the batch
    mean = sum(weight / total * roots[name] for name, weight in weights.items())
    variance = sum(weight / total * (roots[name] - mean) ** 2 for name, weight in weights.items())
    return np.asarray(np.sqrt(variance), np.float64)


def standardised(frame: pd.DataFrame, catalogue: Catalogue) -> np.ndarray:
    """Features as they are compared, ``float64[rows, features]``: the skewed ones as signed log1p, each with mean 0 and
    variance 1; what is missing stands at the mean."""
    columns = []
    for feature in catalogue.features:
        if feature.name not in frame:
            # of a catalogue that is newer than the rows
            continue
        values = frame[feature.name].to_numpy(np.float64, na_value=np.nan)
        values = np.where(np.isfinite(values), values, np.nan)
        if feature.scale == "log":
            values = np.sign(values) * np.log1p(np.abs(values))
        known = values[~np.isnan(values)]
        deviation = known.std() if len(known) else 0.0
        scaled = (values - known.mean()) / deviation if deviation > 0 else np.zeros(len(values))
        columns.append(np.nan_to_num(scaled, nan=0.0))
    return np.stack(columns, axis=1)


def diverse(points: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """Of many rows a few that stand for all: the row nearest to each centre of a weighted k-means.

    Args:
        points: ``float64[rows, features]``, see :func:`standardised`.
        weights: ``float64[rows]``, how much a row is to count: its disagreement.
        count: rows wanted.

    Returns:
        Positions of ``count`` rows, or of all if there are fewer, rising. Where many rows are one and the same there are fewer
        clusters than wanted, and the rows of most weight come in beside them.
    """
    if count >= len(points):
        return np.arange(len(points))
    weights = weights if weights.max() > 0 else np.ones(len(points))
    # more centres than different rows can't be
    different = min(count, len(np.unique(points, axis=0)))
    with threadpool_limits(limits=1):
        # several threads would sum in whatever order they end
        clusters = KMeans(different, n_init=1, random_state=SEED).fit(points, sample_weight=weights)
    apart = np.linalg.norm(points - clusters.cluster_centers_[clusters.labels_], axis=1)
    # by cluster, then the nearest; of equally near ones the first
    order = np.lexsort((apart, clusters.labels_))
    _, first = np.unique(clusters.labels_[order], return_index=True)
    chosen = order[first]
    most = np.argsort(-weights, kind="stable")
    others = most[~np.isin(most, chosen)]
    return np.sort(np.concatenate([chosen, others[: count - len(chosen)]]))


def candidates(
    users: DataFrame, bundle: Bundle, count: int, columns: Sequence[str] = (), on: date | None = None
) -> pd.DataFrame:
    """The users that the bundle's members disagree on most.

    Args:
        users: rows of ``user_features`` of one date.
        count: users wanted.
        columns: of ``users``, to be brought along.
        on: the date from which the spend counts; by default that of the bundle's training.

    Returns:
        ``user_key, disagreement, expected_spend`` and these columns, most disagreement first.

    Raises:
        BundleError: one member alone has weight; ``users`` lacks a column.
    """
    bundle.check_inputs(users.columns)
    weights = {
        name: weight for name, weight in zip(bundle.fusion.members, bundle.fusion.weights, strict=True) if weight > 0
    }
    if len(weights) < 2:
        raise BundleError(
            f"{bundle.folder}: only {', '.join(weights)} has weight in the fusion: nobody is there to disagree with; "
            "train with more fusion.members"
        )
    name, digest = distribute(users.sparkSession, bundle), bundle.digest

    def computed(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        loaded = load_once(name, digest)
        for batch in batches:
            columns = from_arrow(batch)
            said = predict_all([loaded.members[member] for member in loaded.fusion.members], columns)
            yield pa.RecordBatch.from_pydict(
                {
                    "user_key": batch.column("user_key"),
                    "disagreement": pa.array(disagreement(said, weights)),
                    "expected_spend": pa.array(loaded.fusion.apply(said, on)["expected_spend"]),
                }
            )

    inputs = users.select("user_key", *dict.fromkeys(bundle.required_columns))
    found = inputs.mapInArrow(computed, "user_key string, disagreement double, expected_spend double")
    # keys first, then their rows: else every row would be dragged along whole
    most = checkpointed(found.orderBy(F.desc("disagreement"), "user_key").limit(count))
    rows = users.select("user_key", *columns).join(F.broadcast(most), "user_key").toPandas()
    return rows.sort_values(["disagreement", "user_key"], ascending=[False, True]).reset_index(drop=True)


def selected(
    users: DataFrame, bundle: Bundle, catalogue: Catalogue, budget: int, config: LabellingConfig, on: date | None = None
) -> pd.DataFrame:
    """Whom to ask.

    Args:
        users: rows of ``user_features`` of one date, of whom could be asked.
        catalogue: of these features.
        budget: how many.
        on: see :func:`candidates`.

    Returns:
        ``user_key, rank, disagreement, expected_spend``, by rank from 1: most disagreement first. Fewer than ``budget`` where
        there are no more users.
    """
    compared = [name for name in catalogue.names if name in users.columns]
    found = candidates(users, bundle, budget * config.candidates_per_label, compared, on)
    if found.empty:
        return found.assign(rank=pd.Series(dtype="int64"))[["user_key", "rank", "disagreement", "expected_spend"]]
    chosen = diverse(standardised(found[compared], catalogue), found["disagreement"].to_numpy(), budget)
    # candidates stand in order of disagreement, and so do positions that rise
    asked = found.iloc[chosen].assign(rank=np.arange(1, len(chosen) + 1))
    return asked[["user_key", "rank", "disagreement", "expected_spend"]].reset_index(drop=True)


def write_questions(path: Path, asked: pd.DataFrame) -> None:
    """The file for whoever asks: ASKED, by rank, with nothing in ``spend``. No model's opinion is in it, for it would be
    repeated.

    Raises:
        DataError: it can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        asked.assign(spend="")[list(ASKED)].to_csv(path, index=False)
    except OSError as error:
        raise DataError(str(path), f"can't be written ({error.strerror})") from None


# --- what is answered --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GivenLabel:
    """One line of a file of labels.

    Attributes:
        line: where it stands, from 1 for the heading.
        user: the user's key, or the platform's id where the file has ids.
        as_of_date: the spend is that of the horizon from this day on.
        spend: as given.
        source: who says so, if told.
        given_at: when, if told.
    """

    line: int
    user: str
    as_of_date: date
    spend: float
    source: str | None
    given_at: datetime | None


@dataclass(frozen=True)
class LabelFile:
    """What a file of labels holds: the answers, which column names the user, and the lines without an answer."""

    labels: Sequence[GivenLabel]
    user_column: str
    unanswered: int


class _RefusedError(Exception):
    """A value breaks a rule."""


def read_labels(path: Path, first_event: date, today: date, config: LabellingConfig) -> LabelFile:
    """Labels as people gave them: CSV in UTF-8 with a heading; columns of GIVEN, in any order. A line without a spend is one
    that nobody answered, and is passed over.

    Args:
        first_event: day of the first event: of no date up to it has anybody features.
        today: nothing is told later.

    Raises:
        DataError: the file can't be read, lacks a column, has one that is not known, or a value breaks a rule: the message
            names file, line, column and rule, and never a user.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, line) for line in reader if any(cell.strip() for cell in line)]
    except OSError as error:
        raise DataError(str(path), f"can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(str(path), "must be text in UTF-8") from None
    except csv.Error as error:
        raise DataError(str(path), f"must be CSV ({error})") from None
    if not lines:
        raise DataError(str(path), "is empty: the first line must name the columns")
    heading = [name.strip() for name in lines[0][1]]
    user = _user_column(path, heading)
    found, unanswered, seen = list[GivenLabel](), 0, dict[tuple[str, date], int]()
    for number, cells in lines[1:]:
        if len(cells) != len(heading):
            raise DataError(
                str(path), f"line {number}: must have {len(heading)} values, as the first line; has {len(cells)}"
            )
        values = {name: cell.strip() for name, cell in zip(heading, cells, strict=True)}
        if not values["spend"]:
            unanswered += 1
            continue
        label = _label(path, number, values, user, first_event, today, config)
        if (label.user, label.as_of_date) in seen:
            other = seen[label.user, label.as_of_date]
            raise DataError(
                str(path),
                f"line {number}: a user has one label of a date, and this one stands in line {other} too",
                column=user,
            )
        seen[label.user, label.as_of_date] = number
        found.append(label)
    if not found:
        raise DataError(str(path), f"must hold a spend: none of its {unanswered} lines does", column="spend")
    return LabelFile(found, user, unanswered)


def require_known(path: Path, file: LabelFile, keys: Sequence[str], known: Collection[str]) -> None:
    """Whether every label is of a user of the platform.

    Args:
        keys: of the labels, one each.
        known: those of them that are users.

    Raises:
        DataError: one is not; the message names the first line.
    """
    strangers = [label.line for label, key in zip(file.labels, keys, strict=True) if key not in known]
    if strangers:
        rule = f"line {strangers[0]}: must be a user that was ingested, one of the table user_keys"
        raise DataError(str(path), rule, column=file.user_column, count=len(strangers))


def _user_column(path: Path, heading: Sequence[str]) -> str:
    """Which column names the user, of a heading that has all it needs.

    Raises:
        DataError: it hasn't.
    """
    for name in heading:
        if name not in GIVEN:
            raise DataError(str(path), f"line 1: isn't a column of labels; these are {', '.join(GIVEN)}", column=name)
        if heading.count(name) > 1:
            raise DataError(str(path), "line 1: must be there once", column=name)
    users = [name for name in ("user_key", "user_id") if name in heading]
    if len(users) != 1:
        there = "both are" if users else "neither is"
        raise DataError(str(path), f"line 1: must have user_key or user_id; {there} there")
    for name in ("as_of_date", "spend"):
        if name not in heading:
            raise DataError(str(path), "line 1: column is missing", column=name)
    return users[0]


def _label(
    path: Path, line: int, values: Mapping[str, str], user: str, first_event: date, today: date, config: LabellingConfig
) -> GivenLabel:
    given = values.get("given_at")
    column = ""
    try:
        column = user
        if not values[user]:
            raise _RefusedError("must name a user")
        column = "as_of_date"
        as_of_date = _day(values[column])
        if not first_event < as_of_date <= today + timedelta(days=1):
            raise _RefusedError(f"must be after the first event, of {first_event}, and not after tomorrow")
        column = "spend"
        spend = _amount(values[column], config.max_spend)
        column = "given_at"
        given_at = datetime.combine(_day(given), datetime.min.time(), UTC) if given else None
        if given_at is not None and given_at.date() > today:
            raise _RefusedError("must not be in the future")
    except _RefusedError as refused:
        # what stands there may be anything, a user's id too
        raise DataError(str(path), f"line {line}: {refused}", column=column) from None
    return GivenLabel(line, values[user], as_of_date, spend, values.get("source") or None, given_at)


def _day(text: str) -> date:
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise _RefusedError("must be a date, as YYYY-MM-DD") from None


def _amount(text: str, most: float) -> float:
    try:
        # of Python's own numbers 1_000 is one
        amount = math.nan if "_" in text else float(text)
    except ValueError:
        amount = math.nan
    if not 0 <= amount <= most:
        raise _RefusedError(
            f"must be a number from 0 to {most:,.0f} (labelling.max_spend), without separators of thousands"
        )
    return amount
