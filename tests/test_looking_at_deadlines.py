"""Every deadline is looked at when it is due, whatever the clocks, the hooks and the source do."""

from __future__ import annotations

import multiprocessing
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
    LocalTimerServer,
    TimerRequest,
    _clock,
)
from tests.support import (
    FAR,
    Child,
    Fork,
    assert_reaped_in_time,
    eventually,
    is_alive,
    overrun,
    running,
    wait_dead,
    wait_to_be_killed,
)

# Clocks (A6, A12) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [-0.002, -0.001, -0.0009, -0.0005, -0.0001, 0.0005, 0.002])
def test_a6_small_step_of_the_clock(
    step: float, fifo_path: str, fork_worker: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wall clock is set by a millisecond while a worker is in its block: reaped in time."""
    epoch, steps = _clock.epoch, [0.0]
    monkeypatch.setattr(_clock, "epoch", lambda: epoch() + steps[0])
    worker = fork_worker(wait_to_be_killed)
    deadline = time.monotonic() + 0.3
    with running(FileTimerServer(fifo_path, "run", 60)) as server:
        server.register_timers(
            [FileTimerRequest(worker.pid, "block", time.time() + 0.3, signal.SIGKILL)]
        )
        steps[0] = step
        assert wait_dead(worker) < deadline + 2
        assert worker.wait() == -signal.SIGKILL


@pytest.mark.parametrize("kind", ["freezegun", "time_machine"])
def test_a12_server_in_a_process_whose_clock_is_frozen(
    kind: str, spawn: Callable[..., Child], fifo_path: str
) -> None:
    """Deadlines are kept: not early, though the frozen clock says so, and not late."""
    freeze = {
        "freezegun": "freezegun.freeze_time('2040-01-01')",
        "time_machine": "time_machine.travel('2040-01-01', tick=False)",
    }
    child = spawn(
        f"""
        import sys, time, {kind}, elastic_timer
        from elastic_timer import debug_info_logging
        with {freeze[kind]}:
            with elastic_timer.FileTimerServer(sys.argv[1], "run"):
                print("started", flush=True)
                sys.stdin.readline()
        """,
        fifo_path,
    )
    assert child.readline(60) == "started"
    patient = Child(OVERRUN, (fifo_path, "600"))
    worker = Child(OVERRUN, (fifo_path, "1.0"))
    try:
        patient.readline()
        deadline = float(worker.readline()) + 1.0
        died = wait_dead(worker)
        assert deadline <= died < deadline + 4
        assert worker.wait() == -signal.SIGKILL
        assert is_alive(patient)
    finally:
        patient.close()
        worker.close()
    child.send_line("stop")
    assert child.wait() == 0, child.stderr_text()


OVERRUN = """
    import sys, time, elastic_timer
    elastic_timer.configure(elastic_timer.FileTimerClient(sys.argv[1]))
    before = time.monotonic()
    with elastic_timer.expires(after=float(sys.argv[2])):
        print(before, flush=True)
        time.sleep(600)
    """


# Hooks that raise (A6) ----------------------------------------------------------------------------


@pytest.mark.parametrize("is_always", [False, True])
@pytest.mark.parametrize(
    "hook", ["register_timers", "get_expired_timers", "clear_timers", "is_process_running"]
)
def test_a6_hook_that_raises(
    hook: str, is_always: bool, fifo_path: str, fork_worker: Fork, caplog: pytest.LogCaptureFixture
) -> None:
    """Once or always: its error is logged, and workers are reaped in time all the same."""
    worker = fork_worker(wait_to_be_killed)
    calls: list[str] = []
    is_due = threading.Event()

    def fail(*args: Any) -> Any:
        if is_due.is_set() and (is_always or not calls):
            calls.append(hook)
            raise LookupError("a hook's own")
        return getattr(FileTimerServer, hook)(*args)

    is_static = hook == "is_process_running"
    server = type("Failing", (FileTimerServer,), {hook: staticmethod(fail) if is_static else fail})(
        fifo_path, "run", 60
    )
    with running(server):
        request = FileTimerRequest(worker.pid, "block", time.time() + 0.3, signal.SIGKILL)
        if hook in ("register_timers", "is_process_running"):
            is_due.set()
        FileTimerClient(fifo_path)._send_request(request)
        deadline = time.monotonic() + 0.3
        is_due.set()
        assert wait_dead(worker) < deadline + 2
        other = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
        assert_reaped_in_time(other, other.receive())
    if hook != "is_process_running" or calls:
        assert "a hook's own" in caplog.text


def test_a6_hook_that_signals_raises_once(fifo_path: str, fork_worker: Fork) -> None:
    """It is called again within milliseconds, not after a second."""
    calls: list[float] = []

    class Failing(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            calls.append(time.monotonic())
            if len(calls) < 3:
                raise LookupError("not this time")
            return super()._reap_worker(worker_pid, signal)

    worker = fork_worker(wait_to_be_killed)
    with running(Failing(fifo_path, "run", 60)) as server:
        server.register_timers([FileTimerRequest(worker.pid, "block", time.time(), 9)])
        assert worker.wait() == -signal.SIGKILL
    assert calls[2] - calls[0] < 0.5


# Sources that fail (A5, B2) -----------------------------------------------------------------------


def test_b2_queue_whose_manager_has_died(
    fork_worker: Fork, monkeypatch: pytest.MonkeyPatch, short_folder: Path
) -> None:
    """What it held is reaped in time, though every look at the queue raises from then on."""
    monkeypatch.setenv("TMPDIR", str(short_folder))  # Killed, it leaves its folder behind.
    manager = multiprocessing.get_context("spawn").Manager()
    try:
        with running(LocalTimerServer(manager.Queue())) as server:  # type: ignore[arg-type]
            worker = fork_worker(wait_to_be_killed)
            server.register_timers([TimerRequest(worker.pid, "block", time.time() + 1)])
            deadline = time.monotonic() + 1
            manager._process.kill()  # type: ignore[attr-defined]
            assert_reaped_in_time(worker, deadline - 0.01)
    finally:
        manager.shutdown()


def test_a5_exit_that_cannot_be_watched_loses_no_request(
    fifo_path: str, fork_worker: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selector that refuses a worker costs neither its timer nor those read with it."""
    server = FileTimerServer(fifo_path, "run")
    watch = server._loop.watch

    def refuse(fd: int, what: object) -> None:
        if isinstance(what, int):
            raise ValueError("already registered")
        watch(fd, what)

    monkeypatch.setattr(server._loop, "watch", refuse)
    with running(server):
        workers = [fork_worker(wait_to_be_killed) for _ in range(3)]
        end = time.time() + 0.2
        server.register_timers([FileTimerRequest(w.pid, "block", end, 9) for w in workers])
        for worker in workers:
            assert worker.wait(5) == -signal.SIGKILL


# Intervals (B8) -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "queue"])
def test_b8_tiny_interval(kind: str, fifo_path: str, fork_worker: Fork) -> None:
    """With `max_interval` at nearly nothing the server works, and leaves the core to others."""
    queue: Any = multiprocessing.get_context("fork").Queue()
    client: Any = FileTimerClient(fifo_path)
    server: Any
    if kind == "file":
        server = FileTimerServer(fifo_path, "run", 1e-9)
    else:
        from elastic_timer import LocalTimerClient

        client = LocalTimerClient(queue)
        server = LocalTimerServer(queue, 1e-9)
    with running(server):
        worker = fork_worker(overrun, client, 0.3)
        assert_reaped_in_time(worker, worker.receive())
        before = time.process_time(), time.monotonic()
        eventually(lambda: time.monotonic() > before[1] + 1)
        assert time.process_time() - before[0] < 0.6 * (time.monotonic() - before[1])
    queue.close()


def test_seconds_late_are_monotonic(
    fifo_path: str,
    fork_worker: Fork,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After a step of the clock by an hour the log says how late the reap really was (S3)."""
    epoch, steps = _clock.epoch, [0.0]
    monkeypatch.setattr(_clock, "epoch", lambda: epoch() + steps[0])
    worker = fork_worker(wait_to_be_killed)
    with running(FileTimerServer(fifo_path, "run")) as server:
        server.register_timers([FileTimerRequest(worker.pid, "block", time.time() + 0.5, 9)])
        steps[0] = 3600.0
        assert worker.wait() == -signal.SIGKILL
    (record,) = [r for r in caplog.records if r.getMessage().startswith("Reaped worker")]
    fields = {name: value for name, value in vars(record).items() if name.startswith("timer_")}
    assert 0 <= fields.pop("timer_seconds_late") < 5
    assert fields == {
        "timer_run_id": "run",
        "timer_pid": worker.pid,
        "timer_rank": None,
        "timer_local_rank": None,
        "timer_scopes": ["block"],
        "timer_signal": signal.SIGKILL,
    }


def test_far_deadline(fifo_path: str) -> None:
    """A timer for ever is held, and keeps nobody busy."""
    with running(FileTimerServer(fifo_path, "run")) as server:
        server.register_timers([FileTimerRequest(1234567, "block", 1e300, 9)])
        server.register_timers([FileTimerRequest(-1234567, "block", time.time() + FAR, 9)])
        eventually(lambda: list(server._timers) == [(-1234567, "block")])
