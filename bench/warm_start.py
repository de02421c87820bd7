"""What a bundle of another platform is worth, by how many labels there are: ``python -m bench.warm_start FROM TO``.

In: names of two platforms: ``complete_journey``, ``cdnow`` (a tenth of its customers, from the file ``CDNOW_master.txt`` of the
package ``lifetimes``), or a world of :mod:`bench.worlds`. Out: a line of JSON a figure on standard output; every figure in
``build/bench/warm_start.json``, and what that has already isn't measured again.

A bundle is trained on FROM with the default settings. Then members and stack are fitted on TO, with the labels of a share of
the users and no others: once from nothing (``cold``), and once from that bundle (``warm``). Both predict the same users of TO
as of a date after all labels. Shares are nested, by hash of the user.

- ``warm.SHARE.MEMBER.spearman_gain``, with ``_low`` and ``_high``: Spearman of the warm start less that of the cold one, with
  the 90 % interval of paired resamples; likewise ``mae_gain``, below 0 where the warm start is better. MEMBER is ``fused``,
  ``btyd`` or ``transformer``.
- ``cold.SHARE.coverage``, ``warm.SHARE.coverage``: share of users whose spend lies in the interval.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from bench import say, worlds
from bp_spark import pipeline
from bp_spark.core import config
from bp_spark.core.config import Config
from bp_spark.core.session import MODEL_MODULES, get_session
from bp_spark.evaluation import bootstrap
from bp_spark.features import labels
from bp_spark.ingest.clean import span
from bp_spark.lakehouse.run import Run, recorded
from bp_spark.model.stack import CalibratedStack
from bp_spark.training import cross_fit, dataset, ensemble
from bp_spark.training.warm_start import warm_start

OUT = Path("build/bench/warm_start.json")
SHARES = (0.05, 0.1, 0.25, 1.0)
MEMBERS = ("fused", "btyd", "transformer")
METRICS = ("spearman", "mae")
TEST_DATES = {"complete_journey": date(2017, 10, 3), "cdnow": date(1998, 4, 1)}
ORDERS = """
timezone: UTC
transactions:
  path: "orders.csv"
  format: csv
  columns: {user_id: customer, ts: day, quantity: n, amount: paid}
"""


def source(name: str, folder: Path, cdnow: Path | None) -> list[str]:
    """Write a platform's files; the settings that read them."""
    if name == "complete_journey":
        return []
    if name != "cdnow":
        return worlds.write(worlds.WORLDS[name], folder, seed=1)
    if cdnow is None:
        raise SystemExit("cdnow needs --cdnow FILE")
    rows = pd.read_csv(cdnow, sep=r"\s+", header=0, names=["customer", "day", "n", "paid"], dtype=str)
    rows = rows[rows["customer"].str.endswith("7")]
    rows["day"] = pd.to_datetime(rows["day"], format="%Y%m%d").dt.strftime("%Y-%m-%d")
    folder.mkdir(parents=True)
    rows.to_csv(folder / "orders.csv", index=False)
    (folder / "source.yaml").write_text(ORDERS, encoding="utf-8")
    return ["source.kind=files", f"source.mapping={folder}/source.yaml"]


def settings_of(name: str, folder: Path, cdnow: Path | None, overrides: Sequence[str]) -> Config:
    """The settings of a platform, whose files are written."""
    places = [f"tables.path={folder}/lakehouse", f"training.work_dir={folder}/work", f"bundles={folder}/bundles"]
    made = source(name, folder / "shop", cdnow)
    return config.load(overrides=[*made, *places, "tracking.uri=null", "training.refit=false", *overrides])


def curve(
    spark: SparkSession, settings: Config, day: date, donor: Path, shares: Sequence[float]
) -> list[dict[str, Any]]:
    """Fit on each share of the labels, cold and warm, and compare the predictions."""
    pipeline.featurize(spark, settings, [day])
    warm = settings.model_copy(update={"training": settings.training.model_copy(update={"from_bundle": str(donor)})})
    found = []
    with recorded(spark, settings, "backtest") as run:
        first, _ = span(run.lakehouse)
        dates = labels.cutoffs(first, day, settings.labels)
        version, vocabulary, folder = dataset.prepare(run, dates, day)
        rows, location = run.lakehouse.read("training_set", version), run.lakehouse.location("training_set")
        users = dataset.users_of_test_date(run, day)
        for share in shares:
            place = F.pmod(F.xxhash64(F.lit("share"), F.col("user_key")), F.lit(labels.BUCKETS))
            rows.filter(place < share * labels.BUCKETS).write.format("delta").mode("overwrite").save(location)
            kept = run.lakehouse.version("training_set")
            said = {}
            for name, conf in {"cold": settings, "warm": warm}.items():
                work = folder / f"{name}-{share}"
                said[name] = predictions(Run(spark, conf), conf, kept, users, dates, day, vocabulary, work)
            found.append({"share": share, **compared(said, settings)})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    return found


def predictions(
    run: Run, conf: Config, version: int, users: Any, dates: Sequence[date], day: date, vocabulary: Path, work: Path
) -> pd.DataFrame:
    """Fit members and stack; ``user_key, label_spend, seen``, a column of each of :data:`MEMBERS`, and the interval."""
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    start = warm_start(run)
    level, _ = ensemble.fit_level(run, dates, day, start.level_sd)
    rows = run.lakehouse.read("training_set", version)
    members, out_of_fold, _ = cross_fit.cross_fit(run, rows, day, vocabulary, work, version=version, start=start)
    reference = ensemble.predict_sample(users, members, conf)
    fusion = CalibratedStack.fit(out_of_fold, conf.fusion, reference, level.sd)
    fused = fusion.apply_without_level(fusion.inputs_from(reference))
    columns = {"fused": fused["expected_spend"], "low": fused["low"], "high": fused["high"]}
    names = ["user_key", "label_spend", "seen", *MEMBERS[1:]]
    frame = reference.assign(**columns)[[*names, *columns]].sort_values("user_key", ignore_index=True)
    frame.attrs.update(rows=len(out_of_fold), seconds=time.monotonic() - started, weights=fusion.weights)
    return frame


def compared(said: Mapping[str, pd.DataFrame], settings: Config) -> dict[str, Any]:
    """Paired differences of warm and cold starts, by member and metric."""
    cold, warm = said["cold"], said["warm"]
    found: dict[str, Any] = {
        name: {
            "rows": frame.attrs["rows"],
            "seconds": frame.attrs["seconds"],
            "weights": frame.attrs["weights"],
            "coverage": float(frame["label_spend"].clip(lower=0).between(frame["low"], frame["high"]).mean()),
        }
        for name, frame in said.items()
    }
    for member in MEMBERS:
        pair = cold[["user_key", "label_spend", "seen"]].assign(cold=cold[member], warm=warm[member])
        table = bootstrap.compare(pair, ["cold", "warm"], subject="warm", resamples=settings.evaluation.resamples)
        table = table[(table["population"] == "all") & table["metric"].isin(METRICS)]
        figures: dict[str, Any] = {}
        for row in table.itertuples():
            if isinstance(row.peer, str):
                figures[f"{row.metric}_gain"] = {"value": row.value, "low": row.low, "high": row.high}
            else:
                figures[f"{row.metric}_{row.member}"] = row.value
        found[member] = figures
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Arguments in, a training of FROM, two fits of TO for each share, the figures out."""
    parser = argparse.ArgumentParser(prog="python -m bench.warm_start", description=(__doc__ or "").splitlines()[0])
    names = [*TEST_DATES, *worlds.WORLDS]
    for role, words in {"donor": "that the bundle is of", "target": "that starts from it"}.items():
        parser.add_argument(role, choices=names, help=f"the platform {words}")
    parser.add_argument("--cdnow", type=Path, help="the file CDNOW_master.txt")
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="shares of the users with labels")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="a setting to change")
    parser.add_argument("--out", type=Path, default=OUT, help="file of the figures, gone on with")
    given = parser.parse_args(arguments)
    os.environ.setdefault("BP_SPARK_SECRET", "the secret of benchmarks, of invented users")
    known = json.loads(given.out.read_text()) if given.out.exists() else {}
    pair, asked = f"{given.donor} to {given.target}", {"shares": list(given.shares), "settings": given.set}
    if known.get(pair, {}).get("asked") != asked:
        with tempfile.TemporaryDirectory(prefix="bp-bench-") as place:
            donor, target = (
                settings_of(name, Path(place) / role, given.cdnow, given.set)
                for role, name in {"donor": given.donor, "target": given.target}.items()
            )
            spark = get_session(donor, "bp-spark bench", MODEL_MODULES)
            day = TEST_DATES.get(given.donor, worlds.TEST_DATE)
            pipeline.featurize(spark, donor, [day])
            bundle = pipeline.train(spark, donor, day).bundle
            day = TEST_DATES.get(given.target, worlds.TEST_DATE)
            found = curve(spark, target, day, bundle.folder.absolute(), given.shares)
        known[pair] = {"asked": asked, "curve": found}
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    for row in known[pair]["curve"]:
        for member in MEMBERS:
            for metric in METRICS:
                gain = row[member][f"{metric}_gain"]
                name = f"warm.{row['share']}.{member}.{metric}_gain"
                say(name, round(gain["value"], 4))
                say(f"{name}_low", round(gain["low"], 4))
                say(f"{name}_high", round(gain["high"], 4))
        for name in ("cold", "warm"):
            say(f"{name}.{row['share']}.coverage", round(row[name]["coverage"], 4))


if __name__ == "__main__":
    main()
