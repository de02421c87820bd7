"""Commands that only look: lineage, queries, the catalogue of features, the settings, the machine."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from bp_spark.cli import common, render
from bp_spark.cli.common import ConfigOption, Engine, EngineOption, Overrides
from bp_spark.core import config
from bp_spark.core.errors import PlatformError
from bp_spark.core.version import __version__

logger = logging.getLogger(__name__)


def explain_run(
    run: Annotated[str, typer.Argument(help="Run, as in the column run_id of runs, scores and metrics.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Print one run: its stages, the table versions they read and wrote, rows, figures and errors.

    Example: bp-spark explain-run 0123456789ab
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark.cli import queries
    from bp_spark.scoring import lineage

    stages = lineage.explain_run(queries.rows_where(settings, "explain-run"), run)
    first_stage = stages[0]
    digests = [stage["figures"].get("bundle") or stage["figures"].get("digest") for stage in stages]
    facts = [
        ("job", first_stage["job"]),
        ("started", f"{first_stage['started_at']:%Y-%m-%d %H:%M:%S} UTC"),
        ("bp-spark", first_stage["code_version"]),
        ("config digest", first_stage["config_digest"]),
        *(("bundle", digest) for digest in dict.fromkeys(digests) if digest),
        *((f"error in {stage['stage']}", stage["error"]) for stage in stages if stage["error"]),
    ]
    render.show(render.facts_table(f"run {run}", facts))
    columns = ("stage", "status", "seconds", "rows in", "rows out", "read", "written", "figures")
    rows = [
        [
            *(stage["stage"], stage["status"], f"{stage['seconds']:.1f}"),
            *(render.count(stage[name]) for name in ("rows_in", "rows_out")),
            *(render.table_versions(stage["read"]), render.table_versions(stage["written"])),
            render.figures(stage["figures"]),
        ]
        for stage in stages
    ]
    render.show(render.rows_table(columns, rows))


def explain_score(
    user: Annotated[str, typer.Option(help="User, as in the column user_key.")],
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD of the score.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Trace a score back to its run, its features, its bundle, and the data that the bundle learned from.

    The metrics of the bundle on its test date are printed, too.

    Example: bp-spark explain-score --user 1042 --date 2017-10-03
    """
    settings = common.load_settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark.cli import queries
    from bp_spark.evaluation import metrics
    from bp_spark.scoring import lineage

    origin = lineage.explain_score(queries.rows_where(settings, "explain-score"), settings, user, day)
    row, trained = origin.row, origin.bundle.manifest["lineage"]
    training_set = trained["training_set"]
    carried = "" if row["computed_on"] == day else f", and carried forward to {day}: the features were the same"
    facts = [
        ("score", f"{row['score']:.2f}, level {row['level']}"),
        ("expected spend", f"{row['expected_spend']:,.2f} ({row['low']:,.2f} to {row['high']:,.2f})"),
        ("computed", f"for {row['computed_on']} at {row['scored_at']:%Y-%m-%d %H:%M:%S} UTC{carried}"),
        ("by run", f"{row['run_id']}, bp-spark {row['code_version']}, config digest {origin.run['config_digest']}"),
        ("features", f"version {row['features_version']} of user_features, input digest {row['input_digest']}"),
        ("bundle", row["bundle_digest"]),
        ("in folder", origin.bundle.folder),
        ("trained by run", f"{trained['run_id']}, config digest {config.digest(trained['config'])}"),
        ("on", f"version {training_set['version']} of {training_set['location']}"),
        ("nothing seen from", trained["test_date"]),
    ]
    render.show(render.facts_table(f"score of {user} on {day}", facts))
    if not origin.metrics.empty:
        render.show(metrics.render(origin.metrics, f"The bundle on {origin.bundle.test_date}"))


def reproduce(
    score_date: Annotated[str, typer.Option(help="Date YYYY-MM-DD of the night.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Compute a night again, from the recorded versions of features and bundle, and compare it row by row.

    Nothing is written to scores. The command ends with code 3 if a row comes out differently, and names the columns.

    Example: bp-spark reproduce --score-date 2017-10-03
    """
    settings = common.load_settings(config_file, overrides)
    day = config.parse_date(score_date)
    from bp_spark import pipeline
    from bp_spark.scoring.compare import TOLERANCE

    again = pipeline.reproduce(common.start_session(settings, "reproduce"), settings, day)
    for version in again.other_code:
        logger.warning("rows of %s were computed by bp-spark %s, this is %s", day, version, __version__)
    differences = f"differ by {again.largest:.1e} at most ({again.column}), within {TOLERANCE:.0e}"
    render.show(
        f"{again.rows:,} rows of {day} came out again from bundle {again.bundle.digest[:12]} and version "
        f"{again.features_version} of user_features: "
        f"they {differences if again.largest else 'are the same, digit for digit'}"
    )


def features(overrides: Overrides = None, config_file: ConfigOption = None) -> None:
    """Print the catalogue of features as Markdown: name, meaning, unit, window, group.

    Example: bp-spark features > docs/features.md
    """
    from bp_spark.features.catalogue import catalogue

    settings = common.load_settings(config_file, overrides)
    rows = [
        f"| `{feature.name}` | {feature.description} | {feature.unit} | {feature.window} | {feature.group} |"
        for feature in catalogue(settings.features).features
    ]
    print(
        "\n".join(["| feature | what it is | unit | window, days | group in reasons |", "|---|---|---|---|---|", *rows])
    )


def dbt_sources(overrides: Overrides = None, config_file: ConfigOption = None) -> None:
    """Print the tables as sources of dbt: what analysts read, with comments, tests and freshness.

    Tables by path are read by dbt-duckdb, those of a metastore by the adapter of Spark or Databricks.

    Example: bp-spark dbt-sources > models/bp_sources.yml
    """
    from bp_spark.cli import dbt

    print(dbt.sources(common.load_settings(config_file, overrides)), end="")


def sql(
    query: Annotated[str, typer.Argument(help="SQL query; tables are named namespace.table, as in bp.scores_latest.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
    rows: Annotated[int, typer.Option(help="Rows to show at most.")] = 20,
    engine: EngineOption = Engine.auto,
) -> None:
    """Run a SQL query on the tables; it can only read.

    By itself, the command takes Spark SQL. DuckDB answers in a second where it would return the same rows; elsewhere
    Spark does, and a line says why. With --engine duckdb the query is in DuckDB's own SQL, and Spark never starts.

    Example: bp-spark sql "SELECT level, count(*) FROM bp.scores_latest GROUP BY level ORDER BY level"
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark.cli import queries

    columns, found = queries.run(settings, query, rows, engine)
    render.show(render.rows_table(columns, found))


def doctor(overrides: Overrides = None, config_file: ConfigOption = None) -> None:
    """Check whether this machine, or cluster, is fit for a night.

    The checks cover Java, Python, packages, memory, jars, folders, the secret and a Spark session. Each finding is
    ok, warn or fail, with its remedy. The command ends with code 5 if one fails. On a cluster, run spark-submit
    jobs/doctor.py with the settings of the night.

    Example: bp-spark doctor tables.path=/data/lakehouse
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark.cli import doctor as checks

    findings = list(checks.examine(settings, lambda: common.start_session(settings, "doctor")))
    render.show(render.findings_table(findings))
    if failed := [finding.check for finding in findings if finding.status == "fail"]:
        raise PlatformError(f"not fit for a night: {', '.join(failed)}; the table says what to do")


def settings() -> None:
    """Print every setting with its default and its meaning, as a file for --config.

    Example: bp-spark settings > settings.yaml
    """
    print(config.DEFAULT_FILE.read_text(encoding="utf-8"), end="")
