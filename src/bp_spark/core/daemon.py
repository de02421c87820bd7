"""The process that an executor forks its Python workers from, with the libraries that they need imported once.

In: module names in the environment variable ``BP_SPARK_WORKER_IMPORTS``. Out: Spark's own daemon. To import torch, transformers
and XGBoost takes seconds; forked, workers have them at once and share their memory, however many there are and however often
Spark ends idle ones. What a worker does between two tasks, to collect garbage and to look for new modules, is kept short.
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import redirect_stdout
from importlib import import_module
from zipimport import zipimporter

from pyspark.daemon import manager

IMPORTS = "BP_SPARK_WORKER_IMPORTS"


class _Archive(zipimporter):
    """What finds modules in an archive, which nobody changes under a worker.

    Spark lets all finders look anew before each task. Of its own archive there is one for every package, and to read the list
    of its files for each of them takes longer than many a task.
    """

    def invalidate_caches(self) -> None:
        """There is nothing new."""


def keep_archives() -> None:
    """Read the list of an archive's files once in this process and those that are forked from it."""
    sys.path_hooks[:] = [_Archive if hook is zipimporter else hook for hook in sys.path_hooks]
    for path, finder in list(sys.path_importer_cache.items()):
        if isinstance(finder, zipimporter):
            del sys.path_importer_cache[path]


def main() -> None:
    """Import, then serve Spark's requests for workers."""
    keep_archives()
    # standard output is where Spark is told the port
    with redirect_stdout(sys.stderr):
        for name in filter(None, os.environ.get(IMPORTS, "").split(",")):
            import_module(name)
    # workers collect garbage after each task: none of this is, and to look at it all would cost a quarter of a second
    gc.freeze()
    manager()


if __name__ == "__main__":
    main()
