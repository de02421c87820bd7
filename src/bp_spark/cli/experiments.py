"""Commands for experiments: how many users they take, who is in which group, what came of it, and who gained most."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bp_spark.cli import common, render
from bp_spark.cli.common import ConfigOption, Overrides
from bp_spark.core import config, extras

if TYPE_CHECKING:
    from bp_spark.experiments.learners import Tenth
    from bp_spark.pipeline import SizeResult

logger = logging.getLogger(__name__)

app = typer.Typer(
    name="experiment",
    help="Draw users into groups, say how many it takes, and compare what the groups spent.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

NameArgument = Annotated[str, typer.Argument(help="Name of the experiment: small letters, digits, - and _.")]
DaysOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Days of spend, from the scored date on; by default labels.horizon_days.", show_default=False
    ),
]
ComparedDaysOption = Annotated[
    int | None,
    typer.Option(min=1, help="Days of spend to compare; by default those that were planned.", show_default=False),
]
WhereOption = Annotated[
    str | None,
    typer.Option(
        help="Condition on the users, as \"level IN ('A', 'B') AND frequency > 3\". It may name expected_spend, low, high, "
        "p_active, score, level and risk_level of scores, and any feature."
    ),
]
ShareOption = Annotated[float, typer.Option(help="Share of the group treatment; all others are in the group control.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


@app.command()
def size(
    effect: Annotated[float, typer.Option(help="Relative difference of mean spend to be seen, as 0.02 for 2 %.")],
    power: Annotated[float, typer.Option(help="Probability to see that difference if it is there.")] = 0.8,
    alpha: Annotated[
        float, typer.Option(help="Probability of a false alarm where the treatment has no effect.")
    ] = 0.05,
    share: ShareOption = 0.5,
    days: DaysOption = None,
    date: Annotated[
        str | None,
        typer.Option(
            help="Scored date YYYY-MM-DD to learn from; by default the newest whose days are over.", show_default=False
        ),
    ] = None,
    where: WhereOption = None,
    as_json: JsonOption = False,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Say how many users an experiment on mean spend takes, with and without the score as covariate.

    The command takes the spread of spend, and its correlation with the score, from a past scored date whose days are over.
    Without such a date, the spend of as many days before is the covariate.

    Example: bp-spark experiment size --effect 0.02 --where "level IN ('A', 'B')"
    """
    settings = common.load_settings(config_file, overrides)
    day = None if date is None else config.parse_date(date)
    extras.require("spark", "the size of an experiment")
    from bp_spark import pipeline
    from bp_spark.experiments.estimate import Plan

    session = common.start_session(settings, "experiment size")
    plan = Plan(alpha=alpha, power=power, share=share)
    result = pipeline.size_experiment(session, settings, effect, plan, day, days, where)
    if as_json:
        _print_json({**asdict(result), "saved": result.saved})
        return
    render.show(render.facts_table(f"experiment of {result.days} days", _size_facts(result)))
    columns = ["method", "users of control", "users of treatment", f"effect that {result.users:,} users let see"]
    rows = [
        ["adjusted by the " + result.covariate, *_counts(result.adjusted), f"{result.effect_adjusted:.2%}"],
        ["unadjusted", *_counts(result.unadjusted), f"{result.effect_unadjusted:.2%}"],
    ]
    title = f"{result.effect:.2%} of mean spend, power {result.power:.0%}, false alarms {result.alpha:.0%}"
    render.show(render.rows_table(columns, rows, title=title))


@app.command()
def assign(
    name: NameArgument,
    date: Annotated[str, typer.Option(help="Scored date YYYY-MM-DD; spend counts from this day on.")],
    share: ShareOption = 0.5,
    groups: Annotated[
        str | None,
        typer.Option(
            help="Groups with their shares instead of --share, as control=0.4,mail=0.3,coupon=0.3. The group control, else the "
            "first, is the one to compare with. Users beyond the shares are in no group."
        ),
    ] = None,
    days: DaysOption = None,
    where: WhereOption = None,
    as_json: JsonOption = False,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Draw the scored users of a date into groups, and write them to the table experiments.

    A hash of the experiment's name and the user's key decides, so the draw doesn't depend on anything else, nor on other
    experiments. The same command again writes nothing. A name stands for one draw: other groups need another name. Users who
    come later aren't added.

    Example: bp-spark experiment assign spring-mail --date 2017-10-03 --share 0.5 --days 90
    """
    settings = common.load_settings(config_file, overrides)
    day = config.parse_date(date)
    extras.require("spark", "an experiment")
    from bp_spark import pipeline
    from bp_spark.experiments.assignment import CONTROL, TREATMENT, Definition, parse_groups

    shares = {CONTROL: 1 - share, TREATMENT: share} if groups is None else parse_groups(groups)
    planned = settings.labels.horizon_days if days is None else days
    definition = Definition(name, day, planned, shares, where)
    definition.require_usable()
    result = pipeline.assign_experiment(common.start_session(settings, "experiment assign"), settings, definition)
    if as_json:
        _print_json({**asdict(result), "users": result.users})
        return
    rows = [[group, result.definition.groups[group], count] for group, count in result.users.items()]
    title = f"{name}: {day}, {planned} days, {definition.selection}"
    render.show(render.rows_table(["group", "share", "users"], rows, title=title))
    render.show("drawn" if result.written else "was drawn before: nothing changed")


@app.command()
def read(
    name: NameArgument,
    days: ComparedDaysOption = None,
    as_json: JsonOption = False,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Compare what the groups spent since the draw, with 95 % intervals, and write it to experiment_results.

    The score of the draw is taken out as covariate, which narrows the intervals; plain means stand beside it. All drawn users
    count. The command ends with code 3 if the days are not over yet, or a group is too small to be shown. It warns if
    the groups have not the users that their shares let expect, and of looks before the planned end.

    Example: bp-spark experiment read spring-mail
    """
    settings = common.load_settings(config_file, overrides)
    extras.require("spark", "an experiment")
    from bp_spark import pipeline

    result = pipeline.read_experiment(common.start_session(settings, "experiment read"), settings, name, days)
    if as_json:
        _print_json(asdict(result))
        return
    first = result.rows[0]
    columns = [
        "group",
        "method",
        "users",
        "mean spend",
        "difference",
        "95 % interval",
        "relative",
        "95 % interval",
        "p",
    ]
    control = [first["control"], "", f"{first['control_users']:,}", "", "", "", "", "", ""]
    rows = [control, *([*_cells(row)] for row in result.rows)]
    title = f"{name}: spend of {first['days']} days from {first['score_date']}"
    render.show(render.rows_table(columns, rows, title=title))
    for row in result.rows:
        if row["method"] == "adjusted" and row["variance_saved"] is not None:
            narrower = 1 - (1 - row["variance_saved"]) ** 0.5
            saved = f"{row['variance_saved']:.0%} fewer users would do as well as all of them unadjusted"
            render.show(f"{row['group']}: the score makes the interval {narrower:.0%} narrower: {saved}.")


@app.command()
def uplift(
    name: NameArgument,
    group: Annotated[
        str | None, typer.Option(help="Treated group, where there are several.", show_default=False)
    ] = None,
    days: ComparedDaysOption = None,
    as_json: JsonOption = False,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Say whether some users gained more from the treatment than others, and who: whom to treat next time.

    Users are ranked by what the treatment is expected to add to their spend, by models that have not seen them (X-learner).
    The random groups then tell what it added to each tenth. Where the ranking isn't surely better than a random order, the
    command says so. Nothing is written.

    Example: bp-spark experiment uplift spring-mail
    """
    settings = common.load_settings(config_file, overrides)
    extras.require("spark", "an experiment")
    from bp_spark import pipeline

    session = common.start_session(settings, "experiment uplift")
    result = pipeline.uplift_experiment(session, settings, name, group, days)
    if as_json:
        values = {**asdict(result), "sure": result.qini.is_sure}
        # users are for the Python API: a terminal's record is no place for them
        del values["ranking"]
        _print_json(values)
        return
    columns = ["tenth by uplift", "users", "predicted", "gained", "95 % interval", "spend without it"]
    rows = [[f"{number}", *_tenth_cells(tenth)] for number, tenth in enumerate(result.tenths, 1)]
    title = f"{name}, {result.group}: spend of {result.days} days from {result.first_day}"
    render.show(render.rows_table(columns, rows, title=title))
    qini = result.qini
    words = f"Qini coefficient {qini.coefficient:,.3f}, 95 % interval {qini.low:,.3f} to {qini.high:,.3f}"
    t_learner = result.qini_t_learner
    render.show(
        f"{words}; by the T-learner {t_learner.coefficient:,.3f} ({t_learner.low:,.3f} to {t_learner.high:,.3f})."
    )
    if not qini.is_sure:
        render.show("No users surely gain more than others: treat all of them or none, by `experiment read`.")
        return
    render.show("Treat the first tenths. What tells them from the others, by what was known before:")
    told = [[covariate, f"{first:,.2f}", f"{others:,.2f}"] for covariate, first, others in result.separating]
    render.show(render.rows_table(["covariate", "mean of the first tenth", "of the others"], told))


def _tenth_cells(tenth: Tenth) -> list[str]:
    return [
        f"{tenth.users:,}",
        f"{tenth.predicted:+,.2f}",
        f"{tenth.gain:+,.2f}",
        f"{tenth.low:+,.2f} to {tenth.high:+,.2f}",
        "–" if math.isnan(tenth.mean_spend) else f"{tenth.mean_spend:,.2f}",
    ]


def _size_facts(result: SizeResult) -> list[tuple[str, Any]]:
    return [
        ("learned from", f"{result.users:,} users of {result.day}: {result.selection}"),
        ("mean spend", f"{result.mean_spend:,.2f}"),
        ("standard deviation", f"{result.sd_spend:,.2f}"),
        (f"correlation with the {result.covariate}", f"{result.correlation:.3f}"),
        ("users saved by it", f"{result.saved:.0%}"),
    ]


def _counts(users: tuple[int, int]) -> list[str]:
    return [f"{count:,}" for count in users]


def _cells(row: Mapping[str, Any]) -> list[str]:
    relative = ["–", "–"]
    if row["relative"] is not None:
        relative = [f"{row['relative']:+.2%}", f"{row['relative_low']:+.2%} to {row['relative_high']:+.2%}"]
    return [
        row["group"],
        row["method"],
        f"{row['users']:,}",
        f"{row['mean_spend']:,.2f} against {row['control_mean_spend']:,.2f}",
        f"{row['difference']:+,.2f}",
        f"{row['low']:+,.2f} to {row['high']:+,.2f}",
        *relative,
        f"{row['p_value']:.3f}",
    ]


def _print_json(values: Mapping[str, Any]) -> None:
    print(json.dumps(values, default=str, ensure_ascii=False, indent=2))
