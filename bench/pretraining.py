"""What pre-training is worth, by how many labels there are: ``python -m bench.pretraining --config conf/demo.yaml``.

In: a lakehouse with features (``bp-spark train`` or ``make demo`` ran). Out: ``build/bench/pretraining.json``, also on standard
output: for each share of the training users whose labels are used, the transformer alone, fine-tuned from random weights and
from the pre-trained encoder: validation loss and, on the test date, Spearman and normalised Gini of all and of unseen users.

Shares are nested, by hash of the user. The encoder is pre-trained once, on the histories of all users but the holdout and the
first fold, whose users tell when to stop at every share: of users whose labels are left out it sees what they did, spend of the
next days included, only not the labels themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import functions as F
from tqdm import tqdm

from bench import publish
from bp_spark.core import config
from bp_spark.core.errors import ConfigError
from bp_spark.core.session import get_session
from bp_spark.evaluation.metrics import normalised_gini, spearman
from bp_spark.features import job as feature_job
from bp_spark.features import labels
from bp_spark.ingest import clean
from bp_spark.lakehouse.run import Run
from bp_spark.model.inputs import InputSpec
from bp_spark.model.members.transformer import TransformerMember
from bp_spark.training import cross_fit, dataset
from bp_spark.training.loader import snapshot
from bp_spark.training.tasks.finetune import finetune

OUT = Path("build/bench/pretraining.json")
SHARES = (0.1, 0.25, 0.5, 1.0)


def run(
    settings: config.Config, shares: Sequence[float], folder: Path, test_date: date | None = None
) -> dict[str, Any]:
    """All figures; the folder takes the tables and checkpoints of the way.

    Args:
        settings: where the tables are, and how to train.
        shares: of the training users, each in 0..1.
        folder: an existing one.
        test_date: as in :func:`bp_spark.pipeline.train`.

    Raises:
        ConfigError: the settings leave pre-training out.
    """
    if "transformer" not in settings.fusion.members or not settings.pretraining.max_epochs:
        raise ConfigError(
            "pretraining.max_epochs: must be above 0, and fusion.members name the transformer, to compare"
        )
    spark = get_session(settings, "bp-spark bench")
    line = Run(spark, settings)
    first, last = clean.span(line.lakehouse)
    test_date = test_date or last - timedelta(days=settings.labels.horizon_days)
    dates = labels.cutoffs(first, test_date, settings.labels)
    feature_job.write_features(line, [*dates, test_date])
    rows = line.lakehouse.read("training_set", dataset.write_training_set(line, dates, test_date))
    vocabulary = dataset.write_vocabulary(line, test_date, folder)
    clock = time.monotonic()
    encoder, _ = cross_fit.pretrain_encoder(line, test_date, vocabulary, fold=0, epochs=None)
    seconds = time.monotonic() - clock
    test = dataset.users_of_test_date(line, test_date).toPandas()

    spec = InputSpec.of(settings.features)
    location, version = line.lakehouse.location("training_set"), line.lakehouse.version("training_set")
    # the fold whose histories stopped the pre-training
    valid = snapshot(location, version, {"complete": "true", "fold": "0"})
    figures = []
    for share in tqdm(shares, desc="shares of labels", unit="share", file=sys.stderr):
        place = F.pmod(F.xxhash64(F.lit("share"), F.col("user_key")), F.lit(labels.BUCKETS))
        kept = rows.filter(F.col("complete") & (F.col("fold") != 0) & (place < share * labels.BUCKETS))
        path = str(folder / f"labels-{share}")
        kept.repartition(4 * settings.training.processes, "user_key").write.format("delta").save(path)
        train = snapshot(path)
        for name, initial in (("random", None), ("pre-trained", encoder)):
            tuned = finetune(spark, train, valid, spec, vocabulary, settings, folder / f"{name}-{share}", initial)
            figures.append(
                {
                    "share": share,
                    "rows": train.rows,
                    "start": name,
                    "epochs": tuned.epochs,
                    "validation_loss": tuned.best_validation_loss,
                    "seconds": tuned.seconds,
                    **_judged(TransformerMember.load(tuned.folder), test),
                }
            )
            print(json.dumps(figures[-1]), file=sys.stderr, flush=True)
    return {
        "machine": {"cores": os.cpu_count(), "load": os.getloadavg()},
        "test_date": test_date.isoformat(),
        "pretraining_seconds": seconds,
        "network": settings.network.model_dump(),
        "pretraining": settings.pretraining.model_dump(),
        "curve": figures,
    }


def _judged(member: TransformerMember, test: pd.DataFrame) -> dict[str, float]:
    predicted = member.predict({name: test[name].to_numpy() for name in test.columns})
    truth, unseen = test["label_spend"].to_numpy(), ~test["seen"].to_numpy(bool)
    return {
        "spearman": spearman(truth, predicted),
        "gini": normalised_gini(truth, predicted),
        "spearman_unseen": spearman(truth[unseen], predicted[unseen]),
        "gini_unseen": normalised_gini(truth[unseen], predicted[unseen]),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, :func:`run`, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.pretraining", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", type=Path, help="YAML file of settings")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="shares of the training users")
    parser.add_argument("--test-date", type=config.parse_date, help="YYYY-MM-DD")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures")
    parser.add_argument("overrides", nargs="*", help="section.key=value")
    given = parser.parse_args(arguments)
    settings = config.load(given.config, given.overrides)
    with tempfile.TemporaryDirectory(prefix="bp-bench-") as folder:
        figures = run(settings, given.shares, Path(folder), given.test_date)
    publish(figures, given.out)


if __name__ == "__main__":
    main()
