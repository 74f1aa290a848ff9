"""The client of one library works with the server of the other, over FIFO and queue."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

import elastic_timer
from tests.interop.conftest import UPSTREAM
from tests.interop.workers import FILE_SERVER, FILE_WORKER, queue_worker
from tests.support import Spawn, eventually, is_alive, wait_dead

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")
upstream = importlib.import_module(UPSTREAM)

OURS = "elastic_timer"
MIXED = pytest.mark.parametrize(
    ("client", "server"),
    [(UPSTREAM, OURS), (OURS, UPSTREAM)],
    ids=["torch's client, our server", "our client, torch's server"],
)
SPAWN = multiprocessing.get_context("spawn")
FAR = 3600.0


@MIXED
def test_file_pair(client: str, server: str, fifo_path: str, spawn: Spawn) -> None:
    """Acquire, release and expiry get from one library's file client to the other's server."""
    watchdog = spawn(FILE_SERVER, server, fifo_path)
    worker = spawn(FILE_WORKER, client, fifo_path)
    assert (watchdog.readline(60), worker.readline(60)) == ("ready", "ready")

    def timers() -> list[list[Any]]:
        watchdog.send_line("timers")
        held: list[list[Any]] = json.loads(watchdog.readline())
        return held

    def order(text: str) -> None:
        worker.send_line(text)
        assert worker.readline() == "done"

    order(f"acquire first {time.time() + FAR}")
    order(f"acquire second {time.time() + FAR}")
    eventually(lambda: timers() == [[worker.pid, "first"], [worker.pid, "second"]])
    order("release first")
    eventually(lambda: timers() == [[worker.pid, "second"]])
    order(f"acquire second {time.time()}")
    assert worker.wait() == -signal.SIGKILL
    if server == UPSTREAM:  # It ends its own process with the worker's signal.
        assert watchdog.wait() == -signal.SIGKILL
        os.unlink(fifo_path)
    else:
        eventually(lambda: timers() == [])
        assert watchdog.process.stdin is not None
        watchdog.process.stdin.close()
        assert watchdog.wait() == 0


@MIXED
def test_queue_pair(client: str, server: str) -> None:
    """Acquire, release and expiry get from one library's queue client to the other's server."""
    queue = SPAWN.Queue()
    watchdog = importlib.import_module(server).LocalTimerServer(queue, max_interval=0.1)
    with queue_client(client, queue) as (worker, order), running(watchdog):
        order("acquire", "first", time.time() + FAR)
        order("acquire", "second", time.time() + FAR)
        eventually(lambda: set(watchdog._timers) == {(worker.pid, "first"), (worker.pid, "second")})
        order("release", "first")
        eventually(lambda: set(watchdog._timers) == {(worker.pid, "second")})
        order("acquire", "second", time.time() + 0.5)
        wait_dead(worker)
        worker.join()
        assert worker.exitcode == -signal.SIGKILL
        eventually(lambda: not watchdog._timers)
    queue.close()


@contextmanager
def queue_client(library: str, queue: Any) -> Iterator[tuple[BaseProcess, Callable[..., None]]]:
    """A process with that library's client, and what has it call the client's methods."""
    ours, theirs = SPAWN.Pipe()
    worker = SPAWN.Process(target=queue_worker, args=(library, queue, theirs))
    worker.start()

    def order(*call: object) -> None:
        ours.send(call)
        assert ours.poll(60), "the worker does not answer"
        assert ours.recv() == "done"

    try:
        yield worker, order
    finally:
        worker.kill()
        worker.join()
        worker.close()
        ours.close()
        theirs.close()


@contextmanager
def running(server: Any) -> Iterator[None]:
    """Start a queue server of either library, and stop it with its thread gone."""
    before = set(threading.enumerate())
    server.start()
    threads = set(threading.enumerate()) - before
    try:
        yield
    finally:
        server.stop()
        for thread in threads:  # Torch's stop() does not always wait for it to the end.
            thread.join(20)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("sender", [upstream, elastic_timer], ids=["torch's", "ours"])
def test_pickled_requests(sender: Any, spawn: Spawn) -> None:
    """Pickled requests of one library's class are acquires and releases to the other's server."""
    receiver = elastic_timer if sender is upstream else upstream
    worker = spawn("import sys; sys.stdin.read()")
    queue = SPAWN.Queue()
    watchdog = receiver.LocalTimerServer(queue, max_interval=0.1)
    with running(watchdog):
        for scope in ("first", "second"):
            queue.put(sender.TimerRequest(worker.pid, scope, time.time() + FAR))
        eventually(lambda: len(watchdog._timers) == 2)
        assert set(watchdog._timers) == {(worker.pid, "first"), (worker.pid, "second")}
        queue.put(sender.TimerRequest(worker.pid, "first", -1))
        eventually(lambda: set(watchdog._timers) == {(worker.pid, "second")})
        assert is_alive(worker)
        queue.put(sender.TimerRequest(worker.pid, "second", time.time()))
        assert worker.wait() == -signal.SIGKILL
    queue.close()
    queue.join_thread()


def test_pickled_bytes() -> None:
    """Requests of both libraries survive pickling with every protocol of this Python."""
    for library in (upstream, elastic_timer):
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
            request = library.FileTimerRequest(4711, "scope", 1795150503.21, 9)
            assert pickle.loads(pickle.dumps(request, protocol)) == request
