"""The ``bp-spark`` command and the jobs: arguments in, one call of the pipeline, a summary out.

Results go to standard output, progress and errors to standard error, as lines of text or JSON. A job ends with 0 when it is
done, with the ``exit_code`` of its error (see :mod:`bp_spark.core.errors`), with 2 after wrong usage, with 1 after
any other error."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bp_spark.core import config, extras, logs
from bp_spark.core.config import Config
from bp_spark.core.errors import BpSparkError, DriftError, PlatformError
from bp_spark.core.logs import LogFormat
from bp_spark.core.version import __version__
from bp_spark.shop import DEMO_DATE, open_demo

if TYPE_CHECKING:
    import pandas as pd

DEFAULT_CONFIG = Path("conf/default.yaml")
EXAMPLE_ROWS = 10
FAIRNESS_ROWS = 200
MODEL_COMMANDS = ("train", "backtest", "search", "score", "reproduce", "select-labels")

_COMMANDING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_STATUS_STYLES = {"done": "green", "unchanged": "dim", "failed": "red"}

logger = logging.getLogger(__name__)

OVERRIDES_HELP = (
    "Settings to override, as section.key=value; `bp-spark settings` prints all of them with their defaults."
)
ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", "-c", help="YAML file of settings; by default conf/default.yaml where it exists."),
]
Overrides = Annotated[list[str] | None, typer.Argument(help=OVERRIDES_HELP, metavar="[KEY=VALUE]...")]


class QuarantineAction(StrEnum):
    """What can be done with quarantined rows."""

    show = "show"
    replay = "replay"


app = typer.Typer(
    name="bp-spark",
    help="Purchasing power of every user, every night, on Apache Spark.",
    epilog="A first night: bp-spark featurize --as-of 2017-10-03, then train --test-date 2017-10-03, then score --date "
    "2017-10-03. All of it on real data: bp-spark demo.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        _print(__version__)
        raise typer.Exit


@app.callback()
def common(
    log_format: Annotated[
        LogFormat,
        typer.Option(envvar="BP_SPARK_LOG_FORMAT", help="How lines on standard error look; jobs read the variable."),
    ] = LogFormat.text,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    logs.listen(log_format)


@app.command()
def featurize(
    as_of: Annotated[
        list[str],
        typer.Option(help="Date YYYY-MM-DD to build features for, from events before it; may be repeated."),
    ],
    overrides: Overrides = None,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Derive everything anew from the raw tables, as after a change of rules.")
    ] = False,
    config_file: ConfigOption = None,
) -> None:
    """Ingest what the source has delivered, clean it to events and quarantine, and write user_features for the as-of dates.

    Only new deliveries are read, and only the user-days that they touch are aggregated anew.

    Example: bp-spark featurize --as-of 2017-10-03 tables.path=/data/lakehouse
    """
    settings = _settings(config_file, overrides)
    dates = [config.parse_date(text) for text in as_of]
    from bp_spark import pipeline

    stages = pipeline.featurize(_session(settings, "featurize"), settings, dates, rebuild)
    _print(_stage_table("featurize", stages))


@app.command()
def train(
    test_date: Annotated[
        str | None,
        typer.Option(
            help="Evaluation date YYYY-MM-DD; nothing from it on is learned from. By default the newest date whose whole "
            "horizon has been seen; a bundle that is good enough there is then fitted anew with all that is known."
        ),
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Label past dates, train the members (trees, transformer under DDP, linear, btyd), fuse, evaluate and promote a bundle.

    Example: bp-spark train --test-date 2017-10-03 training.processes=2 network.loss=ziln
    """
    settings = _settings(config_file, overrides)
    day = None if test_date is None else config.parse_date(test_date)
    from bp_spark import pipeline

    result = pipeline.train(_session(settings, "train"), settings, day)
    _print(_stage_table("train", result.stages))
    _print_training(result)


@app.command()
def backtest(
    test_date: Annotated[
        list[str] | None,
        typer.Option(help="Evaluation date YYYY-MM-DD whose whole horizon has been seen; may be repeated."),
    ] = None,
    folds: Annotated[
        int | None, typer.Option(min=1, help="Without --test-date: how many dates, the newest possible one and back.")
    ] = None,
    step_days: Annotated[int, typer.Option(min=1, help="Days between two dates of --folds.")] = 28,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Train as of past dates and hold the predictions against what was spent since, every member beside the fused one.

    Figures have 90 % bootstrap intervals and go to the table backtests; a page with charts goes to evaluation.reports.
    No bundle is written or promoted.

    Example: bp-spark backtest --folds 3 --step-days 28 evaluation.external_segment=income
    """
    settings = _settings(config_file, overrides)
    if test_date and folds:
        raise typer.BadParameter("give --test-date or --folds, not both", param_hint="--folds")
    dates = [config.parse_date(text) for text in test_date or ()]
    from bp_spark import pipeline
    from bp_spark.evaluation import bootstrap

    result = pipeline.backtest(_session(settings, "backtest"), settings, dates, folds or 1, step_days)
    _print(_stage_table("backtest", result.stages))
    for day, table in result.tables.items():
        _print(bootstrap.render(table, f"Spend of {settings.labels.horizon_days} days from {day}, 90 % intervals"))
    _print(f"Report: {result.report.absolute()}")


@app.command()
def search(
    test_date: Annotated[
        str | None, typer.Option(help="Date YYYY-MM-DD from which nothing is seen; by default as in train.")
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Try other settings on past cutoffs, judged by the fused prediction of users that no member was fitted on.

    What is tried, how often and until which target stands under search in the settings. Every trial goes to the table trials
    and to TensorBoard; the best settings are printed as they are given to train.

    Example: bp-spark search search.trials=30 search.metric=gini search.target=0.88
    """
    settings = _settings(config_file, overrides)
    day = None if test_date is None else config.parse_date(test_date)
    from bp_spark import pipeline

    result = pipeline.search(_session(settings, "search"), settings, day)
    names = list(settings.search.space)
    rows = [
        [trial.number, *(trial.settings[name] for name in names), trial.value, trial.error or ""]
        for trial in result.trials
    ]
    _print(_rows_table(["trial", *names, settings.search.metric, "error"], rows, title="search"))
    said = " ".join(f"{key}={value}" for key, value in result.best.settings.items())
    _print(f"Best: trial {result.best.number}, {settings.search.metric} {result.best.value:.4f}\nbp-spark train {said}")


@app.command()
def score(
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD to score; featurize must have been run for it.")],
    bundle: Annotated[
        str | None,
        typer.Option(
            help="Folder of a model bundle, or models:/NAME@ALIAS of the registry; by default the promoted one."
        ),
    ] = None,
    overrides: Overrides = None,
    full: Annotated[bool, typer.Option("--full", help="Compute every score, whatever earlier nights said.")] = False,
    config_file: ConfigOption = None,
) -> None:
    """Score every user of a date into the table scores, replacing that date only; bring the profiles up to date, check.

    Users whose features are those of an earlier night keep the score that the same bundle gave them then. The night is
    then checked as drift does; a broken threshold is a warning here, and the scores stay.

    Example: bp-spark score --date 2017-10-03
    """
    settings = _settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark import pipeline

    spark = _session(settings, "score")
    result = pipeline.score(spark, settings, day, bundle, full)
    profiled = pipeline.profile(spark, settings)
    checked = pipeline.check_drift(spark, settings, day)
    _print(_stage_table("score", [*result.stages, *profiled, *checked.stages]))
    _print(_levels_table(result.levels, f"Users of {day} by level", settings))
    done = (
        f"scored, {result.computed:,} of them computed and the others carried forward"
        if result.written
        else "were scored already, with the same bundle on the same features: nothing changed"
    )
    _print(f"{result.users:,} users {done} (bundle {result.bundle.digest[:12]})")


@app.command()
def select_labels(
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD of the questions; featurize must have been run for it.")],
    budget: Annotated[int, typer.Option(min=1, help="How many users can be asked.")],
    output: Annotated[
        Path | None, typer.Option(help="CSV file for whoever asks, with an empty column spend to fill in.")
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Pick the users whose label (survey, manual review) would help the promoted bundle most, into the table label_requests.

    That is whom the members of the bundle disagree on, and of these the ones that stand for the others. Asked is what the user
    will spend over the horizon from the date on; add-labels takes the answers. Nobody is picked who is held out of fitting,
    has a label of the date, or was asked and has not answered. The same call again picks the same users; when answers came in,
    further ones.

    Example: bp-spark select-labels --date 2017-10-03 --budget 200 --output questions.csv
    """
    settings = _settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark import pipeline

    result = pipeline.select_labels(_session(settings, "select-labels"), settings, day, budget, output)
    _print(_stage_table("select-labels", result.stages))
    shown = ["rank", "user_key", "disagreement", "expected_spend"]
    rows = result.asked[shown].head(EXAMPLE_ROWS).to_numpy(object).tolist()
    of = f"{min(EXAMPLE_ROWS, len(result.asked))} of {len(result.asked):,} users to ask"
    _print(_rows_table(shown, rows, title=of))
    if output is not None:
        _print(f"Questions: {output.absolute()}; fill in spend, then bp-spark add-labels {output}")


@app.command()
def add_labels(
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV with the columns user_key or user_id, as_of_date, spend, and if wanted source and given_at (YYYY-MM-DD)."
        ),
    ],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Store labels that were given: what a user said, or a reviewer judged, will be spent over the horizon from a date on.

    The file is taken whole or, if any line breaks a rule, not at all; lines without a spend are passed over. A newer label of a
    user and date replaces the older one. Trainings whose test date is later learn from them as long as the horizon isn't over:
    then what was spent is known.

    Example: bp-spark add-labels questions.csv
    """
    settings = _settings(config_file, overrides)
    from bp_spark import pipeline

    _print(_stage_table("add-labels", pipeline.add_labels(_session(settings, "add-labels"), settings, file)))


@app.command()
def profile(
    date: Annotated[
        str | None, typer.Option(help="Scored date YYYY-MM-DD; by default the newest.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Write user_profile, category_affinity, risk_control, customer_service and market_segments as of a scored date.

    score does so itself; this is for other settings of the section profiles, or another date. Tables whose inputs have not
    changed are left as they are.

    Example: bp-spark profile profiles.region_segment=region privacy.smallest_group=20
    """
    settings = _settings(config_file, overrides)
    day = None if date is None else config.parse_date(date)
    from bp_spark import pipeline

    _print(_stage_table("profile", pipeline.profile(_session(settings, "profile"), settings, day)))


@app.command()
def drift(
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD that was scored.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Compare a night's features and scores with training and with the night before, and past scores with what was spent.

    All figures go to the table drift. Ends with code 8 where one is beyond its threshold, of the section drift of the settings.

    Example: bp-spark drift --date 2017-10-03 drift.max_psi=0.2
    """
    settings = _settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark import pipeline

    result = pipeline.check_drift(_session(settings, "drift"), settings, day)
    _print(_stage_table("drift", result.stages))
    _print_drift(result)
    if result.broken:
        watched = sum(row["threshold"] is not None for row in result.rows)
        raise DriftError(f"drift of {day}: {len(result.broken):,} of {watched:,} thresholds are broken")


@app.command()
def fairness(
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD that was scored.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Report scores and errors by segment of users (age, income, ...), each group beside all others, with 90 % intervals.

    Errors are of the newest night up to the date whose horizon is over. All figures go to the table fairness; those that are
    surely beyond the thresholds of the section fairness are a warning.

    Example: bp-spark fairness --date 2017-10-03
    """
    settings = _settings(config_file, overrides)
    day = config.parse_date(date)
    from pyspark.sql import functions as F

    from bp_spark import pipeline

    result = pipeline.fairness(_session(settings, "fairness"), settings, day)
    _print(_stage_table("fairness", result.stages))
    errors = f"errors of {result.measured}" if result.measured else "no night's horizon is over yet, so without errors"
    shown = ("segment", "group", "users", "small", "metric", "value", "low", "high", "ratio", "ratio_low", "ratio_high")
    rows = result.report.orderBy(F.desc("broken"), "segment", "group", "metric").select(*shown).limit(FAIRNESS_ROWS)
    title = f"{result.broken:,} figures break their thresholds and come first; scores of {day}, {errors}"
    _print(_rows_table(list(shown), [list(row) for row in rows.collect()], title=title))


@app.command()
def report(
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD of a night that was scored.")],
    output: Annotated[
        Path | None, typer.Option(help="File to write; by default night-DATE.html in evaluation.reports.")
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Write the page of a night, one HTML file with its charts: what ran, scores beside those of the night before, reasons,
    data quality, drift and fairness where they are watched, the model. No user is in it, nor a group of few.

    Example: bp-spark report --date 2017-10-03
    """
    settings = _settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark import pipeline

    result = pipeline.report(_session(settings, "report"), settings, day, output)
    _print(_levels_table(result.levels, f"Users of {day} by level", settings))
    _print(f"Report: {result.page.absolute()}")


@app.command()
def explain_run(
    run: Annotated[str, typer.Argument(help="Run, as in the column run_id of runs, scores and metrics.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Print one run: its stages, the table versions they read and wrote, rows in and out, figures, errors.

    Example: bp-spark explain-run 0123456789ab
    """
    settings = _settings(config_file, overrides)
    from bp_spark import pipeline

    stages = pipeline.explain_run(_session(settings, "explain-run"), settings, run)
    first = stages[0]
    digests = [stage["figures"].get("bundle") or stage["figures"].get("digest") for stage in stages]
    facts = [
        ("job", first["job"]),
        ("started", f"{first['started_at']:%Y-%m-%d %H:%M:%S} UTC"),
        ("bp-spark", first["code_version"]),
        ("config digest", first["config_digest"]),
        *(("bundle", digest) for digest in dict.fromkeys(digests) if digest),
        *((f"error in {stage['stage']}", stage["error"]) for stage in stages if stage["error"]),
    ]
    _print(_facts_table(f"run {run}", facts))
    columns = ("stage", "status", "seconds", "rows in", "rows out", "read", "written", "figures")
    rows = [
        [
            *(stage["stage"], stage["status"], f"{stage['seconds']:.1f}"),
            *(_count(stage[name]) for name in ("rows_in", "rows_out")),
            *(_versions(stage["read"]), _versions(stage["written"])),
            _figures(stage["figures"]),
        ]
        for stage in stages
    ]
    _print(_rows_table(columns, rows))


@app.command()
def explain_score(
    user: Annotated[str, typer.Option(help="User, as in the column user_key.")],
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD of the score.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Trace a row of scores back: the night and run that computed it, its features, its bundle, what that learned from and
    how good it was on the test date.

    Example: bp-spark explain-score --user 1042 --date 2017-10-03
    """
    settings = _settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark import pipeline
    from bp_spark.evaluation import metrics

    origin = pipeline.explain_score(_session(settings, "explain-score"), settings, user, day)
    row, lineage = origin.row, origin.bundle.manifest["lineage"]
    training_set = lineage["training_set"]
    carried = "" if row["computed_on"] == day else f", and carried forward to {day}: the features were the same"
    facts = [
        ("score", f"{row['score']:.2f}, level {row['level']}"),
        ("expected spend", f"{row['expected_spend']:,.2f} ({row['low']:,.2f} to {row['high']:,.2f})"),
        ("computed", f"for {row['computed_on']} at {row['scored_at']:%Y-%m-%d %H:%M:%S} UTC{carried}"),
        ("by run", f"{row['run_id']}, bp-spark {row['code_version']}, config digest {origin.run['config_digest']}"),
        ("features", f"version {row['features_version']} of user_features, input digest {row['input_digest']}"),
        ("bundle", row["bundle_digest"]),
        ("in folder", origin.bundle.folder),
        ("trained by run", f"{lineage['run_id']}, config digest {config.digest(lineage['config'])}"),
        ("on", f"version {training_set['version']} of {training_set['location']}"),
        ("nothing seen from", lineage["test_date"]),
    ]
    _print(_facts_table(f"score of {user} on {day}", facts))
    if not origin.metrics.empty:
        _print(metrics.render(origin.metrics, f"The bundle on {origin.bundle.judged_on}"))


@app.command()
def reproduce(
    score_date: Annotated[str, typer.Option(help="Date YYYY-MM-DD of the night.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Compute a night again from the recorded versions of features and bundle, and compare it with scores, row by row.

    Nothing is written to scores. Ends with code 3 where a row does not come out again, and names the columns.

    Example: bp-spark reproduce --score-date 2017-10-03
    """
    settings = _settings(config_file, overrides)
    day = config.parse_date(score_date)
    from bp_spark import pipeline
    from bp_spark.scoring.compare import TOLERANCE

    again = pipeline.reproduce(_session(settings, "reproduce"), settings, day)
    for code in again.other_code:
        logger.warning("rows of %s were computed by bp-spark %s, this is %s", day, code, __version__)
    apart = f"differ by {again.largest:.1e} at most ({again.column}), within {TOLERANCE:.0e}"
    _print(
        f"{again.rows:,} rows of {day} came out again from bundle {again.bundle.digest[:12]} and version "
        f"{again.features_version} of user_features: they {apart if again.largest else 'are the same, digit for digit'}"
    )


@app.command()
def publish(
    bundle: Annotated[
        Path | None, typer.Option(help="Folder of a model bundle; by default the promoted one.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Enter a bundle into the registry at tracking.uri and have the alias name the promoted one, as train does at its end.

    For a registry that could not be reached then. A bundle that is there already is not entered again.

    Example: bp-spark publish --bundle bundles/20171003-0123456789ab
    """
    settings = _settings(config_file, overrides)
    from bp_spark.registry import publishing
    from bp_spark.registry.bundle import load_promoted

    found = load_promoted(settings, bundle)
    published = publishing.publish(settings, found)
    model, alias = settings.tracking.model, settings.tracking.alias
    _print(f"{found.folder} is version {published.version} of {model}; {alias} is {published.promoted or 'none'}")


@app.command()
def quarantine(
    action: Annotated[QuarantineAction, typer.Argument(help="show: rows by source and rule; replay: judge them anew.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Look into quarantine, or judge its rows anew after a change of rules, items or rates; good ones move to events.

    Example: bp-spark quarantine replay cleaning.max_amount=5000000
    """
    settings = _settings(config_file, overrides)
    from bp_spark import pipeline

    spark = _session(settings, "quarantine")
    if action is QuarantineAction.replay:
        _print(_stage_table("quarantine replay", pipeline.replay_quarantine(spark, settings)))
    else:
        _print(
            _rows_table(["source", "rule", "rows"], pipeline.quarantine_by_rule(spark, settings), title="quarantine")
        )


@app.command()
def forget(
    overrides: Overrides = None,
    user: Annotated[list[str] | None, typer.Option(help="The platform's id of a user; may be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="File of user ids, one a line: no shell history keeps them.")
    ] = None,
    config_file: ConfigOption = None,
) -> None:
    """Erase users: from every table, from the files of its older versions, from checkpoints; then read every file to prove it.

    Other jobs may run: one that read the users before ends with an error. If it is stopped, run it again. Rows of these users
    that are delivered later are left out. Ends with code 9 where nobody has one of the ids, after all others were erased.
    Models keep what they learned until the next training.

    Example: bp-spark forget --file gone.txt
    """
    settings = _settings(config_file, overrides)
    ids = list(user or ())
    if file is not None:
        try:
            ids += file.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError):
            raise typer.BadParameter("can't be read as UTF-8 text", param_hint="--file") from None
    if not any(one.strip() for one in ids):
        raise typer.BadParameter("give --user or --file with at least one id", param_hint="--user")
    from bp_spark import pipeline

    _print(_stage_table("forget", pipeline.forget(_session(settings, "forget"), settings, ids)))


@app.command()
def rotate_keys(
    to: Annotated[str, typer.Option(help="Where the new secret is: env:NAME, file:PATH or databricks:SCOPE/KEY.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Give every user a new key, made with another secret; erase the files that hold the old ones.

    Of this and another job that writes meanwhile one ends with code 7 or 3: run it again. If it is stopped, run it again. Then
    set privacy.secret, featurize and train: who is held
    out, and who is in which fold, goes by the key and is drawn anew.

    Example: bp-spark rotate-keys --to file:/etc/bp-spark/secret-2025
    """
    settings = _settings(config_file, overrides)
    config.load(overrides=[f"privacy.secret={to}"])
    from bp_spark import pipeline

    stages = pipeline.rotate_keys(_session(settings, "rotate-keys"), settings, to)
    _print(_stage_table("rotate-keys", stages))
    _print(f"From now on: privacy.secret={to}. Then featurize and train: holdout and folds are drawn anew.")


@app.command()
def retain(overrides: Overrides = None, config_file: ConfigOption = None) -> None:
    """Delete what is older than privacy.retention_days allow, in the tables and in the files of their older versions.

    No other job may run meanwhile.

    Example: bp-spark retain privacy.retention_days.scores=400 privacy.retention_days.events=1100
    """
    settings = _settings(config_file, overrides)
    from bp_spark import pipeline

    _print(_stage_table("retain", pipeline.retain(_session(settings, "retain"), settings)))


@app.command()
def adapt_language(
    output: Annotated[Path, typer.Argument(help="Folder to make, for the adapted model; must not be there.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Optional: go on pre-training the language model on the platform's own texts, by guessing masked words (under DDP).

    Needs the table texts, which featurize makes. A stopped run goes on from its last epoch. Then set texts.model=OUTPUT:
    featurize embeds each text anew with it, and train must follow. The loss on held-out texts, printed before and after,
    says whether the model knows the platform's words better; whether scores got better, train's metrics say.

    Example: bp-spark adapt-language models/our-words language.epochs=3 training.processes=2, then bp-spark featurize
    --as-of 2017-10-03 texts.model=./models/our-words
    """
    settings = _settings(config_file, overrides)
    from bp_spark import pipeline

    stages = pipeline.adapt_language(_session(settings, "adapt-language"), settings, output)
    _print(_stage_table("adapt-language", stages))
    _print(f"To use it: texts.model={output.absolute()} in the settings of featurize, train and score")


@app.command()
def generate(
    folder: Annotated[str, typer.Argument(help="Where to: a folder or an object store's address, empty or not there.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Make the synthetic platform of the section synthetic: files of all five kinds of events, with dirt, and a mapping to
    read them.

    Example: bp-spark generate platform synthetic.users=100000, then bp-spark featurize --as-of 2024-10-01 source.kind=files
    source.mapping=platform/source.yaml
    """
    settings = _settings(config_file, overrides)
    from bp_spark.ingest.sources import synthetic

    made = synthetic.generate(_session(settings, "generate"), settings.synthetic, folder)
    size = f"{settings.synthetic.users:,} users, {settings.synthetic.days} days"
    _print(_rows_table(["table", "rows"], sorted(made.rows.items()), title=f"{folder}: {size}"))
    _print(_rows_table(["table", "dirt", "rows"], [(*of, n) for of, n in sorted(made.dirt.items())], title="dirt"))


@app.command()
def features(overrides: Overrides = None, config_file: ConfigOption = None) -> None:
    """Print the catalogue of features as Markdown: name, meaning, unit, window.

    Example: bp-spark features > docs/features.md
    """
    from bp_spark.features.catalogue import catalogue

    found = catalogue(_settings(config_file, overrides).features).features
    rows = [f"| `{f.name}` | {f.description} | {f.unit} | {f.window} |" for f in found]
    print("\n".join(["| feature | what it is | unit | window, days |", "|---|---|---|---|", *rows]))


@app.command()
def sql(
    query: Annotated[str, typer.Argument(help="A SQL query; tables are named namespace.table, as bp.scores_latest.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
    rows: Annotated[int, typer.Option(help="Rows to show at most.")] = 20,
) -> None:
    """Run a SQL query on the tables.

    Example: bp-spark sql "SELECT level, count(*) FROM bp.scores_latest GROUP BY level ORDER BY level"
    """
    settings = _settings(config_file, overrides)
    from pyspark.errors import AnalysisException, ParseException

    from bp_spark.lakehouse.tables import Lakehouse

    spark = _session(settings, "sql")
    if settings.tables.path is not None:
        Lakehouse(spark, settings.tables).register()
    try:
        found = spark.sql(query)
        names = found.columns
    except (AnalysisException, ParseException) as error:
        raise typer.BadParameter(str(error).strip().splitlines()[0], param_hint="QUERY") from None
    _print(_rows_table(names, [list(row) for row in found.limit(rows).collect()]))


@app.command()
def demo(overrides: Overrides = None) -> None:
    """The whole line on real data: 2,469 households of the Complete Journey, trained, evaluated at 2017-10-03 and scored."""
    # before the first minutes, not after them
    extras.require("train", "the demo")
    shop = open_demo(overrides or ())
    stages = shop.featurize(DEMO_DATE)
    trained = shop.train(DEMO_DATE)
    night = shop.score(DEMO_DATE)
    profiled = shop.profile()
    _print(_stage_table("demo", [*stages, *trained.stages, *night.stages, *profiled]))
    _print_training(trained)
    shown = ("user_key", "score", "level", "expected_spend", "low", "high", "p_active", "risk_level", "reasons")
    examples = shop.table("scores_latest").orderBy("user_key").select(*shown).limit(EXAMPLE_ROWS)
    _print(_rows_table(list(shown), [list(row) for row in examples.collect()], title=f"Ten of {night.users:,} scores"))
    where = shop.settings.tables.path
    _print(f'Tables are in {where}; look around: bp-spark sql "SELECT * FROM bp.scores_latest" tables.path={where}')  # noqa: S608


@app.command()
def doctor(overrides: Overrides = None, config_file: ConfigOption = None) -> None:
    """Is this machine, or cluster, fit for a night? Java, Python, packages, memory, jars, folders, secret, a session.

    Each finding is ok, warn or fail, with its remedy; ends with code 5 if one fails. On a cluster: spark-submit jobs/doctor.py,
    with the settings of the night.

    Example: bp-spark doctor tables.path=/data/lakehouse
    """
    settings = _settings(config_file, overrides)
    from bp_spark.cli import doctor as checks

    findings = list(checks.examine(settings, lambda: _session(settings, "doctor")))
    table = Table(title="doctor")
    for heading in ("check", "", "found", "remedy"):
        table.add_column(heading, overflow="fold")
    colours = {"ok": "green", "warn": "yellow", "fail": "red"}
    for finding in findings:
        status = Text(finding.status, style=colours[finding.status])
        table.add_row(finding.check, status, Text(finding.found), Text(finding.remedy))
    _print(table)
    if failed := [finding.check for finding in findings if finding.status == "fail"]:
        raise PlatformError(f"not fit for a night: {', '.join(failed)}; the table says what to do")


@app.command()
def settings() -> None:
    """Print every setting with its default and its meaning, as a file for --config.

    Example: bp-spark settings > settings.yaml
    """
    print(config.DEFAULT_FILE.read_text(encoding="utf-8"), end="")


def main(command: str | None = None, arguments: Sequence[str] | None = None) -> None:
    """Entry of ``bp-spark`` and, with a command's name, of a job.

    Errors that a user can mend are one message on standard error and an exit code; others keep their traceback.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        # ends the process itself, also after a usage error
        app([command, *given] if command else given, prog_name="bp-spark")
    except SystemExit as end:
        # Databricks takes any SystemExit of a task for a failure
        if end.code:
            raise
    except ModuleNotFoundError as error:
        _fail(extras.explain(error) or error)
    except Exception as error:
        _fail(error)


def _fail(error: Exception) -> NoReturn:
    """Log the error and end the process with its exit code."""
    code = error.exit_code if isinstance(error, BpSparkError) else 1
    fields = {"error": type(error).__name__, "exit_code": code}
    if isinstance(error, BpSparkError):
        logger.error("%s", error, extra={"fields": fields})
    else:
        logger.error("unexpected, see the traceback", exc_info=error, extra={"fields": fields})
    sys.exit(code)


def _settings(path: Path | None, overrides: Sequence[str] | None) -> Config:
    if path is None and DEFAULT_CONFIG.exists():
        path = DEFAULT_CONFIG
    return config.load(path, overrides or ())


def _session(settings: Config, command: str) -> Any:
    from bp_spark.core.session import MODEL_MODULES, get_session

    return get_session(settings, f"bp-spark {command}", MODEL_MODULES if command in MODEL_COMMANDS else ())


def _print(what: Any) -> None:
    # a pipe has no width of its own: rows must not be cut there. What people typed, as [red] or :key:, is shown as it is
    console = Console(width=None if sys.stdout.isatty() else 160, markup=False, emoji=False)
    console.print(what, highlight=False)


def _print_training(result: Any) -> None:
    from bp_spark.evaluation import metrics

    if result.metrics.empty:
        _print("No metrics: no horizon after the test date is over yet.")
    else:
        days = result.bundle.horizon_days
        others = ", ".join(f"_{other}d of {other}" for other in result.bundle.horizons.others)
        title = (
            f"Spend of {days} days from {result.bundle.judged_on}{f' (members with {others} days)' if others else ''}"
        )
        _print(metrics.render(result.metrics, title))
    _print(f"Bundle {result.bundle.digest[:12]} {'promoted' if result.promoted else 'NOT promoted'}: {result.reason}")


def _print_drift(result: Any) -> None:
    broken = [["BROKEN", *_drift_cells(row)] for row in result.broken]
    others = [row for row in result.rows if row["kind"] in ("stability", "realised") and not row["broken"]]
    columns = ["", "figure", "value", "threshold", "users", "note"]
    _print(_rows_table(columns, broken + [["", *_drift_cells(row)] for row in others], title="drift"))
    moves = {tuple(row["subject"].split(">")): row for row in result.rows if row["kind"] == "levels"}
    if moves:
        after = sorted({now for _, now in moves})
        shares = [
            [before, *(f"{moves[before, now]['value']:.2%}" if (before, now) in moves else "" for now in after)]
            for before in sorted({before for before, _ in moves})
        ]
        _print(_rows_table(["before", *after], shares, title="Users of each level of the night before, by level now"))


def _drift_cells(row: dict[str, Any]) -> list[str]:
    from bp_spark.evaluation.job import named

    value, threshold = ("–" if row[name] is None else f"{row[name]:,.4f}" for name in ("value", "threshold"))
    return [named(row), value, threshold, f"{row['users']:,}", row["note"] or ""]


def _stage_table(title: str, stages: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=title, show_footer=True)
    table.add_column("stage", "all")
    table.add_column("status")
    table.add_column("seconds", f"{sum(stage['seconds'] for stage in stages):.1f}", justify="right")
    table.add_column("rows in", justify="right")
    table.add_column("rows out", justify="right")
    table.add_column("figures", overflow="fold")
    for stage in stages:
        status = Text(stage["status"], style=_STATUS_STYLES.get(stage["status"], ""))
        counts = (_count(stage[name]) for name in ("rows_in", "rows_out"))
        table.add_row(stage["stage"], status, f"{stage['seconds']:.1f}", *counts, _figures(stage["figures"]))
    return table


def _figures(figures: Mapping[str, str]) -> str:
    """What a stage came to, as people read it: numbers with commas, digests by their beginning."""
    return ", ".join(f"{name.replace('_', ' ')} {_figure(value)}" for name, value in figures.items())


def _figure(value: str) -> str:
    if re.fullmatch(r"[0-9a-f]{64}", value):
        return value[:12]
    return f"{int(value):,}" if re.fullmatch(r"\d{5,17}", value) else value


def _levels_table(levels: pd.DataFrame, title: str, settings: Config) -> Table:
    """Users and money by level; groups of few are not told.

    Args:
        levels: see :func:`bp_spark.report.population.distribution`, of one night.
    """
    from bp_spark.report.population import by_level

    table = Table(title=title)
    for heading in ("level", "users", "share", f"expected spend, {settings.cleaning.currency}", "mean of a user"):
        table.add_column(heading, justify="left" if heading == "level" else "right")
    for level, group in by_level(levels, settings.privacy.smallest_group).items():
        table.add_row(level, group.users, group.share, group.spend, group.mean)
    return table


def _rows_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> Table:
    table = Table(title=title)
    for column in columns:
        table.add_column(_printable(column))
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    return table


def _facts_table(title: str, facts: Sequence[tuple[str, Any]]) -> Table:
    table = Table(title=title, show_header=False)
    for name, value in facts:
        table.add_row(name, _printable(str(value)))
    return table


def _versions(versions: dict[str, int] | None) -> str:
    return ", ".join(f"{name}@{version}" for name, version in sorted((versions or {}).items()))


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.2f}"
    if isinstance(value, dict):
        return ", ".join(f"{_printable(str(key))}: {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value)
    if "contribution" in getattr(value, "__fields__", ()):  # a Row
        return f"{value['group']} {value['contribution']:+,.2f}"
    return _printable(str(value))


def _printable(text: str) -> str:
    """The text with characters that would command a terminal, or turn the order of others, as escapes."""
    return _COMMANDING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)
