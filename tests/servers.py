"""Servers of either kind, in the test's own process or in one of their own."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
    LocalTimerClient,
    LocalTimerServer,
    TimerClient,
    TimerRequest,
)
from elastic_timer._transport.queue_pipe import PipeWriter
from tests.support import ForkedWorker, eventually, process_state, start_with_pid

Server = Any  # FileTimerServer or LocalTimerServer


class LooksAway(FileTimerServer):
    """A server that reads nothing from the moment that it is told to until it is told otherwise."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "run", 0.02)
        self._is_told, self._is_away, self._may_look = (threading.Event() for _ in range(3))

    def look_away(self) -> None:
        """Return when it does."""
        self._is_told.set()
        assert self._is_away.wait(20)

    def look(self) -> None:
        """Have it go on."""
        self._is_told.clear()
        self._may_look.set()

    @contextlib.contextmanager
    def given_away(self, old: ForkedWorker) -> Iterator[subprocess.Popen[bytes]]:
        """A process with the number of a worker, which has ended while the server looks away."""
        self.look_away()
        old.process.kill()
        old.process.join()
        new = start_with_pid(old.pid)
        if new is None:
            self.look()
            pytest.skip("this system does not let a process choose a pid")
        try:
            # Popen returns a moment before its command line is there.
            eventually(Path(f"/proc/{new.pid}/cmdline").read_bytes)
            yield new
        finally:
            new.kill()
            new.wait()

    def _get_requests(self, fd: Any, max_interval: float) -> list[FileTimerRequest]:
        if self._is_told.is_set():
            self._is_away.set()
            self._may_look.wait(20)
        return super()._get_requests(fd, max_interval)


class Link:
    """One of the two ways from workers to a server: over a FIFO, or over a queue.

    Args:
        kind: "file" or "queue".
        fifo_path: Where the FIFO is to be.
    """

    def __init__(self, kind: str, fifo_path: str) -> None:
        self.kind = kind
        self.path = fifo_path
        self.client: TimerClient
        if kind == "file":
            self.client = FileTimerClient(fifo_path)
        else:
            self._queue: Any = multiprocessing.get_context("fork").Queue()
            self.client = LocalTimerClient(self._queue)

    def close(self) -> None:
        """Close this process's ends of the queue."""
        if self.kind == "queue":
            self._queue.close()
            self._queue._writer.close()

    def server(self, max_interval: float = 60, **changes: Any) -> Server:
        """A server, not started; most changes are for the file server alone."""
        if self.kind == "file":
            return FileTimerServer(self.path, "run", max_interval, **changes)
        return LocalTimerServer(self._queue, max_interval, **changes)

    def put(self, pid: int, scope: str, expiration_time: float) -> None:
        """Send a request in the name of any pid."""
        if self.kind == "file":
            client: Any = self.client
            client._send_request(FileTimerRequest(pid, scope, expiration_time, signal.SIGKILL))
        else:
            writer = PipeWriter(self._queue, pickle.dumps)
            writer.send(TimerRequest(pid, scope, expiration_time))


class ServerProcess:
    """A server that runs in a fork of this process; made by the fixture `serve`."""

    def __init__(self, worker: ForkedWorker, log_path: Path) -> None:
        self._worker = worker
        self._log_path = log_path
        self.pid = worker.pid
        assert worker.receive() == "started"

    def ask(self, expression: str, **names: object) -> Any:
        """What an expression is in that process, where `server` is the server."""
        return self._worker.ask((expression, names))

    def log(self) -> str:
        """What was logged there, a record a line, each with its level."""
        return self._log_path.read_text()

    def holds(self, pid: int) -> bool:
        """Whether the server holds a timer of the worker."""
        return bool(self.ask(f"server._timers.holds({pid})"))

    def pause(self) -> None:
        """Stop the process, as Ctrl-Z does."""
        os.kill(self.pid, signal.SIGSTOP)
        eventually(lambda: process_state(self.pid) == "T")

    def go_on(self) -> None:
        """Continue the process after `pause`."""
        os.kill(self.pid, signal.SIGCONT)

    def wait(self) -> int:
        """The process's exit code, negative for a signal."""
        return self._worker.wait()

    def kill(self) -> None:
        """Kill the process without a warning."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def stop(self) -> None:
        """Stop the server and end its process, which both have to go well."""
        self._worker.send(None)
        assert self._worker.receive() == "stopped"
        assert self.wait() == 0, self.log()


def serve_questions(
    channel: Any, make_server: Callable[[], Server], log_path: Path, prepare: Callable[[], object]
) -> None:
    """The body of a `ServerProcess`."""
    logging.basicConfig(filename=log_path, format="%(levelname)s %(message)s", force=True)
    prepare()
    with make_server() as server:
        channel.send("started")
        while (question := channel.recv()) is not None:
            expression, names = question
            channel.send(eval(expression, {**names, "server": server}))
    channel.send("stopped")


Serve = Callable[..., ServerProcess]
"""The fixture `serve`."""
