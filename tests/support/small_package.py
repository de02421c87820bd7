"""The Complete Journey as its package has it, of some households only: to read all lines would be most of a test's time.

And the settings that train on it in seconds.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bp_spark.ingest.sources.completejourney import PACKAGE, REQUIRED, data_folder

SMALL = [
    "texts.max_tokens=8",
    "labels.cutoffs=2",
    "labels.recent_cutoffs=0",
    "labels.cutoff_step_days=60",
    "labels.other_horizons=[]",
    "fusion.members=[btyd,trees]",
    "trees.rounds=20",
    "trees.learning_rate=0.2",
    "tracking.uri=null",
]


def household_ids() -> list[str]:
    """All households of the installed package, in the order of their numbers."""
    ids = pq.read_table(data_folder() / "transactions.parquet", columns=["household_id"])["household_id"].unique()
    return sorted(map(str, ids.to_pylist()), key=int)


def write_small_package(folder: Path, households: Collection[str]) -> Path:
    """A package of the same name under ``folder``, to be put on the Python path; it has the lines of these households."""
    package = folder / PACKAGE
    (package / "data").mkdir(parents=True)
    (package / "__init__.py").touch()
    chosen = pa.array(sorted(households))
    tables = {name: _table(data_folder() / f"{name}.parquet") for name in REQUIRED}
    bought = tables["transactions"].filter(_of(tables["transactions"], chosen))["product_id"].unique()
    for name, table in tables.items():
        if "household_id" in table.column_names:
            table = table.filter(_of(table, chosen))
        elif "product_id" in table.column_names:
            table = table.filter(pc.is_in(table["product_id"], bought))
        pq.write_table(table, package / "data" / f"{name}.parquet", coerce_timestamps="us")
    return folder


def _table(path: Path) -> pa.Table:
    """Rows of a file, or its first ones: promotions have 21 million."""
    file = pq.ParquetFile(path)
    return pa.Table.from_batches(batch for batch, _ in zip(file.iter_batches(100_000), range(20), strict=False))


def small_settings(folder: Path) -> list[str]:
    """Settings of a training of seconds, with a language model of a few random weights, written to ``folder/bert``."""
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]"))}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "bert"
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder / "bert")
    return [*SMALL, f"texts.model={folder}/bert"]


def _of(table: pa.Table, households: pa.Array) -> pa.ChunkedArray:
    return pc.is_in(pc.cast(table["household_id"], pa.string()), households)
