"""Deliveries over several nights, with what is right after the last one: the nights of :mod:`bench.files`.

All cases of a platform share a lakehouse. The files of a case lie in a folder of its own, ``shop=NAME``, and the ids of its
users begin with its name. So a case stands for itself, though an ingest reads them all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyspark.sql import SparkSession

from bench.file_cases import COLUMNS, HEADER, ONE_WRITE, OTHER_WRITE, TORN, csv, part

TOUCH = "touch"
"""In the place of a file's content: only its time changes."""
GONE = "gone"
"""In the place of a file's content: it is removed."""


@dataclass(frozen=True)
class NightCase:
    """What changes in each night, and what is right after the last one.

    Attributes:
        nights: file -> content, of files that change; in a Delta table SQL statements.
        events: as those of :class:`bench.file_cases.Case`.
        refused: rule -> rows in quarantine.
    """

    nights: Sequence[Any]
    events: Sequence[str]
    refused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Platform:
    """Cases that share a mapping and a lakehouse.

    Attributes:
        cases: name -> case; names have no blanks.
        columns: of the mapping, beside COLUMNS.
        move: called with the path of the mapping, after its files came; returns the path it has from now on.
        moves_in: first night in which it is called, by default the last one. It is called again in those that follow.
        note: regular expression that what the last night records must match.
        hidden: text that it must not have.
    """

    cases: Mapping[str, NightCase]
    columns: Mapping[str, Any] = field(default_factory=dict)
    move: Callable[[Path], Path] | None = None
    moves_in: int = -1
    note: str = ""
    hidden: str = ""

    @property
    def nights(self) -> int:
        """Number of nights."""
        return max(len(case.nights) for case in self.cases.values())

    @property
    def source(self) -> dict[str, Any]:
        """Path and format of the mapping."""
        return {"path": "shop=*/*.csv", "format": "csv"}

    @property
    def user(self) -> str:
        """Expression of a user's id."""
        return "concat(shop, '/', customer)"

    def deliver(self, spark: SparkSession, folder: Path, night: int) -> Path:
        """Change the files as a night does; return the path of the mapping."""
        mapping = folder / "platform" / "shop.yaml"
        mapping.parent.mkdir(parents=True, exist_ok=True)
        columns = {**COLUMNS, "user_id": {"expr": self.user}, **self.columns}
        mapping.write_text(json.dumps({"transactions": {**self.source, "columns": columns}}), encoding="utf-8")
        for name, case in self.cases.items():
            for change in case.nights[night : night + 1]:
                self.change(spark, mapping.parent, name, change)
        return self.move(mapping) if self.move and night >= self.moves_in % self.nights else mapping

    def change(self, spark: SparkSession, folder: Path, name: str, change: Any) -> None:
        """Change the files of a case."""
        for file, content in change.items():
            path = folder / f"shop={name}" / file
            path.parent.mkdir(exist_ok=True)
            if content == GONE:
                path.unlink()
            elif content == TOUCH:
                os.utime(path, (0, path.stat().st_mtime + 60))
            else:
                path.write_text(content, encoding="utf-8")


@dataclass(frozen=True)
class DeltaPlatform(Platform):
    """Cases in one Delta table: each night runs SQL statements, in which ``{orders}`` is the table and ``{case}`` the case."""

    @property
    def source(self) -> dict[str, Any]:
        """Path and format of the mapping."""
        return {"path": "orders", "format": "delta"}

    @property
    def user(self) -> str:
        """Expression of a user's id."""
        return "customer"

    def change(self, spark: SparkSession, folder: Path, name: str, change: Any) -> None:
        """Run the statements of a case."""
        orders = f"delta.`{folder}/orders`"
        columns = "at STRING, customer STRING, order STRING, line STRING, paid DECIMAL(9,2)"
        spark.sql(f"CREATE TABLE IF NOT EXISTS {orders} ({columns}) USING delta")
        for statement in change:
            spark.sql(statement.format(orders=orders, case=name))


def renamed_by_link(mapping: Path) -> Path:
    """Name the mapping by another path: a link to its folder."""
    link = mapping.parent.parent / "link"
    link.symlink_to(mapping.parent)
    return link / mapping.name


def moved(mapping: Path) -> Path:
    """Move the mapping with its files."""
    return mapping.parent.rename(mapping.parent.parent / "moved") / mapping.name


def copied_without_times(mapping: Path) -> Path:
    """Copy the mapping with its files, whose times become those of the copy."""
    copy = shutil.copytree(mapping.parent, mapping.parent.parent / "copy", copy_function=shutil.copyfile)
    shutil.rmtree(mapping.parent)
    return Path(copy) / mapping.name


def with_absolute_path(mapping: Path) -> Path:
    """Name the files by their whole path, in the same mapping."""
    text = mapping.read_text(encoding="utf-8")
    mapping.write_text(text.replace('"shop=*', f'"{mapping.parent}/shop=*'), encoding="utf-8")
    return mapping


def from_another_folder(mapping: Path) -> Path:
    """Move the mapping alone, to a folder from which it names the files by their whole path."""
    moved_mapping = with_absolute_path(mapping).rename(mapping.parent.parent / mapping.name)
    return moved_mapping


def renamed(mapping: Path) -> Path:
    """Give the mapping another name."""
    return mapping.rename(mapping.with_name("shop-2.yaml"))


def text(*lines: str) -> str:
    """A file whose lines begin after the time."""
    content = csv(*lines)["a.csv"]
    assert isinstance(content, str)
    return content


def timed(*lines: str) -> str:
    """A file whose lines begin with the time."""
    return HEADER + "".join(f"{line}\n" for line in lines)


MUG, CUP, POT = "u1,1,1,Mug,5.00,", "u1,1,2,Cup,7.00,", "u2,2,1,Pot,9.00,"
ALL = ("u1 1 5.00", "u1 1 7.00", "u2 2 9.00")
AT_2359, AT_0001 = "2024-05-01 23:59:00,u1,1,1,Mug,30.00,", "2024-05-02 00:01:00,u1,1,1,Mug,30.00,"
LINES = {
    "moved-over-midnight": NightCase(
        ({"a.csv": timed(AT_2359)}, {"b.csv": timed(AT_0001)}), ("u1 1 30.00 2024-05-02",)
    ),
    "moved-over-midnight-in-place": NightCase(
        ({"a.csv": timed(AT_2359)}, {"a.csv": timed(AT_0001)}), ("u1 1 30.00 2024-05-02",)
    ),
    "moved-back-over-midnight": NightCase(({"a.csv": timed(AT_0001)}, {"b.csv": timed(AT_2359)}), ("u1 1 30.00",)),
    "moved-there-and-back": NightCase(
        ({"a.csv": timed(AT_2359)}, {"b.csv": timed(AT_0001)}, {"c.csv": timed(AT_2359)}), ("u1 1 30.00",)
    ),
    # numbers of orders may begin anew: not within twelve hours, it is another line
    "the-same-number-a-month-later": NightCase(
        ({"a.csv": text(MUG)}, {"b.csv": timed("2024-06-01 10:00:00,u1,1,1,Mug,3.00,")}),
        ("u1 1 3.00 2024-06-01", "u1 1 5.00"),
    ),
    "corrected": NightCase(
        ({"a.csv": text(MUG, CUP)}, {"b.csv": text(MUG.replace("5", "3"))}), ("u1 1 3.00", "u1 1 7.00")
    ),
    "same-line-of-another-user": NightCase(
        ({"a.csv": text(MUG)}, {"b.csv": text(MUG.replace("u1", "u2"))}), ("u1 1 5.00", "u2 1 5.00")
    ),
}
WRITTEN_AGAIN = {
    "full-dump": NightCase(
        ({"dump.csv": text(MUG, CUP)}, {"dump.csv": text(MUG, CUP.replace("7", "6"), POT)}),
        ("u1 1 5.00", "u1 1 6.00", "u2 2 9.00"),
    ),
    "corrected-in-place": NightCase(({"a.csv": text(MUG)}, {"a.csv": text(MUG.replace("5", "3"))}), ("u1 1 3.00",)),
    "half-written": NightCase(({"a.csv": text(MUG, CUP, POT)[:-12]}, {"a.csv": text(MUG, CUP, POT)}), ALL),
    "half-written-in-an-amount": NightCase(
        (
            {"a.csv": text(MUG, "u2,2,1,Pot,9.00,1").removesuffix("00,1\n") + "00,"},
            {"a.csv": text(MUG, POT.replace("9", "19"))},
        ),
        ("u1 1 5.00", "u2 2 19.00"),
    ),
    "a-line-less": NightCase(({"a.csv": text(MUG, CUP)}, {"a.csv": text(CUP)}), ("u1 1 7.00",)),
    "grown": NightCase(({"a.csv": text(MUG)}, {"a.csv": text(MUG, CUP)}, {"a.csv": text(MUG, CUP, POT)}), ALL),
    "refused-and-mended": NightCase(
        ({"a.csv": text(MUG, POT.replace("9.00", "x"))}, {"a.csv": text(MUG, POT)}), ("u1 1 5.00", "u2 2 9.00")
    ),
    "equal-lines-again": NightCase(
        ({"a.csv": text(MUG, MUG)}, {"a.csv": text(MUG, MUG, POT)}), ("u1 1 5.00",) * 2 + ALL[2:]
    ),
    "another-name": NightCase(
        ({"a.csv": text(MUG, MUG)}, {"a.csv": GONE, "b.csv": text(MUG, MUG)}), ("u1 1 5.00",) * 2
    ),
    "the-same-delivery-again": NightCase(({"a.csv": text(MUG)}, {"b.csv": text(MUG)}), ("u1 1 5.00",)),
    "parts-of-two-writes": NightCase(
        ({part(0, ONE_WRITE): text(MUG)}, {part(0, OTHER_WRITE): text(MUG)}), ("u1 1 5.00",)
    ),
    "touched": NightCase(({"a.csv": text(MUG, MUG)}, {"a.csv": TOUCH}), ("u1 1 5.00",) * 2),
    "touched-and-refused": NightCase(
        ({"a.csv": text(MUG, "u2,2,1,Pot,9")}, {"a.csv": TOUCH}), ("u1 1 5.00",), {TORN: 1}
    ),
    "unreadable-beside-a-good-one": NightCase(
        ({"a.csv": text(MUG), "b.csv": "other,columns\n1,2\n"}, {"b.csv": text(POT)}), ("u1 1 5.00", "u2 2 9.00")
    ),
}
SAME = {
    "same": NightCase(
        ({"a.csv": text(MUG, MUG), "b.csv": text(POT, "u3,3")}, {}), ("u1 1 5.00",) * 2 + ALL[2:], {TORN: 1}
    )
}
CORRECTED = {
    # the first correction speaks about one of two days, the last one about both
    "corrected-before-and-after": NightCase(
        (
            {"a.csv": timed("2024-05-02 10:00:00,u1,1,1,Mug,5.00,", "2024-05-03 10:00:00,u2,2,1,Pot,9.00,")},
            {"a.csv": timed("2024-05-03 10:00:00,u2,2,1,Pot,8.00,", "u2,2")},
            {},
            {"a.csv": timed("2024-05-02 10:00:00,u1,1,1,Mug,4.00,", "2024-05-03 10:00:00,u2,2,1,Pot,7.00,")},
        ),
        ("u1 1 4.00 2024-05-02", "u2 2 7.00 2024-05-03"),
    ),
    "touched-after": NightCase(({"a.csv": text(MUG, "u2,2")}, {}, {}, {"a.csv": TOUCH}), ("u1 1 5.00",), {TORN: 1}),
}


def rows(*lines: str) -> str:
    """Statement that adds lines to the table."""
    values = [
        f"('2024-05-01 10:00:00', '{{case}}/{u}', '{o}', '{n}', {paid})"
        for u, o, n, _, paid, _ in (x.split(",") for x in lines)
    ]
    return f"INSERT INTO {{orders}} VALUES {', '.join(values)}"


MINE = "customer LIKE '{case}/%'"
START = [rows(MUG, CUP), rows(POT)]
DELTA = {
    "optimize": NightCase((START, ["OPTIMIZE {orders}"]), ALL),
    "optimize-equal-lines": NightCase(([rows(MUG), rows(MUG)], ["OPTIMIZE {orders}"]), ("u1 1 5.00",) * 2),
    "update": NightCase(
        (START, [], [f"UPDATE {{orders}} SET paid = 3 WHERE {MINE} AND line = 1 AND order = 1"]),
        ("u1 1 3.00", *ALL[1:]),
    ),
    "delete": NightCase((START, [], [f"DELETE FROM {{orders}} WHERE {MINE} AND order = 2"]), ALL[:2]),
    "merge": NightCase(
        (
            START[:1],
            [],
            [
                "MERGE INTO {orders} t USING (SELECT '{case}/u1' customer, '1' order, '2' line, 6.00 paid UNION ALL "
                "SELECT '{case}/u2', '2', '1', 9.00) s ON t.customer = s.customer AND t.line = s.line WHEN MATCHED THEN UPDATE "
                "SET paid = s.paid WHEN NOT MATCHED THEN INSERT (at, customer, order, line, paid) VALUES "
                "('2024-05-01 10:00:00', s.customer, s.order, s.line, s.paid)"
            ],
        ),
        ("u1 1 5.00", "u1 1 6.00", "u2 2 9.00"),
    ),
    "append-after-optimize": NightCase((START[:1], [], START[1:]), ALL),
    "delete-and-insert-again": NightCase(
        (START, [], [f"DELETE FROM {{orders}} WHERE {MINE}", rows(MUG, CUP), rows(POT)]), ALL
    ),
}
DELTA_AFTER = {
    "update-and-delete": NightCase(
        (
            [rows(MUG, CUP), rows(POT)],
            [],
            [
                f"UPDATE {{orders}} SET paid = 3 WHERE {MINE} AND line = 1 AND order = 1",
                f"DELETE FROM {{orders}} WHERE {MINE} AND order = 2",
            ],
        ),
        ("u1 1 3.00", "u1 1 7.00"),
    ),
}
WRONG = {
    "wrong": NightCase(({"a.csv": text("user-4711,1,1,Mug,12x,", "u2,2")},), (), {"amount is unreadable": 1, TORN: 1})
}
NIGHTS: Mapping[str, Platform] = {
    "lines": Platform(LINES, columns={"line_id": "line"}),
    "written again": Platform(WRITTEN_AGAIN),
    "Delta": DeltaPlatform(DELTA),
    "by another path": Platform(SAME, move=renamed_by_link),
    "moved": Platform(SAME, move=moved),
    "copied without times": Platform(SAME, move=copied_without_times),
    "an absolute path": Platform(SAME, move=with_absolute_path),
    "from another folder": Platform(SAME, move=from_another_folder),
    "another name": Platform(SAME, move=renamed),
    "another name, then corrected": Platform(CORRECTED, move=renamed, moves_in=2),
    "another folder, then corrected": Platform(CORRECTED, move=from_another_folder, moves_in=2),
    "Delta by another name": DeltaPlatform(DELTA_AFTER, move=renamed, moves_in=1),
    "all refused": Platform(WRONG, note="amount is unreadable.*quarantine show", hidden="4711"),
}
"""Kind -> platform."""
