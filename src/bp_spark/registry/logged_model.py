"""A bundle as an MLflow ``pyfunc`` model: its own files, this package's code and the packages that it needs.

MLflow loads it where bp-spark isn't installed. Nothing is pickled, and the bundle proves itself unchanged as anywhere else.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from importlib import metadata, resources
from importlib.resources.abc import Traversable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pyspark import TaskContext

from bp_spark.core import disk, temporary
from bp_spark.features.aggregates import SEQUENCE_COLUMNS
from bp_spark.lakehouse.tables import SCORES
from bp_spark.model.columns import Ragged, ragged
from bp_spark.registry import bundle as bundles
from bp_spark.registry.bundle import Bundle
from bp_spark.registry.predictions import PREDICTION_COLUMNS, as_frame, fit_to_task, predict

if TYPE_CHECKING:
    from mlflow.models import ModelSignature
    from mlflow.models.model import ModelInfo

_MODEL = "model"
_PACKAGES = (
    "cryptography",
    "delta-spark",
    "mlflow-skinny",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "pyspark",
    "pyyaml",
    "scikit-learn",
    "scipy",
    "threadpoolctl",
    "xgboost-cpu",
)
"""Packages that a logged model imports; :data:`_NETWORK_PACKAGES` are added where a member is a network."""
_NETWORK_PACKAGES = ("safetensors", "torch", "transformers")
_EXAMPLES = {"int": np.int32(1), "bigint": np.int64(0), "float": np.float32(1)}
"""Values of the invented user of the input example, by SQL type."""


class Scorer:
    """Predicts for ``mlflow.pyfunc`` as :func:`bp_spark.registry.predictions.predict` does for a scoring run."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle

    def predict(self, model_input: pd.DataFrame) -> pd.DataFrame:
        """Return a row of predictions for each row of ``user_features``, under the same index."""
        columns: dict[str, np.ndarray | Ragged] = {name: model_input[name].to_numpy() for name in model_input.columns}
        for column in SEQUENCE_COLUMNS:
            if column.type == "array<float>" and column.name in columns:
                # The signature takes doubles, for JSON has no floats; the table has floats.
                history = ragged(columns[column.name])
                columns[column.name] = Ragged(history.values.astype(np.float32), history.lengths)
        return as_frame(predict(self.bundle, columns)).set_index(model_input.index)


def _load_pyfunc(path: str) -> Scorer:
    """Load a logged model; MLflow looks for a function of this name in the loader module."""
    bundle = bundles.load(path)
    if (task := TaskContext.get()) is not None:
        fit_to_task(bundle, task)
    return Scorer(bundle)


def log_model(bundle: Bundle, name: str, tags: Mapping[str, str]) -> ModelInfo:
    """Log the bundle's files, the code and the requirements as a model of MLflow's active run, and register it.

    Args:
        bundle: the bundle.
        name: of the registered model.
        tags: of the version.
    """
    from mlflow import pyfunc

    with disk.writing(temporary.folder("models")), TemporaryDirectory(dir=temporary.folder("models")) as folder:
        data = shutil.copytree(bundle.folder, Path(folder) / "bundle")
        code = Path(folder) / "bp_spark"
        _copy_code(resources.files("bp_spark"), code)
        logged: ModelInfo = pyfunc.log_model(
            name=_MODEL,
            loader_module=__name__,
            data_path=str(data),
            code_paths=[str(code)],
            signature=_signature(bundle),
            input_example=_example(bundle),
            pip_requirements=requirements(bundle),
            registered_model_name=name,
            tags=dict(tags),
        )
    return logged


def _copy_code(package: Traversable, target: Path) -> None:
    """Copy a package's modules, also out of an archive: jobs on a cluster may import this package from one."""
    target.mkdir()
    for entry in package.iterdir():
        if entry.name.endswith(".py"):
            (target / entry.name).write_bytes(entry.read_bytes())
        elif entry.is_dir() and entry.name != "__pycache__":
            _copy_code(entry, target / entry.name)


def requirements(bundle: Bundle) -> list[str]:
    """Return the packages that a bundle needs to predict, as pip takes them, pinned to the installed versions."""
    names = _PACKAGES + (_NETWORK_PACKAGES if "transformer" in bundle.members else ())
    return sorted(_requirement(name) for name in names)


def _requirement(name: str) -> str:
    """Pin the installed version; a platform's own Spark is no installed package and gets this package's range."""
    with suppress(metadata.PackageNotFoundError):
        return f"{name}=={metadata.version(name).partition('+')[0]}"
    with suppress(metadata.PackageNotFoundError):
        for declared in metadata.requires("bp-spark") or ():
            if re.match(rf"{name}\s*[<>=!~]", declared):
                return declared
    return name


def _example(bundle: Bundle) -> pd.DataFrame:
    """Return one row of input columns that no user has: ones, and a history of one event."""
    sequence_types = {column.name: column.type for column in SEQUENCE_COLUMNS}
    row: dict[str, object] = {}
    for name in bundle.required_columns:
        value = _EXAMPLES[_element_type(sequence_types.get(name, "float"))]
        row[name] = np.array([value]) if name in sequence_types else value
    return pd.DataFrame({name: [value] for name, value in row.items()})


def _signature(bundle: Bundle) -> ModelSignature:
    """Return the types of the bundle's input columns and predictions as MLflow declares them."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, Schema
    from mlflow.types.schema import Array, Object, Property, TensorSpec

    # A JSON list holds longs or doubles, and MLflow narrows neither.
    elements = {"int": DataType.long, "bigint": DataType.long, "float": DataType.double}
    arrays = {column.name: Array(elements[_element_type(column.type)]) for column in SEQUENCE_COLUMNS}
    inputs: list[ColSpec | TensorSpec] = [
        ColSpec(arrays.get(name, DataType.float), name) for name in dict.fromkeys(bundle.required_columns)
    ]
    reason = Object(
        [
            Property("group", DataType.string),
            Property("contribution", DataType.double),
            Property("feature", DataType.string, required=False),
            Property("value", DataType.double, required=False),
        ]
    )
    kinds: dict[str, DataType | Array] = {"double": DataType.double, "string": DataType.string, "array": Array(reason)}
    sql_types = {c.name: c.type.partition("<")[0] for c in SCORES.columns if c.name in PREDICTION_COLUMNS}
    # MLflow has no map whose keys are numbers: expected_by_horizon is returned without being declared.
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(kinds[sql_type], name) for name, sql_type in sql_types.items() if sql_type in kinds
    ]
    return ModelSignature(Schema(inputs), Schema(outputs))


def _element_type(sql_type: str) -> str:
    """Return the type of the elements of an array; any other type as it is."""
    return sql_type.removeprefix("array<").removesuffix(">")
