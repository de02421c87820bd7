"""The synthetic platform: what it delivers, checked against the truth that it keeps apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from scipy import stats

from bp_spark.core.config import SyntheticConfig
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.ingest.sources.files import FilesSource
from bp_spark.ingest.sources.synthetic import Summary, generate, users
from bp_spark.ingest.sources.synthetic import logs as synthetic_logs
from bp_spark.ingest.sources.synthetic.currency import CNY_RATE
from bp_spark.ingest.sources.synthetic.draws import normal, uniform
from bp_spark.ingest.sources.synthetic.items import CELLS, HOT_ITEM, popular_item
from bp_spark.ingest.sources.synthetic.logs import WHALE
from bp_spark.ingest.sources.synthetic.platform import LOGS as EVENT_LOGS

pytestmark = pytest.mark.slow

LOGS = (*EVENT_LOGS, "consultations")
KINDS = (*SyntheticConfig().kinds, "consultations")
CONFIG = SyntheticConfig(users=1_500, days=90, first_day=date(2024, 9, 1), malformed_rate=0.03, kinds=KINDS)
LAST_DAY = CONFIG.first_day + timedelta(CONFIG.days - 1)
PREMIUM = "premium|luxury|best|designer|正品|高端|奢华|旗舰"
BARGAIN = "cheap|discount|budget|sale|便宜|优惠|打折|特价"
FINE, LOW = "Quality|finer|质量比|高档", "lowest|coupon|最便宜|优惠券"
"""Words of consultations about quality, and about low prices."""


@dataclass(frozen=True)
class Platform:
    folder: Path
    summary: Summary
    frames: dict[str, pd.DataFrame]

    def dirt(self, log: str) -> dict[str, int]:
        """Kind -> rows, as the summary tells."""
        return {kind: count for (of, kind), count in self.summary.dirt.items() if of == log}

    def clean(self, log: str) -> pd.DataFrame:
        """Rows that are readable and spoiled in no way, each once, with ``ts`` as a time."""
        df = self.frames[log].drop(columns="delivery_day").drop_duplicates()
        ts = pd.to_datetime(df["ts"], format="%Y-%m-%d %H:%M:%S", errors="coerce")
        df = df.assign(ts=ts)[ts.notna() & (ts.dt.year < 2900) & df["user_id"].notna()]
        if log == "transactions":
            amount = pd.to_numeric(df["amount"], errors="coerce")
            df = df.assign(amount=amount)[(amount < 1e6) & df["currency"].isin(["USD", "CNY"])]
            df = df[df["item_id"].isin(self.frames["items"]["item_id"])]
            df["usd"] = df["amount"] * np.where(df["currency"] == "CNY", CNY_RATE, 1.0)
        return df


def _frames(folder: Path) -> dict[str, pd.DataFrame]:
    # pandas by day folder: no Spark reader stands between the files and the checks
    frames = {}
    for table in (name for name in (*LOGS, "items", "users", "rates") if (folder / name).exists()):
        days = [
            pd.read_parquet(day).assign(delivery_day=day.name.removeprefix("delivery_day="))
            for day in sorted((folder / table).glob("delivery_day=*"))
        ]
        frames[table] = pd.concat(days, ignore_index=True)
    return frames


@contextmanager
def _setting(spark: SparkSession, key: str, value: str) -> Iterator[None]:
    before = spark.conf.get(key)
    spark.conf.set(key, value)
    try:
        yield
    finally:
        spark.conf.set(key, str(before))


@pytest.fixture(scope="module")
def platform(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    folder = tmp_path_factory.mktemp("platform") / "files"
    summary = generate(spark, CONFIG, str(folder))
    return Platform(folder, summary, _frames(folder))


@pytest.fixture(scope="module")
def truth(platform: Platform) -> pd.DataFrame:
    return pd.read_parquet(platform.folder / "truth" / "users").set_index("user_id")


def test_the_same_rows_whatever_the_number_of_tasks(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SyntheticConfig(users=200, days=8, kinds=KINDS)
    generate(spark, config, str(tmp_path / "a"))
    monkeypatch.setattr(users, "TASKS_AT_LEAST", 3)
    with _setting(spark, "spark.sql.shuffle.partitions", "5"), _setting(spark, "spark.sql.adaptive.enabled", "false"):
        generate(spark, config, str(tmp_path / "b"))
    first, second = _frames(tmp_path / "a"), _frames(tmp_path / "b")
    for table, rows in first.items():
        columns = list(rows.columns)
        pd.testing.assert_frame_equal(
            *(df.sort_values(columns, ignore_index=True) for df in (rows, second[table])), check_exact=True
        )


def test_another_seed_gives_other_rows(spark: SparkSession) -> None:
    first, second = (
        users.users(spark, SyntheticConfig(users=100, seed=seed)).agg(F.sum("z")).collect() for seed in (1, 2)
    )
    assert first != second


def _recounted(log: str, df: pd.DataFrame, items: set[str]) -> dict[str, int]:
    """Count the kinds of dirt in a log's files by looking at the rows."""
    ts = pd.to_datetime(df["ts"], format="%Y-%m-%d %H:%M:%S", errors="coerce")
    spoiled = {
        "missing_user": df["user_id"].isna(),
        "unreadable_ts": ts.isna() & ~df["ts"].str.startswith("2999"),
        "future_ts": df["ts"].str.startswith("2999"),
    }
    if log == "transactions":
        amount = pd.to_numeric(df["amount"], errors="coerce")
        spoiled["unreadable_amount"] = amount.isna()
        spoiled["huge_amount"] = amount > 1e6
        spoiled["unknown_currency"] = ~df["currency"].isin(["USD", "CNY"])
    if log == "behaviours":
        spoiled["unknown_action"] = ~df["action"].isin(["browse", "click", "cart", "favourite", "coupon"])
    if log == "searches":
        spoiled["empty_query"] = df["query"].str.strip() == ""
        spoiled["broken_unicode"] = df["query"].str.contains("\ufffd")
    if log == "reviews":
        spoiled["rating_out_of_range"] = pd.to_numeric(df["rating"]) > 5
        spoiled["broken_unicode"] = df["text"].str.contains("\ufffd")
    if log == "consultations":
        spoiled["unreadable_solved"] = df["solved"] == "maybe"
    if "item_id" in df:
        spoiled["unknown_item"] = ~df["item_id"].isin(items)
    malformed = pd.concat(spoiled, axis=1).any(axis=1)
    content = [column for column in df.columns if column != "delivery_day"]
    # equal rows of one delivery are two events; those of another delivery are the same ones again
    by_day = df[~malformed].fillna("").groupby([*content, "delivery_day"]).size().rename("copies").reset_index()
    times = by_day.groupby(content).agg(min=("delivery_day", "min"), sum=("copies", "sum"), max=("copies", "max"))
    times = times.reset_index()
    return {
        **{kind: int(rows.sum()) for kind, rows in spoiled.items()},
        "duplicate": int((times["sum"] - times["max"]).sum()),
        "late": int((times["min"] > times["ts"].str[:10]).sum()),
    }


@pytest.mark.parametrize("log", LOGS)
def test_dirt_is_counted_exactly(platform: Platform, log: str) -> None:
    df = platform.frames[log]
    written = pd.read_parquet(platform.folder / "truth" / "dirt").query("table == @log").set_index("kind")["rows"]
    assert _recounted(log, df, set(platform.frames["items"]["item_id"])) == written.to_dict()
    assert written.to_dict() == platform.dirt(log)
    assert len(df) == platform.summary.rows[log]


@pytest.mark.parametrize("log", LOGS)
def test_dirt_comes_at_the_configured_rates(platform: Platform, log: str) -> None:
    dirt = platform.dirt(log)
    rows = platform.summary.rows[log] - dirt["duplicate"]
    late, duplicates = dirt.pop("late"), dirt.pop("duplicate")
    for count, rate in (
        (late, CONFIG.late_rate),
        (duplicates, CONFIG.duplicate_rate),
        (sum(dirt.values()), CONFIG.malformed_rate),
    ):
        assert stats.binomtest(count, rows, rate).pvalue > 1e-4


def test_late_and_repeated_rows_come_within_thirty_days_and_nothing_comes_early(platform: Platform) -> None:
    for log in LOGS:
        df = platform.frames[log]
        ts = pd.to_datetime(df["ts"], format="%Y-%m-%d %H:%M:%S", errors="coerce")
        readable = ts.dt.year < 2900
        delay = (pd.to_datetime(df["delivery_day"]) - ts.dt.normalize()).dt.days[readable]
        assert delay.between(0, 30).all()
        assert (delay > 0).any()
        assert ts[readable].min() >= pd.Timestamp(CONFIG.first_day)
        assert ts[readable].max() < pd.Timestamp(LAST_DAY) + pd.Timedelta(days=1)


def test_the_purchase_process_has_the_published_marginals(platform: Platform, truth: pd.DataFrame) -> None:
    rate = stats.gamma(users.LAMBDA_SHAPE, scale=users.LAMBDA_MEAN / users.LAMBDA_SHAPE)
    assert stats.kstest(truth["lambda"], rate.cdf).pvalue > 1e-3
    assert stats.kstest(truth["mu"] * users.MU_SCALE_DAYS, stats.gamma(users.MU_SHAPE).cdf).pvalue > 1e-3
    assert stats.kstest(truth["z"], stats.norm.cdf).pvalue > 1e-3
    value = stats.invgamma(users.NU_SHAPE, scale=users.VALUE_SHAPE * users.NU_SCALE)
    assert stats.kstest(truth["mean_value"], value.cdf).pvalue > 1e-3
    sales = platform.clean("transactions").query("amount > 0")
    expected = (truth["lambda"] * truth["alive_days"]).sum()
    # orders with all lines spoiled or misread are missing: under 3 %
    assert expected * 0.96 - 4 * expected**0.5 < sales["order_id"].nunique() < expected + 4 * expected**0.5


def test_order_values_scatter_around_the_users_mean_as_gamma_gamma_says(
    platform: Platform, truth: pd.DataFrame
) -> None:
    sales = platform.clean("transactions").query("amount > 0 and currency == 'USD'")
    orders = sales.groupby(["user_id", "order_id"])["usd"].agg(["sum", "size"]).reset_index()
    ratio = orders["sum"] / orders["user_id"].map(truth["mean_value"])
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert ratio.std() == pytest.approx(users.VALUE_SHAPE**-0.5, abs=0.05)
    assert orders["size"].between(1, 6).all()
    assert orders["size"].nunique() == 6


def test_purchasing_power_shows_in_what_users_do(platform: Platform, truth: pd.DataFrame) -> None:
    z = truth["z"]
    spend = platform.clean("transactions").groupby("user_id")["usd"].sum()
    alive = truth[truth["alive_days"] >= 60]
    assert stats.spearmanr(alive["z"], spend.reindex(alive.index).fillna(0)).statistic > 0.35
    sales = platform.clean("transactions").query("amount > 0")
    category = sales["item_id"].map(platform.frames["items"].set_index("item_id")["category"])
    unit = np.log(sales["usd"] / sales["quantity"])
    tier = (unit - unit.groupby(category).transform("mean")).groupby(sales["user_id"]).mean()
    assert stats.spearmanr(z.reindex(tier.index), tier).statistic > 0.4
    queries = platform.clean("searches")
    premium, bargain = (queries["query"].str.contains(words) for words in (PREMIUM, BARGAIN))
    priced = queries[premium | bargain]
    assert stats.spearmanr(z.reindex(priced["user_id"]), premium[priced.index]).statistic > 0.3
    asked = platform.clean("consultations")
    fine, low = (asked["text"].str.contains(words) for words in (FINE, LOW))
    told = asked[fine | low]
    assert len(told) > 100
    assert stats.spearmanr(z.reindex(told["user_id"]), fine[told.index]).statistic > 0.3
    reviews = platform.clean("reviews")
    assert stats.spearmanr(z.reindex(reviews["user_id"]), pd.to_numeric(reviews["rating"])).statistic > 0.2
    coupon = sales[pd.to_numeric(sales["discount"]) > 0]
    used = pd.to_numeric(coupon["coupon_discount"]) > 0
    assert stats.spearmanr(z.reindex(coupon["user_id"]), used).statistic < -0.2


@pytest.mark.parametrize(("strength", "least", "most"), [(0.0, -0.1, 0.1), (4.0, 0.7, 1.0)])
def test_words_tell_as_much_of_purchasing_power_as_is_asked_for(
    spark: SparkSession, strength: float, least: float, most: float
) -> None:
    config = SyntheticConfig(words_of_power=strength)
    columns = {"user_id": F.lit("u"), "z": normal(config, "z", "id"), "second": F.lit(0)}
    columns |= dict.fromkeys(("visit", "line"), F.lit(1)) | dict.fromkeys(("day", "item", "tier", "type"), F.lit(0))
    lines = spark.range(20_000).withColumns(columns).withColumn("chinese", F.col("id") % 2 == 0)
    asked = synthetic_logs.consultations(lines.withColumn("user_id", F.col("z")), config).toPandas()
    fine, low = (asked["text"].str.contains(words) for words in (FINE, LOW))
    told = asked[fine | low]
    assert len(told) > 1_000
    assert least < stats.spearmanr(told["user_id"], fine[told.index]).statistic < most


def test_events_stay_within_the_days_alive(platform: Platform, truth: pd.DataFrame) -> None:
    dropped = truth["first_alive_day"] + truth["alive_days"]
    assert (dropped < CONFIG.days).mean() > 0.1
    sales = platform.clean("transactions").query("amount > 0")
    for df in (sales, platform.clean("behaviours"), platform.clean("searches")):
        day = (df["ts"] - pd.Timestamp(CONFIG.first_day)).dt.days
        assert (day >= df["user_id"].map(truth["first_alive_day"])).all()
        assert (day < df["user_id"].map(dropped)).all()


def test_refunds_pay_back_a_line_of_an_earlier_order(platform: Platform) -> None:
    rows = platform.clean("transactions")
    every = platform.frames["transactions"].drop_duplicates(["order_id", "line_id"]).set_index(["order_id", "line_id"])
    refunds = rows[rows["amount"] < 0]
    assert (refunds["quantity"] < 0).all()
    spoiled = 0
    for row in refunds.itertuples():
        sale = every.loc[(row.order_id, row.line_id.removesuffix("R"))]
        bought = pd.to_datetime(sale["ts"], format="%Y-%m-%d %H:%M:%S", errors="coerce")
        same = (sale["user_id"], sale["item_id"], sale["amount"]) == (row.user_id, row.item_id, f"{-row.amount:.2f}")
        # exchange rates change between the two days
        same = same or row.currency == "CNY"
        if not same or not pd.Timedelta(days=1) <= row.ts - bought <= pd.Timedelta(days=14):
            spoiled += 1
    assert spoiled <= 0.08 * len(refunds)
    sales = rows[rows["amount"] > 0]
    settled = sales[sales["ts"] < pd.Timestamp(LAST_DAY) - pd.Timedelta(days=14)]
    shares = (
        settled["order_id"].str.cat(settled["line_id"]).isin(refunds["order_id"].str.cat(refunds["line_id"].str[:-1]))
    )
    assert stats.binomtest(int(shares.sum()), len(settled), CONFIG.refund_rate).pvalue > 1e-4


def test_peaks_and_evenings_are_busier(platform: Platform) -> None:
    ts = platform.clean("behaviours")["ts"]
    daily = ts.dt.date.value_counts()
    assert daily.idxmax() == date(2024, 11, 11)
    assert daily.max() > 1.6 * daily.median()
    hourly = ts.dt.hour.value_counts()
    assert hourly[20] > 5 * hourly[3]


def test_too_few_items_for_one_of_each_kind_are_refused(spark: SparkSession, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"synthetic\.items \(3\)"):
        generate(spark, SyntheticConfig(items=3), str(tmp_path))


def test_items_follow_zipfs_law_within_a_cell(spark: SparkSession) -> None:
    config = SyntheticConfig(users=1, items=CELLS * 100)
    drawn = spark.range(20_000).select(
        F.lit(3).alias("type"), F.lit(2).alias("tier"), uniform(config, "test", "id").alias("u")
    )
    item = popular_item(config, F.col("u"), F.lit(1.0))
    counts = drawn.select((item / CELLS).cast("int").alias("rank")).groupBy("rank").count().toPandas()
    top = counts.sort_values("rank").head(20)
    slope = np.polyfit(np.log(top["rank"] + 1.5), np.log(top["count"]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.15)
    assert counts["rank"].between(0, 99).all()


def test_users_write_in_their_language(platform: Platform, truth: pd.DataFrame) -> None:
    for log, column in (("searches", "query"), ("reviews", "text"), ("consultations", "text")):
        df = platform.clean(log)
        df = df[~df[column].str.contains("\ufffd") & (df[column].str.strip() != "")]
        chinese = df[column].str.contains("[\u4e00-\u9fff]")
        assert (chinese == df["user_id"].map(truth["chinese"])).all()
        assert 0.3 < chinese.mean() < 0.7
    titles = platform.frames["items"]["title"].str.contains("[\u4e00-\u9fff]")
    assert 0.3 < titles.mean() < 0.7


def test_a_folder_with_something_in_it_is_refused(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DataError, match="absent or an empty folder"):
        generate(spark, CONFIG, str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_whale_and_a_hot_item_skew_the_platform(spark: SparkSession, tmp_path: Path) -> None:
    config = SyntheticConfig(
        users=200, days=8, whale_events=5_000, hot_item_share=0.4, malformed_rate=0, duplicate_rate=0
    )
    generate(spark, config, str(tmp_path / "files"))
    behaviours = _frames(tmp_path / "files")["behaviours"]
    whale = behaviours["user_id"] == WHALE
    assert whale.sum() == 5_000
    others = behaviours[~whale]
    hot = (others["item_id"] == HOT_ITEM).sum()
    # items of one visit leave several actions each: more scatter than a binomial has
    assert hot / len(others) == pytest.approx(0.4, abs=0.08)


def test_only_the_kinds_asked_for_are_delivered(spark: SparkSession, tmp_path: Path) -> None:
    config = SyntheticConfig(users=20, days=5, kinds=("transactions",))
    summary = generate(spark, config, str(tmp_path / "files"))
    assert set(summary.rows) == {"transactions", "users", "rates"}
    assert not (tmp_path / "files" / "searches").exists()
    assert {delivery.table for delivery in FilesSource(tmp_path / "files" / "source.yaml").deliveries(spark)} == {
        "raw_transactions",
        "raw_users",
        "raw_rates",
    }


def test_the_files_source_reads_every_row_by_the_mapping(spark: SparkSession, platform: Platform) -> None:
    source = FilesSource(platform.folder / "source.yaml")
    raw = source.read(spark, source.deliveries(spark))
    assert {name.removeprefix("raw_"): df.count() for name, df in raw.items()} == platform.summary.rows
    dirt = platform.dirt("transactions")
    unreadable = raw["raw_transactions"].select(F.explode("unreadable").alias("column", "text")).groupBy("column")
    assert {row["column"]: row["count"] for row in unreadable.count().collect()} == {
        "ts": dirt["unreadable_ts"],
        "amount": dirt["unreadable_amount"],
    }
    segments = raw["raw_users"].select(F.map_keys("segment").alias("names")).distinct().collect()
    assert [sorted(row.names) for row in segments] == [["age", "income"]]
