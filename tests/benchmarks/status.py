"""What does it cost to be asked? Reaps while status is asked, and an idle server with a socket."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.harness import (
    OURS,
    Host,
    Results,
    Work,
    alternate,
    fork,
    hosted,
    progress,
    serve,
    wait_until,
)

LATENESS = Work("lateness of a reap, 10,000 timers held", "ms")
ANSWER = Work("status --json, 10,000 timers", "ms")
IDLE = Work("idle CPU of a server at 0.1 s, 10,000 timers held", "ms per s")
LEFT = Work("descriptors and memory more than before, after all who asked", "")

WITHOUT = "without a socket"
WITH = "with a socket"
QUIET = "nobody asks"
ASKED = "asked 10 times a second"
CROWD = "100 clients hang, send rubbish or ask"
DESCRIPTORS = "descriptors"
MEMORY = "MiB"

_TIMERS = 10_000
_ROUNDS = 4
_REAPS = 10
_STEP = 0.1
_CLIENTS = 100


def measure(results: Results) -> None:
    """Let workers overrun while nobody asks, somebody does, and a crowd does."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers: dict[str, tuple[Host, str]] = {}
        for name, options in (
            (WITHOUT, {}),
            (QUIET, {"status": True}),
            (f"idle {WITHOUT}", {"max_interval": 0.1}),
            (f"idle {WITH}", {"max_interval": 0.1, "status": True}),
        ):
            path = f"{folder}/{len(servers)}"
            progress(f"status: a server is given {_TIMERS} timers")
            host = stack.enter_context(hosted(_server, path, options))
            host.answer()
            _register(host, path)
            servers[name] = host, path
        before = _weight(servers[QUIET][0])
        quiet = _nobody, servers[QUIET]
        contestants: dict[str, tuple[Callable[[str], Any], tuple[Host, str]]] = {
            WITHOUT: (_nobody, servers[WITHOUT]),
            QUIET: quiet,
            ASKED: (_asker, servers[QUIET]),
            CROWD: (_crowd, servers[QUIET]),
        }
        for name in alternate(list(contestants), _ROUNDS, "status: reaps"):
            asking, (_, path) = contestants[name]
            with asking(path):
                for late in _reaps(path):
                    results.add(LATENESS, name, late * 1000)
        time.sleep(3)
        after = _weight(servers[QUIET][0])
        results.add(LEFT, DESCRIPTORS, after[0] - before[0])
        results.add(LEFT, MEMORY, (after[1] - before[1]) / 2**20)
        for _ in range(2 * _ROUNDS):
            progress("status: how long does an answer take?")
            results.add(ANSWER, OURS, 1000 * _ask_by_command(servers[QUIET][1]))
            time.sleep(0.3)
        idle = {name: host for name, (host, _) in servers.items() if name.startswith("idle")}
        for window in range(6):
            progress(f"status: idle servers, second {window + 1}")
            used = {name: host.cpu_seconds() for name, host in idle.items()}
            time.sleep(1)
            for name, host in idle.items():
                results.add(IDLE, name[5:], 1000 * (host.cpu_seconds() - used[name]))


def _server(connection: Connection, path: str, options: dict[str, Any]) -> None:
    """Host: a server; answers with the timers held."""
    peers.silence()
    importlib.import_module("elastic_timer.debug_info_logging").set_stacks_timeout(0)
    library = importlib.import_module("elastic_timer")
    server = library.FileTimerServer(path, "benchmark", **options)
    server.start()
    connection.send("ready")
    serve(connection, lambda _: len(server._timers))


def _line(pid: int, scope: str, expiration_time: float) -> bytes:
    request = {"version": 1, "pid": pid, "scope_id": scope, "expiration_time": expiration_time}
    return json.dumps({**request, "signal": signal.SIGKILL}).encode() + b"\n"


def _register(host: Host, path: str) -> None:
    """Have a server hold all those timers."""
    with open(path, "wb", buffering=0) as fifo:
        for number in range(_TIMERS):
            fifo.write(_line(os.getpid(), f"/src/train.py#{number}", time.time() + 3600))
    if not wait_until(lambda: host.ask() == _TIMERS, 60):
        raise TimeoutError(f"{host.ask()} timers are held")


def _reaps(path: str) -> Iterator[float]:
    """How late each of some workers is reaped, in seconds, one after the other."""
    pids = [fork(lambda: time.sleep(60)) for _ in range(_REAPS)]
    start = time.time() + 0.3
    deadlines = {pid: start + _STEP * place for place, pid in enumerate(pids)}
    try:
        with open(path, "wb", buffering=0) as fifo:
            for pid, deadline in deadlines.items():
                fifo.write(_line(pid, "stuck", deadline))
        poller = select.poll()
        pidfds = {os.pidfd_open(pid): pid for pid in pids}
        for pidfd in pidfds:
            poller.register(pidfd, select.POLLIN)
        while pidfds:
            for pidfd, _ in poller.poll(10_000) or [(-1, 0)]:
                death = time.time()
                if pidfd < 0:
                    raise TimeoutError("a worker was not reaped")
                poller.unregister(pidfd)
                os.close(pidfd)
                yield death - deadlines[pidfds.pop(pidfd)]
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def _nobody(path: str) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


@contextlib.contextmanager
def _asker(path: str) -> Iterator[None]:
    """A process that asks ten times a second."""
    with hosted(_ask_again, path):
        yield


def _ask_again(connection: Connection, path: str) -> None:
    module = importlib.import_module("elastic_timer._transport.status_socket")
    while not connection.poll(0.1):
        with contextlib.suppress(OSError), module.Question(path, 10) as question:
            while question._connection.recv(1 << 18):  # It is parsed by nobody.
                pass


@contextlib.contextmanager
def _crowd(path: str) -> Iterator[None]:
    """A process with clients that hang, or send rubbish, or ask, ten times a second."""
    with hosted(_crowd_again, path):
        yield


def _crowd_again(connection: Connection, path: str) -> None:
    clients: list[socket.socket] = []
    while not connection.poll(0.1):
        for client in clients[::3]:  # They only ask.
            client.close()
        clients = [client for client in clients if client.fileno() >= 0][-_CLIENTS:]
        while len(clients) < _CLIENTS:
            client = socket.socket(socket.AF_UNIX)
            client.setblocking(False)
            with contextlib.suppress(OSError):
                client.connect(f"{path}.sock")
                client.send(b"rubbish" * 100)
            clients.append(client)


def _weight(host: Host) -> tuple[int, int]:
    return len(os.listdir(f"/proc/{host.pid}/fd")), host.memory()


def _ask_by_command(path: str) -> float:
    began = time.monotonic()
    command = [sys.executable, "-m", "elastic_timer", "status", "--timer-file", path, "--json"]
    told = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
    took = time.monotonic() - began
    assert len(json.loads(told)["timers"]) >= _TIMERS
    return took
