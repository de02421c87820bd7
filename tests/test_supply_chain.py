"""Nothing that is loaded can run code: what ruff's security rules (``S``) don't see of it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from bp_spark.core.errors import PlatformError
from bp_spark.ingest import texts

ROOT = Path(__file__).parents[1]
UNPICKLE = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "jsonpickle", "marshal", "shelve"}
RUNS_CODE = {"read_pickle", "exec", "eval", "unsafe_load", "full_load"}


def unsafe(source: str) -> Iterator[str]:
    """What in a module's text loads data in a way that may run code hidden in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.split(".")[0] in UNPICKLE)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in UNPICKLE:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            yield from _unsafe_call(node)


def _unsafe_call(call: ast.Call) -> Iterator[str]:
    said = ast.unparse(call.func)
    owner, _, name = said.rpartition(".")
    given = {word.arg: ast.unparse(word.value) for word in call.keywords}
    yield from (
        f"{said}({word})" for word in ("trust_remote_code", "allow_pickle") if given.get(word, "False") != "False"
    )
    bare = {"exec", "eval"}  # as the methods of others they are harmless
    refused = (
        name in RUNS_CODE - (bare if owner else set()),
        said == "yaml.load",
        said == "torch.load" and given.get("weights_only") != "True",
        name == "from_pretrained" and "Model" in owner and given.get("use_safetensors") != "True",
    )
    if any(refused):
        yield said


@pytest.mark.parametrize("path", [p for part in ("src", "jobs") for p in sorted((ROOT / part).rglob("*.py"))], ids=str)
def test_no_module_unpickles_or_runs_what_it_loads(path: Path) -> None:
    assert list(unsafe(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "def f():\n    import cloudpickle as c",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "pd.read_pickle(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text)",
        "exec(text)",
        "AutoModel.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_the_search_finds_what_it_is_for(source: str) -> None:
    assert len(list(unsafe(source))) == 1


def test_a_language_model_whose_weights_are_pickled_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(PlatformError, match="holds no safetensors"):
        texts.model_folder(str(tmp_path))
