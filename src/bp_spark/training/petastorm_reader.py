"""Petastorm's batch reader over plain Parquet files, on any pyarrow.

Petastorm 0.13.1, its last release, reads through interfaces that pyarrow removed after version 14 and numpy with version 2. Its
batch reader needs little of them: a dataset, which says what files there are, and pieces, the row groups of these. Both stand
here, on pyarrow's own file systems and with each page held against its checksum, and take the place of pyarrow's in the three
modules of Petastorm that read. Nothing outside Petastorm sees a difference, and nothing else imports Petastorm.
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
    from bp_spark.training.loader import Columns, Share

WORKERS = 2
"""Threads that decode row groups."""


@contextmanager
def open_share(
    share: Share, scalars: Sequence[str], arrays: Mapping[str, np.dtype[Any]], seed: int | None
) -> Iterator[Iterator[Columns]]:
    """One pass over a share by Petastorm; see :class:`bp_spark.training.loader.ShareReader`."""
    petastorm = _petastorm()
    store, paths = share.opened()

    def pack(frame: pd.DataFrame) -> pd.DataFrame:
        """Arrays and texts as bytes: Petastorm joins arrays of equal length only, and makes the text ``None`` of a NULL."""
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

    texts = [name for name in scalars if pa.types.is_string(share.schema.field(name).type)]
    reader = petastorm.make_batch_reader(
        # a path as a URL, in which nothing is a separator; the dataset takes the path out again
        [f"file:{quote(path)}" for path in paths],
        schema_fields=[f"^{re.escape(name)}$" for name in (*scalars, *arrays)],
        workers_count=WORKERS,
        shuffle_row_groups=seed is not None,
        seed=seed,
        num_epochs=1,
        cur_shard=share.index,
        shard_count=share.count,
        filesystem=store,
        transform_spec=petastorm.TransformSpec(
            pack, edit_fields=[petastorm.edit_field(name, np.bytes_, ()) for name in (*arrays, *texts)]
        ),
    )
    try:
        yield (unpack(table._asdict()) for table in _until_spent(reader))
    finally:
        # Not `with reader`: that prints to standard output.
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


def _until_spent(reader: Iterator[Any]) -> Iterator[Any]:
    """What a reader of Petastorm gives until it twice in a row has nothing.

    Its pool ends a pass when all workers are idle and, a moment later, nothing is left to hand out. Where the last items are
    handed out between these two looks, it ends too early; asked again, it goes on.
    """
    ends = 0
    while ends < 2:
        found = False
        for table in reader:
            found = True
            yield table
        ends = 0 if found else ends + 1


@cache
def _petastorm() -> SimpleNamespace:
    """Petastorm, imported with the names that it looks for, and reading by what stands here."""
    gone = {name: ModuleType(name) for name in ("pyarrow.filesystem", "pyarrow.hdfs")}
    vars(gone["pyarrow.filesystem"])["LocalFileSystem"] = vars(gone["pyarrow.hdfs"])["HadoopFileSystem"] = object
    sys.modules.update(gone)
    try:
        from petastorm import TransformSpec, arrow_reader_worker, make_batch_reader, reader, unischema
        from petastorm.etl import dataset_metadata
        from petastorm.transform import edit_field
    finally:
        for name in gone:
            del sys.modules[name]
    for module in (reader, arrow_reader_worker, dataset_metadata):
        module.pq = SimpleNamespace(ParquetDataset=_Dataset, ParquetDatasetPiece=_Piece)
    # it opens the file of a piece and then lets the piece read
    arrow_reader_worker.ParquetFile = lambda opened: opened
    arrow_reader_worker.np = unischema.np = SimpleNamespace(**vars(np), unicode_=np.str_, string_=np.bytes_)
    return SimpleNamespace(make_batch_reader=make_batch_reader, TransformSpec=TransformSpec, edit_field=edit_field)


class _Dataset:
    """Files, as Petastorm asks pyarrow's former ``ParquetDataset`` for them: without partitions in their paths, and without the
    metadata beside them, which it would unpickle."""

    metadata = common_metadata = None
    partitions = ()

    def __init__(self, paths: Sequence[str], filesystem: fs.FileSystem, **_: object) -> None:
        self.fs = SimpleNamespace(open=partial(_opened, filesystem))
        self.paths = paths
        self.pieces = [_Piece(path, self.fs.open) for path in paths]


class _Piece:
    """A file or a row group of it, as Petastorm asks pyarrow's former ``ParquetDatasetPiece`` for it."""

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
def _opened(filesystem: fs.FileSystem, path: str) -> Iterator[pq.ParquetFile]:
    with filesystem.open_input_file(unquote(path)) as source:
        yield pq.ParquetFile(source, page_checksum_verification=True)
