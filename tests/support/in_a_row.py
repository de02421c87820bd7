"""Jobs one after the other in one driver, which then starts once: ``in_a_row.py featurize ARGUMENTS -- train ARGUMENTS``."""

from __future__ import annotations

import runpy
import sys
from itertools import groupby
from pathlib import Path

JOBS = Path(__file__).parents[2] / "jobs"

if __name__ == "__main__":
    for is_end, words in groupby(sys.argv[1:], "--".__eq__):
        if is_end:
            continue
        job, *sys.argv[1:] = words
        try:
            runpy.run_path(str(JOBS / f"{job}.py"), run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
