"""Servers that are stopped, started anew and at their last moment while something is under way."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import types

import pytest

from elastic_timer import FileTimerClient, FileTimerRequest, FileTimerServer
from elastic_timer._server import loop
from elastic_timer._server.callbacks import flush_log, give_up_on_the_log
from tests.support import FAR, Fork, eventually, running, wire_line, write_raw


class Busy(FileTimerServer):
    """Its rounds do not come to an end while `go_on` is not set."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "run", 60)
        self.is_busy, self.go_on = threading.Event(), threading.Event()

    def get_expired_timers(self, deadline: float) -> dict[int, list[FileTimerRequest]]:
        if self._timers:
            self.is_busy.set()
            self.go_on.wait(20)
        return super().get_expired_timers(deadline)


@pytest.mark.parametrize("is_too_long", [False, True])
def test_start_while_the_last_round_is_under_way(
    fifo_path: str, monkeypatch: pytest.MonkeyPatch, is_too_long: bool
) -> None:
    """It is waited for, and then the server serves; where it takes too long that is an error."""
    server = Busy(fifo_path)
    with running(server):
        FileTimerClient(fifo_path).acquire("s", time.time() + FAR)
        assert server.is_busy.wait(20)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        eventually(server._loop.is_stopping)
        monkeypatch.setattr(loop, "_START_PATIENCE", 0.05 if is_too_long else 20)
        if is_too_long:
            with pytest.raises(RuntimeError, match="still in its last round"):
                server.start()
            server.go_on.set()
            stopping.join()
            assert not os.path.exists(fifo_path)
        else:
            threading.Timer(0.1, server.go_on.set).start()
        server.start()
        stopping.join()
        FileTimerClient(fifo_path).acquire("again", time.time() + FAR)
        eventually(lambda: server._timers.scopes(os.getpid()) == ["again"])


class LastMoment(FileTimerServer):
    """Lets something happen right before a worker is killed that was given time to end."""

    def __init__(self, path: str, what: str) -> None:
        super().__init__(path, "run", 60, kill_after=0.3)
        self.what = what
        self.path = path
        self.happened: list[int] = []

    def get_expired_timers(self, deadline: float) -> dict[int, list[FileTimerRequest]]:
        expired = super().get_expired_timers(deadline)
        for pid, signalled in self._signalled.items():
            if signalled.until <= time.monotonic() and not self.happened:
                self.happened.append(pid)
                if self.what == "release":
                    write_raw(self.path, wire_line(pid=pid, scope_id="s", expiration_time=-1))
                else:
                    os.kill(pid, signal.SIGUSR1)
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        return expired


@pytest.mark.parametrize("what", ["release", "exit"])
def test_a7_what_happens_at_the_last_moment_counts(
    fifo_path: str, fork_worker: Fork, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    """A worker that has left the block, or ended, by the time of its SIGKILL does not get it."""
    worker = fork_worker(ignore_sigterm)
    assert worker.receive() == "ignores it"
    with running(LastMoment(fifo_path, what)) as server:
        server.register_timers([FileTimerRequest(worker.pid, "s", 1.0, signal.SIGTERM)])
        eventually(lambda: server.happened)
        eventually(lambda: not server._signalled)
        if what == "release":
            # Served again as any other worker.
            server.register_timers([FileTimerRequest(worker.pid, "t", 1.0, signal.SIGUSR1)])
    assert worker.wait() == -signal.SIGUSR1
    assert flush_log(20)
    assert "outlived" not in caplog.text


def ignore_sigterm(channel: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    channel.send("ignores it")  # type: ignore[attr-defined]  # A connection.
    time.sleep(FAR)


def test_b4_threads_that_do_not_run_by_themselves(
    fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where others have been put in their place no server is made, and no FIFO."""
    patcher = types.ModuleType("eventlet.patcher")
    patched = {"thread"}
    patcher.is_monkey_patched = patched.__contains__  # type: ignore[attr-defined]  # A stand-in.
    monkeypatch.setitem(sys.modules, "eventlet.patcher", patcher)
    with pytest.raises(RuntimeError, match="process of its own"):
        FileTimerServer(fifo_path, "run")
    assert not os.path.exists(fifo_path)
    patched.clear()
    server = FileTimerServer(fifo_path, "run")
    patched.add("thread")
    with pytest.raises(RuntimeError, match="process of its own"):
        server.start()
    patched.clear()
    with running(server):
        assert os.path.exists(fifo_path)


def test_b6_handlers_that_block_are_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those alone: logging's end then waits for none of them, and stderr is used by nobody."""
    handlers = [logging.StreamHandler(stream) for stream in (sys.stderr, sys.stdout, sys.stderr)]
    monkeypatch.setattr(logging, "_handlerList", [lambda h=h: h for h in handlers])
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    held, done = threading.Event(), threading.Event()

    def block(*blocked: logging.Handler) -> None:
        for handler in blocked:
            handler.acquire()
        held.set()
        done.wait(20)
        for handler in blocked:
            handler.release()

    def left(*blocked: logging.Handler) -> list[logging.Handler]:
        held.clear()
        done.clear()
        thread = threading.Thread(target=block, args=blocked)
        thread.start()
        assert held.wait(20)
        give_up_on_the_log()
        done.set()
        thread.join()
        return [reference() for reference in logging._handlerList]  # type: ignore[attr-defined]

    stderr = sys.stderr
    assert left() == handlers
    assert left(handlers[1]) == [handlers[0], handlers[2]]
    assert sys.stderr is stderr
    assert left(handlers[0]) == [handlers[2]]
    assert sys.stderr is None
