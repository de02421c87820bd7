"""What asking the right users is worth, by how many labels there are: ``python -m bench.labelling --config conf/demo.yaml``.

In: a lakehouse with events and user-days (``bp-spark featurize`` or ``make demo`` ran). Out: ``build/bench/labelling.json``,
also on standard output: for each way of choosing whose label comes next, what a small ensemble comes to on the test date, by
number of labels; and how much better than random choice that is, seed by seed, with an interval.

The pool is the users of one date, a horizon before the test date, but the holdout; their labels are what they really spent, and
are hidden until they are asked for. From a few random ones on, a batch is added at a time. The ensemble, two boosters and a
ridge regression, is fitted anew on the labels so far; it says who is asked next, by `disagreement` and
`select_diverse` of `bp_spark.scoring.active_learning.selection`, as ``bp-spark select-labels`` does.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xgboost
from scipy import stats
from sklearn.linear_model import Ridge
from tqdm import tqdm

from bench import publish
from bp_spark.core import config
from bp_spark.core.session import get_session
from bp_spark.evaluation import metrics
from bp_spark.features import catalogue as features
from bp_spark.features import job as feature_job
from bp_spark.features.catalogue import Catalogue
from bp_spark.ingest import clean
from bp_spark.lakehouse.run import Run
from bp_spark.model.columns import Columns, to_matrix
from bp_spark.model.members.base import Member, predict_all
from bp_spark.model.members.linear import LinearMember
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember
from bp_spark.scoring.active_learning import selection
from bp_spark.training import cross_fit, dataset

OUT = Path("build/bench/labelling.json")
STEP, MOST, SEEDS = 50, 600, 20
RANDOM, DISAGREEMENT, DIVERSE = "random", "disagreement", "disagreement + diversity"
METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "spearman": metrics.spearman,
    "gini": metrics.normalised_gini,
    "mae": metrics.mae,
}
ROUNDS = 150
BOOSTER = {
    "max_depth": 3,
    "learning_rate": 0.05,
    "min_child_weight": 5.0,
    "subsample": 0.7,
    "colsample_bytree": 0.3,
    "tree_method": "hist",
    "nthread": 1,
}


def run(settings: config.Config, seeds: int, most: int = MOST, test_date: date | None = None) -> dict[str, Any]:
    """All figures.

    Args:
        settings: where the tables are; horizon, holdout and ``labelling.candidates_per_label``.
        seeds: how many times, each from other first labels.
        most: labels at the end.
        test_date: by default the newest whose whole horizon was seen.
    """
    spark = get_session(settings, "bp-spark bench")
    line = Run(spark, settings)
    horizon = timedelta(days=settings.labels.horizon_days)
    test_date = test_date or clean.span(line.lakehouse)[1] - horizon
    pool_date = test_date - horizon
    feature_job.write_features(line, [pool_date, test_date])
    pool, test = (
        dataset.users_of_test_date(line, day).orderBy("user_key").toPandas() for day in (pool_date, test_date)
    )
    pool = pool[pool["seen"]].reset_index(drop=True)
    spark.stop()
    return {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()},
        "pool": {"date": pool_date.isoformat(), "users": len(pool)},
        "test": {"date": test_date.isoformat(), "users": len(test)},
        "step": STEP,
        "candidates_per_label": settings.labelling.candidates_per_label,
        "rounds": ROUNDS,
        "booster": BOOSTER,
        **simulate(
            pool, test, features.catalogue(settings.features), settings.labelling.candidates_per_label, seeds, most
        ),
    }


def simulate(
    pool: pd.DataFrame, test: pd.DataFrame, catalogue: Catalogue, per_label: int, seeds: int, most: int
) -> dict[str, Any]:
    """The curves of each strategy, and the differences from random.

    Args:
        pool: features and ``label_spend`` of the users who can be asked.
        test: those of the users whom the ensemble is judged by.
    """
    ask: dict[str, Callable[[np.ndarray, np.ndarray, np.random.Generator], np.ndarray]] = {
        RANDOM: lambda free, _, rng: rng.choice(free, STEP, replace=False),
        DISAGREEMENT: lambda free, apart, _: free[np.argsort(-apart, kind="stable")[:STEP]],
        DIVERSE: lambda free, apart, _: _diverse(pool, catalogue, free, apart, STEP * per_label),
    }
    begun = time.monotonic()
    figures: list[dict[str, Any]] = []
    for seed in tqdm(range(seeds), desc="seeds", unit="seed", file=sys.stderr):
        first = np.random.default_rng(seed).choice(len(pool), STEP, replace=False)
        for strategy, choose in ask.items():
            rng, known = np.random.default_rng([seed, 1]), first
            while True:
                members = fit(pool.iloc[known], catalogue, seed)
                judged = _judged(members, test)
                figures.append({"seed": seed, "strategy": strategy, "labels": len(known), **judged})
                if len(known) + STEP > min(most, len(pool)):
                    break
                free = np.setdiff1d(np.arange(len(pool)), known)
                apart = selection.disagreement(_said(members, pool.iloc[free]), {m.name: 1.0 for m in members})
                known = np.concatenate([known, choose(free, apart, rng)])
    everyone = [_judged(fit(pool, catalogue, seed), test) for seed in range(min(seeds, 5))]
    table = pd.DataFrame(figures)
    return {
        "seeds": seeds,
        "seconds": time.monotonic() - begun,
        "curve": _curve(table),
        "less_random": _differences(table),
        "all_labels": {metric: float(np.mean([one[metric] for one in everyone])) for metric in METRICS},
    }


def fit(rows: pd.DataFrame, catalogue: Catalogue, seed: int) -> list[Member]:
    """The ensemble on a few labels: boosters of Tweedie and of root spend, ridge on recency, frequency and monetary value."""
    columns, spend = _columns(rows), np.maximum(rows["label_spend"].to_numpy(np.float64), 0.0)
    values = to_matrix(columns, catalogue.names, np.float32)
    return [
        TreesMember(_booster(values, spend, catalogue, {"objective": "reg:tweedie", "seed": seed})),
        _sqrt_trees(values, spend, catalogue, seed),
        _linear(columns, spend),
    ]


def _booster(values: np.ndarray, target: np.ndarray, catalogue: Catalogue, more: Mapping[str, Any]) -> xgboost.Booster:
    matrix = xgboost.DMatrix(values, target, missing=np.nan, feature_names=list(catalogue.names), nthread=1)
    return xgboost.train({**BOOSTER, **more}, matrix, ROUNDS)


def _sqrt_trees(values: np.ndarray, spend: np.ndarray, catalogue: Catalogue, seed: int) -> SqrtTreesMember:
    booster = _booster(values, np.sqrt(spend), catalogue, {"objective": SqrtTreesMember.OBJECTIVE, "seed": seed})
    roots = np.maximum(booster.inplace_predict(values, missing=np.nan, validate_features=False), 0.0)
    booster.set_attr(smearing=repr(float(spend.sum() / max(float((roots**2).sum()), 1e-9))))
    return SqrtTreesMember(booster)


def _linear(columns: Columns, spend: np.ndarray) -> LinearMember:
    values = to_matrix(columns, cross_fit.RFM, np.float64)
    logs = np.sign(values) * np.log1p(np.abs(values))
    means = np.nan_to_num(np.nanmean(logs, axis=0))
    filled, target = np.where(np.isnan(logs), means, logs), np.log1p(spend)
    ridge = Ridge(alpha=1.0).fit(filled, target)
    ceiling = float(target.max())
    said = np.exp(np.minimum(ridge.predict(filled), ceiling)).sum()
    smearing = float(np.exp(target).sum() / said)
    return LinearMember(
        cross_fit.RFM, tuple(means), tuple(ridge.coef_), float(ridge.intercept_), smearing=smearing, ceiling=ceiling
    )


def _columns(rows: pd.DataFrame) -> dict[str, np.ndarray]:
    return {str(name): rows[name].to_numpy() for name in rows.columns}


def _said(members: Sequence[Member], rows: pd.DataFrame) -> dict[str, np.ndarray]:
    return predict_all(members, _columns(rows))


def _judged(members: Sequence[Member], test: pd.DataFrame) -> dict[str, float]:
    """Of the stack with equal weights."""
    said = _said(members, test)
    fused = np.mean([np.sqrt(said[member.name]) for member in members], axis=0) ** 2
    truth = np.maximum(test["label_spend"].to_numpy(np.float64), 0.0)
    return {name: metric(truth, fused) for name, metric in METRICS.items()}


def _diverse(pool: pd.DataFrame, catalogue: Catalogue, free: np.ndarray, apart: np.ndarray, count: int) -> np.ndarray:
    most = np.argsort(-apart, kind="stable")[:count]
    points = selection.standardise(pool.iloc[free[most]], catalogue)
    return free[most[selection.select_diverse(points, apart[most], STEP)]]


def _curve(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Means over the seeds."""
    means = table.groupby(["strategy", "labels"], sort=False)[list(METRICS)].mean()
    return means.reset_index().to_dict("records")


def _differences(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Strategy less random, of the same seed: mean and 90 % interval (Student's t), by number of labels and over all but the
    first, which all strategies share."""
    later = table[table["labels"] > STEP]
    overall = later.groupby(["strategy", "seed"], as_index=False)[list(METRICS)].mean().assign(labels="all")
    found = []
    for (labels, metric), part in _by_metric(pd.concat([later, overall])):
        wide = part.pivot(index="seed", columns="strategy", values=metric)
        for strategy in (DISAGREEMENT, DIVERSE):
            apart = (wide[strategy] - wide[RANDOM]).to_numpy()
            half = stats.t.ppf(0.95, len(apart) - 1) * apart.std(ddof=1) / np.sqrt(len(apart))
            mean = float(apart.mean())
            found.append(
                {
                    **{"strategy": strategy, "labels": labels, "metric": metric},
                    **{"mean": mean, "low": mean - float(half), "high": mean + float(half)},
                }
            )
    return found


def _by_metric(table: pd.DataFrame) -> list[tuple[tuple[Any, str], pd.DataFrame]]:
    return [((labels, metric), part) for labels, part in table.groupby("labels", sort=False) for metric in METRICS]


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, :func:`run`, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.labelling", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="times, each from other first labels; 2 at least")
    parser.add_argument("--most", type=int, default=MOST, help="labels at the end")
    parser.add_argument("--test-date", type=config.parse_date, help="YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    given = parser.parse_args(arguments)
    settings = config.load(given.config, given.overrides)
    publish(run(settings, given.seeds, given.most, given.test_date), given.out)


if __name__ == "__main__":
    main()
