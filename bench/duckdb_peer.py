"""The data half of the platform once more, in DuckDB: the same raw files in, the same features out; what Spark is measured by.

In: the raw tables' active Parquet files, and what the language model made of each text. Out: the tables ``events``,
``quarantine``, ``texts``, ``daily`` and ``category_days`` in a database file, and the features as Parquet. The rules, the
identity of an event, the aggregates and the expressions are those of :mod:`bp_spark`; the catalogue's SQL is evaluated as it
stands, through :func:`dialect`, and its aggregates through :func:`aggregate_sql`. Logs without ``line_id`` in their orders are
not handled: the synthetic platform has them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import duckdb

from bp_spark.core.config import Config
from bp_spark.features.aggregates import (
    ACTIVITY,
    SEQUENCE_COLUMNS,
    WEEKDAYS,
    Aggregate,
    Decayed,
    Largest,
    Newest,
    Oldest,
    Total,
)
from bp_spark.features.catalogue import catalogue
from bp_spark.features.categories import CATEGORY_BUCKETS
from bp_spark.features.user_daily import CODES
from bp_spark.ingest.cleaning import ACTIONS
from bp_spark.lakehouse.tables import RAW_LOGS

SUMS = {
    # raw column of tokens -> measure of a day, where it is only added up
    "refunds": "refunds",
    "discount": "discount",
    "coupon_discount": "coupon_discount",
    "discounted_items": "discounted_items",
    "dwell_milli": "dwell_milli",
}
HOURS = {"morning": "BETWEEN 5 AND 10", "afternoon": "BETWEEN 11 AND 16", "evening": "BETWEEN 17 AND 22"}
ACTION_COUNTS = {
    "browse": "browses",
    "click": "clicks",
    "cart": "carts",
    "favourite": "favourites",
    "coupon": "coupons",
}

MEASURES = {
    "purchase_days": "(orders > 0)::BIGINT",
    "activity": " + ".join(ACTIVITY),
    "paid": "greatest(spend, 0)",
    **{
        f"paid_{name}": f"CASE WHEN isodow(day) = {number} THEN greatest(spend, 0) ELSE 0 END"
        for number, name in enumerate(WEEKDAYS, start=1)
    },
}
"""Measures of a day beside the columns of ``user_daily``."""

MACROS = r"""
CREATE MACRO try_divide(a, b) AS CASE WHEN b <> 0 THEN a / b END;
CREATE MACRO shiftleft(x, n) AS x << n;
CREATE MACRO get(l, i) AS l[i + 1];
CREATE MACRO cents(x) AS round(x::DOUBLE * 100)::BIGINT;
CREATE MACRO normalised(x) AS nullif(trim(regexp_replace(lower(substring(x, 1, 2000)),
    '^[^\p{L}\p{N}]+|[^\p{L}\p{M}\p{N}][^\p{L}\p{N}]*', ' ', 'g')), '');
CREATE MACRO broken(x) AS regexp_matches(x, '[\x00-\x08\x0B\x0C\x0E-\x1F\x{FFFD}]');
CREATE MACRO field(name, x) AS '"' || name || '":"' || x || '"';
CREATE MACRO number_field(name, x) AS '"' || name || '":' || x;
CREATE MACRO instant(x) AS strftime(x, '%Y-%m-%dT%H:%M:%S.%gZ');
CREATE MACRO runs(word, size) AS list_transform(range(1, length(word) + 1), lambda i: substr(word, i, size));
CREATE MACRO terms(words) AS list_distinct(list_concat(
    words,
    list_transform(range(1, len(words) + 1), lambda i: concat_ws(' ', words[i], words[i + 1])),
    flatten(list_transform(list_filter(words, lambda w: regexp_matches(w, '\p{Han}')),
        lambda w: list_concat(runs(w, 2), runs(w, 3), runs(w, 4))))));
"""


def dialect(sql: str) -> str:
    """Spark SQL of the catalogue in DuckDB's words.

    >>> dialect("aggregate(array(a, b), 0L, (s, x) -> s + x)")
    'list_reduce(list_value(a, b), lambda s, x: s + x, 0::BIGINT)'
    """
    sql = _initial_value_last(sql)
    for pattern, plain in (
        (r"\barray\(", "list_value("),
        (r"\barray_max\(", "list_max("),
        (r"\barray_sort\(", "list_sort("),
        (r"\bfilter\(", "list_filter("),
        (r"\bsize\(", "len("),
        (r"\((\w+), (\w+)\) ->", r"lambda \1, \2:"),
        (r"\b(\w+) ->", r"lambda \1:"),
        (r"\b(\d+)L\b", r"\1::BIGINT"),
        (r"(\d+(?:\.\d+)?)D\b", r"\1::DOUBLE"),
    ):
        sql = re.sub(pattern, plain, sql)
    return re.sub(r"\)\[(\d+)\]", lambda found: f")[{int(found[1]) + 1}]", sql)


def _initial_value_last(sql: str) -> str:
    """``aggregate(list, start, step)`` as ``list_reduce(list, step, start)``."""
    while (start := sql.find("aggregate(")) >= 0:
        first = start + len("aggregate(")
        commas, depth, end = [], 0, first
        while depth >= 0:
            depth += {"(": 1, ")": -1}.get(sql[end], 0)
            if sql[end] == "," and not depth:
                commas.append(end)
            end += 1
        array, initial, step = sql[first : commas[0]], sql[commas[0] + 2 : commas[1]], sql[commas[1] + 2 : end - 1]
        sql = f"{sql[:start]}list_reduce({array}, {step}, {initial}){sql[end:]}"
    return sql


def aggregate_sql(aggregate: Aggregate) -> str:
    """An aggregate of the catalogue over a user's days, in DuckDB's words.

    >>> aggregate_sql(Total("spend", oldest=30))
    'coalesce(sum(spend) FILTER (age BETWEEN 1 AND 30), 0)'
    """
    match aggregate:
        case Total(measure, None, _):
            return f"sum({_measure(measure)})"
        case Total(measure, oldest, newest):
            return f"coalesce(sum({_measure(measure)}) FILTER (age BETWEEN {newest} AND {oldest}), 0)"
        case Decayed(measure, half_life):
            return f"sum(round({_measure(measure)} * 1000 * pow(0.5, age / {half_life}))::BIGINT)"
        case Largest(measure, oldest):
            return f"max({_measure(measure)}) FILTER (age <= {oldest})"
        case Newest(measure):
            return f"min(age) FILTER (({_measure(measure)}) > 0)"
        case Oldest(measure):
            return f"max(age) FILTER (({_measure(measure)}) > 0)"
        case _:
            raise TypeError(f"no SQL for {aggregate}")


def _measure(name: str) -> str:
    return MEASURES.get(name, name)


class Peer:
    """DuckDB on the raw tables of a platform.

    Args:
        database: its file, new.
        threads: cores that it may use.
        memory: its limit, as ``4GB``; beyond it DuckDB works on disk.
    """

    def __init__(self, database: Path, config: Config, threads: int, memory: str) -> None:
        self.config = config
        self.seconds: dict[str, float] = {}
        self.connection = duckdb.connect(str(database), config={"threads": threads, "memory_limit": memory})
        self.connection.execute("SET preserve_insertion_order = false")
        self.connection.execute(f"SET temp_directory = '{database}.tmp'")
        self.connection.execute(MACROS)

    def close(self) -> None:
        self.connection.close()

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        clock = time.monotonic()
        yield
        self.seconds[stage] = time.monotonic() - clock

    def run(self, raw: Mapping[str, Sequence[str]], known_texts: Path, buckets: Path, as_of: date, out: Path) -> None:
        """Features of the date, from raw tables to Parquet; ``seconds`` then holds what each stage took.

        Args:
            raw: raw table -> its active files.
            known_texts: ``text``, ``text_id``, ``sentiment``: what the language model has read. The ids are Spark's, since
                DuckDB lacks its hash.
            buckets: ``top``, ``bucket``: number of each top-level category, by the same hash.
        """
        for name, files in raw.items():
            self.connection.execute(
                f"CREATE VIEW {name} AS FROM read_parquet({list(files)!r}, hive_partitioning = true, union_by_name = true)"
            )
        self.connection.execute(f"CREATE VIEW known_texts AS FROM '{known_texts}'")
        self.connection.execute(f"CREATE VIEW buckets AS FROM '{buckets}'")
        with self._timed("clean"):
            for statement in (*self._judged(), self._texts(), self._events()):
                self.connection.execute(statement)
        with self._timed("aggregate"):
            for statement in (self._tokens(), self._daily(), self._category_days()):
                self.connection.execute(statement)
        with self._timed("featurize"):
            self.connection.execute(f"COPY ({self._features(as_of)}) TO '{out}' (FORMAT parquet)")

    # --- cleaning ----------------------------------------------------------------------------------------------------------

    def _judged(self) -> list[str]:
        """Each log as a view with ``rule``, and the rows of ``quarantine``."""
        currency = self.config.cleaning.currency
        items = f"""
            CREATE TABLE item_versions AS
            SELECT item_id, ingest_id AS since, category, item_text, text_id,
                   coalesce(lead(ingest_id) OVER (PARTITION BY item_id ORDER BY ingest_id), {2**62}) AS until
            FROM (
                SELECT item_id, ingest_id, nullif(trim(category), '') AS category,
                       normalised(coalesce(title, string_split(category, ' > ')[-1])) AS item_text
                FROM raw_items WHERE item_id IS NOT NULL
                QUALIFY row_number() OVER (
                    PARTITION BY item_id, ingest_id ORDER BY delivery DESC, title DESC, category DESC) = 1
            ) LEFT JOIN known_texts ON text = item_text"""
        rates = f"""
            CREATE TABLE rates AS
            SELECT foreign_rows.*, arg_max(rate, row(day, raw_rates.ingest_id, delivery, rate)) AS rate
            FROM (SELECT DISTINCT currency, ts::DATE AS ts_day, ingest_id FROM raw_transactions
                  WHERE currency <> '{currency}') AS foreign_rows
            JOIN raw_rates ON raw_rates.currency = foreign_rows.currency AND raw_rates.rate > 0
                 AND day <= ts_day AND raw_rates.ingest_id <= foreign_rows.ingest_id
            GROUP BY ALL"""
        views = []
        for log in (table.name for table in RAW_LOGS):
            item = "clicked_item_id" if log == "raw_searches" else "item_id"
            rate, join_rates = "", ""
            if log == "raw_transactions":
                rate = (
                    f", CASE WHEN coalesce(r.currency, '{currency}') = '{currency}' THEN 1 ELSE rates.rate END AS rate"
                )
                join_rates = """LEFT JOIN rates ON rates.currency = r.currency AND rates.ts_day = r.ts::DATE
                                AND rates.ingest_id = r.ingest_id"""
            views.append(f"""
                CREATE VIEW judged_{log} AS
                SELECT *, {self._rule(log)} AS rule
                FROM (
                    SELECT r.*, i.category, i.item_text, i.text_id AS item_text_id, i.item_id IS NOT NULL AS item_known {rate}
                    FROM {log} r
                    LEFT JOIN item_versions i ON i.item_id = r.{item} AND r.ingest_id >= since AND r.ingest_id < until
                    {join_rates}
                )""")
        whole = {table.name: ", ".join(column.name for column in table.columns) for table in RAW_LOGS}
        refused = " UNION ALL ".join(
            f"""SELECT '{log}' AS source, rule, to_json(struct_pack({columns}))::VARCHAR AS row, ingest_id
                FROM judged_{log} WHERE rule IS NOT NULL"""
            for log, columns in whole.items()
        )
        return [items, rates, *views, f"CREATE TABLE quarantine AS {refused}"]

    def _rule(self, log: str) -> str:
        """SQL of the first broken rule, as :func:`bp_spark.ingest.cleaning.rules` has them."""
        config = self.config.cleaning
        actions = ", ".join(f"'{action}'" for action in ACTIONS)
        timed = [
            ("user_id is missing", "user_key IS NOT NULL"),
            ("ts is missing", "ts IS NOT NULL"),
            ("ts is in the future", f"ts <= ingested_at + INTERVAL {config.ahead_minutes} MINUTES"),
            (f"ts is before {config.first_day}", f"ts >= DATE '{config.first_day}'"),
        ]
        item = ("item is unknown", "item_id IS NULL OR item_known")
        known_item = [item] if config.unknown_items == "quarantine" else []

        def plausible(column: str) -> tuple[str, str]:
            rule = f"{column} is beyond {config.max_amount:g}"
            return rule, f"{column} IS NULL OR abs({column}) <= {config.max_amount:.2f}"

        own = {
            "raw_transactions": [
                ("amount is missing", "amount IS NOT NULL"),
                ("currency has no rate", "rate IS NOT NULL"),
                plausible("amount"),
                plausible("discount"),
                ("quantity is not a finite number", "quantity IS NULL OR abs(quantity) BETWEEN 0 AND 1e15"),
                ("discount is negative", "discount IS NULL OR discount >= 0 OR amount < 0"),
                ("quantity is negative, amount is not", "quantity IS NULL OR quantity >= 0 OR amount <= 0"),
                *known_item,
            ],
            "raw_behaviours": [
                ("action is unknown", f"action IN ({actions})"),
                ("dwell_s is not within a day", "dwell_s IS NULL OR dwell_s BETWEEN 0 AND 86400"),
                *known_item,
            ],
            "raw_searches": [
                ("query is missing", "length(trim(query)) > 0"),
                ("query is broken text", "query IS NULL OR NOT broken(query)"),
            ],
            "raw_reviews": [
                ("rating and text are missing", "coalesce(rating, length(text)) IS NOT NULL"),
                (
                    f"rating is beyond 0..{config.max_rating:g}",
                    f"rating IS NULL OR rating BETWEEN 0 AND {config.max_rating}",
                ),
                ("text is broken text", "text IS NULL OR NOT broken(text)"),
                *known_item,
            ],
        }
        cases = " ".join(f"WHEN NOT coalesce({holds}, false) THEN '{name}'" for name, holds in (*timed, *own[log]))
        return f"""CASE WHEN cardinality(unreadable) > 0
                   THEN list_min(map_keys(unreadable)) || ' is unreadable' {cases} END"""

    def _texts(self) -> str:
        config = self.config.texts

        def words(of: Sequence[str]) -> str:
            listed = ", ".join(f"'{word.lower()}'" for word in of)
            return f"len(list_intersect(terms, [{listed}]))"

        return f"""
            CREATE TABLE texts AS
            WITH found AS (
                SELECT text, min(ingest_id) AS ingest_id, terms(string_split(text, ' ')) AS terms
                FROM (
                    SELECT item_text AS text, since AS ingest_id FROM item_versions
                    UNION ALL SELECT normalised(query), ingest_id FROM raw_searches
                    UNION ALL SELECT normalised(text), ingest_id FROM raw_reviews
                ) WHERE text IS NOT NULL GROUP BY text
            ), brands AS (
                SELECT normalised(brand) AS brand, min(ingest_id) AS known_from FROM raw_items GROUP BY 1
            ), named AS (
                SELECT text, count(*) AS brand_words FROM (SELECT text, ingest_id, unnest(terms) AS term FROM found)
                JOIN brands ON brand = term AND known_from <= ingest_id GROUP BY text
            )
            SELECT text_id, text, ingest_id, {words(config.cheap_words)} AS cheap_words,
                   {words(config.premium_words)} AS premium_words, coalesce(brand_words, 0) AS brand_words, sentiment
            FROM found LEFT JOIN named USING (text) LEFT JOIN known_texts USING (text)"""

    def _events(self) -> str:
        """Good rows as events, each once, with the ids that Spark gives them."""
        by_line = """concat_ws(',', field('kind', kind), field('user_key', user_key), field('order_id', order_id),
                     field('event_date', ts::DATE), field('line_id', line_id))"""
        by_content = """concat_ws(',', field('kind', kind), field('user_key', user_key), field('item_id', item_id),
                        field('ts', instant(ts)), number_field('rating', rating), number_field('dwell_s', dwell_s),
                        field('own_text', own_text))"""
        money = ", ".join(
            f"({name} * rate)::DECIMAL(18, 2) AS {name}" for name in ("amount", "discount", "coupon_discount", "cost")
        )
        logs = f"""
            SELECT 'purchase' AS kind, user_key, ts, order_id, line_id, item_id, quantity, {money},
                   NULL::DOUBLE AS rating, NULL::DOUBLE AS dwell_s, NULL AS own_text, category, item_text_id, ingest_id,
                   delivery
            FROM judged_raw_transactions WHERE rule IS NULL
            UNION ALL BY NAME
            SELECT action AS kind, user_key, ts, item_id, dwell_s, category, item_text_id, ingest_id, delivery
            FROM judged_raw_behaviours WHERE rule IS NULL
            UNION ALL BY NAME
            SELECT 'search' AS kind, user_key, ts, clicked_item_id AS item_id, normalised(query) AS own_text,
                   category, item_text_id, ingest_id, delivery
            FROM judged_raw_searches WHERE rule IS NULL
            UNION ALL BY NAME
            SELECT 'review' AS kind, user_key, ts, item_id, rating, normalised(text) AS own_text,
                   category, NULL AS item_text_id, ingest_id, delivery
            FROM judged_raw_reviews WHERE rule IS NULL"""
        newest = ", ".join(
            f"{name} DESC"
            for name in (
                *("ingest_id", "delivery", "item_id", "ts", "quantity", "amount", "discount", "coupon_discount"),
                *("rating", "dwell_s", "own_text", "cost", "category", "item_text_id"),
            )
        )
        write = "regexp_replace(delivery, 'part-\\d+-([0-9a-f-]{36})[^/]*$', '\\1')"
        return f"""
            CREATE TABLE events AS
            SELECT sha256(identity || '/' || occurrence) AS event_id, user_key, ts, ts::DATE AS event_date, kind, order_id,
                   item_id, category, CASE WHEN own_text IS NULL THEN item_text_id ELSE text_id END AS text_id, amount,
                   quantity, discount, coupon_discount, cost, rating, dwell_s,
                   min(ingest_id) OVER (PARTITION BY identity, occurrence) AS ingest_id,
                   row_number() OVER (PARTITION BY identity, occurrence ORDER BY {newest}) AS copy
            FROM (
                SELECT *, CASE WHEN line_id IS NOT NULL THEN 0 ELSE row_number() OVER (
                              PARTITION BY identity, ingest_id, {write} ORDER BY ts, cost) END AS occurrence
                FROM (
                    SELECT *, sha256('{{' || CASE WHEN line_id IS NULL THEN {by_content} ELSE {by_line} END || '}}') AS identity
                    FROM ({logs})
                )
            ) LEFT JOIN (SELECT text, text_id FROM texts) ON text = own_text
            QUALIFY copy = 1"""

    # --- user-days ---------------------------------------------------------------------------------------------------------

    def _tokens(self) -> str:
        codes = " ".join(f"WHEN '{kind}' THEN {code}" for kind, code in CODES.items())
        return f"""
            CREATE TEMP TABLE tokens AS
            SELECT user_key, event_date AS day, CASE kind {codes} END AS kind,
                   CASE WHEN kind = 'purchase' THEN order_id ELSE event_id END AS token, min(ts) AS ts,
                   coalesce(sum(cents(amount)), 0)::BIGINT AS amount,
                   CASE WHEN count_if(kind = 'purchase' AND amount > 0) > 0
                        THEN count_if(kind = 'purchase' AND amount >= 0) ELSE 0 END AS items,
                   coalesce(sum(CASE WHEN kind = 'purchase' THEN greatest(-cents(amount), 0) END), 0)::BIGINT AS refunds,
                   coalesce(sum(cents(discount)), 0)::BIGINT AS discount,
                   coalesce(sum(cents(coupon_discount)), 0)::BIGINT AS coupon_discount,
                   count_if(discount > 0) AS discounted_items,
                   coalesce(arg_max(text_id, row(coalesce(amount, 0), text_id)), 0) AS text_id,
                   max(dwell_s * 1000)::BIGINT AS dwell_milli, max(rating) AS rating, count(item_id) AS with_item,
                   max(cheap_words) AS cheap_words, max(premium_words) AS premium_words, max(brand_words) AS brand_words,
                   max(sentiment) AS sentiment
            FROM events LEFT JOIN (
                SELECT text_id AS worded_id, cheap_words, premium_words, brand_words, sentiment FROM texts
            ) ON worded_id = text_id AND kind IN ('search', 'review')
            GROUP BY ALL"""

    def _daily(self) -> str:
        order = f"(kind = {CODES['purchase']} AND items > 0)"
        search, review = f"kind = {CODES['search']}", f"kind = {CODES['review']}"
        kept = self.config.features.history_length
        sums = ", ".join(f"coalesce(sum({column}), 0)::BIGINT AS {name}" for column, name in SUMS.items())
        hours = ", ".join(f"count_if({order} AND hour(ts) {span}) AS {name}_orders" for name, span in HOURS.items())
        actions = ", ".join(f"count_if(kind = {CODES[kind]}) AS {name}" for kind, name in ACTION_COUNTS.items())
        words = ", ".join(
            f"count_if({search} AND {word}_words > 0) AS searches_{word}" for word in ("cheap", "premium", "brand")
        )
        return f"""
            CREATE TABLE daily AS
            SELECT measures.*, coalesce(items_browsed, 0) AS items_browsed,
                   coalesce(items_browsed_bought, 0) AS items_browsed_bought, coalesce(items_carted, 0) AS items_carted,
                   coalesce(items_carted_bought, 0) AS items_carted_bought
            FROM (
                SELECT user_key, day, count_if({order}) AS orders,
                       coalesce(sum(items) FILTER (kind = {CODES["purchase"]}), 0)::BIGINT AS items,
                       coalesce(sum(amount) FILTER (kind = {CODES["purchase"]}), 0)::BIGINT AS spend, {sums},
                       coalesce(sum(amount) FILTER ({order}), 0)::BIGINT AS order_value,
                       coalesce(max(amount) FILTER ({order}), 0) AS order_value_max,
                       coalesce(sum(round((amount / 100) * (amount / 100))::BIGINT) FILTER ({order}), 0)::BIGINT
                           AS order_value_sq,
                       {hours}, count_if({order} AND (hour(ts) >= 23 OR hour(ts) < 5)) AS night_orders, {actions},
                       count(dwell_milli) AS dwelled, count_if({search}) AS searches,
                       count_if({search} AND with_item > 0) AS searches_clicked, {words}, count_if({review}) AS reviews,
                       count(rating) AS rated, coalesce(sum(round(rating * 1000)::BIGINT), 0)::BIGINT AS rating_milli,
                       count_if(rating <= 2) AS low_ratings,
                       count_if({review} AND sentiment IS NOT NULL) AS worded_reviews,
                       coalesce(sum(round(sentiment * 100)::BIGINT) FILTER ({review}), 0)::BIGINT AS sentiment_centi,
                       list({{'ts': ts, 'kind': kind, 'amount': amount, 'items': items, 'discount': discount,
                              'text_id': text_id}} ORDER BY ts, kind, token)[-{kept}:] AS tokens
                FROM tokens GROUP BY user_key, day
            ) AS measures LEFT JOIN (
                SELECT user_key, day, count_if(looked) AS items_browsed,
                       count_if(looked AND bought) AS items_browsed_bought, count_if(carted) AS items_carted,
                       count_if(carted AND bought) AS items_carted_bought
                FROM (
                    SELECT user_key, event_date AS day, item_id, bool_or(kind IN ('browse', 'click', 'favourite')) AS looked,
                           bool_or(kind = 'cart') AS carted, bool_or(kind = 'purchase') AS bought
                    FROM events
                    WHERE kind IN ('purchase', 'browse', 'click', 'favourite', 'cart') AND item_id IS NOT NULL
                    GROUP BY ALL
                ) WHERE looked OR carted GROUP BY user_key, day
            ) USING (user_key, day)"""

    def _category_days(self) -> str:
        return """
            CREATE TABLE category_days AS
            SELECT user_key, day, category, sum(cents(amount))::BIGINT AS spend, count(micro) AS priced,
                   coalesce(sum(micro), 0)::BIGINT AS price_micro,
                   coalesce(sum(round(micro / 1000 * (micro / 1000))::BIGINT), 0)::BIGINT AS price_sq
            FROM (
                SELECT user_key, event_date AS day, category, amount,
                       CASE WHEN quantity > 0 AND amount + coalesce(discount, 0) > 0
                            THEN round(ln((amount + coalesce(discount, 0))::DOUBLE / quantity) * 1e6)::BIGINT END AS micro
                FROM events WHERE kind = 'purchase' AND amount >= 0 AND category IS NOT NULL
            ) GROUP BY ALL"""

    # --- features ----------------------------------------------------------------------------------------------------------

    def _features(self, as_of: date) -> str:
        features = catalogue(self.config.features)
        aggregates = ", ".join(f"{aggregate_sql(what)} AS {name}" for name, what in features.aggregates.items())
        columns = ", ".join(f"({dialect(f.expression.sql)})::FLOAT AS {f.name}" for f in features.features)
        sequences = ", ".join(f"coalesce({column.name}, []) AS {column.name}" for column in SEQUENCE_COLUMNS)
        bits = self.config.features.recency_precision_bits
        age = "age" if bits is None else f"age - age % (1 << greatest(length(bin(age)) - {bits}, 0))"
        return f"""
            WITH clocks AS MATERIALIZED (
                SELECT user_key, last + ({age})::INT AS seen_on
                FROM (SELECT user_key, max(day) AS last, DATE '{as_of}' - last AS age
                      FROM daily WHERE day < DATE '{as_of}' GROUP BY user_key)
            ),
            past AS (
                SELECT *, seen_on - day AS age,
                       CASE WHEN orders > 0 THEN day - lag(day) OVER (PARTITION BY user_key, orders > 0 ORDER BY day) END AS gap
                FROM daily JOIN clocks USING (user_key) WHERE day < DATE '{as_of}'
            ),
            aggregated AS (
                SELECT user_key, {aggregates}, avg(gap) AS p_mean,
                       sqrt(greatest(avg(gap * gap) - avg(gap) * avg(gap), 0)) AS p_std, max(gap) AS p_max,
                       quantile_cont(gap, 0.5) AS p_median, arg_min(gap, age) AS p_last
                FROM past GROUP BY user_key
            ),
            categorised AS ({self._categories(as_of)}),
            history AS ({self._history(as_of)})
            SELECT user_key, {columns}, {sequences}
            FROM aggregated LEFT JOIN categorised USING (user_key) LEFT JOIN history USING (user_key)
            WHERE a_tenure IS NOT NULL"""

    def _categories(self, as_of: date) -> str:
        sums = ("spend", "priced", "price_micro")
        within = ", ".join(
            f"sum({name})::BIGINT AS {name}_365, coalesce(sum({name}) FILTER (age <= 90), 0)::BIGINT AS {name}_90"
            for name in sums
        )

        def position(days: int) -> str:
            return f"(price_micro_{days} / 1e6 - priced_{days} * mean) / std"

        tops = ", ".join(
            f"sum(spend_{days}) AS spend_{days}, sum(round({position(days)} * 1000)::BIGINT) AS tier_{days}, "
            f"sum(priced_{days}) FILTER (std IS NOT NULL) AS tiered_{days}"
            for days in (90, 365)
        )
        by_days = ", ".join(
            f"count_if(spend_{days} > 0) AS c_count_{days}, sum(spend_{days}) AS c_total_{days}, "
            f"sum(tier_{days}) AS c_tier_{days}, sum(tiered_{days}) AS c_tiered_{days}, "
            f"list(spend_{days} ORDER BY spend_{days}) FILTER (spend_{days} > 0) AS c_spends_{days}"
            for days in (90, 365)
        )
        entropies = ", ".join(
            f"list_sum(list_transform(c_spends_{days}, lambda x: -x / c_total_{days} * ln(x / c_total_{days})))"
            f" AS c_sum_{days}"
            for days in (90, 365)
        )
        in_buckets = ", ".join(
            f"coalesce(sum(spend_365) FILTER (bucket = {n}), 0) AS c_bucket_{n}" for n in range(CATEGORY_BUCKETS)
        )
        return f"""
            WITH by_category AS MATERIALIZED (
                SELECT user_key, category, {within}, sum(price_sq)::BIGINT AS price_sq
                FROM (SELECT *, seen_on - day AS age FROM category_days JOIN clocks USING (user_key) WHERE day < DATE '{as_of}')
                WHERE age <= 365 GROUP BY user_key, category
            ), reference AS (
                SELECT category, sum(priced_365) AS n, sum(price_micro_365) / 1e6 / n AS mean,
                       sqrt(greatest(sum(price_sq) / 1e6 / n - mean * mean, 0)) AS std
                FROM by_category GROUP BY category HAVING n >= 10 AND std > 1e-3
            ), tops AS (
                SELECT user_key, string_split(category, ' > ')[1] AS top, {tops}, count_if(spend_365 > 0) AS types,
                       sum(spend_365 * ({position(365)} > 0.5 * priced_365)::INT) AS premium
                FROM by_category LEFT JOIN reference USING (category) GROUP BY user_key, top
            ), totals AS (
                SELECT user_key, {by_days}, sum(types) AS c_types, sum(premium) AS c_premium,
                       list(spend_365 ORDER BY spend_365 DESC) AS c_ranked, {in_buckets}
                FROM tops JOIN buckets USING (top) GROUP BY user_key
            )
            SELECT *, coalesce(c_sum_90, 0) AS c_entropy_90, coalesce(c_sum_365, 0) AS c_entropy_365
            FROM (SELECT *, {entropies} FROM totals)"""

    def _history(self, as_of: date) -> str:
        length = self.config.features.history_length
        fields = {
            "seq_kind": "t.kind",
            "seq_age_days": "((epoch_us(seen_on::TIMESTAMP) - epoch_us(t.ts)) / 86400000000)::FLOAT",
            "seq_amount": "(t.amount / 100)::FLOAT",
            "seq_items": "t.items::FLOAT",
            "seq_discount": "(t.discount / 100)::FLOAT",
            "seq_text_id": "t.text_id",
            "seq_weekday": "isodow(t.ts)::INT",
            "seq_hour": "hour(t.ts)::INT",
        }
        arrays = ", ".join(f"list_transform(kept, lambda t: {sql}) AS {name}" for name, sql in fields.items())
        return f"""
            SELECT user_key, {arrays}
            FROM (
                SELECT user_key, seen_on, flatten(list(tokens ORDER BY day))[-{length}:] AS kept
                FROM (
                    SELECT user_key, seen_on, day, tokens FROM daily JOIN clocks USING (user_key) WHERE day < DATE '{as_of}'
                    QUALIFY coalesce(sum(len(tokens)) OVER (
                        PARTITION BY user_key ORDER BY day DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) < {length}
                ) GROUP BY user_key, seen_on
            )"""
