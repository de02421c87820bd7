"""Private temporary folders: those of killed processes are swept, those of living ones are not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_KILLED = (
    "import os; from bp_spark.core import temporary as t; print(t.folder('x'), flush=True); os.kill(os.getpid(), 9)"
)
_ENDS = "from bp_spark.core import temporary as t; print(t.folder('x'), flush=True); input()"


def test_the_next_process_sweeps_what_a_killed_one_left_and_spares_the_living(tmp_path: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", _ENDS], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as living:
        assert living.stdout is not None
        spared = Path(living.stdout.readline().strip())
        assert spared.parent.stat().st_mode & 0o777 == 0o700
        subprocess.run([sys.executable, "-c", _KILLED], env=environment, check=False)
        assert len(list(tmp_path.iterdir())) == 2
        subprocess.run([sys.executable, "-c", _ENDS], env=environment, input="\n", text=True, check=True)
        assert list(tmp_path.iterdir()) == [spared.parent]
        living.communicate("\n")
    assert list(tmp_path.iterdir()) == []
