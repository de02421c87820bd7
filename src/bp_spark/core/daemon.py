"""The process that an executor forks its Python workers from, with the workers' libraries imported once.

In: module names in the environment variable ``BP_SPARK_WORKER_IMPORTS``. Out: Spark's own daemon. To import torch, transformers
and XGBoost takes seconds. Forked workers have them at once and share their memory, however often Spark ends idle workers.
Between two tasks a worker collects garbage and looks for new modules; both are kept short.
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
    """A finder of modules in an archive that keeps its list of files; nobody changes an archive under a worker.

    Spark invalidates all finders before each task. Its own archive has a finder for every package, and to read the list of
    files for each of them takes longer than many a task.
    """

    def invalidate_caches(self) -> None:
        """Keep the list of files."""


def keep_archives() -> None:
    """Read the list of an archive's files once in this process and in its forks."""
    sys.path_hooks[:] = [_Archive if hook is zipimporter else hook for hook in sys.path_hooks]
    for path, finder in list(sys.path_importer_cache.items()):
        if isinstance(finder, zipimporter):
            del sys.path_importer_cache[path]


def main() -> None:
    """Import, then serve Spark's requests for workers."""
    keep_archives()
    # Spark reads the port from standard output
    with redirect_stdout(sys.stderr):
        for name in filter(None, os.environ.get(IMPORTS, "").split(",")):
            import_module(name)
    # workers collect garbage after each task; to look at all imported objects would take a quarter of a second
    gc.freeze()
    manager()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main()
