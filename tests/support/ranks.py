"""A process that pretends to be a rank of a DDP job."""

from __future__ import annotations

import os
import socket

import pytest


def as_rank(rank: int, ranks: int) -> None:
    """Pretend that torchrun started this process; a new port for each process group."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
    )


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture
def single_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    as_rank(0, 1)
