"""What decisions rest on, measured on real spend: ``python -m bench.decisions [--lakehouse FOLDER] [--cdnow FILE]``.

In: the lakehouse of ``make demo``, and the file ``CDNOW_master.txt`` of the package ``lifetimes`` if it is at hand. Out: a line
of JSON a figure on standard output. Nothing stays written.

A/A tests: 1,000 experiments without a treatment split real users by the hash of ``bp-spark experiment assign`` and compare what
both halves spent since. Each should raise a false alarm in 5 of 100 cases.

- ``aa.false_alarms``: share of them whose p-value is below 0.05, with the score of that day as covariate.
- ``aa.false_alarms_unadjusted``: the same of plain means.
- ``aa.effect_covered``: share of them whose interval holds an effect of 10 % that is put into the treatment group.
- ``aa.users_saved``: share of the variance that the score takes out, and so of the users; the mean of all.
- ``aa.false_alarms_small``, ``aa.users_saved_small``: the same among the 200 users with the smallest keys.
- ``aa.cdnow_*``: the same in another shop, whose users bought seldom. The covariate is what they spent before.

And the figures of :mod:`bench.decisions_market`, :mod:`bench.decisions_reco`, :mod:`bench.decisions_effects`,
:mod:`bench.decisions_uplift`, :mod:`bench.decisions_totals` and :mod:`bench.decisions_refunds`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from deltalake import DeltaTable

from bench import say
from bench.decisions_effects import effects
from bench.decisions_market import market
from bench.decisions_reco import reco
from bench.decisions_refunds import refunds
from bench.decisions_totals import totals
from bench.decisions_uplift import uplift
from bp_spark.core import config
from bp_spark.core.config import DEMO_FILE
from bp_spark.core.session import get_session
from bp_spark.experiments.assignment import CONTROL, TREATMENT, borders, point
from bp_spark.experiments.estimate import Comparison, Moments, adjusted, compare, lines, unadjusted

LAKEHOUSE = "demo/lakehouse/bp"
DAYS = 90
EXPERIMENTS = 1_000
ALPHA = 0.05
SMALL = 200
EFFECT = 0.1
CDNOW_DATE = date(1997, 7, 1)
"""All its users first bought in the three months before April; a year of spend follows."""


def aa(lakehouse: str) -> dict[str, float]:
    """Return the figures of A/A tests among the users of the demo."""
    scores = DeltaTable(f"{lakehouse}/scores").to_pandas(columns=["user_key", "score_date", "expected_spend"])
    day = scores["score_date"].max()
    scores = scores[scores["score_date"] == day].sort_values("user_key")
    daily = DeltaTable(f"{lakehouse}/user_daily").to_pandas(columns=["user_key", "day", "spend"])
    in_span = (daily["day"] >= day) & (daily["day"] < day + timedelta(days=DAYS))
    spend = daily[in_span].groupby("user_key")["spend"].sum()
    users = scores["user_key"].to_numpy()
    x = scores["expected_spend"].to_numpy()
    y = scores["user_key"].map(spend).fillna(0).to_numpy(np.float64)
    small = aa_tests(users[:SMALL], x[:SMALL], y[:SMALL])
    return {
        **{f"aa.{name}": value for name, value in aa_tests(users, x, y).items()},
        "aa.false_alarms_small": small["false_alarms"],
        "aa.users_saved_small": small["users_saved"],
    }


def aa_cdnow(file: Path) -> dict[str, float]:
    """Return the figures of A/A tests among the users of CDNOW."""
    orders = pd.read_csv(file, sep=r"\s+", skiprows=1, names=["user", "day", "cds", "spend"], dtype={"user": str})
    orders["day"] = pd.to_datetime(orders["day"], format="%Y%m%d").dt.date
    before, after = orders["day"] < CDNOW_DATE, orders["day"] >= CDNOW_DATE
    spent_before = orders[before].groupby("user")["spend"].sum()
    spent_after = orders[after].groupby("user")["spend"].sum().reindex(spent_before.index, fill_value=0.0)
    found = aa_tests(spent_before.index.to_numpy(), spent_before.to_numpy(), spent_after.to_numpy())
    return {f"aa.cdnow_{name}": value for name, value in found.items()}


def aa_tests(users: Sequence[str], expected: np.ndarray, spend: np.ndarray) -> dict[str, float]:
    """Return false alarms, adjusted and not, the coverage of an effect, and the share of users saved, over EXPERIMENTS splits.

    Args:
        users: keys.
        expected: covariate of each user, in money.
        spend: spend of each user, in money.
    """
    x, y = np.round(expected * 100), np.round(spend * 100)
    border = borders({CONTROL: 0.5, TREATMENT: 0.5})[CONTROL]
    p_values, saved, covered = [], [], []
    for number in range(EXPERIMENTS):
        name = f"aa-{number}"
        is_control = np.array([point(name, user) < border for user in users])
        with_score, plain = _compared(x, y, is_control)
        p_values.append((with_score.p_value, plain.p_value))
        saved.append(1 - (with_score.standard_error / plain.standard_error) ** 2)
        treated, _ = _compared(x, np.where(is_control, y, np.round(y * (1 + EFFECT))), is_control)
        covered.append(treated.relative_low <= EFFECT <= treated.relative_high)
    alarms = (np.array(p_values) < ALPHA).mean(axis=0)
    return {
        "false_alarms": float(alarms[0]),
        "false_alarms_unadjusted": float(alarms[1]),
        "effect_covered": float(np.mean(covered)),
        "users_saved": float(np.mean(saved)),
    }


def _compared(x: np.ndarray, y: np.ndarray, is_control: np.ndarray) -> tuple[Comparison, Comparison]:
    """Return the adjusted and the unadjusted comparison of two groups."""
    members = {CONTROL: is_control, TREATMENT: ~is_control}
    groups = {group: _moments(x[of], y[of]) for group, of in members.items()}
    means = {
        group: adjusted(line, float(line.squared_influence(x[members[group]], y[members[group]]).sum()))
        for group, line in lines(groups).items()
    }
    plain = (unadjusted(groups[group]) for group in (CONTROL, TREATMENT))
    return compare(means[CONTROL], means[TREATMENT]), compare(*plain)


def _moments(x: np.ndarray, y: np.ndarray) -> Moments:
    return Moments(len(x), *(int(total) for total in (x.sum(), y.sum(), x @ x, x @ y, y @ y)))


def main(arguments: Sequence[str]) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lakehouse", default=LAKEHOUSE, help="folder of the demo's tables")
    parser.add_argument("--cdnow", type=Path, help="CDNOW_master.txt of the package lifetimes")
    options = parser.parse_args(arguments)
    figures = aa(options.lakehouse)
    if options.cdnow:
        figures |= aa_cdnow(options.cdnow)
    settings = config.load(DEMO_FILE, [f"tables.path={Path(options.lakehouse).absolute().parent}"])
    spark = get_session(settings, "bp-spark bench", ())
    figures |= market(spark, settings)
    figures |= reco(spark, settings)
    figures |= effects(spark, settings)
    figures |= uplift(spark, settings)
    with tempfile.TemporaryDirectory() as folder:
        figures |= totals(spark, Path(options.lakehouse).absolute(), Path(folder) / "totals")
        figures |= refunds(spark, Path(folder) / "refunds")
    spark.stop()
    for figure, value in figures.items():
        say(figure, value)


if __name__ == "__main__":
    main(sys.argv[1:])
