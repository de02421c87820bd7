"""A scoring run: every user of a date scored, and unchanged users' scores carried forward."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
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
from bp_spark.features.catalogue import catalogue
from bp_spark.ingest.clean import currency_of
from bp_spark.lakehouse import parquet
from bp_spark.lakehouse.run import Run, Step, recorded
from bp_spark.lakehouse.schema import rows_of_date
from bp_spark.lakehouse.store import Lakehouse
from bp_spark.lakehouse.tables import SCORES, SCORES_LATEST
from bp_spark.registry.bundle import Bundle, load_promoted
from bp_spark.report import population
from bp_spark.scoring import prediction
from bp_spark.scoring.carry_forward import Growth, carry_forward, stale_users
from bp_spark.scoring.prospects import score_prospects

logger = logging.getLogger(__name__)

_NAMED = 3
"""Features that a message names."""


@dataclass(frozen=True)
class ScoreResult:
    """Result of a scoring run.

    Attributes:
        users: Rows of the date.
        computed: Users whose score was computed; the others' score was carried forward from an earlier run.
        written: Whether rows were written; ``False`` if the same run wrote them before.
        levels: Users and money by level and score; see :func:`bp_spark.report.population.distribution`.
        bundle: The model.
        stages: The stages that ran.
        currency: Currency of the money in ``levels``.
        prospects: Sums over the prospects of the date; ``None`` where there are none, or no model of them.
    """

    users: int
    computed: int
    written: bool
    levels: pd.DataFrame
    bundle: Bundle
    stages: list[dict[str, Any]]
    currency: str
    prospects: population.Prospects | None = None


def score(
    spark: SparkSession, config: Config, score_date: date, chosen: str | Path | None = None, full: bool = False
) -> ScoreResult:
    """Score every user of a date and overwrite that date in ``scores``.

    If the same bundle scored the date on the same features before, nothing is written. Otherwise a user whose features are
    unchanged since the newest run of the same bundle keeps the score of that run.

    Prospects, users without a purchase before the date, get a row in ``prospect_scores``.

    Args:
        spark: The session.
        config: All settings.
        score_date: A date with features.
        chosen: A bundle's folder, or its address in the registry as ``models:/NAME@ALIAS``; by default the promoted bundle,
            which ``bundles/current`` names.
        full: Compute every user's score, whatever earlier runs gave.

    Raises:
        BundleError: No bundle is promoted, or it can't be trusted or doesn't fit the features or their currency.
        DataError: There are no features of that date.
        TrackingError: The registry can't be reached.
    """
    with recorded(spark, config, "score") as run:
        lakehouse = run.lakehouse
        bundle = load_promoted(config, chosen)
        require_same_features(bundle, config)
        currency = common_currency(bundle, currency_of(lakehouse)) or config.cleaning.currency
        # read the version that is recorded, whatever other runs write meanwhile
        version = lakehouse.version("user_features")
        users = features_of_date(lakehouse, score_date, version)
        users_by_source = {row["built_from"]: row["count"] for row in users.groupBy("built_from").count().collect()}
        if not users_by_source:
            require_whole_features(lakehouse, score_date, version)
            raise DataError(
                "user_features", f"holds no rows of {score_date}; run featurize for it", column="as_of_date"
            )
        inputs = digest(__version__, bundle.digest, sorted(users_by_source))
        expected_users = sum(users_by_source.values())
        with run.step("score", SCORES, inputs, score_date=str(score_date)) as step:
            figures = step.figures
            # the table's own log tells: a run that was killed after its write is not in ``runs``
            is_new = full or not (
                step.unchanged and rows_of_date(lakehouse.read("scores"), score_date).count() == expected_users
            )
            if is_new:
                require_whole_features(lakehouse, score_date, version)
                runs = _runs_before(lakehouse)
                estimate = _time_estimate(runs, expected_users)
                logger.info("scoring %s users of %s%s", f"{expected_users:,}", score_date, estimate)
                compute = partial(
                    prediction.score,
                    bundle=bundle,
                    score_date=score_date,
                    features_version=version,
                    run_id=run.run_id,
                    batch_mb=config.scoring.batch_mb,
                )
                earlier = None if full else _earlier_scores(run, runs, bundle, score_date)

                def write(reader: FeatureReader) -> None:
                    figures["reader"] = reader
                    scored = _scored_rows(users, earlier, compute, score_date, reader)
                    with prediction.batch_sizes(spark, config.scoring), scored as rows:
                        step.replace(rows, where={"score_date": [score_date]})

                try:
                    by_files = config.scoring.reader == "files" and lakehouse.is_plain("user_features")
                    write("files" if by_files else "spark")
                except FileReadError as error:
                    logger.warning("Spark reads the features, because a worker could not read them itself: %s", error)
                    write("spark")
            _refresh_latest(run, inputs, score_date)
            count, computed = _checked_counts(lakehouse, score_date, expected_users)
            figures["rows_in"], figures["rows_out"] = expected_users, count if is_new else 0
            figures["users"], figures["computed"] = count, computed if is_new else 0
            levels = population.distribution(rows_of_date(lakehouse.read("scores"), score_date)).toPandas()
            figures["expected_spend"] = f"{levels['expected_spend'].sum():.2f}"
            figures["score_date"], figures["bundle"] = score_date, bundle.digest
            figures["horizon_days"] = bundle.horizon_days
        prospects = score_prospects(run, bundle, score_date)
        return ScoreResult(count, computed if is_new else 0, is_new, levels, bundle, run.records, currency, prospects)


def require_same_features(bundle: Bundle, config: Config) -> None:
    """Refuse a bundle whose features have the same names as today's but other values.

    Raises:
        BundleError: A setting that changes values, not columns, differs from that in training, or a feature means something
            else now.
    """
    trained = bundle.manifest["lineage"].get("config", {}).get("features", {})
    for name in ("recency_precision_bits", "history_length"):
        now = getattr(config.features, name)
        before = trained.get(name, now)
        if before != now:
            raise BundleError(
                f"{bundle.folder}: was trained on features with features.{name}={before}, and now it is {now}: "
                "train again, or featurize and score with the old setting"
            )
    now = catalogue(config.features).definitions
    definitions = bundle.manifest["lineage"].get("features", {})
    changed = [name for name, definition in definitions.items() if now.get(name, definition) != definition]
    if changed:
        more = f" and {len(changed) - _NAMED} more" if len(changed) > _NAMED else ""
        raise BundleError(
            f"{bundle.folder}: was trained on another definition of {', '.join(changed[:_NAMED])}{more}: train again"
        )


def common_currency(bundle: Bundle, currency: str | None) -> str | None:
    """Return the currency of a bundle and of the features that it scores; ``None`` if neither knows it.

    Args:
        bundle: The bundle.
        currency: Currency of the features, where it is known.

    Raises:
        BundleError: The two differ.
    """
    if None not in (bundle.currency, currency) and bundle.currency != currency:
        raise BundleError(f"{bundle.folder}: predicts {bundle.currency}, and events are in {currency}; train again")
    return currency or bundle.currency


def features_of_date(lakehouse: Lakehouse, score_date: date, version: int) -> DataFrame:
    """Return the rows of a version of ``user_features`` that a scoring run of the date scores."""
    return rows_of_date(lakehouse.read("user_features", version), score_date, "as_of_date")


def require_whole_features(lakehouse: Lakehouse, score_date: date, version: int) -> None:
    """Require that no damaged footer hides rows of :func:`features_of_date`.

    Raises:
        DataError: A footer is damaged.
    """
    lakehouse.require_whole_files("user_features", version, {"as_of_date": str(score_date)})


class _EarlierScores(NamedTuple):
    """Scores of an earlier scoring run, and the growth of the platform's level since then."""

    rows: DataFrame
    growth: Growth


@contextmanager
def _scored_rows(
    users: DataFrame,
    earlier: _EarlierScores | None,
    compute: Callable[..., DataFrame],
    score_date: date,
    reader: FeatureReader,
) -> Iterator[DataFrame]:
    """Yield rows of SCORES of all users: computed for stale users, carried forward for the others."""
    row_locations = parquet.row_locations(users, *prediction.SHARED_COLUMNS) if reader == "files" else None
    if earlier is None:
        yield compute(users, row_locations=row_locations)
        return
    candidates = users.select(*prediction.SHARED_COLUMNS) if row_locations is None else row_locations
    with persisted(stale_users(candidates, earlier.rows)) as stale:
        stale_keys = broadcast_few(stale.select("user_key"), stale.count())
        if row_locations is None:
            computed = compute(users.join(stale_keys, "user_key", "left_semi"))
        else:
            present = stale.filter(F.col(parquet.LOCATION_COLUMNS[0]).isNotNull())
            computed = compute(users, row_locations=parquet.in_file_order(present, len(users.inputFiles())))
        yield computed.unionByName(carry_forward(earlier.rows, stale_keys, score_date, earlier.growth))


def newest_run_of(lakehouse: Lakehouse, score_date: date) -> Row | None:
    """Return the row of ``runs`` of the newest run that wrote this date into ``scores``, or ``None``."""
    scoring_runs = _scoring_runs(lakehouse)
    if scoring_runs is None:
        return None
    runs_of_date = scoring_runs.filter(F.element_at("figures", "score_date") == str(score_date))
    return runs_of_date.orderBy(F.desc("started_at")).first()


def _scoring_runs(lakehouse: Lakehouse) -> DataFrame | None:
    """Return rows of ``runs`` of the scoring runs that wrote scores; ``None`` where there can't be any."""
    if not (lakehouse.exists("scores") and lakehouse.exists("runs")):
        return None
    return lakehouse.read("runs").filter((F.col("stage") == "score") & (F.col("status") == "done"))


def _runs_before(lakehouse: Lakehouse) -> list[Row]:
    """Return ``seconds, computed, score_date, bundle`` of the scoring runs that wrote scores, newest first: one a night."""
    scoring_runs = _scoring_runs(lakehouse)
    if scoring_runs is None:
        return []
    figures = {name: F.element_at("figures", name) for name in ("computed", "score_date", "bundle")}
    columns = figures | {"computed": figures["computed"].cast("long"), "score_date": F.to_date(figures["score_date"])}
    named = [column.alias(name) for name, column in columns.items()]
    return scoring_runs.orderBy(F.desc("started_at")).select("seconds", *named).collect()


def _time_estimate(runs: Sequence[Row], users: int) -> str:
    """Return in words how long so many users take at most, judged by the newest run that computed any."""
    newest = next((row for row in runs if row["computed"]), None)
    if newest is None:
        return ""
    seconds = newest["seconds"] * max(1.0, users / newest["computed"])
    return f": at most about {timedelta(seconds=math.ceil(seconds))}, by the last night"


def _earlier_scores(run: Run, runs: Sequence[Row], bundle: Bundle, score_date: date) -> _EarlierScores | None:
    """Return the scores of the newest date, up to this one, that the same bundle and code computed."""
    dates = (row["score_date"] for row in runs if row["bundle"] == bundle.digest and row["score_date"])
    newest = max((day for day in dates if day <= score_date), default=None)
    if newest is None:
        return None
    scores = run.lakehouse.read("scores")
    if not set(SCORES.schema.names) <= set(scores.columns):
        # written by an older version of this package, which recorded less
        return None
    by_same_code = (F.col("bundle_digest") == bundle.digest) & (F.col("code_version") == __version__)
    scores = run.lakehouse.read("scores", run.lakehouse.version("scores"))
    now, before = (bundle.horizons.factors(bundle.stack.factor(day), day) for day in (score_date, newest))
    log_odds = bundle.stack.log_odds(score_date) - bundle.stack.log_odds(newest)
    growth = Growth(bundle.horizon_days, {days: now[days] / before[days] for days in now}, log_odds)
    return _EarlierScores(rows_of_date(scores, newest).filter(by_same_code), growth)


def _refresh_latest(run: Run, inputs: str, score_date: date) -> None:
    """Copy the newest date of ``scores``, this one or a later one, into ``scores_latest``, unless it was copied before."""
    lakehouse = run.lakehouse
    # the step begins first: what another run copies after that makes this one fail, not go back
    step = Step.begin(lakehouse, SCORES_LATEST)
    version = lakehouse.version("scores")
    step.inputs = digest(inputs, version)
    if not step.unchanged:
        scores = lakehouse.read("scores", version)
        # without a later date no file is read
        later = scores.filter(F.col("score_date") > F.lit(score_date)).agg(F.max("score_date")).collect()[0][0]
        step.replace(rows_of_date(scores, later or score_date), after=step.version)


def _checked_counts(lakehouse: Lakehouse, score_date: date, users: int) -> tuple[int, int]:
    """Return the number of rows of a date, and how many of them its own run computed.

    Raises:
        DataError: There isn't one row for each user.
    """
    counts = (
        rows_of_date(lakehouse.read("scores"), score_date)
        .agg(
            F.count(F.lit(1)).alias("rows"),
            F.count_distinct("user_key").alias("users"),
            F.count_if(F.col("computed_on") == F.lit(score_date)).alias("computed"),
        )
        .first()
    )
    assert counts is not None
    if not counts["rows"] == counts["users"] == users:
        raise DataError(
            "scores", f"must hold one row for each of {users} users", column="user_key", count=counts["rows"]
        )
    return counts["rows"], counts["computed"]
