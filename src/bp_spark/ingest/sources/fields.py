"""Columns that a file does not have as such: fields of objects, elements of arrays, values in the file's path.

In: rows with the columns of a file. Out: these rows, with a column for each name in the mapping. A name with a dot is that of a
column, if there is one, else of a field: ``customer.id`` is the field ``id`` of the column ``customer``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from urllib.parse import unquote

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql import types as T

from bp_spark.core.errors import DataError
from bp_spark.ingest.sources.lines import CORRUPT, characters_pattern, quoted_column
from bp_spark.ingest.sources.mapping import TableMapping

NO_ELEMENTS = "_bp_spark_no_elements"
"""Column of exploded rows: whether the array was missing or empty, so that there is no row."""
UNEXPLODED = "_bp_spark_unexploded"
"""Column of exploded rows: length of a text that should be an array and is none."""
_NO_VALUE = "__HIVE_DEFAULT_PARTITION__"
_FIELDS = "_bp_spark_fields"


def partitions_of(path: str) -> dict[str, str]:
    """Return the names in folders such as ``day=2024-05-01``, and how each is written in the path."""
    return {unquote(name): name for name in re.findall(r"(?<=/)([^/=]+)=[^/]*(?=/)", path)}


def file_path() -> Column:
    """Return the path of the file that a row came from, as the file system has it."""
    # Spark escapes the path as an address; a plus stands for itself there, but is a space to url_decode
    return F.url_decode(F.replace(F.col("_metadata.file_path"), F.lit("+"), F.lit("%2B")))


def missing_columns(schema: T.StructType, mapping: TableMapping, partitions: Iterable[str]) -> list[str]:
    """Return the names of the mapping that neither the file's columns nor their fields nor its path has, sorted."""
    known = _elements_as_column(schema, mapping)
    return sorted(name for name in mapping.platform_columns.difference(partitions) if _type_of(known, name) is None)


def names_in(schema: T.StructType) -> list[str]:
    """Return the names of columns and of the fields directly within them."""
    names: list[str] = []
    for field in schema.fields:
        kind = field.dataType
        element = kind.elementType if isinstance(kind, T.ArrayType) else kind
        inner = element.names if isinstance(element, T.StructType) else []
        names += [field.name, *(f"{field.name}.{name}" for name in inner)]
    return names


def is_array(schema: T.StructType, name: str) -> bool:
    """Return whether a column or field is an array of objects."""
    kind = _type_of(schema, name)
    return isinstance(kind, T.ArrayType) and isinstance(kind.elementType, T.StructType)


def require_columns(schema: T.StructType, mapping: TableMapping, file: str, partitions: Iterable[str] = ()) -> None:
    """Raise a DataError for a column that the mapping names and the file lacks.

    The first line of a CSV file without a header is a user's row. So the message quotes it only where the line names a column
    of the mapping.
    """
    missing = missing_columns(schema, mapping, partitions)
    if mapping.explode and mapping.explode not in missing and not is_array(schema, mapping.explode):
        raise DataError(file, "column can't be exploded: it is no array of objects", column=mapping.explode)
    if not missing:
        return
    mapped = mapping.platform_columns.difference(partitions)
    if mapping.format == "csv" and mapping.has_header and len(missing) == len(mapped):
        problem = (
            f"column is missing, and so are all others of the mapping; the first line has {len(schema)} fields between "
            f"{mapping.separator!r}. For another separator set options: {{sep: ...}}; for lines before the header "
            "skip_lines; for a file without a header options: {header: false}, and name its columns _c0, _c1, ..."
        )
    else:
        names = names_in(schema)
        close = difflib.get_close_matches(missing[0], names, n=1)
        problem = f"column is missing; there are {', '.join(map(repr, names))}"
        if close == missing[:1]:
            problem += f"; {close[0].rpartition('.')[0]!r} is an array: name it in explode"
        elif close:
            problem += f"; did you mean {close[0]!r}?"
    raise DataError(file, problem, column=missing[0])


def with_fields(df: DataFrame, mapping: TableMapping, partitions: Mapping[str, str]) -> DataFrame:
    """Return rows with a column for each name in the mapping; with ``explode`` a row for each element.

    Args:
        df: rows with the file's columns; of JSON the keys of ``mapping.top_level_names`` as texts.
        mapping: the table's mapping.
        partitions: see :func:`partitions_of`.
    """
    names = mapping.platform_columns
    add = _with_fields_of_texts if mapping.format == "json" else _with_fields_of_structs
    if mapping.explode:
        df = _exploded(add(df, {mapping.explode}), mapping)
        names = names - {mapping.explode}
    df = add(df, names)
    in_path = {
        name: F.coalesce(quoted_column(name), _in_path(written)) if name in df.columns else _in_path(written)
        for name, written in partitions.items()
        if name in names and (mapping.format == "json" or name not in df.columns)
    }
    return df.withColumns(in_path) if in_path else df


def _in_path(name: str) -> Column:
    """Return the value that the path has for a name, as Hive writes it."""
    path = F.concat(F.lit("/"), file_path())
    value = F.nullif(F.regexp_extract(path, rf"^.*/{characters_pattern(name)}=([^/]*)/", 1), F.lit(_NO_VALUE))
    return F.coalesce(F.try_url_decode(F.replace(value, F.lit("+"), F.lit("%2B"))), value)


def _with_fields_of_structs(df: DataFrame, names: Iterable[str]) -> DataFrame:
    added = sorted(set(names).difference(df.columns))
    fields = {name: column for name in added if (column := _field(df.schema, name)) is not None}
    return df.withColumns(fields) if fields else df


def _with_fields_of_texts(df: DataFrame, names: Iterable[str]) -> DataFrame:
    """Add fields of JSON objects: each object is a text, and so are its fields."""
    paths = {
        ".".join(parts[:count]) for parts in (name.split(".") for name in names) for count in range(2, len(parts) + 1)
    }
    done = set(df.columns) - set(names)
    for depth in range(1, max((path.count(".") for path in paths), default=0) + 1):
        children: dict[str, list[str]] = {}
        for path in sorted(paths - done):
            if path.count(".") == depth:
                children.setdefault(path.rpartition(".")[0], []).append(path)
        for parent, fields in children.items():
            if parent not in df.columns:
                continue
            struct = T.StructType([T.StructField(path.rpartition(".")[2], T.StringType()) for path in fields])
            df = df.withColumn(_FIELDS, F.from_json(quoted_column(parent), struct))
            values = {path: F.col(_FIELDS).getField(path.rpartition(".")[2]) for path in fields}
            flat = {
                path: F.coalesce(quoted_column(path), value) for path, value in values.items() if path in df.columns
            }
            df = df.withColumns({**values, **flat}).drop(_FIELDS)
    return df


def _exploded(df: DataFrame, mapping: TableMapping) -> DataFrame:
    """Return a row for each element of an array, in the place of the array; one row where there is no element."""
    name = mapping.explode or ""
    array = quoted_column(name)
    unexploded = F.lit(None).cast("string")
    elements = array
    if mapping.format == "json":
        elements = F.from_json(array, "array<string>")
        unexploded = F.when(F.trim(array) != "", F.when(elements.isNull(), _length_of(array)))
    others = [quoted_column(column) for column in df.columns if column not in (name, "_metadata")]
    corrupt = F.col(CORRUPT) if CORRUPT in df.columns else F.lit(None).cast("string")
    is_row = (F.size(elements) > 0) | unexploded.isNotNull() | corrupt.isNotNull()
    return df.select(
        "_metadata",
        *others,
        unexploded.alias(UNEXPLODED),
        (~F.coalesce(is_row, F.lit(False))).alias(NO_ELEMENTS),
        F.explode_outer(elements).alias(name),
    )


def _length_of(text: Column) -> Column:
    # the text may hold all that the platform knows of an order
    return F.concat(F.lit("<"), F.length(text).cast("string"), F.lit(" characters>"))


def _elements_as_column(schema: T.StructType, mapping: TableMapping) -> T.StructType:
    """Return the schema after ``explode``."""
    kind = _type_of(schema, mapping.explode) if mapping.explode else None
    if not isinstance(kind, T.ArrayType) or mapping.explode is None:
        return schema
    others = [field for field in schema.fields if field.name != mapping.explode]
    return T.StructType([*others, T.StructField(mapping.explode, kind.elementType)])


def _type_of(schema: T.StructType, name: str) -> T.DataType | None:
    """Return the type of a column or field; ``None`` if there is none of that name."""
    path = _path(schema, name)
    kind: T.DataType = schema
    for part in path:
        kind = kind[part].dataType  # type: ignore[index]
    return kind if path else None


def _field(schema: T.StructType, name: str) -> Column | None:
    """Return a column or a field within one; ``None`` if there is none of that name."""
    path = _path(schema, name)
    if not path:
        return None
    column = quoted_column(path[0])
    for part in path[1:]:
        column = column.getField(part)
    return column


def _path(schema: T.StructType, name: str) -> list[str]:
    """Return the names from a column to a field; the longest name that a column has wins."""
    if name in schema.names:
        return [name]
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        head, rest = ".".join(parts[:count]), ".".join(parts[count:])
        kind = schema[head].dataType if head in schema.names else None
        if isinstance(kind, T.StructType) and (path := _path(kind, rest)):
            return [head, *path]
    return []
