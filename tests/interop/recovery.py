"""A job that recovers from a hang, or does not, for each way of starting torchrun.

`python -m tests.interop.recovery WAY WHERE TIMES [--kill-tree]` tries one way again and again and
tells how often the job came to its end; the figures in docs/torchrun.md are from there. WAY is one
of `WAYS`, WHERE what jobs/all_reduce.py can hang in.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from tests.interop.conftest import JOBS, MARK, Job, find_free_port, read_lines
from tests.support import kill_marked, marked_processes

RANKS = 3
HANGING_RANK = 1
PATIENCE = 60.0
"""How long a job may take, in seconds; one that recovers takes some twelve."""

RUN = ["-m", "elastic_timer", "run"]
TORCHRUN = ["-m", "torch.distributed.run", "--max-restarts", "3"]
LOCAL = ["--local-addr", "127.0.0.1"]
C10D = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:PORT"]
STATIC = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", "PORT", "--node-rank"]
SHARED = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "0"}


class Way(NamedTuple):
    """How torchrun is started: its options on each node, the ranks of each, the environment."""

    nodes: list[list[str]]
    ranks: list[int]
    env: dict[str, str] | None = None


RECOMMENDED = {
    "standalone": Way([["--standalone", *LOCAL]], [RANKS]),
    "one node": Way([LOCAL], [RANKS]),
    "c10d": Way([[*C10D, *LOCAL]] * 2, [2, 1]),
}
FAILING = {
    "standalone, shared": RECOMMENDED["standalone"]._replace(env=SHARED),
    "c10d, shared": RECOMMENDED["c10d"]._replace(env=SHARED),
    "static": Way([[*STATIC, "0"], [*STATIC, "1"]], [2, 1]),
    "static, one node": Way([["--master-port", "PORT", *LOCAL]], [RANKS]),
}
WAYS = {**RECOMMENDED, **FAILING}


class Training:
    """A job of three ranks, started in one of the ways, of which one rank hangs once.

    Args:
        way: How torchrun is started.
        where: What hangs.
        folder: Where the job and its nodes write.
        port: A free one.
        options: Those of `run`.
    """

    def __init__(self, way: Way, where: str, folder: Path, port: int, *options: str) -> None:
        self._record = folder / "record"
        self._record.touch()
        script = [str(JOBS / "all_reduce.py"), str(folder), str(HANGING_RANK), where]
        self.nodes: list[Job] = []
        for node, ranks in zip(way.nodes, way.ranks, strict=True):
            torchrun = [*TORCHRUN, *(option.replace("PORT", str(port)) for option in node)]
            command = [sys.executable, *RUN, *options, "--", sys.executable, *torchrun]
            command += ["--nproc-per-node", str(ranks), *script]
            output = folder / f"output-{len(self.nodes)}"
            self.nodes.append(Job(output, command, way.env or {}))

    def wait(self, timeout: float) -> list[int]:
        """The exit codes of all nodes; an AssertionError where there are none in time."""
        deadline = time.monotonic() + timeout
        return [node.wait(max(0.0, deadline - time.monotonic())) for node in self.nodes]

    @property
    def output(self) -> str:
        """What all nodes printed so far."""
        return "\n".join(node.output for node in self.nodes)

    def events(self, name: str) -> list[dict[str, Any]]:
        """What the processes of the job noted of this kind, in their order."""
        return [line for line in read_lines(self._record) if line["event"] == name]

    def attempts(self) -> int:
        """How often the ranks were started, once all have come to the end with the right sum.

        Raises:
            AssertionError: They have not; or nothing hung.
        """
        assert len(self.events("hangs")) == 1
        finished = self.events("finished")
        assert sorted(line["rank"] for line in finished) == list(range(RANKS)), self.output
        assert [line["sum"] for line in finished] == [RANKS] * RANKS
        hung, started = self.events("hangs")[0]["pid"], self.events("started")
        assert hung not in [line["pid"] for line in finished]
        return len(started) // RANKS

    def close(self) -> None:
        """End what is still running of torchrun and its server, and what hung."""
        for node in self.nodes:
            if node.process.poll() is None:
                node.process.kill()
                node.process.wait()
        # The loader's process outlives its rank, unless torchrun was the first to end that.
        for line in self.events("hangs"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(line["pid"], signal.SIGKILL)


def try_once(way: Way, where: str, folder: Path, *options: str) -> str:
    """What became of one job, in a few words."""
    os.environ[MARK] = mark = str(uuid.uuid4())
    with contextlib.closing(Training(way, where, folder, find_free_port(), *options)) as training:
        try:
            codes = training.wait(PATIENCE)
            outcome = f"{training.attempts()} attempts" if not any(codes) else f"exit {codes}"
        except AssertionError as error:
            outcome = str(error).partition("\n")[0] or "it did not finish"
        left = len(marked_processes(f"{MARK}={mark}"))
    while kill_marked(f"{MARK}={mark}"):
        time.sleep(0.2)
    return f"{outcome}, {left} processes left"


def main(way: str, where: str, times: str, *options: str) -> None:
    """Try it so often; tells each job's outcome, and keeps the folders of those that failed."""
    recovered = 0
    for _ in range(int(times)):
        folder = Path(tempfile.mkdtemp(prefix="recovery-"))
        outcome = try_once(WAYS[way], where, folder, *options)
        print(f"{way}, {where}: {outcome}, {folder}", flush=True)
        if " attempts" in outcome:
            recovered += 1
            shutil.rmtree(folder)
    print(f"{way}, {where}: {recovered} of {times} recovered", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
