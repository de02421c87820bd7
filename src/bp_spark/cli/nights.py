"""Commands of a night, all of it at once or step by step; and the demo, which runs the whole line."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bp_spark.cli import common, render
from bp_spark.cli.common import BundleOption, ConfigOption, Overrides, StrictOption
from bp_spark.core import config, extras
from bp_spark.core.config import Config
from bp_spark.core.errors import DriftError
from bp_spark.shop import DEMO_DATE, open_demo

if TYPE_CHECKING:
    from datetime import date as date_type

    from bp_spark.pipeline import ReportResult, ScoreResult

logger = logging.getLogger(__name__)

FAIRNESS_ROWS = 200
"""Rows of the fairness report that are printed at most."""


def night(
    date: Annotated[
        str | None, typer.Option(help="Date YYYY-MM-DD to score; by default today's (UTC).", show_default=False)
    ] = None,
    bundle: BundleOption = None,
    overrides: Overrides = None,
    strict: StrictOption = False,
    output: Annotated[
        Path | None, typer.Option(help="File of the report; by default night-DATE.html in evaluation.reports.")
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Run a whole night in one session: featurize, score, profile, recommend, drift, fairness, report.

    Recommendations are made every few nights (recommendations.every_days), and so is the report by segments of users
    (fairness.every_days). The log says which step begins, and how long the rest took on the last nights. A step whose
    inputs are unchanged writes nothing: run a night that was stopped again, and it goes on where it was. A broken
    threshold of drift or fairness is a warning here, and the scores stay.

    Example: bp-spark night --date 2017-10-03
    """
    settings = common.load_settings(config_file, overrides)
    day = datetime.now(UTC).date() if date is None else config.parse_date(date)
    extras.require("spark", "a night")
    from bp_spark.ingest.onboarding.preflight import require_ready

    require_ready(settings)
    from bp_spark.night import night as run_night

    result = run_night(
        common.start_session(settings, "night"), settings, day, bundle=bundle, strict=strict, page=output
    )
    scored = result.scored
    render.show(render.stage_table("night", result.stages))
    smallest_group = settings.privacy.smallest_group
    render.show(render.levels_table(scored.levels, f"Users of {day} by level", scored.currency, smallest_group))
    _show_prospects(scored, smallest_group)
    render.show(f"{_outcome(scored)}. Report: {result.report.page.absolute()}")


def _show_prospects(scored: ScoreResult, smallest_group: int) -> None:
    """Print a line about users without a purchase, where there are some."""
    if scored.prospects is not None:
        render.show(scored.prospects.in_words(scored.currency, smallest_group))


def _outcome(scored: ScoreResult) -> str:
    how = (
        f"scored, {scored.computed:,} of them computed and the others carried forward"
        if scored.written
        else "were scored already, with the same bundle on the same features: nothing changed"
    )
    return f"{scored.users:,} users {how} (bundle {scored.bundle.digest[:12]})"


def score(
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD to score; run featurize for it first.")],
    bundle: BundleOption = None,
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="Compute every score, and carry none forward.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Score every user of a date, update the profiles, and check for drift.

    Only that date of the tables scores and prospect_scores is replaced. A buyer whose features did not change keeps the
    score that the same bundle gave on an earlier night. A broken drift threshold is a warning here, and the scores stay.

    Example: bp-spark score --date 2017-10-03
    """
    settings = common.load_settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark import pipeline

    spark = common.start_session(settings, "score")
    result = pipeline.score(spark, settings, day, bundle, full)
    profile_stages = pipeline.profile(spark, settings)
    drift_result = pipeline.check_drift(spark, settings, day)
    render.show(render.stage_table("score", [*result.stages, *profile_stages, *drift_result.stages]))
    smallest_group = settings.privacy.smallest_group
    render.show(render.levels_table(result.levels, f"Users of {day} by level", result.currency, smallest_group))
    _show_prospects(result, smallest_group)
    render.show(_outcome(result))


def profile(
    date: Annotated[
        str | None, typer.Option(help="Scored date YYYY-MM-DD; by default the newest one.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    user: Annotated[
        str | None, typer.Option(help="The platform's id of a user: show that user's profile, and write nothing.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="The same, by the column user_key.")] = None,
    config_file: ConfigOption = None,
) -> None:
    """Write the profiles of all users, and the tables made from them, as of a scored date; or show one user's.

    The tables are user_profile, category_affinity, risk_control, customer_service, market_segments, totals, cohorts and
    market_forecast. score writes them, too. Use this command after a change of the settings profiles, or for another
    date. A table whose inputs are unchanged stays as it is.

    With --user or --key the command shows what the tables say of one user: score, expected spend, reasons, trend,
    risk, activity, next purchase, interests, recommendations, talking points, and contacts with the shop. --user finds
    the key by privacy.secret. The command ends with code 3 if that user has no profile.

    Example: bp-spark profile profiles.region_segment=region privacy.smallest_group=20, then bp-spark profile --user
    1042
    """
    settings = common.load_settings(config_file, overrides)
    if user is not None or key is not None:
        if date is not None or (user is not None and key is not None):
            raise typer.BadParameter("give one of --user, --key and --date", param_hint="--user")
        _show_profile(settings, user, key)
        return
    day = None if date is None else config.parse_date(date)
    from bp_spark import pipeline

    stages = pipeline.profile(common.start_session(settings, "profile"), settings, day)
    render.show(render.stage_table("profile", stages))


def _show_profile(settings: Config, user_id: str | None, user_key: str | None) -> None:
    name = (user_key if user_id is None else user_id) or ""
    if not name.strip():
        raise typer.BadParameter("must not be blank", param_hint="--key" if user_id is None else "--user")
    from bp_spark.cli import card, queries

    if user_id is not None:
        from bp_spark.ingest import pseudonyms

        user_key = pseudonyms.load_secret(settings.privacy.secret).key_of(user_id)
    found = card.read(queries.rows_where(settings, "profile"), user_key or "")
    render.show(render.facts_table(f"user {name} on {found.profile['score_date']}", card.facts(found)))


def recommend(
    date: Annotated[str, typer.Option(help="Scored date YYYY-MM-DD.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Choose the items that each scored user is likely to buy, with the reason, into the table recommendations.

    Users of scores and prospect_scores of the date get up to ten items: what they buy again, what they looked at, what
    users alike take, and what users of their level buy most. night runs this every recommendations.every_days. Only
    that date of the table is replaced, and nothing is written if its inputs are unchanged.

    Example: bp-spark recommend --date 2017-10-03
    """
    settings = common.load_settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark import pipeline

    stages = pipeline.recommend(common.start_session(settings, "recommend"), settings, day)
    render.show(render.stage_table("recommend", stages))


def drift(
    date: Annotated[str, typer.Option(help="Scored date YYYY-MM-DD.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Compare a night with the training and with the night before, and past scores with real spend.

    All figures go to the table drift. The thresholds are settings of the section drift. The command ends with code 8
    if a figure is beyond its threshold.

    Example: bp-spark drift --date 2017-10-03 drift.max_psi=0.2
    """
    settings = common.load_settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark import pipeline

    result = pipeline.check_drift(common.start_session(settings, "drift"), settings, day)
    render.show(render.stage_table("drift", result.stages))
    render.show_drift(result)
    if result.broken:
        thresholds = sum(row["threshold"] is not None for row in result.rows)
        raise DriftError(f"drift of {day}: {len(result.broken):,} of {thresholds:,} thresholds are broken")


def fairness(
    date: Annotated[str, typer.Option(help="Scored date YYYY-MM-DD.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Report scores and errors by segment of users (age, income, ...), with 90 % intervals.

    Each group stands beside all other users. Errors are those of the newest night up to the date whose horizon is
    over. All figures go to the table fairness. A figure that is surely beyond a threshold of the section fairness is
    a warning.

    Example: bp-spark fairness --date 2017-10-03
    """
    settings = common.load_settings(config_file, overrides)
    day = config.parse_date(date)
    from pyspark.sql import functions as F

    from bp_spark import pipeline

    result = pipeline.fairness(common.start_session(settings, "fairness"), settings, day)
    render.show(render.stage_table("fairness", result.stages))
    errors = f"errors of {result.measured}" if result.measured else "no night's horizon is over yet, so without errors"
    columns = (
        *("segment", "group", "users", "small", "metric", "value", "low", "high"),
        *("ratio", "ratio_low", "ratio_high"),
    )
    ordered = result.report.orderBy(F.desc("broken"), "segment", "group", "metric")
    rows = [list(row) for row in ordered.select(*columns).limit(FAIRNESS_ROWS).collect()]
    title = f"{result.broken:,} figures break their thresholds and come first; scores of {day}, {errors}"
    render.show(render.rows_table(columns, rows, title=title))


def report(
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD of a scored night.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default night-DATE.html in evaluation.reports.")
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Write the page of a night: one HTML file with its charts, and without any user.

    It shows what ran, the scores beside those of the night before, reasons, data quality, drift, fairness and the
    model. Groups of few users are left out. Path-based tables are read without Spark where that is possible; the table
    runs then has no row of it.

    Example: bp-spark report --date 2017-10-03
    """
    settings = common.load_settings(config_file, overrides)
    day = config.parse_date(date)
    result = _report(settings, day, output)
    smallest_group = settings.privacy.smallest_group
    render.show(render.levels_table(result.levels, f"Users of {day} by level", result.currency, smallest_group))
    render.show(f"Report: {result.page.absolute()}")


def _report(settings: Config, day: date_type, output: Path | None) -> ReportResult:
    from bp_spark.lakehouse import without_spark
    from bp_spark.report.job import report, report_without_spark

    if without_spark.is_possible(settings.tables):
        try:
            return report_without_spark(settings, day, output)
        except without_spark.UnreadableError as reason:
            logger.info("read by Spark: %s", reason)
    return report(common.start_session(settings, "report"), settings, day, output)


def demo(overrides: Overrides = None) -> None:
    """Run the whole line on real data: train, evaluate at 2017-10-03 and score 2,469 households of the Complete Journey."""
    # A missing package must be named before the first minutes of work, not after them.
    extras.require("train", "the demo")
    shop = open_demo(overrides or ())
    feature_stages = shop.featurize(DEMO_DATE)
    training = shop.train(DEMO_DATE)
    scoring = shop.score(DEMO_DATE)
    profile_stages = shop.profile()
    stages = [*feature_stages, *training.stages, *scoring.stages, *profile_stages]
    render.show(render.stage_table("demo", stages))
    render.show_training(training)
    columns = ("user_key", "score", "level", "expected_spend", "low", "high", "p_active", "risk_level", "reasons")
    examples = shop.table("scores_latest").orderBy("user_key").select(*columns).limit(render.EXAMPLE_ROWS)
    rows = [list(row) for row in examples.collect()]
    render.show(render.rows_table(columns, rows, title=f"Ten of {scoring.users:,} scores"))
    path = shop.settings.tables.path
    query = f'bp-spark sql "SELECT * FROM bp.scores_latest" tables.path={path}'  # noqa: S608
    render.show(f"Tables are in {path}; look around: {query}")
