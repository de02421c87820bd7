"""A standalone cluster of processes on this machine, shared by the tests of the jobs and of the image."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
# Short jobs on small tables: Delta's 50 and Spark's 200 tasks and the second compiler would be all overhead.
SHORT = {
    "spark.sql.shuffle.partitions": "2",
    "spark.databricks.delta.snapshotPartitions": "2",
    "spark.databricks.delta.optimizeWrite.maxShufflePartitions": "2",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "2",
    "spark.ui.enabled": "false",
    "spark.buffer.pageSize": "1m",
    "spark.driver.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m",
    "spark.executor.extraJavaOptions": "-XX:TieredStopAtLevel=1 -XX:ReservedCodeCacheSize=256m",
}

# To compile plans as for large tables would be most of the time of a job; one job does, as it does at a user's.
UNCOMPILED = {"spark.sql.codegen.wholeStage": "false", "spark.sql.codegen.factoryMode": "NO_CODEGEN"}
COMPILED_JOB = "score"
START_SETTINGS = {
    # by default a sort of three rows takes a page of 64 MB, which goes to the old generation at once
    "spark.buffer.pageSize": "1m",
    # what no page shows need not be kept
    "spark.sql.ui.retainedExecutions": "20",
    "spark.ui.retainedJobs": "50",
    "spark.ui.retainedStages": "50",
    "spark.ui.retainedTasks": "500",
}
"""Of the Java that the tests of a process share, from its start on."""
TEST_SETTINGS = {
    "spark.sql.shuffle.partitions": "2",
    **UNCOMPILED,
    "spark.databricks.delta.snapshotPartitions": "1",
    "spark.databricks.delta.optimizeWrite.maxShufflePartitions": "2",
    "spark.sql.sources.parallelPartitionDiscovery.parallelism": "2",
    # the web interface alone shows plans as text, and no test opens it
    "spark.sql.ui.explainMode": "simple",
    "spark.sql.maxPlanStringLength": "0",
}
"""Of the session that the tests of a process share."""


@dataclass
class Cluster:
    """A master and its workers, each the leader of a process group of its own, started as docs/cluster.md says."""

    folder: Path
    workers: int = 2
    python_path: Path | None = None
    address: str = ""
    page: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self) -> None:
        port, page_port = free_ports(2)
        self.address, self.page = f"spark://localhost:{port}", f"http://localhost:{page_port}/json/"
        self.daemon(
            "master", *self.master(), "--host", "localhost", "--port", str(port), "--webui-port", str(page_port)
        )
        for number in range(1, self.workers + 1):
            sizes = ("--cores", "1", "--memory", "2g", "--webui-port", "0", "--work-dir", str(self.work_dir(number)))
            self.daemon(f"worker-{number}", *self.worker("--host", "localhost", *sizes))
        self._wait_for_workers()

    def master(self) -> list[str]:
        """The command that starts a master."""
        return [str(BIN / "spark-class"), "org.apache.spark.deploy.master.Master"]

    def worker(self, *arguments: str) -> list[str]:
        """The command that starts a worker of this master."""
        return [str(BIN / "spark-class"), "org.apache.spark.deploy.worker.Worker", *arguments, self.address]

    def job(self, job: str, *arguments: str) -> list[str]:
        """The command that runs a job on the cluster."""
        settings = SHORT if job == COMPILED_JOB else SHORT | UNCOMPILED
        return [
            str(BIN / "spark-submit"),
            *("--master", self.address, "--driver-memory", "2g", "--executor-memory", "1g"),
            *(part for setting in settings.items() for part in ("--conf", "=".join(setting))),
            *(str(ROOT / f"jobs/{job}.py"), *arguments),
        ]

    def environment(self) -> dict[str, str]:
        """A shell with the environment activated and nothing more: conf/spark-env.sh finds interpreter and Java."""
        activated = {**bare_environment(), "PATH": f"{BIN}:{os.environ['PATH']}"}
        return activated | ({"PYTHONPATH": str(self.python_path)} if self.python_path else {})

    def work_dir(self, number: int) -> Path:
        return self.folder / f"work-{number}"

    def state(self) -> dict:
        """What the master's page says."""
        with urllib.request.urlopen(self.page) as answer:
            return json.load(answer)

    def submit(
        self, job: str, *arguments: str, meanwhile: Callable[[subprocess.Popen[str]], None] = lambda _: None
    ) -> subprocess.CompletedProcess[str]:
        """Run a job to its end, and something else beside it, which is given the job's process."""
        command = self.job(job, *arguments)
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=self.environment(),
            start_new_session=True,
        )
        # in a thread, for what the job says is to be read all the while: it would wait for a reader once the pipe is full
        with ThreadPoolExecutor(max_workers=1) as beside:
            try:
                watching = beside.submit(meanwhile, process)
                output, errors = process.communicate()
            finally:
                _end(process)
            watching.result()
        return subprocess.CompletedProcess(command, process.returncode, output, errors)

    def stop(self) -> None:
        for process in reversed(self.processes):
            _end(process)

    def daemon(self, name: str, *command: str) -> None:
        """Start a process that runs until the cluster is stopped; what it says goes to ``NAME.log``."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.processes.append(
                subprocess.Popen(
                    command,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    cwd=self.folder,
                    env=self.environment(),
                    start_new_session=True,
                )
            )

    def wait_for(self, what: str, done: Callable[[], bool]) -> None:
        """Wait until something is so, as long as all processes live; fail with the logs when one has ended."""
        while True:
            with suppress(OSError):
                if done():
                    return
            for process in self.processes:
                assert process.poll() is None, f"{what}, for {process.args} ended:\n{self._logs()}"
            time.sleep(0.2)

    def _wait_for_workers(self) -> None:
        self.wait_for("the workers did not register", lambda: self.state()["aliveworkers"] == self.workers)

    def _logs(self) -> str:
        return "\n".join(f"{log.name}: {log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))


def bare_environment() -> dict[str, str]:
    """This process's environment without what is Spark's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYSPARK_", "SPARK_"))}
    return {**kept, "SPARK_LOCAL_HOSTNAME": "localhost"}


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens on."""
    sockets = [socket.create_server(("localhost", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def _end(process: subprocess.Popen) -> None:
    """End a process with its children (they share its process group), gently first."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            # Spark ends within seconds if it ends at all; whoever is killed has nothing left to say
            process.wait(timeout=20)
