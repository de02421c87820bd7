"""Files as shops have them, and whether each comes to the right money: ``python -m bench.files``.

In: the cases of :mod:`bench.file_cases`, the exports of docs/mappings with :mod:`bench.file_shops`, and the nights of
:mod:`bench.file_nights`. Each has what is right: the events, with user, order, amount and day, and the rows in quarantine, by
rule. Cases of one delivery are read, pseudonymised and cleaned by the functions that ingest and clean call, without tables
between them. Nights go through the stages themselves.

Out: a line of JSON a figure on standard output:

- ``files.cases``; ``files.right``: cases whose events, rows in quarantine and error are exactly those that are right;
- ``files.silent_wrong``: cases with an event that isn't right: another amount, user, order or day, or one too many;
- ``files.rows_lost``: rows that are neither events nor duplicates nor in quarantine nor left out by the mapping's ``where``. Of
  nights, where deliveries replace each other, these are the right events that are missing and not in quarantine either.

Cases that are not right are named on standard error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import reduce
from pathlib import Path
from re import search
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from bench import say
from bench.file_cases import CASES, DAY, TORN, Case, Content
from bench.file_nights import NIGHTS, Platform
from bench.file_shops import SHOPS
from bp_spark.core import config
from bp_spark.core.errors import ConfigError, DataError
from bp_spark.core.session import get_session
from bp_spark.ingest import clean, cleaning, job, pseudonyms
from bp_spark.ingest.sources.contract import Delivery
from bp_spark.ingest.sources.files import FilesSource
from bp_spark.lakehouse.run import Run
from bp_spark.lakehouse.store import Lakehouse

SECRET = pseudonyms.Secret(b"of the benchmark of files, 32 bytes and more")
AT_ONCE = 12
"""Cases that one job of Spark reads."""
QUICK = {
    "spark.sql.shuffle.partitions": "2",
    "spark.sql.codegen.wholeStage": "false",
    "spark.sql.codegen.factoryMode": "NO_CODEGEN",
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.sql.maxPlanStringLength": "0",
}
"""Settings of Spark for plans of hundreds of nodes over files of five lines."""


@dataclass
class Outcome:
    """What a case comes to: events and rows in quarantine as the case writes them, and rows of the files."""

    events: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    duplicates: int = 0
    left_out: int = 0
    error: str = ""


@dataclass(frozen=True)
class Verdict:
    """Whether an outcome is right, and in which way it isn't."""

    problems: Sequence[str]
    silent_wrong: bool
    rows_lost: int


def judged(case: Case, outcome: Outcome) -> Verdict:
    """Compare the outcome of a case of one delivery with what is right."""
    verdict = compared(case.events, case.refused, outcome)
    accounted = outcome.events.total() + outcome.duplicates + outcome.refused.total() + outcome.left_out
    lost = 0 if outcome.error else max(0, case.records - accounted)
    problems = list(verdict.problems)
    if bool(case.error) != bool(outcome.error) or not search(case.error, outcome.error):
        problems.append(f"the error is {outcome.error!r}, right is {case.error!r}")
    if case.hidden and case.hidden in outcome.error:
        problems.append("a value of the data stands in the error")
    if outcome.left_out != case.left_out or lost:
        problems.append(f"{outcome.left_out} rows are left out, right is {case.left_out}; {lost} are lost")
    return Verdict(problems, verdict.silent_wrong, lost)


def compared(events: Iterable[str], refused: Mapping[str, int], outcome: Outcome) -> Verdict:
    """Compare events and rows in quarantine with what is right; rows that are lost are right events that are missing."""
    right, problems = Counter(events), []
    unexpected, missing = outcome.events - right, right - outcome.events
    if unexpected or missing:
        problems.append(f"not right are {sorted(unexpected.elements())}, missing are {sorted(missing.elements())}")
    if outcome.refused != Counter(refused):
        problems.append(f"in quarantine are {dict(outcome.refused)}, right is {dict(refused)}")
    elsewhere = max(0, outcome.refused.total() - sum(refused.values())) + unexpected.total()
    return Verdict(problems, bool(unexpected), max(0, missing.total() - elsewhere))


def as_text(event: Row, users: Mapping[str, str]) -> str:
    """Return an event as cases write it."""
    user = users.get(event["user_key"], event["user_key"])
    what = f"{event['order_id']} {event['amount']}" if event["kind"] == "purchase" else event["kind"]
    day = str(event["event_date"])
    return f"{user} {what}" + (f" {day}" if day != DAY else "")


def as_rule(row: Row) -> str:
    """Return the rule of a row in quarantine; a line that can't be taken apart must have no user's key."""
    content = json.loads(row["row"])
    return f"{row['rule']}, of a user" if row["rule"] == TORN and content["user_key"] is not None else str(row["rule"])


# --- cases of one delivery -----------------------------------------------------------------------------------------------


def outcomes(spark: SparkSession, folder: Path, cases: Mapping[str, Case]) -> dict[str, Outcome]:
    """Read the files of all cases, and clean all that was read at once. Cases with the same mapping are one source."""
    found = {name: Outcome() for name in cases}
    numbers = {name: number for number, name in enumerate(cases)}
    sources: dict[str, dict[str, Case]] = {}
    for name, case in cases.items():
        # an error would be one of all cases of the source
        sources.setdefault(name if case.error else case.yaml, {})[name] = case
    frames: dict[str, list[DataFrame]] = {}
    for place, together in enumerate(sources.values()):
        try:
            for table, rows in _read(spark, folder / str(place), together, numbers, found).items():
                frames.setdefault(table, []).append(rows)
        except Exception as error:
            for name in together:
                found[name].error = (
                    str(error) if isinstance(error, ConfigError | DataError) else f"{type(error)}: {error}"
                )
    validated = cleaning.validate({table: _stored(rows) for table, rows in frames.items()}, {}, config.load().cleaning)
    names = list(cases)
    users = _users(case.events for case in cases.values())
    for event in cleaning.events(validated).collect():
        number, _, key = event["user_key"].partition("/")
        outcome = found[names[int(number)]]
        if event["copy"] != 1:
            outcome.duplicates += 1
        else:
            outcome.events[as_text(event, users).replace(f"{number}/{key}", users.get(key, key))] += 1
    for row in cleaning.quarantine(validated).collect():
        number = json.loads(row["row"])["delivery"].partition("/")[0]
        found[names[int(number)]].refused[as_rule(row)] += 1
    return found


def _stored(frames: Sequence[DataFrame]) -> DataFrame:
    """Return the rows of many sources as those of one table."""
    groups = [frames[first : first + AT_ONCE] for first in range(0, len(frames), AT_ONCE)]
    rows = reduce(DataFrame.unionByName, (reduce(DataFrame.unionByName, group).localCheckpoint() for group in groups))
    return rows.withColumns({"ingest_id": F.lit(1).cast("bigint"), "ingested_at": F.lit(_NOW)})


def _users(events: Iterable[Iterable[str]], secret: pseudonyms.Secret = SECRET) -> dict[str, str]:
    """Return key -> user of all users in events."""
    return {secret.key_of(user): user for texts in events for user in (text.split()[0] for text in texts)}


def _read(
    spark: SparkSession,
    folder: Path,
    cases: Mapping[str, Case],
    numbers: Mapping[str, int],
    found: Mapping[str, Outcome],
) -> dict[str, DataFrame]:
    """Write the files of cases with the same mapping; return the rows of its logs with keys in the place of ids.

    The number of its case stands before each key and name of a delivery: a user of one case is another one in the next.
    """
    for name, case in cases.items():
        for file, content in case.files.items():
            write(folder / case.folder.format(numbers[name]) / file, content)
        write(folder / "shop.yaml", case.yaml)
    source = FilesSource(folder / "shop.yaml")
    deliveries = [delivery for delivery in source.deliveries(spark) if delivery.table in cleaning.LOGS]
    only, of_case = numbers[next(iter(cases))], F.regexp_extract("delivery", r"^files/(\d+)/", 1)
    for case_name, case in cases.items():
        inside = case.folder.format(numbers[case_name])
        own = [d for d in deliveries if d.name.startswith(inside) and source.tables[d.table].selects]
        found[case_name].left_out = sum(counts.left_out for counts in source.counts(spark, own).values())
    number = F.coalesce(F.nullif(of_case, F.lit("")), F.lit(str(only)))
    tables = {}

    def leave(delivery: Delivery, error: DataError) -> None:
        for name, case in cases.items():
            if delivery.name.startswith(case.folder.format(numbers[name])):
                found[name].error = str(error)

    for table, rows in source.read(spark, deliveries, leave).items():
        keyed = pseudonyms.pseudonymous(rows, table, SECRET, pseudonyms.as_written)
        prefixed = {name: F.concat(number, F.lit("/"), name) for name in ("user_key", "delivery")}
        # errors that show only when rows are read must not be those of another case
        tables[table] = keyed.localCheckpoint() if any(case.error for case in cases.values()) else keyed
        tables[table] = tables[table].withColumns(prefixed)
    return tables


_NOW = datetime(2030, 1, 1, tzinfo=UTC)


def write(path: Path, content: Content) -> None:
    """Write a text, bytes or a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, pa.Table):
        pq.write_table(content, path)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


# --- nights --------------------------------------------------------------------------------------------------------------


def nights(spark: SparkSession, folder: Path, platform: Platform) -> dict[str, Outcome]:
    """Run the nights of a platform, and return case -> outcome after the last one."""
    lakehouse_path = folder / "lakehouse"
    for night in range(platform.nights):
        mapping = platform.deliver(spark, folder, night)
        settings = config.load(
            overrides=[f"source.mapping={mapping}", "source.kind=files", f"tables.path={lakehouse_path}"]
        )
        run = Run(spark, settings, "featurize")
        job.ingest(run)
        clean.clean(run, rebuild=False)
    lakehouse = Lakehouse(spark, settings.tables)
    secret = pseudonyms.load_secret(settings.privacy.secret)
    users = _users(([f"{name}/{event}" for event in case.events] for name, case in platform.cases.items()), secret)
    found = {name: Outcome() for name in platform.cases}
    for event in lakehouse.read("events").collect():
        name, _, text = as_text(event, users).partition("/")
        found.setdefault(name, Outcome()).events[text] += 1
    for row in lakehouse.read("quarantine").collect():
        name = json.loads(row["row"])["delivery"].partition("shop=")[2].partition("/")[0]
        found.setdefault(name, Outcome()).refused[as_rule(row)] += 1
    if not search(platform.note, str(run.records)) or (platform.hidden and platform.hidden in str(run.records)):
        raise AssertionError(f"what the night recorded isn't {platform.note!r}, or has a value of the data")
    return found


def night_verdicts(spark: SparkSession, folder: Path, platforms: Mapping[str, Platform] = NIGHTS) -> dict[str, Verdict]:
    """Run the nights of all platforms and compare what they come to with what is right."""
    verdicts: dict[str, Verdict] = {}
    for number, (kind, platform) in enumerate(platforms.items()):
        try:
            found = nights(spark, folder / str(number), platform)
        except Exception as error:
            found = {name: Outcome(error=f"{type(error).__name__}: {error}") for name in platform.cases}
        for name, case in platform.cases.items():
            outcome = found.get(name, Outcome())
            verdict = compared(case.events, case.refused, outcome)
            problems = [*verdict.problems, *([outcome.error] if outcome.error else [])]
            verdicts[f"{kind}: {name}"] = Verdict(problems, verdict.silent_wrong, verdict.rows_lost)
    return verdicts


# --- figures -------------------------------------------------------------------------------------------------------------


def figures(verdicts: Mapping[str, Verdict]) -> dict[str, int]:
    """Return the figures of the cases' verdicts; name cases that are not right on standard error."""
    for name, verdict in verdicts.items():
        if verdict.problems:
            print(f"{name}: {'; '.join(verdict.problems)}", file=sys.stderr)
    return {
        "files.cases": len(verdicts),
        "files.right": sum(not verdict.problems for verdict in verdicts.values()),
        "files.silent_wrong": sum(verdict.silent_wrong for verdict in verdicts.values()),
        "files.rows_lost": sum(verdict.rows_lost for verdict in verdicts.values()),
    }


def main() -> None:
    """Run all cases."""
    os.environ.setdefault("BP_SPARK_SECRET", "of the benchmark of files, 32 bytes and more")
    spark: Any = get_session(config.load(), "bench-files")
    for key, value in QUICK.items():
        spark.conf.set(key, value)
    cases = {**CASES, **SHOPS}
    with tempfile.TemporaryDirectory() as folder:
        found = outcomes(spark, Path(folder) / "cases", cases)
        verdicts = {name: judged(case, found[name]) for name, case in cases.items()}
        verdicts |= night_verdicts(spark, Path(folder) / "nights")
    spark.stop()
    for name, value in figures(verdicts).items():
        say(name, value)


if __name__ == "__main__":
    main()
