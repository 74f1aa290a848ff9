"""What does a server take that holds many timers while nothing happens? CPU and memory."""

from __future__ import annotations

import json
import os
import select
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection

from tests.benchmarks import peers
from tests.benchmarks.harness import Host, Results, Work, fork, hosted, progress, wait_until
from tests.benchmarks.peers import ELASTIC_TIMER, FLOOR, UPSTREAM, Library

IDLE = Work("idle CPU of a server", "ms per s", "timers held")
TIMER_MEMORY = Work("memory per timer held", "bytes")
WORKER_MEMORY = Work("memory per worker watched", "bytes")
TIMERS = (100, 10_000, 100_000)
WORKERS = 500

# The shortest of the benchmarked intervals: a server that looks at every timer in every
# round does so ten times a second.
_MAX_INTERVAL = 0.1
_WINDOWS = 6
_SECONDS = 1.0


def measure(results: Results) -> None:
    """Measure servers of both libraries, all side by side."""
    libraries = [each for each in (ELASTIC_TIMER, UPSTREAM) if each.name not in results.skipped]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers: dict[tuple[str, int], Host] = {}
        for library in libraries:
            for timers in TIMERS:
                progress(f"idle servers: {library.name} is given {timers} timers")
                path = f"{folder}/{library.name}-{timers}"
                server = stack.enter_context(_server(library, path))
                scopes = (f"train.py#{number}" for number in range(timers))
                _register(server, path, ((os.getpid(), scope) for scope in scopes), timers)
                servers[library.name, timers] = server
            few, many = servers[library.name, TIMERS[0]], servers[library.name, TIMERS[-1]]
            per_timer = (many.memory() - few.memory()) / (TIMERS[-1] - TIMERS[0])
            results.add(TIMER_MEMORY, library.name, per_timer)
        servers[FLOOR, TIMERS[0]] = stack.enter_context(hosted(_wake_ups))
        servers[FLOOR, TIMERS[0]].answer()
        for window in range(_WINDOWS):
            progress(f"idle servers: second {window + 1} of {_WINDOWS}")
            before = {key: server.cpu_seconds() for key, server in servers.items()}
            time.sleep(_SECONDS)
            for (name, timers), server in servers.items():
                used = server.cpu_seconds() - before[name, timers]
                results.add(IDLE, name, used / _SECONDS * 1000, timers)
    with tempfile.TemporaryDirectory() as folder, hosted(_sleepers, WORKERS) as sleepers:
        pids = sleepers.answer()
        for library in libraries:
            progress(f"memory per worker watched: {library.name}")
            path = f"{folder}/{library.name}"
            with _server(library, path) as server:
                _register(server, path, [(os.getpid(), "first")], 1)
                memory = server.memory()
                _register(server, path, ((pid, "train.py#42") for pid in pids), WORKERS + 1)
                per_worker = (server.memory() - memory) / WORKERS
            results.add(WORKER_MEMORY, library.name, per_worker)


def _wake_ups(connection: Connection) -> None:
    """Host: wakes up as often as a server does that looks every `max_interval`, for nothing."""
    poller = select.poll()
    poller.register(connection.fileno(), select.POLLIN)
    connection.send("ready")
    while not poller.poll(_MAX_INTERVAL * 1000):
        pass


@contextmanager
def _server(library: Library, path: str) -> Iterator[Host]:
    with hosted(peers.file_server, library, path, _MAX_INTERVAL) as server:
        server.answer()
        yield server


def _register(server: Host, path: str, timers: Iterable[tuple[int, str]], held: int) -> None:
    """Send timers over the wire, and wait until the server holds `held`."""
    expiration_time = time.time() + 3600
    block = b""
    with open(path, "wb", buffering=0) as fifo:
        for pid, scope in timers:
            request = {"version": 1, "pid": pid, "scope_id": scope}
            request |= {"expiration_time": expiration_time, "signal": signal.SIGKILL}
            line = json.dumps(request).encode() + b"\n"
            if len(block) + len(line) > select.PIPE_BUF:
                fifo.write(block)
                block = b""
            block += line
        fifo.write(block)
    if not wait_until(lambda: server.ask()[1] == held, 60):
        raise TimeoutError(f"{path} holds {server.ask()[1]} timers, {held} were sent")


def _sleepers(connection: Connection, count: int) -> None:
    """Host: forks processes that sleep until it ends, and sends their pids."""
    pids = [fork(lambda: time.sleep(3600)) for _ in range(count)]
    connection.send(pids)
    connection.poll(None)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
