"""The notebooks, as a reader runs them: one after the other on one small platform."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import nbformat
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable
from nbclient import NotebookClient
from tokenizers import Tokenizer, models
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from bp_spark.sources.completejourney import FILES, PACKAGE
from clusters import UNCOMPILED

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
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
PROMOTE = """
from bp_spark.model import bundle
bundle.promote(settings.bundles, trained.bundle)
"""
MOST_SHOWN = 600_000
"""Bytes of a notebook with all it came to."""
CONF = {
    **UNCOMPILED,
    "spark.ui.enabled": "false",
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_what_it_came_to(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None
        assert not cell.metadata
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    assert path.stat().st_size < 20_000


def environment(folder: Path) -> dict[str, str]:
    """Of a kernel that works in a folder, with a language model of a few random weights."""
    words = {word: number for number, word in enumerate(("[PAD]", "[UNK]", "[CLS]", "[SEP]"))}
    tokenizer = Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "bert"
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=16, **sizes)).save_pretrained(folder / "bert")
    _small_package(folder / "packages" / PACKAGE)
    settings = [
        *SMALL,
        f"texts.model={folder}/bert",
        f"tables.path={folder}/lakehouse",
        f"bundles={folder}/bundles",
        f"training.work_dir={folder}/work",
        f"evaluation.reports={folder}/reports",
        f"privacy.secret=file:{folder}/secret",
    ]
    submitted = " ".join(f"--conf {key}={value}" for key, value in CONF.items())
    return {
        **os.environ,
        "BP_SPARK_SETTINGS": " ".join(settings),
        "PYTHONPATH": os.pathsep.join([str(folder / "packages"), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYSPARK_SUBMIT_ARGS": f"{submitted} pyspark-shell",
        "JAVA_TOOL_OPTIONS": "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m",
    }


def _small_package(folder: Path) -> None:
    """The demo's data as its package has them, of every 27th household: to sample all would be most of the test's time."""
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").touch()
    spec = importlib.util.find_spec(PACKAGE)
    assert spec is not None
    assert spec.origin is not None
    whole = Path(spec.origin).parent / "data"
    tables = {name: pq.read_table(whole / f"{name}.parquet") for name in FILES.values()}
    bought = tables["transactions"].filter(_sampled(tables["transactions"]))["product_id"].unique()
    for name, table in tables.items():
        kept = pc.is_in(table["product_id"], bought) if name == "products" else _sampled(table)
        pq.write_table(table.filter(kept), folder / "data" / f"{name}.parquet", coerce_timestamps="us")


def _sampled(table: pa.Table) -> pa.ChunkedArray:
    household = pc.cast(table["household_id"], pa.int64())
    return pc.equal(pc.subtract(household, pc.multiply(pc.divide(household, 27), 27)), 0)


@pytest.mark.slow
def test_the_notebooks_run_one_after_the_other(tmp_path: Path) -> None:
    notebooks = [nbformat.read(path, as_version=4) for path in NOTEBOOKS]
    assert [path.stem[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04"]
    # in one kernel, of which nothing is left to the next notebook but the Spark session: as on Databricks it is there already
    together = nbformat.v4.new_notebook()
    for path, notebook in zip(NOTEBOOKS, notebooks, strict=True):
        # whether so small a bundle outdoes the baselines is chance, and the notebooks after it need one that is promoted
        promote = [nbformat.v4.new_code_cell(PROMOTE)] if path.stem.startswith("02") else []
        together.cells += [*notebook.cells, *promote, nbformat.v4.new_code_cell("%reset -f")]
    client = NotebookClient(together, timeout=600, resources={"metadata": {"path": str(FOLDER)}})
    # an error of a cell ends it with the cell and the traceback
    client.execute(env=environment(tmp_path))
    for path, notebook in zip(NOTEBOOKS, notebooks, strict=True):
        shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert any("image/png" in output.get("data", {}) for output in shown), f"{path.stem} draws nothing"
        assert len(nbformat.writes(notebook)) < MOST_SHOWN, f"{path.stem} shows too much"
    report = (tmp_path / "reports/night-2017-10-03.html").read_text(encoding="utf-8")
    keys = DeltaTable(str(tmp_path / "lakehouse/bp/user_keys")).to_pyarrow_table().column("user_key").to_pylist()
    assert len(keys) > 50
    assert not any(key in report for key in keys)
