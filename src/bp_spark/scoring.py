"""Features of one date and a bundle -> rows of ``scores``, computed on the executors from Arrow batches.

A score depends on nothing but the bundle and the user's features, so a user whose features are those of an earlier night
keeps that night's score, and only the others are computed. The bundle travels as one archive, which every executor unpacks
once; its Python workers map the same files into memory.
"""

from __future__ import annotations

import atexit
import gc
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyspark import SparkFiles, TaskContext
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import to_arrow_schema
from pyspark.sql.types import StructField, StructType

from bp_spark import __version__, parquet
from bp_spark.config import ScoringConfig
from bp_spark.errors import BundleError
from bp_spark.model import bundle as bundles
from bp_spark.model.bundle import Bundle
from bp_spark.model.columns import Columns, from_arrow
from bp_spark.model.explanation import SEQUENCE
from bp_spark.model.fusion import LEVEL_BORDERS, relative_width
from bp_spark.session import with_settings
from bp_spark.tables import SCORES

REASONS = 3
ANSWERS = (
    "expected_spend",
    "low",
    "high",
    "p_active",
    "score",
    "level",
    "risk_level",
    "expected_by_horizon",
    "base_spend",
    "reasons",
    "other_reasons",
)
"""Columns of SCORES that a bundle computes."""
MONEY = ("expected_spend", "low", "high", "expected_by_horizon", "base_spend", "reasons", "other_reasons")
"""Those of ANSWERS that the level of the platform moves."""
KEPT = ("user_key", "input_digest")
"""Columns of ``user_features`` that SCORES has too."""
ORIGIN = ("bundle_digest", "run_id", "features_version", "code_version", "computed_on", "scored_at")
"""Columns of SCORES that say where a score comes from: one that is carried forward keeps them."""
NUMBERS = ("expected_spend", "low", "high", "p_active", "score")
WORDS = ("user_key", "bundle_digest", "input_digest")
COMPARED = (*WORDS, *ANSWERS)
"""Columns of SCORES that are the same whenever and with whomever a night is computed."""
TOLERANCE = 1e-5
"""How far two computations of a number may be apart, relative to it where it is above 1: single precision sums of the network
depend on who shares the batch, by about 1e-7."""
REASON = pa.struct(
    [
        ("group", pa.string()),
        ("contribution", pa.float64()),
        ("feature", pa.string()),
        ("value", pa.float64()),
    ]
)
ROWS_AT_ONCE = 65_536
"""Rows of an Arrow batch at most, however narrow they are."""

_archives: dict[tuple[str, str, str], Path] = {}
_loaded: dict[str, Bundle] = {}


def score(
    users: DataFrame,
    bundle: Bundle,
    score_date: date,
    features_version: int,
    run_id: str | None = None,
    places: DataFrame | None = None,
    batch_mb: int = ScoringConfig().batch_mb,
) -> DataFrame:
    """Compute the score of every row of ``users``, or of those at ``places``.

    Args:
        users: rows of ``user_features`` of one date.
        bundle: the model.
        features_version: Delta version of ``user_features``, recorded with each score.
        run_id: run that computes them, recorded too.
        places: KEPT and where in its file each row lies, of ``users`` or some of them, as :func:`bp_spark.parquet.places`
            gives them: the workers then read the features themselves, and raise FileReadError where they can't.
        batch_mb: megabytes of features that a worker reads at once, where it reads them itself.

    Returns:
        Rows of SCORES.

    Raises:
        BundleError: ``users`` lacks a column that the bundle reads.
    """
    bundle.check_inputs(users.columns)
    name, digest = distribute(users.sparkSession, bundle), bundle.digest
    features = users.select(*dict.fromkeys(bundle.required_columns))
    inputs = users.select(*KEPT, *features.columns) if places is None else places
    read: Callable[[Iterable[pa.RecordBatch]], Iterable[pa.RecordBatch]] = iter
    if places is not None:
        schema = to_arrow_schema(features.schema)
        read = partial(parquet.read, schema=schema, batch_bytes=batch_mb << 20, most_rows=ROWS_AT_ONCE)

    def computed(batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        loaded = load_once(name, digest)
        for batch in read(batches):
            yield _answer_batch(loaded, batch, score_date)

    return inputs.mapInArrow(computed, _schema(*KEPT, *ANSWERS)).withColumns(
        {
            "score_date": F.lit(score_date),
            "bundle_digest": F.lit(digest),
            "run_id": F.lit(run_id).cast("string"),
            "features_version": F.lit(features_version).cast("bigint"),
            "code_version": F.lit(__version__),
            "computed_on": F.lit(score_date),
            "scored_at": F.current_timestamp(),
        }
    )


def moved(users: DataFrame, earlier: DataFrame) -> DataFrame:
    """Of whom an earlier night's score doesn't hold: users who are new or gone, or whose features are others now.

    Args:
        users: KEPT of ``user_features``, a user once, and what else is to be told of users.
        earlier: rows of SCORES that the same bundle made, a user at most once.

    Returns:
        The columns of ``users``; of one who is gone only ``user_key`` is known.
    """
    before = earlier.select("user_key", F.col("input_digest").alias("earlier_digest"))
    both = users.join(before, "user_key", "full_outer")
    # a user without a digest, or whom one side lacks, is like nobody
    same = F.coalesce(F.col("input_digest") == F.col("earlier_digest"), F.lit(False))
    return both.filter(~same).drop("earlier_digest")


def carried(earlier: DataFrame, keys: DataFrame, score_date: date, factor: float = 1.0) -> DataFrame:
    """Rows of SCORES for ``score_date``: those of an earlier night but of the users in ``keys``, as computed then.

    Args:
        factor: what the level has moved by since the earlier night; all money is multiplied by it.
    """
    still = earlier.join(keys, "user_key", "left_anti")
    if factor != 1.0:
        still = still.withColumns({name: _times(name, factor) for name in MONEY})
    return still.select("user_key", F.lit(score_date).alias("score_date"), "input_digest", *ANSWERS, *ORIGIN)


def _times(name: str, factor: float) -> Column:
    """A column of MONEY, multiplied."""
    if name == "expected_by_horizon":
        return F.transform_values(name, lambda _, money: money * F.lit(factor))
    if name == "reasons":
        return F.transform(
            name, lambda reason: reason.withField("contribution", reason["contribution"] * F.lit(factor))
        )
    return F.col(name) * F.lit(factor)


def differences(stored: DataFrame, computed: DataFrame, bundle: Bundle, score_date: date) -> DataFrame:
    """How far two computations of the same scores are apart, user by user.

    Args:
        stored: rows of SCORES of one night.
        computed: the same night, as computed by ``bundle``.
        score_date: the night.

    Returns:
        A double for each of COMPARED: 0 where both say the same, up to TOLERANCE where that is due to who shared a batch, more
        where they differ, infinity where one side has nothing to compare. A label on whose border the user stands within
        TOLERANCE counts as the same.
    """
    both = stored.alias("s").join(computed.alias("c"), F.col("s.user_key") == F.col("c.user_key"), "full_outer")
    s, c = ({name: F.col(f"{side}.{name}") for name in COMPARED} for side in "sc")
    apart = {name: _numbers_apart(s[name], c[name]) for name in NUMBERS}
    apart |= {name: _words_apart(s[name], c[name]) for name in WORDS}
    for label, figure, borders in (
        ("level", c["score"], LEVEL_BORDERS),
        ("risk_level", relative_width(c, bundle.fusion.factor(score_date)), bundle.fusion.risk),
    ):
        on_border = reduce(or_, (_numbers_apart(figure, F.lit(border)) <= TOLERANCE for border in borders))
        apart[label] = F.when(on_border, 0.0).otherwise(_words_apart(s[label], c[label]))
    by_horizon = F.map_zip_with(
        s["expected_by_horizon"], c["expected_by_horizon"], lambda _, x, y: _numbers_apart(x, y)
    )
    apart["expected_by_horizon"] = F.array_max(F.map_values(by_horizon))
    apart["reasons"] = _reasons_apart(s["reasons"], c["reasons"])
    apart["base_spend"] = _numbers_apart(s["base_spend"], c["base_spend"])
    apart["other_reasons"] = _money_apart(s["other_reasons"], c["other_reasons"], c["expected_spend"])
    nothing = {name: F.when(s[name].isNull() != c[name].isNull(), math.inf) for name in COMPARED}
    return both.select(*(F.coalesce(nothing[name], apart[name], F.lit(0.0)).alias(name) for name in COMPARED))


def _numbers_apart(x: Column, y: Column) -> Column:
    """Relative to the larger where that is above 1."""
    return _money_apart(x, y, F.lit(1.0))


def _words_apart(x: Column, y: Column) -> Column:
    return F.when(x.eqNullSafe(y), 0.0).otherwise(math.inf)


def _reasons_apart(x: Column, y: Column) -> Column:
    """By group; of one that only one side lists, how much more it is than the least that the other does: which of two nearly
    equal ones is the last to be listed is a matter of rounding."""

    def by_group(reasons: Column, field: str) -> Column:
        return F.map_from_entries(F.transform(reasons, lambda each: F.struct(each["group"], each[field])))

    def sizes(reasons: Column) -> Column:
        return F.array_max(F.transform(reasons, lambda each: F.abs(each["contribution"])))

    def least(reasons: Column) -> Column:
        return F.array_min(F.transform(reasons, lambda each: F.abs(each["contribution"])))

    scale = F.greatest(sizes(x), sizes(y))
    both = F.map_zip_with(
        by_group(x, "contribution"),
        by_group(y, "contribution"),
        lambda _, one, other: (
            F.when(one.isNull(), F.abs(F.abs(other) - least(x)))
            .when(other.isNull(), F.abs(F.abs(one) - least(y)))
            .otherwise(F.abs(one - other))
        ),
    )
    apart = F.array_max(F.map_values(both)) / F.greatest(scale, F.lit(1.0))
    values = F.map_zip_with(by_group(x, "value"), by_group(y, "value"), lambda _, one, other: _values_apart(one, other))
    features = F.map_zip_with(
        by_group(x, "feature"), by_group(y, "feature"), lambda _, one, other: _values_apart(one, other)
    )
    return F.greatest(
        F.coalesce(apart, F.lit(0.0)), F.array_max(F.map_values(values)), F.array_max(F.map_values(features))
    )


def _money_apart(x: Column, y: Column, scale: Column) -> Column:
    """Relative to a user's money: what is left of sums that cancel is as exact as these are."""
    apart = F.abs(x - y) / F.greatest(F.abs(scale), F.abs(x), F.abs(y), F.lit(1.0))
    return F.when(x.eqNullSafe(y), 0.0).otherwise(F.coalesce(apart, F.lit(math.inf)))


def _values_apart(x: Column, y: Column) -> Column:
    """0 where both are the same or one side has none."""
    return F.when(x.isNull() | y.isNull() | (x == y), 0.0).otherwise(math.inf)


@contextmanager
def sized(spark: SparkSession, config: ScoringConfig) -> Iterator[None]:
    """For the block, Spark cuts tasks and Arrow batches by bytes, as configured."""
    settings = {
        "spark.sql.files.maxPartitionBytes": f"{config.partition_mb}MB",
        "spark.sql.execution.arrow.maxBytesPerBatch": f"{config.batch_mb}MB",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(ROWS_AT_ONCE),
        # above 100 columns Spark would build every row whole before it asks whether the user changed
        "spark.sql.codegen.maxFields": "1000",
    }
    with with_settings(spark, settings):
        yield


def prediction_udf(spark: SparkSession, bundle: Bundle, name: str | None = None, on: date | None = None) -> Any:
    """Return an iterator pandas UDF from a struct of ``user_features`` to a struct of ANSWERS.

    :func:`score` gives the same answers without the way through pandas. The bundle goes to each executor once; a Python worker
    loads it once and shares the memory of its weights with the other workers of the machine.

    Args:
        bundle: the model.
        name: what SQL calls the function; without one it isn't registered. ``predict_spend(struct(*))`` is computed from
            the columns that the bundle reads and ignores the others.
        on: the date from which the spend counts; by default that of the bundle's training.
    """
    folder, digest, inputs = distribute(spark, bundle), bundle.digest, tuple(dict.fromkeys(bundle.required_columns))
    schema = _schema(*ANSWERS)

    @F.pandas_udf(schema)  # type: ignore[call-overload]
    def answer(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        loaded = load_once(folder, digest)
        for batch in batches:
            yield as_frame(answers(loaded, {column: batch[column].to_numpy() for column in inputs}, on))

    return answer if name is None else spark.udf.register(name, answer)


def _schema(*names: str) -> StructType:
    """Those columns of SCORES, as Python gives them: Spark takes none for NOT NULL."""
    return StructType([StructField(name, SCORES.schema[name].dataType) for name in names])


def answers(bundle: Bundle, columns: Columns, on: date | None = None) -> dict[str, pa.Array]:
    """ANSWERS for users, an Arrow array of one value each per column.

    Args:
        on: the date from which the spend counts; by default that of the bundle's training.
    """
    predicted = bundle.predict(columns, on)
    made: dict[str, pa.Array] = {
        "expected_by_horizon": _by_horizon(bundle, predicted["expected_by_horizon"]),
    } | _reasons(bundle, columns, predicted, on)
    return {name: made[name] if name in made else pa.array(predicted[name]) for name in ANSWERS}


def as_frame(said: Mapping[str, pa.Array]) -> pd.DataFrame:
    """What :func:`answers` returned, for people who work with pandas."""
    return pa.table(said).to_pandas(maps_as_pydicts="strict")


def _answer_batch(bundle: Bundle, batch: pa.RecordBatch, score_date: date) -> pa.RecordBatch:
    """``user_key``, ``input_digest`` and ANSWERS; users with the same features are computed once."""
    inputs = batch.select([name for name in batch.schema.names if name not in KEPT])
    first, place = _distinct(batch.column("input_digest"))
    if len(first) < batch.num_rows:
        said = answers(bundle, from_arrow(inputs.take(pa.array(first))), score_date)
        said = {name: array.take(pa.array(place)) for name, array in said.items()}
    else:
        said = answers(bundle, from_arrow(inputs), score_date)
    return pa.RecordBatch.from_pydict(
        {"user_key": batch.column("user_key"), "input_digest": batch.column("input_digest"), **said}
    )


def _distinct(digests: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the first user with each digest, and for each user where among these the own one is."""
    if digests.null_count:
        # features of an older version have none: nobody is known to be like another
        everyone = np.arange(len(digests))
        return everyone, everyone
    _, first, place = np.unique(digests.to_numpy(), return_index=True, return_inverse=True)
    return first, place


def _by_horizon(bundle: Bundle, expected: np.ndarray) -> pa.MapArray:
    """Days -> expected spend of each user, from float64 [users, horizons]."""
    users, horizons = expected.shape
    offsets = np.arange(users + 1, dtype=np.int32) * horizons
    return pa.MapArray.from_arrays(offsets, np.tile(np.array(bundle.horizons.days, np.int32), users), expected.ravel())


def _reasons(
    bundle: Bundle, columns: Columns, predicted: Mapping[str, np.ndarray], on: date | None
) -> dict[str, pa.Array]:
    """The groups of features that moved each user's expected spend most, each with the feature that did most of it; the sum
    of all others, and what they count from. None where the bundle gives no reasons."""
    users = len(predicted["expected_spend"])
    explanation = bundle.explanation
    if explanation is None or users == 0:
        return {
            "base_spend": pa.nulls(users, pa.float64()),
            "reasons": pa.ListArray.from_arrays(np.zeros(users + 1, np.int32), pa.array([], REASON)),
            "other_reasons": pa.nulls(users, pa.float64()),
        }
    given, rest, base = bundle.explain(columns, predicted, on)
    names = explanation.group_names
    by_group = np.zeros((len(names), users))
    foremost = np.full((len(names), users), -1)
    groups = np.array(explanation.groups)
    for number, name in enumerate(names):
        if name == SEQUENCE:
            by_group[number] = rest
            continue
        theirs = np.flatnonzero(groups == name)
        by_group[number] = given[theirs].sum(axis=0)
        foremost[number] = theirs[np.argmax(given[theirs] * np.sign(by_group[number]), axis=0)]
    count = min(REASONS, len(names))
    # stable: of two that are equal the first is first
    top = np.argsort(-np.abs(by_group), axis=0, kind="stable")[:count]
    contribution = np.take_along_axis(by_group, top, axis=0)
    feature = np.take_along_axis(foremost, top, axis=0).T.ravel()
    told = feature >= 0
    values = np.full(len(feature), np.nan)
    tabular = np.stack([np.asarray(columns[name], np.float64) for name in explanation.features])
    values[told] = tabular[feature[told], np.repeat(np.arange(users), count)[told]]
    listed = pa.StructArray.from_arrays(
        [
            pa.array(names, pa.string()).take(pa.array(top.T.ravel())),
            pa.array(contribution.T.ravel()),
            pa.array(explanation.features, pa.string()).take(pa.array(feature, mask=~told)),
            pa.array(values, from_pandas=True),
        ],
        fields=list(REASON),
    )
    return {
        "base_spend": pa.array(np.full(users, base)),
        "reasons": pa.ListArray.from_arrays(np.arange(users + 1, dtype=np.int32) * count, listed),
        "other_reasons": pa.array(by_group.sum(axis=0) - contribution.sum(axis=0)),
    }


# --- the bundle on the executors ---------------------------------------------------------------------------------------


def distribute(spark: SparkSession, bundle: Bundle) -> str:
    """Send the bundle to executors, present and future, once a session; returns the name of its folder there."""
    name = f"bp-spark-bundle-{bundle.digest[:32]}"
    # of a Spark Connect session, what it was sent is its own
    key = (str(spark.conf.get("spark.app.id")), str(getattr(spark, "session_id", "")), name)
    if key not in _archives:
        # executors that start later fetch it too: it stays for as long as this process
        folder = Path(tempfile.mkdtemp(prefix="bp-spark-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        _archives[key] = folder / f"{name}.zip"
        with zipfile.ZipFile(_archives[key], "w", zipfile.ZIP_STORED) as archive:
            for path in sorted(bundle.folder.iterdir()):
                archive.write(path, path.name)
        spark.addArtifact(f"{_archives[key]}#{name}", archive=True)
    return name


def load_once(name: str, digest: str) -> Bundle:
    """The bundle, verified as any bundle is and loaded by the first task of this worker process."""
    if digest not in _loaded:
        _loaded.clear()
        bundle = bundles.load(SparkFiles.get(name))
        if bundle.digest != digest:
            raise BundleError(f"{bundle.folder}: is bundle {bundle.digest[:12]}, not the one sent, {digest[:12]}")
        _loaded[digest] = bundle
        # a worker collects garbage after each task: without this it would look at all objects of all libraries each time
        gc.freeze()
    fit_to_task(_loaded[digest], TaskContext.get())
    return _loaded[digest]


def fit_to_task(bundle: Bundle, task: TaskContext | None) -> None:
    """Let the bundle use what the task was given: as many threads as it has cores, for more would take those of the next
    task, and its GPU, if it has one.
    """
    cores = task.cpus() if task else 1
    for member in bundle.members.values():
        member.set_threads(cores)
    transformer: Any = bundle.members.get("transformer")
    resources: Mapping[str, Any] = task.resources() if task else {}
    if transformer is not None and "gpu" in resources:
        transformer.move_to(f"cuda:{resources['gpu'].addresses[0]}")
