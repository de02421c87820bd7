"""Has Spark's Python workers save what they covered after each task: they are killed in the end, and never exit.

Python imports this at its start where the folder is on its path, which conftest.py puts it on while coverage is measured.
"""

from __future__ import annotations

import sys
from typing import Any

if "bp_spark.core.daemon" in sys.orig_argv:
    import coverage
    from pyspark import daemon

    serve = daemon.worker

    def worker(*connection: Any) -> int:
        try:
            return int(serve(*connection))
        finally:
            measured = coverage.Coverage.current()
            if measured is not None:
                measured.save()

    daemon.worker = worker
