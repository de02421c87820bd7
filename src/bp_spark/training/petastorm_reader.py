"""Petastorm's batch reader over plain Parquet files, on any pyarrow.

Petastorm 0.13.1, its last release, reads through interfaces that pyarrow removed after version 14 and numpy with version 2.
Its batch reader needs only two of them: a dataset, which lists the files, and pieces, which are row groups. This module
defines both on pyarrow's own file systems, and verifies the checksum of each page. It puts them in the place of pyarrow's
classes in the three modules of Petastorm that read. Nothing outside Petastorm sees a difference, and nothing else imports
Petastorm.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

if TYPE_CHECKING:
    from bp_spark.training.loader import Columns, Shard

WORKERS = 2
"""Number of threads that decode row groups."""

_EMPTY_PASSES = 2


@contextmanager
def open_shard(
    shard: Shard, scalars: Sequence[str], arrays: Mapping[str, np.dtype[Any]], seed: int | None
) -> Iterator[Iterator[Columns]]:
    """Open a pass over a shard by Petastorm; see :class:`bp_spark.training.loader.ShardReader`."""
    petastorm = _petastorm()
    store, paths = shard.file_system_and_paths()

    def pack(frame: pd.DataFrame) -> pd.DataFrame:
        """Encode arrays and texts as bytes: Petastorm only joins arrays of equal length, and turns NULL into ``"None"``."""
        for name, dtype in arrays.items():
            frame[name] = [b"" if array is None else array.astype(dtype, copy=False).tobytes() for array in frame[name]]
        for name in texts:
            frame[name] = [None if text is None else text.encode() for text in frame[name]]
        return frame

    def unpack(table: Mapping[str, np.ndarray]) -> Columns:
        columns = dict(table)
        for name, dtype in arrays.items():
            columns[name] = _arrays(columns[name], dtype)
        for name in texts:
            columns[name] = np.array([None if text is None else text.decode() for text in columns[name]], object)
        return columns

    texts = [name for name in scalars if pa.types.is_string(shard.schema.field(name).type)]
    reader = petastorm.make_batch_reader(
        # Petastorm wants URLs: quote each path, so that nothing in it separates; the dataset unquotes it
        [f"file:{quote(path)}" for path in paths],
        schema_fields=[f"^{re.escape(name)}$" for name in (*scalars, *arrays)],
        workers_count=WORKERS,
        shuffle_row_groups=seed is not None,
        seed=seed,
        num_epochs=1,
        cur_shard=shard.index,
        shard_count=shard.count,
        filesystem=store,
        transform_spec=petastorm.TransformSpec(
            pack, edit_fields=[petastorm.edit_field(name, np.bytes_, ()) for name in (*arrays, *texts)]
        ),
    )
    try:
        yield (unpack(table._asdict()) for table in _until_exhausted(reader))
    finally:
        # not `with reader`, which prints to standard output
        reader.stop()
        reader.join()


def _arrays(packed: np.ndarray, dtype: np.dtype[Any]) -> np.ndarray:
    flat = np.frombuffer(b"".join(packed), dtype)
    arrays = np.empty(len(packed), object)
    start = 0
    for row, end in enumerate(np.cumsum([len(array) // flat.itemsize for array in packed])):
        arrays[row] = flat[start:end]
        start = end
    return arrays


def _until_exhausted(reader: Iterator[Any]) -> Iterator[Any]:
    """Yield the tables of a Petastorm reader until two passes in a row are empty.

    Its pool ends a pass when all workers are idle and, a moment later, no table is left to hand out. If the last tables are
    handed out between these two checks, the pass ends too early; the next pass then goes on.
    """
    empty_passes = 0
    while empty_passes < _EMPTY_PASSES:
        empty_passes += 1
        for table in reader:
            empty_passes = 0
            yield table


@cache
def _petastorm() -> SimpleNamespace:
    """Import Petastorm with the removed names in place, and make it read through this module's classes."""
    removed_modules = {name: ModuleType(name) for name in ("pyarrow.filesystem", "pyarrow.hdfs")}
    vars(removed_modules["pyarrow.filesystem"])["LocalFileSystem"] = vars(removed_modules["pyarrow.hdfs"])[
        "HadoopFileSystem"
    ] = object
    sys.modules.update(removed_modules)
    try:
        from petastorm import TransformSpec, arrow_reader_worker, make_batch_reader, reader, unischema
        from petastorm.etl import dataset_metadata
        from petastorm.transform import edit_field
    finally:
        for name in removed_modules:
            del sys.modules[name]
    for module in (reader, arrow_reader_worker, dataset_metadata):
        module.pq = SimpleNamespace(ParquetDataset=_Dataset, ParquetDatasetPiece=_Piece)
    # the worker opens the file of a piece itself, and then lets the piece read
    arrow_reader_worker.ParquetFile = lambda opened: opened
    arrow_reader_worker.np = unischema.np = SimpleNamespace(**vars(np), unicode_=np.str_, string_=np.bytes_)
    return SimpleNamespace(make_batch_reader=make_batch_reader, TransformSpec=TransformSpec, edit_field=edit_field)


class _Dataset:
    """The part of pyarrow's former ``ParquetDataset`` that Petastorm uses.

    It has no partitions in paths, and no metadata beside the files: Petastorm would unpickle those.
    """

    metadata = common_metadata = None
    partitions = ()

    def __init__(self, paths: Sequence[str], filesystem: fs.FileSystem, **_: object) -> None:
        self.fs = SimpleNamespace(open=partial(_open_parquet, filesystem))
        self.paths = paths
        self.pieces = [_Piece(path, self.fs.open) for path in paths]


class _Piece:
    """The part of pyarrow's former ``ParquetDatasetPiece`` that Petastorm uses: a file, or one row group of it."""

    partition_keys = ()

    def __init__(self, path: str, open_file_func: _Open, row_group: int | None = None, **_: object) -> None:
        self.path, self._open, self._row_group = path, open_file_func, row_group

    def get_metadata(self) -> pq.FileMetaData:
        with self._open(self.path) as file:
            return file.metadata

    def read(self, columns: Iterable[str], **_: object) -> pa.Table:
        with self._open(self.path) as file:
            return file.read_row_group(self._row_group, sorted(columns), use_threads=False)


_Open = Callable[[str], AbstractContextManager[pq.ParquetFile]]


@contextmanager
def _open_parquet(filesystem: fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    with filesystem.open_input_file(unquote(path)) as source:
        yield pq.ParquetFile(source, page_checksum_verification=True)
