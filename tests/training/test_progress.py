"""Events of TensorBoard on a full disk: the error names the folder, whenever the writer notices it."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest
from tensorboard.summary.writer.record_writer import RecordWriter

from bp_spark.core import disk
from bp_spark.core.errors import PlatformError
from bp_spark.training.progress import event_writer


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("method", ["write", "close"])
def test_a_full_disk_names_the_folder_of_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def train() -> None:
        with event_writer(tmp_path / "run/tensorboard") as writer:
            monkeypatch.setattr(RecordWriter, method, full)
            for epoch in range(3):
                with disk.writing(tmp_path / "run/tensorboard"):
                    writer.add_scalar("loss", 1.0, epoch)

    before = set(threading.enumerate())
    with pytest.raises(PlatformError, match=r"run/tensorboard: can't be written: no space left") as raised:
        train()
    assert raised.value.exit_code == 5
    # the writer's thread ends by the same error: here, and not within another test
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=30)
