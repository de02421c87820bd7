"""The nightly pass: every user of a date scored, those whose features did not change carried over."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, FeatureReader, digest
from bp_spark.core.errors import BundleError, DataError, FileReadError
from bp_spark.core.session import broadcast_few, persisted
from bp_spark.core.version import __version__
from bp_spark.lakehouse import parquet
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.lakehouse.tables import SCORES, SCORES_LATEST, Lakehouse
from bp_spark.registry.bundle import Bundle, load_promoted
from bp_spark.report import population
from bp_spark.scoring import prediction
from bp_spark.scoring.carry_forward import carry_forward, stale_users

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreResult:
    """What a night came to.

    Attributes:
        users: rows of the night.
        computed: users whose score was computed; the others' was carried forward from an earlier night.
        written: whether rows were written; False: they were there already.
        levels: users and money by level and score; see :func:`bp_spark.report.population.distribution`.
        bundle: the model.
        stages: what ran.
    """

    users: int
    computed: int
    written: bool
    levels: pd.DataFrame
    bundle: Bundle
    stages: list[dict[str, Any]]


def score(
    spark: SparkSession, config: Config, score_date: date, chosen: str | Path | None = None, full: bool = False
) -> ScoreResult:
    """Score every user of a date and overwrite that date in ``scores``.

    A night that was scored with the same bundle on the same features is left as it is. Of any other, users whose features
    are those of the newest night that the same bundle scored keep that night's score.

    Args:
        chosen: a bundle's folder, or its address in the registry as ``models:/NAME@ALIAS``; by default the bundle that
            ``bundles/current`` names.
        full: compute every user's score, whatever earlier nights said.

    Raises:
        BundleError: no bundle is promoted, or it can't be trusted or doesn't fit the features.
        DataError: there are no features of that date.
        TrackingError: the registry can't be reached.
    """
    with recorded(spark, config, "score") as run:
        lakehouse = run.lakehouse
        bundle = load_promoted(config, chosen)
        require_same_features(bundle, config)
        # the version that is recorded is the one that is read, whatever is written meanwhile
        version = lakehouse.version("user_features")
        lakehouse.require_whole_files("user_features", version, {"as_of_date": str(score_date)})
        users = features_of(lakehouse, score_date, version)
        source = {row["built_from"]: row["count"] for row in users.groupBy("built_from").count().collect()}
        if not source:
            raise DataError(
                "user_features", f"holds no rows of {score_date}; run featurize for it", column="as_of_date"
            )
        inputs, expected = digest(__version__, bundle.digest, sorted(source)), sum(source.values())
        with run.stage("score", inputs) as figures:
            written = full or not _scored(lakehouse, inputs, score_date, expected)
            if written:
                logger.info("scoring %s users of %s%s", f"{expected:,}", score_date, _estimate(run, expected))
                compute = partial(
                    prediction.score,
                    bundle=bundle,
                    score_date=score_date,
                    features_version=version,
                    run_id=run.run_id,
                    batch_mb=config.scoring.batch_mb,
                )
                earlier = None if full else _earlier_night(run, bundle, score_date)

                def write(reader: FeatureReader) -> None:
                    figures["reader"] = reader
                    night = _night(users, earlier, compute, score_date, reader)
                    with prediction.sized(spark, config.scoring), night as rows:
                        where, note = {"score_date": [score_date]}, {"score_date": str(score_date)}
                        lakehouse.replace(SCORES, rows, where=where, inputs=inputs, note=note)

                try:
                    by_files = config.scoring.reader == "files" and lakehouse.is_plain("user_features")
                    write("files" if by_files else "spark")
                except FileReadError as error:
                    logger.warning("Spark brings the features, for a worker could not read them itself: %s", error)
                    write("spark")
            else:
                figures["status"] = "unchanged"
            _refresh_latest(run, inputs)
            count, computed = _checked(lakehouse, score_date, expected)
            figures["rows_in"], figures["rows_out"] = expected, count if written else 0
            figures["users"], figures["computed"] = count, computed if written else 0
            night = lakehouse.read("scores").filter(F.col("score_date") == F.lit(score_date))
            levels = population.distribution(night).toPandas()
            figures["expected_spend"] = f"{levels['expected_spend'].sum():.2f}"
            figures["score_date"], figures["bundle"] = score_date, bundle.digest
        return ScoreResult(count, computed if written else 0, written, levels, bundle, run.records)


def require_same_features(bundle: Bundle, config: Config) -> None:
    """Refuse a bundle of features that have the names of today's and mean something else.

    Raises:
        BundleError: a setting that changes values, not columns, is another than in training.
    """
    trained = bundle.manifest["lineage"].get("config", {}).get("features", {})
    # bundles of version 0.1.0 know the first by its old name
    for name, old_name in (("recency_precision_bits", "silence_digits"), ("history_length", "history_length")):
        now = getattr(config.features, name)
        before = trained.get(name, trained.get(old_name, now))
        if before != now:
            raise BundleError(
                f"{bundle.folder}: was trained on features with features.{name}={before}, and now it is {now}: "
                "train anew, or featurize and score as then"
            )


def features_of(lakehouse: Lakehouse, score_date: date, version: int) -> DataFrame:
    """Rows of ``user_features`` that a night scores."""
    return lakehouse.read("user_features", version).filter(F.col("as_of_date") == F.lit(score_date))


class _Earlier(NamedTuple):
    """Scores of an earlier night, and what the level has moved by since."""

    scores: DataFrame
    factor: float


@contextmanager
def _night(
    users: DataFrame,
    earlier: _Earlier | None,
    compute: Callable[..., DataFrame],
    score_date: date,
    reader: FeatureReader,
) -> Iterator[DataFrame]:
    """Rows of SCORES of all users, for the block; computed are those whose earlier score doesn't hold."""
    places = parquet.row_locations(users, *prediction.KEPT) if reader == "files" else None
    if earlier is None:
        yield compute(users, places=places)
        return
    with persisted(stale_users(users.select(*prediction.KEPT) if places is None else places, earlier.scores)) as moved:
        few = broadcast_few(moved.select("user_key"), moved.count())
        if places is None:
            fresh = compute(users.join(few, "user_key", "left_semi"))
        else:
            there = moved.filter(F.col(parquet.LOCATION_COLUMNS[0]).isNotNull())
            fresh = compute(users, places=parquet.in_file_order(there, len(users.inputFiles())))
        yield fresh.unionByName(carry_forward(earlier.scores, few, score_date, earlier.factor))


def night_run(lakehouse: Lakehouse, score_date: date) -> Row | None:
    """The row of ``runs`` of the newest run that wrote this date into ``scores``, if one did."""
    nights = _nights(lakehouse)
    if nights is None:
        return None
    of_date = nights.filter(F.element_at("figures", "score_date") == str(score_date))
    return of_date.orderBy(F.desc("started_at")).first()


def _nights(lakehouse: Lakehouse) -> DataFrame | None:
    """Rows of ``runs`` of the nights that were scored; ``None`` where none can have been."""
    if not (lakehouse.exists("scores") and lakehouse.exists("runs")):
        return None
    return lakehouse.read("runs").filter((F.col("stage") == "score") & (F.col("status") == "done"))


def _estimate(run: Run, users: int) -> str:
    """How long so many users take at most, in words, by the newest night that computed any."""
    nights = _nights(run.lakehouse)
    if nights is None:
        return ""
    computed = F.element_at("figures", "computed").cast("long")
    newest = (
        nights.filter(computed > 0).orderBy(F.desc("started_at")).select("seconds", computed.alias("computed")).first()
    )
    if newest is None:
        return ""
    seconds = newest["seconds"] * max(1.0, users / newest["computed"])
    return f": at most about {timedelta(seconds=math.ceil(seconds))}, by the last night"


def _earlier_night(run: Run, bundle: Bundle, score_date: date) -> _Earlier | None:
    """Scores of the newest night up to this date that the same bundle and code made."""
    nights = _nights(run.lakehouse)
    if nights is None:
        return None
    scored_date = F.to_date(F.element_at("figures", "score_date"))
    theirs = (F.element_at("figures", "bundle") == bundle.digest) & (scored_date <= F.lit(score_date))
    newest = nights.filter(theirs).agg(F.max(scored_date)).first()
    if newest is None or newest[0] is None:
        return None
    scores = run.lakehouse.read("scores")
    if not set(SCORES.schema.names) <= set(scores.columns):
        # written by an older version of this package, which did not record as much
        return None
    made_by = (F.col("bundle_digest") == bundle.digest) & (F.col("code_version") == __version__)
    scores = run.lakehouse.read("scores", run.lakehouse.version("scores"))
    factor = bundle.fusion.factor(score_date) / bundle.fusion.factor(newest[0])
    return _Earlier(scores.filter((F.col("score_date") == F.lit(newest[0])) & made_by), factor)


def _scored(lakehouse: Lakehouse, inputs: str, score_date: date, users: int) -> bool:
    """Whether the newest write of this date was made from these inputs, by the table's own log, and its rows are there.

    ``runs`` can't tell: a run that was killed after its write is not in it, and its order is that of the machines' clocks.
    """
    if lakehouse.inputs("scores", score_date=str(score_date)) != inputs:
        return False
    return lakehouse.read("scores").filter(F.col("score_date") == F.lit(score_date)).count() == users


def _refresh_latest(run: Run, inputs: str) -> None:
    lakehouse = run.lakehouse
    before, version = lakehouse.commit_metadata("scores_latest"), lakehouse.version("scores")
    scores = lakehouse.read("scores", version)
    newest = scores.agg(F.max("score_date")).first()
    assert newest is not None
    made_from = digest(inputs, version)
    if before.get("inputs") != made_from:
        rows = scores.filter(F.col("score_date") == F.lit(newest[0]))
        lakehouse.replace(SCORES_LATEST, rows, inputs=made_from, after=before["version"])


def _checked(lakehouse: Lakehouse, score_date: date, users: int) -> tuple[int, int]:
    """Rows of a night, and how many of them it computed itself.

    Raises:
        DataError: there isn't one row for each user.
    """
    night = lakehouse.read("scores").filter(F.col("score_date") == F.lit(score_date))
    counted = night.agg(
        F.count(F.lit(1)).alias("rows"),
        F.count_distinct("user_key").alias("users"),
        F.count_if(F.col("computed_on") == F.lit(score_date)).alias("computed"),
    ).first()
    assert counted is not None
    if not counted["rows"] == counted["users"] == users:
        raise DataError(
            "scores", f"must hold one row for each of {users} users", column="user_key", count=counted["rows"]
        )
    return counted["rows"], counted["computed"]
