"""Random users and random models: as many as a benchmark or a test asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xgboost
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from bp_spark.core.config import Config, FusionConfig
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.features.catalogue import catalogue, input_digest
from bp_spark.model.curve import Curve
from bp_spark.model.explanation import Explanation
from bp_spark.model.history import HistoryEncoder
from bp_spark.model.horizons import EXPECTED, Horizons, Ratio
from bp_spark.model.inputs import HISTORY_COLUMNS, InputSpec
from bp_spark.model.level import Level
from bp_spark.model.members.base import Member
from bp_spark.model.members.btyd import BtydMember
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.model.members.trees import SqrtTreesMember, TreesMember
from bp_spark.model.network import SpendNetwork
from bp_spark.model.stack import CalibratedStack
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle

NIGHT = date(2024, 10, 1)


TEXT_SIZE = 384


SEED = 7


RISING = Level(NIGHT.isoformat(), 1.0, 0.5, Curve((0.0, 7.0), (0.0, 0.1)), 0.05, odds=0.8)
"""Everyone's spend is expected to rise by a tenth in a week, so that scores of an earlier night have to follow."""


def users(spark: SparkSession, settings: Config, count: int, mean: float | None, night: date = NIGHT) -> DataFrame:
    """Random rows of ``user_features``.

    Args:
        mean: events of a history in the mean, exponentially distributed up to the cap; ``None``: all at the cap.
    """
    features, cap = catalogue(settings.features), settings.features.history_length
    key = F.col("id")

    def uniform(*salt: object) -> Column:
        return F.pmod(F.xxhash64(key, *(s if isinstance(s, Column) else F.lit(s) for s in salt)), F.lit(1 << 20)) / (
            1 << 20
        )

    length = (
        F.lit(cap)
        if mean is None
        else F.least(F.lit(cap), 1 + F.floor(-F.log(1 - uniform("length")) * mean)).cast("int")
    )
    steps = F.sequence(F.lit(1), F.col("length"))
    events: dict[str, Callable[[Column], Column]] = {
        "seq_kind": lambda i: 1 + (uniform(i, 1) * 8).cast("int"),
        "seq_age_days": lambda i: (F.col("length") - i + uniform(i, 2)) * 5,
        "seq_amount": lambda i: -F.log(1 - uniform(i, 3)) * 30,
        "seq_items": lambda i: 1 + (uniform(i, 4) * 5).cast("int"),
        "seq_discount": lambda i: uniform(i, 5),
        "seq_text_id": lambda i: (uniform(i, 6) * 50_000).cast("bigint"),
        "seq_weekday": lambda i: 1 + (uniform(i, 7) * 7).cast("int"),
        "seq_hour": lambda i: (uniform(i, 8) * 24).cast("int"),
    }
    values = {
        name: F.when(uniform(number) > 0.05, -F.log(1 - uniform(number)) * 10).cast("float").alias(name)
        for number, name in enumerate(features.names)
    }
    sequences = [F.transform(steps, events[c.name]).cast(c.type).alias(c.name) for c in SEQUENCE_COLUMNS]
    rows = spark.range(count).withColumn("length", length)
    return rows.select(
        F.concat(F.lit("user"), key).alias("user_key"),
        F.lit(night).alias("as_of_date"),
        F.lit(night).alias("seen_on"),
        *values.values(),
        *sequences,
        F.lit("bench").alias("built_from"),
    ).withColumn("input_digest", input_digest(features))


def make_bundles(folder: Path, settings: Config, texts: int) -> dict[str, Bundle]:
    """``network``: the default network alone; ``whole``: all members of the default fusion."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    features = catalogue(settings.features)
    spec = InputSpec.of(settings.features)
    history = HistoryEncoder(settings.network, spec.history_length, torch.randn(texts, TEXT_SIZE))
    others = settings.labels.other_horizons
    network = SpendNetwork(spec, settings.network, torch.arange(1, texts + 1), history, others)
    values = rng.exponential(10, (4000, len(features.names))).astype(np.float32)
    spend = rng.gamma(2, 1 + values[:, 0]) * (rng.random(4000) < 0.7)
    members: dict[str, Member] = {
        "btyd": BtydMember(90, 0.8, 20.0, 0.5, 3.0, 4.0, 3.0, 30.0),
        "trees": TreesMember(_booster(values, spend, features.names, "reg:tweedie", settings)),
        "sqrt_trees": SqrtTreesMember(_booster(values, np.sqrt(spend), features.names, "reg:squarederror", settings)),
        "transformer": TransformerMember(network),
    }
    frame = pd.DataFrame({name: rng.gamma(2, 20, 2000) for name in members}).assign(label_spend=rng.gamma(2, 20, 2000))
    horizons = Horizons(90, tuple(Ratio(days, EXPECTED, Curve((0.0, 8.0), (0.9, 1.1))) for days in others))
    made = {}
    columns = {name: values[:, place] for place, name in enumerate(features.names)}
    said = {name: frame[name].to_numpy() for name in members}
    for name, chosen in (("network", ("transformer",)), ("whole", tuple(members))):
        fusion = replace(CalibratedStack.fit(frame, FusionConfig(members=chosen)), level=RISING)
        explanation = Explanation.fit(
            {column: some[:2000] for column, some in columns.items()},
            said,
            np.arange(2000),
            list(members.values()),
            fusion,
            features.groups,
            seed=SEED,
            threads=1,
        )
        made[name] = bundles.write(
            folder / name,
            [members[member] for member in chosen],
            fusion,
            explanation=explanation if name == "whole" else None,
            inputs={"tabular": features.names, "history": HISTORY_COLUMNS},
            lineage={},
            metrics={},
            horizons=horizons if name == "whole" else Horizons(90, ()),
        )
    return made


def _booster(x: np.ndarray, y: np.ndarray, names: Sequence[str], objective: str, settings: Config) -> xgboost.Booster:
    conf = settings.trees
    booster = xgboost.train(
        {"objective": objective, "max_depth": conf.max_depth, "eta": conf.learning_rate, "nthread": 1, "seed": SEED},
        xgboost.DMatrix(x, label=y, feature_names=list(names)),
        conf.rounds,
    )
    booster.set_attr(smearing="1.0")
    return booster
