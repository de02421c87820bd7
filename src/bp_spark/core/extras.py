"""The optional parts of the package, such as ``bp-spark[spark]``, and the error that names a missing part.

A platform with its own Spark installs the package without ``spark``; a machine that only scores needs no ``train``.
Commands that only look do without ``spark`` where ``duckdb`` is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from bp_spark.core.errors import PlatformError

EXTRAS: Mapping[str, tuple[str, ...]] = {
    "spark": ("pyspark", "py4j", "delta"),
    "train": ("petastorm", "optuna", "peft", "tensorboard"),
    "duckdb": ("duckdb",),
    "market": ("statsforecast",),
    "openlineage": ("openlineage",),
}
"""Extra -> modules that it brings and that the code needs."""


def require(extra: str, purpose: str) -> None:
    """Require that an extra is installed, before any work begins.

    Args:
        extra: a key of :data:`EXTRAS`.
        purpose: what needs the extra, as the beginning of a sentence.

    Raises:
        PlatformError: a module of the extra is missing.
    """
    error = lacking(extra, purpose)
    if error is not None:
        raise error


def lacking(extra: str, purpose: str) -> PlatformError | None:
    """Return the error of :func:`require`, for work that goes on without the extra; ``None`` if it is installed."""
    missing = [module for module in EXTRAS[extra] if find_spec(module) is None]
    return _error(extra, f"{purpose} needs {', '.join(missing)}") if missing else None


def explain(error: ModuleNotFoundError) -> PlatformError | None:
    """Return the error that names the extra of a missing module; ``None`` if no extra brings the module.

    >>> print(explain(ModuleNotFoundError("No module named 'pyspark'", name="pyspark")))
    this needs pyspark, which is not installed: pip install 'bp-spark[spark]'
    """
    module = (error.name or "").partition(".")[0]
    for extra, modules in EXTRAS.items():
        if module in modules:
            return _error(extra, f"this needs {module}")
    return None


def _error(extra: str, what: str) -> PlatformError:
    return PlatformError(f"{what}, which is not installed: pip install 'bp-spark[{extra}]'")
