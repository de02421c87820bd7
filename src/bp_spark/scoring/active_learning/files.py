"""Files of labels: the questions for those who ask, and the answers as people give them."""

from __future__ import annotations

import csv
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pandas as pd

from bp_spark.core import disk
from bp_spark.core.config import LabellingConfig
from bp_spark.core.errors import DataError

QUESTION_COLUMNS = ("user_key", "as_of_date", "rank", "spend")
"""Columns of the file of questions; people fill in ``spend``."""
LABEL_COLUMNS = ("user_key", "user_id", "as_of_date", "spend", "source", "given_at", "rank")
"""Columns that a file of labels may have."""


@dataclass(frozen=True)
class SurveyLabel:
    """One line of a file of labels.

    Attributes:
        line: Its number, from 1 for the heading.
        user: The user's key, or the platform's id where the file has ids.
        as_of_date: The horizon of the spend begins on this day.
        spend: The spend, as given.
        source: Who gave the label, if the file names it.
        given_at: When, if the file says so.
    """

    line: int
    user: str
    as_of_date: date
    spend: float
    source: str | None
    given_at: datetime | None


@dataclass(frozen=True)
class LabelFile:
    """Content of a file of labels: the labels, the column that names the user, and the number of unanswered lines."""

    labels: Sequence[SurveyLabel]
    user_column: str
    unanswered: int


class _RefusedError(Exception):
    """A value breaks a rule."""


def write_questions(path: Path, users: pd.DataFrame) -> None:
    """Write the file of questions, by rank, with an empty ``spend``.

    It holds no prediction, because people would repeat it.

    Args:
        path: The file; its folder is made.
        users: ``user_key, as_of_date, rank`` of the users to ask.

    Raises:
        DataError: The file can't be written.
        PlatformError: The disk is full.
    """
    try:
        with disk.writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            users.assign(spend="")[list(QUESTION_COLUMNS)].to_csv(path, index=False)
    except OSError as error:
        raise DataError(str(path), f"can't be written ({error.strerror})") from None


def read_labels(path: Path, first_event: date, today: date, config: LabellingConfig) -> LabelFile:
    """Read labels as people gave them: CSV in UTF-8 with a heading and columns of LABEL_COLUMNS, in any order.

    Lines without a spend are questions that nobody answered, and are passed over.

    Args:
        path: The file.
        first_event: Day of the first event. Nobody has features on a date up to it.
        today: No label can be given later.
        config: Bounds of a spend.

    Raises:
        DataError: The file can't be read, lacks a column or has an unknown one, or a value breaks a rule. The message names
            file, line, column and rule, and never a user.
    """
    (_, heading_cells), *lines = _read_lines(path)
    heading = [name.strip() for name in heading_cells]
    user_column = _user_column(path, heading)
    labels, unanswered, line_by_label = list[SurveyLabel](), 0, dict[tuple[str, date], int]()
    for number, cells in lines:
        if len(cells) != len(heading):
            raise DataError(
                str(path), f"line {number}: must have {len(heading)} values, as the first line; has {len(cells)}"
            )
        values = {name: cell.strip() for name, cell in zip(heading, cells, strict=True)}
        if not values["spend"]:
            unanswered += 1
            continue
        label = _label(path, number, values, user_column, first_event, today, config)
        if (label.user, label.as_of_date) in line_by_label:
            other = line_by_label[label.user, label.as_of_date]
            raise DataError(
                str(path),
                f"line {number}: a user has one label of a date, and this one stands in line {other} too",
                column=user_column,
            )
        line_by_label[label.user, label.as_of_date] = number
        labels.append(label)
    if not labels:
        raise DataError(str(path), f"must hold a spend: none of its {unanswered} lines does", column="spend")
    return LabelFile(labels, user_column, unanswered)


def require_known_users(path: Path, file: LabelFile, keys: Sequence[str], known_keys: Collection[str]) -> None:
    """Require that every label is of a user of the platform.

    Args:
        path: The file, for the message.
        file: Its content.
        keys: ``user_key`` of each label.
        known_keys: Those of ``keys`` that users have.

    Raises:
        DataError: A label is of somebody else; the message names the first line.
    """
    unknown_lines = [label.line for label, key in zip(file.labels, keys, strict=True) if key not in known_keys]
    if unknown_lines:
        rule = f"line {unknown_lines[0]}: must be a user that was ingested, one of the table user_keys"
        raise DataError(str(path), rule, column=file.user_column, count=len(unknown_lines))


def _read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """Return number and cells of each line that isn't blank; at least one.

    Raises:
        DataError: The file can't be read as CSV in UTF-8, or is empty.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except OSError as error:
        raise DataError(str(path), f"can't be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise DataError(str(path), "must be text in UTF-8") from None
    except csv.Error as error:
        raise DataError(str(path), f"must be CSV ({error})") from None
    if not lines:
        raise DataError(str(path), "is empty: the first line must name the columns")
    return lines


def _user_column(path: Path, heading: Sequence[str]) -> str:
    """Return the column that names the user.

    Raises:
        DataError: The heading lacks a column, or has an unknown one or one twice.
    """
    for name in heading:
        if name not in LABEL_COLUMNS:
            rule = f"line 1: isn't a column of labels; these are {', '.join(LABEL_COLUMNS)}"
            raise DataError(str(path), rule, column=name)
        if heading.count(name) > 1:
            raise DataError(str(path), "line 1: must be there once", column=name)
    user_columns = [name for name in ("user_key", "user_id") if name in heading]
    if len(user_columns) != 1:
        trouble = "both are" if user_columns else "neither is"
        raise DataError(str(path), f"line 1: must have user_key or user_id; {trouble} there")
    for name in ("as_of_date", "spend"):
        if name not in heading:
            raise DataError(str(path), "line 1: column is missing", column=name)
    return user_columns[0]


def _label(
    path: Path,
    line: int,
    values: Mapping[str, str],
    user_column: str,
    first_event: date,
    today: date,
    config: LabellingConfig,
) -> SurveyLabel:
    given_on = values.get("given_at")
    column = ""
    try:
        column = user_column
        if not values[user_column]:
            raise _RefusedError("must name a user")
        column = "as_of_date"
        as_of_date = _day(values[column])
        if not first_event < as_of_date <= today + timedelta(days=1):
            raise _RefusedError(f"must be after the first event, of {first_event}, and not after tomorrow")
        column = "spend"
        spend = _amount(values[column], config.max_spend)
        column = "given_at"
        given_at = datetime.combine(_day(given_on), datetime.min.time(), UTC) if given_on else None
        if given_at is not None and given_at.date() > today:
            raise _RefusedError("must not be in the future")
    except _RefusedError as refused:
        # the message doesn't quote the value, which may be anything, even a user's id
        raise DataError(str(path), f"line {line}: {refused}", column=column) from None
    return SurveyLabel(line, values[user_column], as_of_date, spend, values.get("source") or None, given_at)


def _day(text: str) -> date:
    try:
        return datetime.strptime(text, "%Y-%m-%d").date()
    except ValueError:
        raise _RefusedError("must be a date, as YYYY-MM-DD") from None


def _amount(text: str, most: float) -> float:
    try:
        # Python accepts 1_000 as a number
        amount = math.nan if "_" in text else float(text)
    except ValueError:
        amount = math.nan
    if not 0 <= amount <= most:
        raise _RefusedError(
            f"must be a number from 0 to {most:,.0f} (labelling.max_spend), without separators of thousands"
        )
    return amount
