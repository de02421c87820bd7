"""How right the money is on shops of all kinds, with the default settings: ``python -m bench.worlds [WORLD ...]``.

In: names of worlds, by default all, and settings to change. Out: one JSON line a figure on standard output; a line a world on
standard error; every figure in ``build/bench/worlds.json``, from which a run that was stopped goes on.

A world is a simulated shop with what its users will spend after the test date known. Users come week by week, order by a
Poisson process at a rate of their own (gamma), and leave after an exponential time, as in Pareto/NBD (Schmittlein, Morrison &
Colombo 1987). The calendar, the trend and what an order costs differ by world. The Complete Journey is there, too.

- ``worlds.total_error_median``, ``worlds.total_error_worst``: of all users together, |expected / spent - 1|.
- ``worlds.decile_mape_median``: see :func:`bp_spark.evaluation.metrics.decile_mape`.
- ``worlds.coverage_min``, ``worlds.coverage_max``: share of users whose spend lies in their interval. Where most hardly
  buy at all, more than promised lie in it.
- ``worlds.above_high_max``: largest share of users who spend more than the upper end; at most what the coverage leaves.
- ``worlds.rank_losses``: worlds in which a single member, linear regression, or the same weeks of the year before rank users
  surely better (Spearman, in 95 % of paired resamples).
- ``worlds.mae_ratio_to_best_peer``: mean absolute error over that of the best of these, the median.
- ``worlds.p_active_error_median``, ``worlds.p_active_error_worst``: largest difference of ``p_active`` and the share of buyers
  among users of like recency.
- ``worlds.totals_coverage``: share of totals, of the platform and of its levels, that lie in the interval of
  :mod:`bp_spark.model.totals`; ``worlds.platform_coverage``: of the platform alone.
- ``young.…``: the same figures of shops that are too young for the default horizon.
- ``worlds.total_error_steady_median``, ``worlds.total_error_steady_worst``: errors without the factor of the season.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bench import say
from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.session import MODEL_MODULES, get_session
from bp_spark.evaluation import bootstrap, metrics
from bp_spark.features import labels
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import recorded
from bp_spark.model.totals import interval
from bp_spark.scoring.profiles.totals import EVERYONE
from bp_spark.training.ensemble import Fitted, fit_as_of

OUT = Path("build/bench/worlds.json")
TEST_DATE = date(2024, 10, 6)
HORIZON_WEEKS = 13
USERS = 2_500
ITEMS = 60
COMPLETE_JOURNEY = "complete_journey"
SAME_WEEKS = "same weeks a year before"
SILENT = "silent_days"
BANDS = [-1, 14, 30, 60, 120, 10_000]
"""Borders of recency, in days."""
MAPPING = """
timezone: UTC
transactions:
  path: "orders.parquet"
  format: parquet
  columns: {user_id: user, order_id: order, item_id: item, ts: at, quantity: n, amount: paid}
items:
  path: "items.parquet"
  format: parquet
  columns: {item_id: item, title: title, category: category, brand: brand}
"""


@dataclass(frozen=True)
class World:
    """A shop.

    Attributes:
        weeks: of history before the test date.
        season: amplitude of the yearly wave of the order rate, on a log scale, and of the peak before Christmas.
        growth: of the order rate in a year, on a log scale.
        price_rise: by what factor orders cost more since eight weeks before the test date.
        promotion: by what factor more is ordered in the third and fourth week of the horizon.
        rate: orders a week of a user, the mean.
        rate_shape: of the gamma distribution of rates; small: most users order seldom.
        stay: weeks that a user stays, the mean.
        spread: standard deviation of the log value of an order, of a user and in each order; 0: all cost the same.
        interval: weeks between two orders of a subscriber; 0: orders come at random.
    """

    weeks: int = 104
    season: float = 0.0
    growth: float = 0.0
    price_rise: float = 1.0
    promotion: float = 1.0
    rate: float = 0.15
    rate_shape: float = 0.8
    stay: float = 80.0
    spread: float = 0.5
    interval: int = 0


WORLDS: Mapping[str, World] = {
    "plain": World(),
    "season_1_year": World(weeks=60, season=0.35),
    "season_2_years": World(season=0.35),
    "season_3_years": World(weeks=156, season=0.35),
    "growth": World(growth=0.4),
    "decline": World(growth=-0.4),
    "price_rise": World(price_rise=1.15),
    "promotion": World(promotion=1.8),
    "one_time_buyers": World(rate=0.03, rate_shape=0.3, stay=30.0),
    "subscriptions": World(interval=4, spread=0.1),
    "equal_amounts": World(spread=0.0),
    "wholesale": World(spread=1.2, rate_shape=0.4),
}
YOUNG: Mapping[str, World] = {
    "6_weeks": World(weeks=6),
    "13_weeks": World(weeks=13),
    "22_weeks": World(weeks=22),
    "22_weeks_season": World(weeks=22, season=0.35),
}
"""Shops that are too young for the default horizon; a shorter one is predicted."""


def orders(world: World, seed: int) -> pd.DataFrame:
    """Orders of the history and of the horizon: ``user, order, item, at, n, paid``."""
    rng = np.random.default_rng(seed)
    weeks = world.weeks + HORIZON_WEEKS
    week = np.arange(weeks)
    monday = [TEST_DATE + timedelta(weeks=int(w) - world.weeks) for w in week]
    of_year = np.array([day.timetuple().tm_yday for day in monday]) / 365.25
    peak = np.exp(-(((of_year - 0.93) * 52 / 3) ** 2))
    log_rate = world.season * (np.cos(2 * np.pi * (of_year - 0.9)) + peak) + world.growth * (week - world.weeks) / 52
    lift = np.where((week >= world.weeks + 2) & (week < world.weeks + 4), world.promotion, 1.0)
    # a third have been there before, the others come through all weeks
    start = np.where(rng.random(USERS) < 1 / 3, 0, rng.integers(0, world.weeks, USERS))
    end = start + np.maximum(1, np.ceil(rng.exponential(world.stay, USERS)))
    there = (week >= start[:, None]) & (week < end[:, None])
    if world.interval:
        count = (there & ((week - start[:, None]) % world.interval == 0)).astype(int)
        count *= rng.random(count.shape) < 0.95
    else:
        rate = rng.gamma(world.rate_shape, world.rate / world.rate_shape, USERS)
        count = rng.poisson(rate[:, None] * np.exp(log_rate) * lift * there)
    # each user's first week has an order: the platform knows nobody without one
    count[np.arange(USERS), start] = np.maximum(count[np.arange(USERS), start], 1)
    user, when = np.nonzero(count)
    user, when = (np.repeat(of, count[user, when]) for of in (user, when))
    value = 30 * np.exp(rng.normal(0, world.spread, USERS)[user] + rng.normal(0, world.spread, len(user)))
    value *= np.where(when >= world.weeks - 8, world.price_rise, 1.0)
    midnight = datetime(TEST_DATE.year, TEST_DATE.month, TEST_DATE.day)
    days = (when - world.weeks) * 7 + rng.integers(0, 7, len(user))
    at = pd.Series(days).map(lambda d: midnight + timedelta(days=int(d))) + pd.to_timedelta(
        rng.integers(8 * 3600, 20 * 3600, len(user)), unit="s"
    )
    return pd.DataFrame(
        {
            "user": [f"u{number}" for number in user],
            "order": [f"o{number}" for number in range(len(user))],
            "item": [f"i{number}" for number in rng.integers(0, ITEMS, len(user))],
            "at": at,
            "n": 1.0,
            "paid": np.maximum(value, 0.01).round(2),
        }
    )


def write(world: World, folder: Path, seed: int) -> list[str]:
    """Write a shop's files; the settings that read them."""
    folder.mkdir(parents=True)
    orders(world, seed).to_parquet(folder / "orders.parquet", index=False, coerce_timestamps="us")
    numbers = range(ITEMS)
    items = {
        "item": [f"i{n}" for n in numbers],
        "title": [f"Thing {n}" for n in numbers],
        "category": [f"Home > {n % 6}" for n in numbers],
        "brand": "Acme",
    }
    pd.DataFrame(items).to_parquet(folder / "items.parquet", index=False)
    (folder / "source.yaml").write_text(MAPPING, encoding="utf-8")
    return ["source.kind=files", f"source.mapping={folder}/source.yaml"]


def figures(spark: SparkSession, settings: Config, test_date: date) -> dict[str, float]:
    """Train as of the test date, and hold what is expected against what was spent."""
    started = time.monotonic()
    pipeline.featurize(spark, settings, [test_date])
    with recorded(spark, settings, "backtest") as run:
        first, _ = span(run.lakehouse)
        fitted = fit_as_of(run, labels.cutoffs(first, test_date, settings.labels), test_date)
        features = run.lakehouse.read("user_features").filter(F.col("as_of_date") == F.lit(test_date))
        silent = features.select("user_key", F.col("recency_days").alias(SILENT)).toPandas()
        before = test_date - timedelta(days=364)
        same_weeks = labels.future_spend(
            run.lakehouse.read("user_daily"), [before], settings.labels.horizon_days
        ).toPandas()
    users = fitted.predictions.merge(
        same_weeks.rename(columns={"label_spend": SAME_WEEKS})[["user_key", SAME_WEEKS]], on="user_key", how="left"
    )
    users[SAME_WEEKS] = users[SAME_WEEKS].fillna(0.0).clip(lower=0.0)
    users = users.merge(silent, on="user_key")
    peers = [*(member.name for member in fitted.members), SAME_WEEKS]
    promised = settings.fusion.coverage
    table = bootstrap.compare(users, [*peers, "fused"], resamples=settings.evaluation.resamples, promised=promised)
    table = table[table["population"] == "all"]
    spent = float(users["label_spend"].clip(lower=0).sum())
    own = metrics.evaluate(
        users["label_spend"].to_numpy(),
        users["fused"].to_numpy(),
        **{name: users[name].to_numpy() for name in ("low", "high", "p_active")},
        promised=promised,
    )
    spend = users["label_spend"].to_numpy()
    active, by_band = users["label_spend"].to_numpy() > 0, pd.cut(users[SILENT], BANDS)
    by_spend = fitted.fusion.activity(np.log1p(users["fused"].to_numpy() / fitted.fusion.factor()))
    rank = table[(table["metric"] == "spearman") & table["peer"].notna()]
    maes = table[(table["metric"] == "mae") & table["peer"].isna() & (table["member"] != "fused")]
    level = fitted.fusion.level
    return {
        **own,
        "below_low": float((spend < users["low"]).mean()),
        "above_high": float((spend > users["high"]).mean()),
        "users": float(len(users)),
        "p_active_error": _worst_band(users["p_active"].to_numpy(), active, by_band),
        "p_active_error_by_spend": _worst_band(by_spend, active, by_band),
        "auc_by_spend": metrics.auc(active, by_spend),
        "brier_by_spend": metrics.brier(active, by_spend),
        "total_error": float(users["fused"].sum()) / spent - 1,
        "total_error_steady": float(users["fused"].sum()) / fitted.fusion.factor() / spent - 1,
        "same_weeks_total": float(users[SAME_WEEKS].sum()) / spent - 1,
        "rank_loss": float((rank["better"] < 0.05).any()),
        "mae_ratio_to_best_peer": own["mae"] / float(maes["value"].min()),
        "evidence": level.evidence if level else 0.0,
        "level_sd": level.sd if level else 0.0,
        "horizon_days": float(settings.labels.horizon_days),
        **totals_inside(fitted, users),
        "seconds": time.monotonic() - started,
    }


def totals_inside(fitted: Fitted, users: pd.DataFrame) -> dict[str, float]:
    """Whether the platform's total lies in its interval, and the share of such totals, its levels included."""
    error = next(error for error in fitted.totals.errors if error.days == fitted.horizons.main)
    rows = pd.DataFrame(
        {
            "spent": users["label_spend"].clip(lower=0),
            "expected": users["fused"],
            "variance": error.variance(users["fused"].to_numpy()),
            "level": fitted.fusion.rank(users["fused"].to_numpy() / fitted.fusion.factor())[1],
        }
    )
    sums = rows.groupby("level").sum()
    sums.loc[EVERYONE] = sums.sum()
    inside = {}
    for group, row in sums.iterrows():
        low, high = interval(
            row["expected"], row["variance"], error, fitted.totals.coverage, everyone=group == EVERYONE
        )
        inside[group] = float(low <= row["spent"] <= high)
    return {"platform_inside": inside[EVERYONE], "totals_inside": statistics.mean(inside.values())}


def _worst_band(p_active: np.ndarray, active: np.ndarray, bands: pd.Series) -> float:
    """Largest difference of mean probability and share of buyers, of bands of recency that hold a fiftieth of the users."""
    said = pd.DataFrame({"gap": p_active - active, "band": bands}).groupby("band", observed=True)["gap"]
    return float(said.mean()[said.size() >= len(p_active) / 50].abs().max())


def summary(worlds: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The figures of all worlds together."""

    def of(name: str, over: Callable[[list[float]], float]) -> float:
        return over([abs(figures[name]) for figures in worlds.values()])

    return {
        "total_error_median": of("total_error", statistics.median),
        "total_error_worst": of("total_error", max),
        "total_error_steady_median": of("total_error_steady", statistics.median),
        "total_error_steady_worst": of("total_error_steady", max),
        "decile_mape_median": of("decile_mape", statistics.median),
        "coverage_min": of("coverage", min),
        "coverage_max": of("coverage", max),
        "above_high_max": of("above_high", max),
        "rank_losses": of("rank_loss", sum),
        "mae_ratio_to_best_peer": of("mae_ratio_to_best_peer", statistics.median),
        "totals_coverage": of("totals_inside", statistics.mean),
        "platform_coverage": of("platform_inside", statistics.mean),
        "p_active_error_median": of("p_active_error", statistics.median),
        "p_active_error_worst": of("p_active_error", max),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, a training a world, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.worlds", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("worlds", nargs="*", help=f"of {', '.join([*WORLDS, COMPLETE_JOURNEY, *YOUNG])}")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting to change")
    parser.add_argument("--seed", type=int, default=1, help="of the simulated shops")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures, gone on with")
    given = parser.parse_args(arguments)
    os.environ.setdefault("BP_SPARK_SECRET", "the secret of benchmarks, of invented users")
    known = json.loads(given.out.read_text()) if given.out.exists() else {}
    chosen = given.worlds or [*WORLDS, COMPLETE_JOURNEY, *YOUNG]
    spark: SparkSession | None = None
    for name in chosen:
        world = (WORLDS | YOUNG).get(name)
        asked = {"world": asdict(world) if world else name, "seed": given.seed, "settings": given.set, "users": USERS}
        if known.get(name, {}).get("asked") == asked:
            continue
        with tempfile.TemporaryDirectory(prefix="bp-bench-") as place:
            folder = Path(place)
            source = write(world, folder / "shop", given.seed) if world else []
            settings = config.load(
                overrides=[
                    *source,
                    f"tables.path={folder}/lakehouse",
                    f"training.work_dir={folder}/work",
                    f"bundles={folder}/bundles",
                    "tracking.uri=null",
                    *given.set,
                ]
            )
            spark = spark or get_session(settings, "bp-spark bench", MODEL_MODULES)
            if world:
                opened, last = TEST_DATE - timedelta(weeks=world.weeks), TEST_DATE - timedelta(days=1)
                reachable = labels.with_horizon_in_reach(settings.labels, opened, last)
                settings = settings.model_copy(update={"labels": reachable})
            found = figures(spark, settings, TEST_DATE if world else date(2017, 10, 3))
        known[name] = {"asked": asked, "figures": found}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
        print(name, {key: round(value, 4) for key, value in found.items()}, file=sys.stderr, flush=True)
    for group, names in {"worlds": set(chosen) - set(YOUNG), "young": set(chosen) & set(YOUNG)}.items():
        if names:
            for figure, value in summary({name: known[name]["figures"] for name in names}).items():
                say(f"{group}.{figure}", round(value, 4))


if __name__ == "__main__":
    main()
