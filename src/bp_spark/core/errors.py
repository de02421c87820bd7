"""The project's own errors; each message names the table or file, the column, the rule and, where useful, an example."""

from __future__ import annotations


class BpSparkError(Exception):
    """Base of all errors that a user can cause and fix.

    Attributes:
        exit_code: exit code of a job that ends with the error.
    """

    exit_code = 1


class ConfigError(BpSparkError):
    """A configuration file or an override is unusable: unknown key, wrong type, value out of range."""

    exit_code = 2


class DataError(BpSparkError):
    """Data break a contract: missing table or column, wrong type, no rows.

    Args:
        table: the table or file that breaks the rule.
        rule: the broken rule, in words.
        column: the column at fault, if one is.
        count: how many rows break the rule, if counted.
        example: one offending value (never personal data).
    """

    exit_code = 3

    def __init__(
        self,
        table: str,
        rule: str,
        *,
        column: str | None = None,
        count: int | None = None,
        example: object = None,
    ) -> None:
        where = f"{table}.{column}" if column else table
        message = f"{where}: {rule}"
        if count is not None:
            message += f" ({count} rows)"
        if example is not None:
            message += f"; for example {example!r}"
        super().__init__(message)
        self.table = table
        self.column = column
        self.rule = rule


class MissingTableError(DataError):
    """A table does not exist.

    Args:
        table: the table.
    """

    def __init__(self, table: str) -> None:
        super().__init__(table, "table does not exist; run the stage that makes it first")


class OccupiedError(DataError):
    """A table can't be created, because its folder holds files that are no Delta table.

    Args:
        table: the table.
    """

    def __init__(self, table: str) -> None:
        super().__init__(
            table,
            "its folder holds files and no Delta table (somebody else's files, or what a run left that was killed while it "
            "created the table): empty the folder, then run again",
        )


class FileReadError(DataError):
    """A Python worker can't read a Parquet file by itself; ``table`` is the file, and ``rule`` the reason."""


class BundleError(BpSparkError):
    """A model bundle can't be trusted or used: digest mismatch, foreign features, newer format."""

    exit_code = 4


class PlatformError(BpSparkError):
    """The machine lacks something: no Java, no Delta jars, a worker process that was killed."""

    exit_code = 5


class TrackingError(BpSparkError):
    """The store at ``tracking.uri`` can't be reached or refuses a request."""

    exit_code = 6


class ConflictError(BpSparkError):
    """Two jobs wrote one table at the same time; this job ended, and the other job's rows are whole.

    Args:
        table: the table that the other job wrote.
    """

    exit_code = 7

    def __init__(self, table: str) -> None:
        super().__init__(
            f"{table or 'a table'}: another run wrote this table meanwhile, and its rows are whole; nothing of this run is in "
            "that commit. What this run wrote before is whole too: run again when the other has ended, it goes on from there"
        )
        self.table = table


class OvertakenError(ConflictError):
    """Another training promoted its bundle while this one decided about its own.

    Args:
        pointer: the file that names the promoted bundle.
        promoted: the bundle that it names now, if any.
    """

    def __init__(self, pointer: str, promoted: str | None) -> None:
        BpSparkError.__init__(
            self,
            f"{pointer}: names {promoted or 'no bundle'} now, which another run changed meanwhile, and which the new bundle "
            "wasn't compared with; the new bundle is written and not promoted: train again",
        )
        self.table = pointer


class DriftError(BpSparkError):
    """Thresholds of a drift check are broken; the rows are in the table drift, and the scores stay unchanged."""

    exit_code = 8


class UnknownUserError(BpSparkError):
    """Some ids to forget belong to no user; all other users were erased."""

    exit_code = 9
