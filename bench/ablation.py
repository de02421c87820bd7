"""What each part of the prediction adds: ``python -m bench.ablation --config conf/demo.yaml --test-date 2017-10-03``.

In: a lakehouse with events (``bp-spark featurize`` or ``make demo`` ran). Out: ``build/bench/ablation.json``, also on standard
output: for each variant of the pipeline its figures on the users of the test date and the paired difference of the default to
it, with 90 % bootstrap intervals.

Members are fitted once; a variant that leaves one out, takes one alone, or gives all the same weight fuses and calibrates the
same out-of-fold predictions anew. Of the transformer three more are fitted: with pre-training, without the texts of events, and
without the tabular features.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bench import publish
from bp_spark.core import config
from bp_spark.core.config import Config, FusionConfig, MemberName
from bp_spark.core.session import MODEL_MODULES, get_session
from bp_spark.evaluation import bootstrap
from bp_spark.features import labels
from bp_spark.ingest import clean
from bp_spark.lakehouse.run import Run
from bp_spark.model.inputs import InputSpec
from bp_spark.model.stack import CalibratedStack
from bp_spark.training import cross_fit, dataset, ensemble

OUT = Path("build/bench/ablation.json")
METRICS = ("spearman", "gini", "decile_mape", "mae", "rmse")
EVEN = 1e9
"""A shrinkage that leaves nothing of what predictions say of the weights."""
PRETRAINING_EPOCHS = 60
FULL = "default"


@dataclasses.dataclass(frozen=True)
class Said:
    """A column a member: of users out of fold, and of the test date's users."""

    out_of_fold: pd.DataFrame
    test: pd.DataFrame

    def with_transformer(self, other: Said) -> Said:
        """The same, with another transformer."""
        same = ["user_key", "as_of_date"]
        theirs = other.out_of_fold.set_index(same)["transformer"]
        rows = self.out_of_fold.set_index(same).assign(transformer=theirs).reset_index()
        users = self.test.set_index("user_key").assign(transformer=other.test.set_index("user_key")["transformer"])
        return Said(rows, users.reset_index())

    def fused(self, conf: FusionConfig) -> np.ndarray:
        """Expected spend of the test date's users, float64 [users]."""
        fusion = CalibratedStack.fit(self.out_of_fold, conf, self.test)
        return fusion.apply(fusion.inputs_from(self.test))["expected_spend"]


def run(settings: Config, test_date: date | None, folder: Path) -> dict[str, Any]:
    """All figures; the folder takes checkpoints of the way."""
    spark = get_session(settings, "bp-spark bench", MODEL_MODULES)
    line = Run(spark, settings)
    first, last = clean.span(line.lakehouse)
    test_date = test_date or last - timedelta(days=settings.labels.horizon_days)
    dates = labels.cutoffs(first, test_date, settings.labels)
    version, vocabulary, _ = dataset.prepare(line, dates, test_date)

    def said(name: str, conf: Config, vocabulary: Path, spec: InputSpec | None = None) -> Said:
        print(f"fitting: {name}", file=sys.stderr, flush=True)
        place = folder / name.replace(" ", "-")
        place.mkdir()
        rows = line.lakehouse.read("training_set", version)
        members, out_of_fold, _ = cross_fit.cross_fit(
            Run(spark, conf), rows, test_date, vocabulary, place, version=version, spec=spec
        )
        return Said(out_of_fold, ensemble.predict_sample(dataset.users_of_test_date(line, test_date), members, conf))

    alone = settings.model_copy(
        update={"fusion": settings.fusion.model_copy(update={"members": ("transformer",), "shrinkage": 0.0})}
    )
    full = said(FULL, settings, vocabulary)
    pretrained = _with(alone, "pretraining", max_epochs=PRETRAINING_EPOCHS)
    wordless = _with(alone, "texts", vocabulary=1)
    without_texts = folder / "without-texts"
    without_texts.mkdir()
    no_words = dataset.write_vocabulary(Run(spark, wordless), test_date, without_texts)
    history = dataclasses.replace(
        InputSpec.of(settings.features), tabular=("tenure_days",), log_scaled=frozenset[str]()
    )
    others = {
        "transformer pre-trained": full.with_transformer(said("transformer pre-trained", pretrained, vocabulary)),
        "transformer without texts": full.with_transformer(said("transformer without texts", wordless, no_words)),
        "transformer without features": full.with_transformer(
            said("transformer without features", alone, vocabulary, history)
        ),
    }
    spark.stop()
    return {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()},
        "test_date": test_date.isoformat(),
        "resamples": settings.evaluation.resamples,
        "variants": judged(variants(full, others, settings.fusion), full.test, settings),
    }


def variants(full: Said, others: Mapping[str, Said], conf: FusionConfig) -> dict[str, np.ndarray]:
    """Expected spend of the test date's users by variant: the default first, then fusions without a part, and parts alone."""

    def of(*members: MemberName) -> FusionConfig:
        return conf.model_copy(update={"members": members})

    made = {FULL: full.fused(conf)}
    for name, said in others.items():
        made[f"fused, {name}"] = said.fused(conf)
    for member in conf.members:
        made[f"fused without {member}"] = full.fused(of(*(other for other in conf.members if other != member)))
    made["fused, equal weights"] = full.fused(conf.model_copy(update={"shrinkage": EVEN}))
    for name in ("linear", *conf.members):
        made[f"{name} alone, calibrated"] = full.fused(of(name))
        made[f"{name} alone, as it says"] = full.test[name].to_numpy(np.float64)
    for name, said in others.items():
        made[f"{name} alone, calibrated"] = said.fused(of("transformer"))
    return made


def judged(made: Mapping[str, np.ndarray], test: pd.DataFrame, settings: Config) -> list[dict[str, Any]]:
    frame = test[["user_key", "label_spend", "seen"]].assign(**made)
    table = bootstrap.compare(
        frame, list(made), subject=FULL, resamples=settings.evaluation.resamples, seed=settings.training.seed
    )
    table = table[(table["population"] == "all") & table["metric"].isin(METRICS)]
    own = table[table["peer"].isna()].set_index(["member", "metric"])
    against = table[table["peer"].notna()].set_index(["peer", "metric"])

    def figures(of: pd.DataFrame, name: str) -> dict[str, dict[str, float]]:
        shown = [column for column in ("value", "low", "high", "better") if not of[column].isna().all()]
        return {metric: of.loc[(name, metric), shown].astype(float).to_dict() for metric in METRICS}

    return [
        {
            "variant": name,
            "figures": figures(own, name),
            **({} if name == FULL else {"default_less_variant": figures(against, name)}),
        }
        for name in made
    ]


def _with(settings: Config, section: str, **values: object) -> Config:
    changed = getattr(settings, section).model_copy(update=values)
    return settings.model_copy(update={section: changed})


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, :func:`run`, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.ablation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("--test-date", type=config.parse_date, help="YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="bp-bench-") as folder:
        publish(run(config.load(given.config, given.overrides), given.test_date, Path(folder)), given.out)


if __name__ == "__main__":
    main()
