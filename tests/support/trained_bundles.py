"""Small bundles as a training leaves them, and rows of features that they score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xgboost

from bp_spark.core.config import Config, FusionConfig
from bp_spark.model.explanation import Explanation
from bp_spark.model.horizons import Horizons
from bp_spark.model.members.linear import LinearMember
from bp_spark.model.members.trees import TreesMember
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import bundle as bundles
from bp_spark.registry import decisions
from bp_spark.registry.bundle import Bundle

USERS = 50


def features() -> pd.DataFrame:
    """Return rows of ``user_features``: float32 columns, one of them not always known, and a history of any length."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        {"recency_days": rng.exponential(20, USERS), "spend_90d": np.exp(rng.normal(3, 1, USERS))}, dtype=np.float32
    )
    rows.loc[3, "recency_days"] = np.nan
    rows["seq_amount"] = [rng.random(length, dtype=np.float32) for length in rng.integers(0, 5, USERS)]
    return rows.set_axis([f"user{n}" for n in range(USERS)])


def fitted_members(rows: pd.DataFrame | None = None) -> list[Any]:
    """Return trees and a line, both fitted on rows of features: by default :func:`features`."""
    rows = features() if rows is None else rows
    names = tabular(rows)
    matrix = xgboost.DMatrix(rows[list(names)], label=rows["spend_90d"])
    return [
        TreesMember(xgboost.train({"objective": "reg:tweedie", "max_depth": 2, "seed": 1}, matrix, 5)),
        LinearMember(names, (2.0, 3.0), (-0.1, 0.9), 0.2, 1.3, 9.0),
    ]


def tabular(rows: pd.DataFrame) -> tuple[str, ...]:
    """Return the names of the columns that hold one number a user."""
    return tuple(name for name in rows.columns if not name.startswith("seq_"))


def write_bundle(
    settings: Config,
    members: list[Any],
    name: str,
    promoted: bool = True,
    reason: str = "no worse than linear 0.81",
    rows: pd.DataFrame | None = None,
) -> Bundle:
    """Write a bundle of these members to ``settings.bundles``, with the decision of its training.

    Args:
        rows: what it was fitted on, by default :func:`features`.
    """
    rows = features() if rows is None else rows
    columns = {column: rows[column].to_numpy() for column in rows.columns}
    predictions = {member.name: member.predict(columns) for member in members}
    fusion = CalibratedStack.fit(
        pd.DataFrame({"label_spend": columns["spend_90d"], **predictions}),
        FusionConfig(members=tuple(member.name for member in members)),
    )
    groups = {column: column.split("_")[0] for column in tabular(rows)}
    explanation = Explanation.fit(
        columns, predictions, rows.index.to_numpy(), members, fusion, groups, seed=1, threads=1
    )
    figures = [("fused", "gini", 0.87), ("fused", "auc", float("nan")), ("linear", "gini", 0.81)]
    bundle = bundles.write(
        Path(settings.bundles) / name,
        members,
        fusion,
        inputs={"tabular": list(tabular(rows)), "history": [column for column in rows if column.startswith("seq_")]},
        lineage={
            "run_id": name,
            "test_date": "2017-10-03",
            "training_set": {"location": "lakehouse/training_set", "version": 3},
            "config": settings.model_dump(mode="json"),
        },
        metrics={
            "rows": [{"member": m, "population": "all", "metric": k, "value": v} for m, k, v in figures],
            "reasons": {"users": 100, "error": 0.25, "same_first": 0.8},
        },
        horizons=Horizons(90, ()),
        explanation=explanation,
    )
    if promoted:
        bundles.promote(settings.bundles, bundle)
    decisions.record(settings.bundles, bundle, promoted=promoted, reason=reason)
    return bundle
