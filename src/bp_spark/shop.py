"""The Python API: settings, Spark session, tables and stages of a platform in one object, over :mod:`bp_spark.pipeline`.

Spark and the models are imported at their first use, so that ``import bp_spark`` takes no time.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bp_spark.core import config, extras
from bp_spark.core.config import Config, parse_date
from bp_spark.core.errors import ConfigError

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

    from bp_spark.lakehouse.store import Lakehouse
    from bp_spark.night import NightResult
    from bp_spark.pipeline import ReportResult, ScoreResult, TrainResult

Day = str | date
"""A date, or its text as YYYY-MM-DD."""
DEMO_DATE = "2017-10-03"
DEMO_SECRET = "the Complete Journey is public: nothing to hide"  # noqa: S105
DEMO_SETTINGS = "BP_SPARK_SETTINGS"
"""Environment variable with more settings of the demo, as a shell splits them."""


class Shop:
    """A platform: what `bp_spark.open` returns.

    The other functions of the pipeline take the attributes `spark` and `settings`, as in
    `bp_spark.pipeline.backtest(shop.spark, shop.settings)`.

    Attributes:
        settings: Every setting, typed and frozen.

    Example:
        ```python
        import bp_spark

        shop = bp_spark.open("settings.yaml", ["tables.path=/data/lakehouse"])
        shop.featurize("2024-10-01")
        shop.train()
        shop.score("2024-10-01")
        shop.table("scores_latest").orderBy("score", ascending=False).show(10)
        ```
    """

    def __init__(self, settings: Config, spark: SparkSession | None = None) -> None:
        self.settings = settings
        self._given_session = spark

    @cached_property
    def spark(self) -> SparkSession:
        """Return the Spark session: the given one, the active one, or a local one that starts now.

        The time zone of the session is set to UTC.

        Raises:
            PlatformError: The extra `spark` or a usable Java is missing, or the session has no Delta Lake.
        """
        extras.require("spark", "a session")
        from bp_spark.core.session import MODEL_MODULES, get_session, prepare

        if self._given_session is not None:
            return prepare(self._given_session)
        return get_session(self.settings, worker_imports=MODEL_MODULES)

    def featurize(self, *as_of: Day, rebuild: bool = False, strict: bool = False) -> list[dict[str, Any]]:
        """Ingest new deliveries, clean them, and write `user_features` for the dates.

        Args:
            *as_of: Dates to build features for, from events before them.
            rebuild: Derive all tables again from the raw tables, as after a change of rules.
            strict: Refuse all new files if one can't be read. By default that one is named in the log and left for the next
                call.

        Returns:
            The stages that ran, as rows of the table `runs`.

        Raises:
            ConfigError: The mapping has a mistake, or there is no secret. This shows before a session starts.
            DataError: The source breaks the raw contract, or a date lies before the data.

        Example:
            ```python
            shop.featurize("2024-09-01", "2024-10-01")
            ```
        """
        extras.require("spark", "featurize")
        from bp_spark.ingest.onboarding.preflight import require_ready

        require_ready(self.settings)
        from bp_spark import pipeline

        return pipeline.featurize(self.spark, self.settings, [_day(day) for day in as_of], rebuild, strict)

    def train(self, test_date: Day | None = None) -> TrainResult:
        """Fit all members on past dates, evaluate the bundle at a date that it has not seen, and promote or refuse it.

        Args:
            test_date: Evaluation date; the training sees nothing from that date on. By default the newest date whose
                horizon is over. A bundle that passes there is then fitted again, with all data up to now.

        Returns:
            The bundle, its metrics (a pandas DataFrame), whether it was promoted and why, and the stages.

        Raises:
            DataError: There are no events, or too little history.
            PlatformError: The extra `train` is not installed.

        Example:
            ```python
            trained = shop.train("2024-07-01")
            print(trained.promoted, trained.reason)
            ```
        """
        extras.require("spark", "train")
        from bp_spark import pipeline

        return pipeline.train(self.spark, self.settings, None if test_date is None else _day(test_date))

    def score(self, score_date: Day, bundle: str | Path | None = None, full: bool = False) -> ScoreResult:
        """Score every user of a date into the table `scores`; only that date is replaced.

        The command `bp-spark score` also writes the profiles and checks for drift.

        Args:
            score_date: Date to score; run `featurize` for it first.
            bundle: Folder of a bundle, or its address in the registry as `models:/NAME@ALIAS`; by default the promoted one.
            full: Compute every score, and carry none forward from an earlier night.

        Returns:
            The number of users and of computed scores, users and money by level, the bundle, and the stages.

        Raises:
            BundleError: No bundle is promoted, it can't be trusted, or it doesn't fit the features.
            DataError: There are no features of that date.

        Example:
            ```python
            night = shop.score("2024-10-01")
            print(f"{night.users:,} users, {night.computed:,} computed")
            ```
        """
        extras.require("spark", "score")
        from bp_spark import pipeline

        return pipeline.score(self.spark, self.settings, _day(score_date), bundle, full)

    def night(self, day: Day, *, strict: bool = False) -> NightResult:
        """Run a whole night: `featurize`, `score`, `profile`, `recommend` where it is due, the check for drift, and `report`.

        A step whose inputs are unchanged writes nothing. Run a night that was stopped again, and it goes on where it was.

        Args:
            day: Date to score, from events before it.
            strict: Refuse all new files if one can't be read.

        Returns:
            What was scored, drift, the page, and the stages.

        Raises:
            BundleError: No bundle is promoted, it can't be trusted, or it doesn't fit the features.
            ConfigError: The mapping has a mistake, or a setting doesn't fit the stored tables.
            DataError: The source breaks the raw contract, or the date lies before the data.

        Example:
            ```python
            print(shop.night("2024-10-01").report.page)
            ```
        """
        extras.require("spark", "a night")
        from bp_spark.ingest.onboarding.preflight import require_ready

        require_ready(self.settings)
        from bp_spark.night import night

        return night(self.spark, self.settings, _day(day), strict=strict)

    def profile(self, score_date: Day | None = None) -> list[dict[str, Any]]:
        """Write the profiles and market segments as of a scored date.

        Args:
            score_date: By default the newest scored date.

        Returns:
            The stages that ran.

        Raises:
            DataError: Nothing has been scored yet.
        """
        extras.require("spark", "profile")
        from bp_spark import pipeline

        return pipeline.profile(self.spark, self.settings, None if score_date is None else _day(score_date))

    def recommend(self, score_date: Day) -> list[dict[str, Any]]:
        """Write the items that each scored user is likely to buy, with the reason, into `recommendations`.

        Args:
            score_date: A scored date.

        Returns:
            The stages that ran.

        Raises:
            DataError: The date has not been scored.

        Example:
            ```python
            shop.recommend("2024-10-01")
            shop.table("recommendations").filter("rank <= 3").show()
            ```
        """
        extras.require("spark", "recommend")
        from bp_spark import pipeline

        return pipeline.recommend(self.spark, self.settings, _day(score_date))

    def report(self, score_date: Day, output: str | Path | None = None) -> ReportResult:
        """Write the page of a night, one HTML file without any user in it.

        Args:
            score_date: A scored date.
            output: File to write; by default `night-DATE.html` in `evaluation.reports`.

        Returns:
            The page, and users and money by level.

        Raises:
            DataError: The date has not been scored.
        """
        extras.require("spark", "report")
        from bp_spark import pipeline

        file = None if output is None else Path(output)
        return pipeline.report(self.spark, self.settings, _day(score_date), file)

    def table(self, name: str, version: int | None = None) -> DataFrame:
        """Return a table as a Spark DataFrame.

        Args:
            name: Its name without the namespace, as `scores_latest`.
            version: Delta version; by default the newest.

        Raises:
            DataError: There is no such table.

        Example:
            ```python
            tonight = shop.table("scores_latest").select("user_key", "expected_spend", "level")
            before = shop.table("scores", version=3)
            ```
        """
        return self._lakehouse.read(name, version)

    def sql(self, query: str) -> DataFrame:
        """Return the result of a SQL query, as a Spark DataFrame.

        Args:
            query: SQL that names tables by the namespace, as `bp.scores_latest`, wherever they are stored.

        Raises:
            AnalysisException: The query doesn't fit the tables (Spark's own error).
            ConfigError: In this session the names belong to the tables of another platform.

        Example:
            ```python
            shop.sql("SELECT level, sum(expected_spend) AS spend FROM bp.scores_latest GROUP BY level").show()
            ```
        """
        if self.settings.tables.path is not None:
            self._reserve_names(self.settings.tables.path)
            from bp_spark.lakehouse.tables import TABLE_NAMES

            self._lakehouse.register(TABLE_NAMES)
        return self.spark.sql(query)

    def _reserve_names(self, path: str) -> None:
        """Refuse a namespace that names another platform's tables in this session, which queries would read silently."""
        namespace = self.settings.tables.namespace
        key = f"bp_spark.names.{namespace}"
        owner = self.spark.conf.get(key, path)
        if owner != path:
            raise ConfigError(f"{namespace} names the tables of {owner} in this session: set tables.namespace")
        self.spark.conf.set(key, path)

    def prediction_udf(self, name: str = "predict_spend", bundle: str | Path | None = None) -> Callable[..., Column]:
        """Return a model as a function of Spark, for your own columns, joins and what-if queries.

        Args:
            name: Name of the function in SQL.
            bundle: Folder of a bundle; by default the promoted one.

        Returns:
            The function, registered for SQL. It takes a struct of `user_features` and returns a struct of the predictions in
                `scores`.

        Raises:
            BundleError: No bundle is promoted, or it can't be trusted.

        Example:
            ```python
            shop.prediction_udf("predict_spend")
            shop.sql("SELECT user_key, predict_spend(struct(*)).expected_spend FROM bp.user_features").show()
            ```
        """
        extras.require("spark", "a prediction")
        from bp_spark.registry.bundle import load_promoted
        from bp_spark.scoring import prediction

        loaded = load_promoted(self.settings, bundle)
        predict: Callable[..., Column] = prediction.prediction_udf(self.spark, loaded, name)
        return predict

    @cached_property
    def _lakehouse(self) -> Lakehouse:
        spark = self.spark
        from bp_spark.lakehouse.store import Lakehouse

        return Lakehouse(spark, self.settings.tables)


def open_demo(overrides: Sequence[str] = (), spark: SparkSession | None = None) -> Shop:
    """Open the demo's platform, with its settings and its public secret; see :func:`bp_spark.open_demo`."""
    environment_overrides = shlex.split(os.environ.get(DEMO_SETTINGS, ""))
    settings = config.load(config.DEMO_FILE, [*environment_overrides, *overrides])
    kind, _, path = settings.privacy.secret.partition(":")
    if kind == "file":
        extras.require("spark", "the demo")
        from bp_spark.ingest.pseudonyms import make_secret

        # Holdout and folds depend on user keys: with a random secret, each demo would have other figures.
        make_secret(Path(path), DEMO_SECRET)
    return Shop(settings, spark)


def _day(day: Day) -> date:
    return parse_date(day) if isinstance(day, str) else day
