"""The process that an executor forks its Python workers from, with the libraries that they need imported once.

In: module names in the environment variable ``BP_SPARK_WORKER_IMPORTS``. Out: Spark's own daemon. To import torch, transformers
and XGBoost takes seconds; forked, workers have them at once and share their memory, however many there are and however often
Spark ends idle ones.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import redirect_stdout
from importlib import import_module

from pyspark.daemon import manager

IMPORTS = "BP_SPARK_WORKER_IMPORTS"


def main() -> None:
    """Import, then serve Spark's requests for workers."""
    # standard output is where Spark is told the port
    with redirect_stdout(sys.stderr):
        for name in filter(None, os.environ.get(IMPORTS, "").split(",")):
            import_module(name)
    # workers collect garbage after each task: none of this is, and to look at it all would cost a quarter of a second
    gc.freeze()
    manager()


if __name__ == "__main__":
    main()
