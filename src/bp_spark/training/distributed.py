"""Start the ranks of a distributed training job, and let them work together.

:func:`run_ranks` runs a function in every rank through pyspark's ``TorchDistributor``. In the function, each rank enters
:func:`process_group`.
"""

from __future__ import annotations

import gc
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
import torch.distributed as dist
from pyspark.sql import SparkSession
from torch import Tensor

from bp_spark.core.config import TrainingConfig
from bp_spark.core.errors import PlatformError

P = ParamSpec("P")
T = TypeVar("T")

_ERROR_LINES = 8


@dataclass(frozen=True)
class Group:
    """The ranks of a job, as seen by one rank.

    Attributes:
        rank: number of this rank, from 0.
        size: number of ranks.
        device: device that this rank computes on.
    """

    rank: int
    size: int
    device: torch.device

    def sum(self, values: Tensor) -> Tensor:
        """Return the element-wise sum over all ranks; the same bits on each rank, so that all decide alike."""
        total = values.detach().clone().to(self.device)
        dist.all_reduce(total)
        dist.broadcast(total, src=0)
        return total.to(values.device)

    def max(self, values: Tensor) -> Tensor:
        """Return the element-wise maximum over all ranks."""
        total = values.detach().clone().to(self.device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return total.to(values.device)

    def from_first(self, value: int) -> int:
        """Return the value of rank 0 on every rank."""
        shared = torch.tensor(value, device=self.device)
        dist.broadcast(shared, src=0)
        return int(shared)


def run_ranks(
    spark: SparkSession,
    config: TrainingConfig,
    run_dir: Path,
    function: Callable[P, T],
    *args: P.args,
    **kwargs: P.kwargs,
) -> T:
    """Run ``function(*args, **kwargs)`` in ``config.processes`` ranks.

    ``launcher: driver`` starts all ranks on this machine. They see its GPUs, whether Spark manages them or not.
    ``launcher: cluster`` starts each rank as a barrier task of an executor. This needs as many free task slots as ranks, no
    dynamic allocation, and ``run_dir`` and all data on a file system that every machine sees.

    Args:
        spark: the running session; ``TorchDistributor`` takes its settings from it.
        config: number of ranks, and where they run.
        run_dir: an existing folder; a rank that fails leaves its traceback there.
        function: a function that the ranks can import, or a closure that cloudpickle can send.
        args: positional arguments, which cloudpickle can send.
        kwargs: keyword arguments, which cloudpickle can send.

    Returns:
        The result of rank 0.

    Raises:
        PlatformError: a rank failed or could not be started.
    """
    from pyspark.ml.torch.distributor import TorchDistributor

    for old in run_dir.glob("rank-*.error"):
        old.unlink()
    on_driver = config.launcher == "driver"
    # on the driver TorchDistributor would only count GPUs that Spark manages; without `use_gpu` the ranks see all GPUs
    use_gpu = not on_driver and float(str(spark.conf.get("spark.task.resource.gpu.amount", "0"))) >= 1
    threads = _threads(spark, config)
    try:
        # the output of ranks is progress, not a result: it belongs on standard error
        with _environment(), redirect_stdout(sys.stderr):
            distributor = TorchDistributor(config.processes, local_mode=on_driver, use_gpu=use_gpu)
            distributor.logger.setLevel("WARNING")
            result: Any = distributor.run(_run_rank, function, str(run_dir), threads, args, kwargs)
            return cast(T, result)
    except Exception as error:
        raise PlatformError(_explain(run_dir, error)) from None


@contextmanager
def process_group() -> Iterator[Group]:
    """Join the other ranks for the block: by ``nccl`` if each rank on this machine has a GPU of its own, else by ``gloo``.

    It reads the variables that torchrun sets: ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR``,
    ``MASTER_PORT``.
    """
    local_rank, local_size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.device_count() >= local_size:
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        device = torch.device("cpu")
        dist.init_process_group("gloo")
    try:
        yield Group(dist.get_rank(), dist.get_world_size(), device)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # A DDP model that outlives its group hangs when it is freed: it joins the group's threads while it holds the
        # lock that they wait for. So callers keep the model local to a function inside the block, and it is freed here.
        gc.collect()
        dist.destroy_process_group()


def _run_rank(
    function: Callable[..., T], run_dir: str, threads: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> T:
    """Run the function in this rank; write an error to a file, as torchrun only passes on an exit code."""
    torch.set_num_threads(threads)
    try:
        return function(*args, **kwargs)
    except BaseException:
        path = Path(run_dir) / f"rank-{os.environ['RANK']}.error"
        # on a full disk, the launcher still gets the error's exit code
        with suppress(OSError):
            path.write_text(traceback.format_exc(), encoding="utf-8")
        raise


def _threads(spark: SparkSession, config: TrainingConfig) -> int:
    """Return the number of cores of one rank: ranks that take more than their share slow each other down."""
    if config.launcher == "cluster":
        return int(str(spark.conf.get("spark.task.cpus", "1")))
    return max(1, len(os.sched_getaffinity(0)) // config.processes)


@contextmanager
def _environment() -> Iterator[None]:
    """Put this interpreter's folder first on ``PATH``, for ``torchrun``, and let ranks pass on lines as they come."""
    before = dict(os.environ)
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before.get("PATH", "")])
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        yield
    finally:
        for name in ("PATH", "PYTHONUNBUFFERED", "OMP_NUM_THREADS"):
            os.environ.pop(name)
            if name in before:
                os.environ[name] = before[name]


def _explain(run_dir: Path, error: Exception) -> str:
    """Return the end of the traceback of the first rank that failed: it brought the others down."""
    files = sorted(run_dir.glob("rank-*.error"), key=lambda path: path.stat().st_mtime_ns)
    if files:
        return (
            f"training: {files[0].stem.replace('-', ' ')} failed; see {files[0]}\n{_last_lines(files[0].read_text())}"
        )
    if isinstance(error, RuntimeError):
        return f"training: the ranks ended without saying why (out of memory?)\n{_last_lines(str(error))}"
    return f"training: the ranks could not be started: {str(error)[:500]}"


def _last_lines(text: str) -> str:
    return "\n".join([line for line in text.splitlines() if line.strip()][-_ERROR_LINES:])
