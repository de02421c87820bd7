"""Commands for data scientists: train, backtest, search, ask for labels, publish."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from bp_spark.cli import common, render
from bp_spark.cli.common import ConfigOption, Overrides
from bp_spark.core import config


def train(
    test_date: Annotated[
        str | None,
        typer.Option(
            help="Evaluation date YYYY-MM-DD; the training sees nothing from that date on. By default the newest date whose "
            "horizon is over. A bundle that passes there is then fitted again, with all data up to now."
        ),
    ] = None,
    from_bundle: Annotated[
        str | None,
        typer.Option(
            help="Bundle of another platform to start from: its folder, or its address in the registry. "
            "The same as training.from_bundle=BUNDLE."
        ),
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Label past dates, fit the members, combine them, evaluate the bundle, and promote or refuse it.

    Members are two kinds of boosted trees, a purchase process, a transformer (under DDP) and a linear baseline.

    Example: bp-spark train --test-date 2017-10-03 training.processes=2 network.loss=ziln
    """
    given = [] if from_bundle is None else [f"training.from_bundle={json.dumps(from_bundle)}"]
    settings = common.load_settings(config_file, [*(overrides or ()), *given])
    day = None if test_date is None else config.parse_date(test_date)
    from bp_spark import pipeline

    result = pipeline.train(common.start_session(settings, "train"), settings, day)
    render.show(render.stage_table("train", result.stages))
    render.show_training(result)


def backtest(
    test_date: Annotated[
        list[str] | None,
        typer.Option(help="Evaluation date YYYY-MM-DD whose horizon is over; may be repeated."),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(min=1, help="Without --test-date: number of dates, from the newest possible one backwards."),
    ] = None,
    step_days: Annotated[int, typer.Option(min=1, help="Days between two dates of --folds.")] = 28,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Train as of past dates, and compare the predictions with what users spent since.

    The fused prediction stands beside each member. Figures have 90 % bootstrap intervals and go to the table
    backtests. A page with charts goes to evaluation.reports. No bundle is written or promoted.

    Example: bp-spark backtest --folds 3 --step-days 28 evaluation.external_segment=income
    """
    settings = common.load_settings(config_file, overrides)
    if test_date and folds:
        raise typer.BadParameter("give --test-date or --folds, not both", param_hint="--folds")
    dates = [config.parse_date(text) for text in test_date or ()]
    from bp_spark import pipeline
    from bp_spark.evaluation import bootstrap

    result = pipeline.backtest(common.start_session(settings, "backtest"), settings, dates, folds or 1, step_days)
    render.show(render.stage_table("backtest", result.stages))
    for day, table in result.tables.items():
        title = f"Spend of {settings.labels.horizon_days} days from {day}, 90 % intervals"
        render.show(bootstrap.render(table, title))
    render.show(f"Report: {result.report.absolute()}")


def search(
    test_date: Annotated[
        str | None,
        typer.Option(help="Date YYYY-MM-DD; the search sees nothing from that date on. By default as in train."),
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Try other settings on past cutoffs, and print the best ones as arguments of train.

    A trial is judged by the fused prediction of users that no member was fitted on. The section search of the
    settings says what to try, how often, and at which value to stop. Trials go to the table trials and to
    TensorBoard.

    Example: bp-spark search search.trials=30 search.metric=gini search.target=0.88
    """
    settings = common.load_settings(config_file, overrides)
    day = None if test_date is None else config.parse_date(test_date)
    from bp_spark import pipeline

    result = pipeline.search(common.start_session(settings, "search"), settings, day)
    names = list(settings.search.space)
    rows = [
        [trial.number, *(trial.settings[name] for name in names), trial.value, trial.error or ""]
        for trial in result.trials
    ]
    render.show(render.rows_table(["trial", *names, settings.search.metric, "error"], rows, title="search"))
    best_settings = " ".join(f"{key}={value}" for key, value in result.best.settings.items())
    best_value = f"{settings.search.metric} {result.best.value:.4f}"
    render.show(f"Best: trial {result.best.number}, {best_value}\nbp-spark train {best_settings}")


def select_labels(
    date: Annotated[str, typer.Option(help="Date YYYY-MM-DD of the questions; run featurize for it first.")],
    budget: Annotated[int, typer.Option(min=1, help="Number of users to ask.")],
    output: Annotated[
        Path | None, typer.Option(help="CSV file to write for whoever asks, with an empty column spend to fill in.")
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Pick the users whose label, from a survey or a reviewer, would help the promoted bundle most.

    They are users that the members disagree on, chosen to differ from each other. The question is what the user will
    spend over the horizon from the date on. add-labels stores the answers.

    Left out are users of the holdout, users with a label of the date, and users whose answer is still open. The same
    call picks the same users again, or further ones once answers have come in. The questions go to the table
    label_requests.

    Example: bp-spark select-labels --date 2017-10-03 --budget 200 --output questions.csv
    """
    settings = common.load_settings(config_file, overrides)
    day = config.parse_date(date)
    from bp_spark import pipeline

    result = pipeline.select_labels(common.start_session(settings, "select-labels"), settings, day, budget, output)
    render.show(render.stage_table("select-labels", result.stages))
    columns = ["rank", "user_key", "disagreement", "expected_spend"]
    rows = result.asked[columns].head(render.EXAMPLE_ROWS).to_numpy(object).tolist()
    title = f"{min(render.EXAMPLE_ROWS, len(result.asked))} of {len(result.asked):,} users to ask"
    render.show(render.rows_table(columns, rows, title=title))
    if output is not None:
        render.show(f"Questions: {output.absolute()}; fill in spend, then bp-spark add-labels {output}")


def add_labels(
    file: Annotated[
        Path,
        typer.Argument(
            help="CSV file with the columns user_key or user_id, as_of_date and spend; optionally source and given_at "
            "(YYYY-MM-DD)."
        ),
    ],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Store labels from a survey or a reviewer: what users will spend over the horizon from a date on.

    If one line breaks a rule, nothing of the file is stored. Lines without a spend are skipped. A newer label of the
    same user and date replaces the older one. Trainings with a later test date learn from a label until its horizon
    is over; from then on the real spend is known.

    Example: bp-spark add-labels questions.csv
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark import pipeline

    stages = pipeline.add_labels(common.start_session(settings, "add-labels"), settings, file)
    render.show(render.stage_table("add-labels", stages))


def publish(
    bundle: Annotated[
        Path | None, typer.Option(help="Folder of a model bundle; by default the promoted one.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Enter a bundle into the registry at tracking.uri, and point the alias to the promoted bundle.

    train does both at its end. This command makes up for a registry that could not be reached then. A bundle that the
    registry already has is not entered again.

    Example: bp-spark publish --bundle bundles/20171003-0123456789ab
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark.registry import publishing
    from bp_spark.registry.bundle import load_promoted

    loaded = load_promoted(settings, bundle)
    published = publishing.publish(settings, loaded)
    model, alias = settings.tracking.model, settings.tracking.alias
    render.show(f"{loaded.folder} is version {published.version} of {model}; {alias} is {published.promoted or 'none'}")


def adapt_language(
    output: Annotated[Path, typer.Argument(help="Folder for the adapted model; it must not exist yet.")],
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Continue the pre-training of the language model on the platform's own texts (optional).

    The model learns to guess masked words, under DDP. It needs the table texts, which featurize makes. A stopped run
    goes on from its last epoch. The loss on held-out texts is printed before and after: it says whether the model
    knows the platform's words better. The metrics of train say whether predictions got better.

    To use the model, set texts.model=OUTPUT: featurize then embeds all texts again, and train must follow.

    Example: bp-spark adapt-language models/our-words language.epochs=3 training.processes=2, then bp-spark featurize
    --as-of 2017-10-03 texts.model=./models/our-words
    """
    settings = common.load_settings(config_file, overrides)
    from bp_spark import pipeline

    stages = pipeline.adapt_language(common.start_session(settings, "adapt-language"), settings, output)
    render.show(render.stage_table("adapt-language", stages))
    render.show(f"To use it: texts.model={output.absolute()} in the settings of featurize, train and score")
