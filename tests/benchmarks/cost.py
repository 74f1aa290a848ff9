"""What does one block cost the worker? All contestants in one process, rounds alternating."""

from __future__ import annotations

import faulthandler
import fcntl
import os
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.harness import SPAWN, Results, Work, alternate, hosted, progress, wait_until
from tests.benchmarks.peers import ELASTIC_TIMER, FAULTHANDLER, FLOOR, NVRX, UPSTREAM, Library

FIFO_DEFAULT = Work("block over the FIFO, default scope", "us", "frames on the stack")
FIFO_EXPLICIT = Work("block over the FIFO, explicit scope", "us", "frames on the stack")
QUEUE_DEFAULT = Work("block over the queue, default scope", "us", "frames on the stack")
QUEUE_EXPLICIT = Work("block over the queue, explicit scope", "us", "frames on the stack")
QUEUE_SENT = Work("the same, until the requests are sent", "us", "frames on the stack")
SENT_AT_RETURN = Work("over the queue: request sent when acquire() returns (1: yes)")
OTHER = Work("start and end of one timer by other means", "us", "frames on the stack")

DEPTH = 30
DEPTHS = (3, 10, DEPTH, 100)

# Short: torch's server reads only when one is over, and its pipe is full after 300 blocks.
_MAX_INTERVAL = 0.02
_ROUNDS = 40
_SECONDS_PER_ROUND = 0.004


@dataclass
class Contestant:
    """Who is measured at what: `run(blocks)` enters and leaves that many blocks.

    Attributes:
        depths: The stack depths at which it is measured.
        settle: Called after a round, so that its aftermath meets nobody else's.
        until_settled: Whether `settle` belongs to what is measured.
    """

    work: Work
    name: str
    run: Callable[[int], None]
    depths: tuple[int, ...] = (DEPTH,)
    settle: Callable[[], None] = lambda: None
    until_settled: bool = False


def measure(results: Results) -> None:
    """Measure the cost of one block, of every contestant at every depth.

    In a script started by its path, as most training is: under ``python -m`` the stack begins with
    frames that have no source file, and torch's search for one takes it ten times as long.
    """
    root = str(Path(__file__).parents[2])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    script = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        input=results.to_json(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    results.series = Results.from_json(script.stdout).series


def _measure_here(results: Results) -> None:
    progress("cost of a block: servers start")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        contestants = []
        for library in (ELASTIC_TIMER, UPSTREAM):
            if library.name not in results.skipped:
                contestants += _over_fifo(stack, library, f"{folder}/{library.name}")
                contestants += _over_queue(stack, library, results)
        if NVRX not in results.skipped:
            contestants.append(_over_rank_monitor(stack, f"{folder}/{NVRX}"))
        contestants.append(_with_faulthandler())
        turns = [(each, depth) for each in contestants for depth in each.depths]
        blocks = {id(each): _calibrate(each) for each in contestants}
        for each, depth in alternate(turns, _ROUNDS, "cost of a block"):
            cost = _time(each, depth, blocks[id(each)])
            results.add(each.work, each.name, cost * 1e6, depth)


def _calibrate(contestant: Contestant) -> int:
    _time(contestant, DEPTH, 5)  # Warms up.
    return max(5, round(_SECONDS_PER_ROUND / _time(contestant, DEPTH, 20)))


def _time(contestant: Contestant, depth: int, blocks: int) -> float:
    """Seconds for one block with `depth` frames on the stack."""

    def timed() -> float:
        start = time.perf_counter()
        contestant.run(blocks)
        if contestant.until_settled:
            contestant.settle()
        end = time.perf_counter()
        contestant.settle()
        return (end - start) / blocks

    # A server awake, from whoever had the turn before, would not be one's own.
    time.sleep(0.002)
    return _at_depth(depth - 2, timed)  # The frames of timed() and run().


def _at_depth(depth: int, function: Callable[[], float]) -> float:
    frame: FrameType | None = sys._getframe()
    here = 0
    while frame is not None:
        frame, here = frame.f_back, here + 1
    return _deeper(depth - here, function)


def _deeper(frames: int, function: Callable[[], float]) -> float:
    return function() if frames <= 0 else _deeper(frames - 1, function)


def _blocks(library: Library, client: Any) -> tuple[Callable[[int], None], Callable[[int], None]]:
    """What enters and leaves blocks, with a scope of its own and with the default one."""
    expires = library.load().expires

    def explicit(blocks: int) -> None:
        for _ in range(blocks):
            with expires(60, "train.py#42", client):
                pass

    def default(blocks: int) -> None:
        for _ in range(blocks):
            with expires(60, client=client):
                pass

    return explicit, default


def _over_fifo(stack: ExitStack, library: Library, path: str) -> list[Contestant]:
    stack.enter_context(hosted(peers.file_server, library, path, _MAX_INTERVAL)).answer()
    explicit, default = _blocks(library, library.load().FileTimerClient(path))
    pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    stack.callback(os.close, pipe)

    def settle() -> None:
        wait_until(lambda: _bytes_in(pipe) == 0, 5)

    contestants = [
        Contestant(FIFO_EXPLICIT, library.name, explicit, DEPTHS, settle),
        Contestant(FIFO_DEFAULT, library.name, default, DEPTHS, settle),
    ]
    if library == ELASTIC_TIMER:
        # To the same server: one that reads slows its writers down, by whatever calls they come.
        floor = peers.bare_blocks(path)
        contestants.append(Contestant(FIFO_EXPLICIT, FLOOR, floor, DEPTHS, settle))
    return contestants


def _over_queue(stack: ExitStack, library: Library, results: Results) -> list[Contestant]:
    queue: Any = SPAWN.Queue()
    client, pipe = library.load().LocalTimerClient(queue), queue._reader.fileno()
    for _ in range(20):
        before = _bytes_in(pipe)
        client.acquire("sent?", time.time() + 60)
        results.add(SENT_AT_RETURN, library.name, float(_bytes_in(pipe) > before))
        client.release("sent?")
        _flush(queue)
    stack.enter_context(hosted(peers.queue_server, library, queue, _MAX_INTERVAL)).answer()
    explicit, default = _blocks(library, client)

    def settle() -> None:
        _flush(queue)

    return [
        Contestant(QUEUE_EXPLICIT, library.name, explicit, settle=settle),
        Contestant(QUEUE_DEFAULT, library.name, default, settle=settle),
        Contestant(QUEUE_SENT, library.name, explicit, settle=settle, until_settled=True),
    ]


def _bytes_in(pipe: int) -> int:
    """How much lies in a pipe, by the kernel's count."""
    content = bytearray(4)
    fcntl.ioctl(pipe, termios.FIONREAD, content)
    return int.from_bytes(content, sys.byteorder)


def _flush(queue: Any) -> None:
    """Wait until the queue's feeder thread, where one runs, has written everything."""
    while queue._buffer:
        time.sleep(0)
    with queue._wlock:
        pass


def _over_rank_monitor(stack: ExitStack, path: str) -> Contestant:
    stack.enter_context(hosted(peers.rank_monitor, path)).answer()
    client = peers.connect_to_rank_monitor(path)
    stack.callback(client.shutdown_workload_monitoring)

    def run(blocks: int) -> None:
        for _ in range(blocks):
            client.start_section("stuck")
            client.end_section("stuck")

    return Contestant(OTHER, NVRX, run, DEPTHS)


def _with_faulthandler() -> Contestant:
    null = os.open(os.devnull, os.O_WRONLY)

    def run(blocks: int) -> None:
        for _ in range(blocks):
            faulthandler.dump_traceback_later(60, file=null)
            faulthandler.cancel_dump_traceback_later()

    return Contestant(OTHER, FAULTHANDLER, run, DEPTHS)


if __name__ == "__main__":
    measured = Results.from_json(sys.stdin.read())
    _measure_here(measured)
    print(measured.to_json())
