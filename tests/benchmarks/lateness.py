"""How late is a stuck worker reaped? Seen from outside: by a pidfd on every worker."""

from __future__ import annotations

import faulthandler
import functools
import importlib
import json
import multiprocessing
import os
import select
import signal
import struct
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.harness import OURS, Host, Results, Work, fork, hosted, progress, serve
from tests.benchmarks.peers import ELASTIC_TIMER, FAULTHANDLER, FLOOR, NVRX, UPSTREAM, Library

LATENESS = Work("lateness of a reap", "ms", "max_interval, s")
UNREAPED = Work("workers still there at the end", varied="max_interval, s")
EVIDENCE = Work("of that, the evidence's own time", "ms")
INTERVALS = (0.1, 10.0, 60.0)

# Within which all deadlines lie. As long as the longest max_interval: a server that looks
# only every max_interval is late by anything between nothing and all of it.
# A little less, for the last ones to be seen too, and for steps that are no multiple of another
# interval: all deadlines would lie at the same place in it.
_WINDOW = 58.7
# Before the first deadline all workers have entered; after the last one, servers have time left.
_LEAD = 1.0
# So long they take to enter, one after the other. If all woke at one moment, some would wait for a
# processor after they have told their deadline and before they enter: it would be that much later.
_ENTRY = 0.9
_MARGIN = 2.0
_LONG = 3 * _WINDOW
_START = struct.Struct("d")
_REPORT = struct.Struct("id")
_DUE = struct.Struct("di")
_SAMPLES = 20
_PAUSE = 0.2


@dataclass(frozen=True)
class Contest:
    """One contestant at one max_interval, with as many workers as it is to reap.

    Attributes:
        takes_stacks: Whether Python stacks are taken of each, which only ours does.
    """

    name: str
    library: Library | None
    interval: float
    workers: int
    takes_stacks: bool = False


def contests(skipped: dict[str, str]) -> list[Contest]:
    """All contestants that can take part."""
    entries = []
    for interval in INTERVALS:
        for library in (ELASTIC_TIMER, UPSTREAM):
            for kind in ("file", "queue"):
                entries.append(Contest(f"{library.name}, {kind}", library, interval, 20))
        entries.append(Contest(NVRX, None, interval, 7))
    # These have no interval: they wait for the deadline itself.
    entries += [Contest(name, None, 0, 20) for name in (FAULTHANDLER, FLOOR)]
    return [entry for entry in entries if entry.name.split(",")[0] not in skipped]


def measure(results: Results) -> None:
    """Let all workers of all contestants overrun their deadlines, one after another."""
    entries = contests(results.skipped)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        progress(f"{LATENESS.title}: {sum(entry.workers for entry in entries)} workers start")
        hosts: list[Host] = []
        for place, entry in enumerate(entries):
            # The contestants' deadlines alternate, and no two of them coincide.
            step = _WINDOW / entry.workers
            shift = step * (place + 0.5) / len(entries)
            afters = [_LEAD + shift + step * number for number in range(entry.workers)]
            arguments = (entry, tempfile.mkdtemp(dir=folder), afters)
            hosts.append(stack.enter_context(hosted(stuck_workers, *arguments)))
        pidfds = [[stack.enter_context(Pidfd(pid)) for pid in host.answer()] for host in hosts]
        start = time.time() + 1
        for host in hosts:
            host.connection.send(start)
        workers = {pidfd.fileno() for of_host in pidfds for pidfd in of_host}
        deaths = watch(workers, start + _LEAD + _WINDOW + _MARGIN, LATENESS.title)
        for entry, host, of_host in zip(entries, hosts, pidfds, strict=True):
            for number, deadline in host.answer():
                death = deaths.get(of_host[number].fileno())
                at = entry.interval or None
                results.add(UNREAPED, entry.name, float(death is None), at)
                if death is not None:
                    results.add(LATENESS, entry.name, (death - deadline) * 1000, at)

    progress(f"{EVIDENCE.title}: {_SAMPLES} times")
    with hosted(_evidence) as host:
        for _ in range(_SAMPLES):
            results.add(EVIDENCE, OURS, host.ask() * 1000)


def _evidence(connection: Connection) -> None:
    """Host: answers with how long it takes to find out and to log what a worker was doing."""
    peers.silence()
    logging = importlib.import_module("elastic_timer.debug_info_logging")
    logging.set_stacks_timeout(0)
    timers = [json.dumps({"scope_id": "stuck", "expiration_time": time.time()})]

    def answer(_: object) -> float:
        worker = fork(lambda: time.sleep(_LONG))
        time.sleep(_PAUSE)  # As long after the one before as a server's next worker may come.
        began = time.monotonic()
        found = logging.log_debug_info_for_expired_timers("benchmark", {worker: timers})
        took = time.monotonic() - began
        assert worker in found
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        return took

    serve(connection, answer)


def watch(workers: set[int], end: float, what: str) -> dict[int, float]:
    """When each process ended, in epoch seconds, by its pidfd."""
    deaths: dict[int, float] = {}
    poller = select.poll()
    for pidfd in workers:
        poller.register(pidfd, select.POLLIN)
    while len(deaths) < len(workers) and (left := end - time.time()) > 0:
        for pidfd, _ in poller.poll(min(left, 1) * 1000):
            deaths[pidfd] = time.time()
            poller.unregister(pidfd)
        progress(f"{what}: {len(deaths)} of {len(workers)} reaped, {left:.0f} s left")
    return deaths


class Pidfd:
    """What becomes readable when a process ends."""

    def __init__(self, pid: int) -> None:
        self._descriptor = os.pidfd_open(pid)

    def fileno(self) -> int:
        return self._descriptor

    def __enter__(self) -> Pidfd:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)


def stuck_workers(connection: Connection, entry: Contest, folder: str, afters: list[float]) -> None:
    """Host: forks the workers, starts their server, sends their pids; then, their deadlines.

    Their times begin at the start, which the other side says when it has the pids.
    """
    peers.silence()
    start_server, stick = _REAPERS[entry.name.split(", ")[-1]](entry, folder, afters)
    served_reader, served_writer = os.pipe()
    start_reader, start_writer = os.pipe()
    report_reader, report_writer = os.pipe()

    def worker(number: int) -> None:
        os.read(served_reader, 1)
        stuck = stick(number)
        os.write(report_writer, b"r")
        (start,) = _START.unpack(os.read(start_reader, _START.size))
        turn = start + number / len(afters) * _ENTRY
        time.sleep(max(0.0, turn - time.time()))
        now = time.time()
        # Of one moment for all, whenever it is their turn; NVRx knows nothing but a time.
        after = afters[number] + (0.0 if entry.name == NVRX else start - now)
        os.write(report_writer, _REPORT.pack(number, now + after))
        stuck(after)

    def report(size: int) -> bytes:
        sources: list[Any] = [report_reader, connection]
        if report_reader not in select.select(sources, [], [])[0]:
            raise EOFError("the benchmark was given up")
        return os.read(report_reader, size)

    pids = [fork(functools.partial(worker, number)) for number in range(len(afters))]
    monitors = None
    try:
        monitors = start_server()
        os.write(served_writer, b"s" * len(pids))
        for _ in pids:
            report(1)
        connection.send(pids)
        os.write(start_writer, _START.pack(connection.recv()) * len(pids))
        connection.send([_REPORT.unpack(report(_REPORT.size)) for _ in pids])
        connection.poll(None)  # The other side is done once it has closed its end.
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        for monitor in monitors or ():
            monitor.kill()


# What a host needs: to start the server (a list of processes to end, or None), and in a
# worker, given its number, to prepare a function of `after` that is stuck past its deadline.
_Start = Callable[[], Any]
_Stick = Callable[[int], Callable[[float], None]]


def _file(entry: Contest, folder: str, afters: list[float]) -> tuple[_Start, _Stick]:
    assert entry.library is not None
    _set_stacks(entry)
    library, path = entry.library.load(), f"{folder}/fifo"
    server = library.FileTimerServer(path, "benchmark", entry.interval)
    if entry.library == UPSTREAM:
        # After its first reap it ends its own process. Spared, or one sample would be all there is.
        reap = server._reap_worker
        server._reap_worker = lambda pid, signal: pid == os.getpid() or reap(pid, signal)
    return server.start, _in_block(library, lambda: library.FileTimerClient(path))


def _queue(entry: Contest, folder: str, afters: list[float]) -> tuple[_Start, _Stick]:
    assert entry.library is not None
    _set_stacks(entry)
    library, queue = entry.library.load(), multiprocessing.get_context("fork").Queue()
    server = library.LocalTimerServer(queue, entry.interval)
    return server.start, _in_block(library, lambda: library.LocalTimerClient(queue))


def _set_stacks(entry: Contest) -> None:
    """Have no Python stacks taken, which py-spy, where it is installed, does before a reap."""
    if entry.library == ELASTIC_TIMER and not entry.takes_stacks:
        logging = importlib.import_module("elastic_timer.debug_info_logging")
        logging.set_stacks_timeout(0)


def _in_block(library: Any, make_client: Callable[[], Any]) -> _Stick:
    def stick(number: int) -> Callable[[float], None]:
        client = make_client()

        def stuck(after: float) -> None:
            # With the default scope, torch's search for it would delay all that enter with it.
            with library.expires(after, "stuck", client):
                time.sleep(_LONG)

        return stuck

    return stick


def _rank_monitor(entry: Contest, folder: str, afters: list[float]) -> tuple[_Start, _Stick]:
    importlib.import_module(peers.NVRX_MODULE)  # Here, once, and not in every worker.
    paths = [f"{folder}/{number}" for number in range(len(afters))]

    def start() -> list[Any]:
        return [
            peers.start_rank_monitor(path, after, entry.interval)
            for path, after in zip(paths, afters, strict=True)
        ]

    def stick(number: int) -> Callable[[float], None]:
        client = peers.connect_to_rank_monitor(paths[number])

        def stuck(after: float) -> None:
            client.start_section("stuck")
            time.sleep(_LONG)

        return stuck

    return start, stick


def _floor(entry: Contest, folder: str, afters: list[float]) -> tuple[_Start, _Stick]:
    """A bare loop in another process, which sleeps until each deadline and sends SIGKILL."""
    reader, writer = os.pipe()

    def kill() -> None:
        for deadline, pid in sorted(_DUE.unpack(os.read(reader, _DUE.size)) for _ in afters):
            time.sleep(max(0.0, deadline - time.time()))
            os.kill(pid, signal.SIGKILL)

    def start() -> list[Any]:
        killer = multiprocessing.get_context("fork").Process(target=kill)
        killer.start()
        return [killer]

    def stuck(after: float) -> None:
        os.write(writer, _DUE.pack(time.time() + after, os.getpid()))
        time.sleep(_LONG)

    return start, lambda number: stuck


def _faulthandler(entry: Contest, folder: str, afters: list[float]) -> tuple[_Start, _Stick]:
    def stuck(after: float) -> None:
        faulthandler.dump_traceback_later(after, exit=True)
        time.sleep(_LONG)

    return (lambda: None), (lambda number: stuck)


_REAPERS = {
    "file": _file,
    "queue": _queue,
    NVRX: _rank_monitor,
    FAULTHANDLER: _faulthandler,
    FLOOR: _floor,
}
