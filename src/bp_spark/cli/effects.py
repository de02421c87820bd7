"""The command for campaigns without a random group: did contacted users spend more than comparable others?"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bp_spark.cli import common, render
from bp_spark.cli.common import ConfigOption, Overrides
from bp_spark.core import extras

if TYPE_CHECKING:
    from bp_spark.experiments.campaign import CampaignResult
    from bp_spark.experiments.doubly_robust import Effect

_NOT_EXPLAINED = (
    "What we know of the users before doesn't explain the difference. "
    "Only a random group can tell whether the campaign caused it."
)
SENTENCES = {
    "more": f"Contacted users spent more than comparable others. {_NOT_EXPLAINED}",
    "less": f"Contacted users spent less than comparable others. {_NOT_EXPLAINED}",
    "no difference seen": "Contacted users spent as much as comparable others, as far as the interval shows.",
    "can't tell": "Can't tell:",
}
"""Answer -> what it means."""


def campaign_effect(
    campaign: Annotated[str, typer.Argument(help="campaign_id of campaign_contacts.")],
    days: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Days of spend, from the campaign's first day on; by default those of the campaign.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    overrides: Overrides = None,
    config_file: ConfigOption = None,
) -> None:
    """Compare the spend of the users whom a campaign contacted with that of comparable others, without a random group.

    The comparison is doubly robust: it adjusts for spend, orders and contacts before the campaign, and for the score of that
    date where there is one. The same comparison over the weeks before must see no difference. Where it does, or where few
    users are comparable, the answer is "can't tell". Nothing is written.

    Example: bp-spark campaign-effect 18 --days 28
    """
    settings = common.load_settings(config_file, overrides)
    extras.require("spark", "the effect of a campaign")
    from bp_spark import pipeline

    result = pipeline.campaign_effect(common.start_session(settings, "campaign-effect"), settings, campaign, days)
    if as_json:
        print(json.dumps(asdict(result, dict_factory=_without_nan), default=str, ensure_ascii=False, indent=2))
        return
    title = f"campaign {campaign}: spend of {result.days} days from {result.first_day}"
    if result.window is not None:
        columns = ["comparison", "contacted", "others", "mean spend", "difference", "95 % interval", "relative", "p"]
        render.show(render.rows_table(columns, _rows(result), title=title))
        render.show(render.facts_table("can it be compared?", _facts(result, result.window.effect)))
    render.show(SENTENCES[result.answer])
    for reason in result.reasons:
        render.show(f"- {reason}")


def _without_nan(values: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return fields as JSON has them: it knows no NaN."""
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in values}


def _rows(result: CampaignResult) -> list[list[str]]:
    assert result.window is not None
    assert result.capped is not None
    naive = result.window.effect.naive
    unadjusted = ["unadjusted, misleading", *[""] * 3, f"{naive:+,.2f}", *[""] * 3]
    return [
        _cells("adjusted", result.window.effect),
        _cells("adjusted, largest spend capped", result.capped),
        unadjusted,
        *(_cells(f"placebo from {placebo.first_day}", placebo.effect) for placebo in result.placebos),
    ]


def _cells(name: str, effect: Effect) -> list[str]:
    found = effect.comparison
    return [
        name,
        f"{effect.treated:,}",
        f"{effect.others:,}",
        f"{effect.treated_mean:,.2f} against {effect.expected_mean:,.2f}",
        f"{found.difference:+,.2f}",
        f"{found.low:+,.2f} to {found.high:+,.2f}",
        "–" if math.isnan(found.relative) else f"{found.relative:+.1%}",
        f"{found.p_value:.3f}",
    ]


def _facts(result: CampaignResult, effect: Effect) -> list[tuple[str, Any]]:
    assert result.window is not None
    overlap = effect.overlap
    contacted, others = (
        " / ".join(f"{p:.2f}" for p in of) for of in (overlap.treated_quantiles, overlap.other_quantiles)
    )
    before, after = (f"{value:.2f}" for value in (overlap.imbalance_before, overlap.imbalance_after))
    facts = [
        ("users contacted", f"{result.contacted:,}"),
        ("propensity of contacted users, at 5 / 50 / 95 %", contacted),
        ("propensity of others", others),
        ("contacted users with comparable others", f"{overlap.comparable:.0%}"),
        ("others, as many as equally weighted users", f"{overlap.effective_others:,.0f}"),
        ("largest standardised difference before and after weighting", f"{before}, {after}"),
        ("score among the covariates", result.window.score_date or "none"),
        ("contacted by another campaign later in these days", "{:.0%} against {:.0%}".format(*result.later_contacts)),
    ]
    if result.sampled < 1:
        facts.append(("share of the others in the sample", f"{result.sampled:.1%}"))
    return facts
