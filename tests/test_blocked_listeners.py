"""Listeners that block, raise or get no thread hold up neither the watchdog nor each other."""

from __future__ import annotations

import importlib.util
import os
import signal
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import FileTimerClient, FileTimerRequest, FileTimerServer, LocalTimerServer
from elastic_timer._server.events import (
    Event,
    TimerAcquired,
    TimerEvent,
    TimerExpired,
    TimerReleased,
    WorkerExited,
    WorkerSignalled,
)
from tests.support import (
    FAR,
    Child,
    Fork,
    assert_reaped_in_time,
    eventually,
    no_more_threads,
    overrun,
    running,
    wait_to_be_killed,
)


def block(unblock: threading.Event) -> None:
    unblock.wait(60)


@pytest.fixture
def unblock() -> Iterator[threading.Event]:
    """Set at the end, so that what blocks comes back."""
    event = threading.Event()
    yield event
    event.set()


def test_b1_log_event_that_blocks(
    fifo_path: str, fork_worker: Fork, unblock: threading.Event
) -> None:
    """From the very first event on: start, reaps in time, and stop within about a second."""
    server = FileTimerServer(fifo_path, "run", log_event=lambda *_: block(unblock))
    started = time.monotonic()
    with running(server):
        assert time.monotonic() - started < 2
        for _ in range(2):
            worker = fork_worker(overrun, FileTimerClient(fifo_path), 0.2)
            assert_reaped_in_time(worker, worker.receive())
        stopped = time.monotonic()
    assert time.monotonic() - stopped < 5
    assert not os.path.exists(fifo_path)


def test_b1_exit_with_a_log_event_that_blocks(spawn: Callable[..., Child], fifo_path: str) -> None:
    """The interpreter ends within a few seconds, and the FIFO is gone."""
    child = spawn(
        """
        import sys, threading, elastic_timer
        server = elastic_timer.FileTimerServer(
            sys.argv[1], "run", log_event=lambda *_: threading.Event().wait())
        server.start()
        print("started", flush=True)
        """,
        fifo_path,
    )
    assert child.readline() == "started"
    assert child.wait(15) == 0, child.stderr_text()
    assert not os.path.exists(fifo_path)


def test_b7_no_more_threads(
    fifo_path: str, fork_worker: Fork, unblock: threading.Event, caplog: pytest.LogCaptureFixture
) -> None:
    """A listener that blocks and no thread to be had: workers are reaped, and told of later."""
    signalled: list[Event] = []
    server = FileTimerServer(fifo_path, "run", log_event=lambda *_: block(unblock))
    server.subscribe(signalled.append, WorkerSignalled)
    with running(server):
        workers = [fork_worker(wait_to_be_killed) for _ in range(2)]
        with no_more_threads():
            for worker in workers:
                request = FileTimerRequest(worker.pid, "block", time.time(), signal.SIGKILL)
                server.register_timers([request])
                assert worker.wait(10) == -signal.SIGKILL
        last = fork_worker(overrun, FileTimerClient(fifo_path), 0.1)
        assert_reaped_in_time(last, last.receive())
        eventually(lambda: len(signalled) == 3)


def test_records_of_a_worker(fifo_path: str, fork_worker: Fork) -> None:
    """Acquired, released, expired, signalled, exited: each told once, in this order."""
    told: list[Event] = []
    server = FileTimerServer(fifo_path, "run")
    server.subscribe(
        told.append, TimerAcquired, TimerReleased, TimerExpired, WorkerSignalled, WorkerExited
    )
    client = FileTimerClient(fifo_path)
    with running(server):
        worker = fork_worker(wait_to_be_killed)
        now = time.time()
        for scope, expiration in (("kept", now + FAR), ("left", now + FAR), ("left", -1)):
            client._send_request(FileTimerRequest(worker.pid, scope, expiration, 9))
        client._send_request(FileTimerRequest(worker.pid, "late", now, 9))
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: told and isinstance(told[-1], WorkerExited))
    names = [
        (event.name, event.timer.scope_id if isinstance(event, TimerEvent) else None)
        for event in told
    ]
    assert names == [
        ("timer acquired", "kept"),
        ("timer acquired", "left"),
        ("timer released", "left"),
        ("timer acquired", "late"),
        ("timer expired", "late"),
        ("kill worker process", "late"),
        ("worker exited", None),
    ]
    expired, signalled, exited = told[-3:]
    assert isinstance(expired, TimerExpired)
    assert isinstance(signalled, WorkerSignalled)
    assert isinstance(exited, WorkerExited)
    assert expired.evidence is not None
    assert expired.evidence["pid"] == worker.pid
    assert 0 <= expired.seconds_late <= signalled.seconds_late
    assert (signalled.signal, signalled.scopes) == (signal.SIGKILL, ["late"])
    # Killed, it has no timer left.
    assert (exited.pid, exited.scopes) == (worker.pid, [])


def test_ranks_are_read_off_the_environment(spawn: Callable[..., Child], fifo_path: str) -> None:
    """Each record tells the rank that the worker was started with; None without one."""
    told: list[Any] = []
    server = FileTimerServer(fifo_path, "run")
    server.subscribe(told.append)
    source = "import time; print('started', flush=True); time.sleep(600)"
    environments = [{"RANK": "3", "LOCAL_RANK": "1"}, {"SLURM_PROCID": "5"}, {"RANK": "x"}, {}]
    with running(server):
        for environment in environments:
            bare = {"RANK": "", "LOCAL_RANK": "", "SLURM_PROCID": ""}
            worker = spawn(source, env={**bare, **environment})
            assert worker.readline() == "started"
            server.register_timers([FileTimerRequest(worker.pid, "block", time.time(), 9)])
            assert worker.wait() == -signal.SIGKILL
        eventually(lambda: sum(isinstance(event, WorkerExited) for event in told) == 4)
    for kind in (TimerExpired, WorkerSignalled, WorkerExited):
        ranks = [(event.rank, event.local_rank) for event in told if isinstance(event, kind)]
        assert ranks == [(3, 1), (5, None), (None, None), (None, None)]


def test_listener_that_raises(
    fifo_path: str, fork_worker: Fork, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged, and called again with the next record; others are told all."""
    calls: list[Event] = []
    others: list[Event] = []

    def fail(event: Event) -> None:
        calls.append(event)
        raise SystemExit("a listener's own")

    server = FileTimerServer(fifo_path, "run")
    server.subscribe(fail)
    server.subscribe(others.append)
    with running(server):
        pass
    assert [event.name for event in calls] == ["watchdog started", "watchdog stopped"]
    assert [event.name for event in others] == ["watchdog started", "watchdog stopped"]
    assert caplog.text.count("SystemExit: a listener's own") == 2


@pytest.mark.parametrize(
    ("library", "patch"),
    [
        ("eventlet", "import eventlet; eventlet.monkey_patch()"),
        ("gevent", "from gevent import monkey; monkey.patch_all()"),
    ],
)
def test_b4_threads_that_take_turns(
    library: str, patch: str, spawn: Callable[..., Child], fifo_path: str
) -> None:
    """Where they replace the system's, both servers refuse to start and say what to do."""
    # Not imported here: it would warn of every fork from then on.
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"needs {library}")
    child = spawn(
        """
        import sys
        exec(sys.argv[2])
        import multiprocessing, elastic_timer
        for make in (lambda: elastic_timer.FileTimerServer(sys.argv[1], "run"),
                     lambda: elastic_timer.LocalTimerServer(multiprocessing.Queue())):
            try:
                make().start()
            except RuntimeError as error:
                print(error, flush=True)
        """,
        fifo_path,
        patch,
    )
    for _ in range(2):
        assert child.readline().startswith(f"{library} has replaced the threads")
    assert child.wait() == 0, child.stderr_text()
    assert not Path(fifo_path).exists()


def test_b6_stderr_that_nobody_reads(spawn: Callable[..., Child], fifo_path: str) -> None:
    """A full pipe on stderr: the interpreter ends within a few seconds, and the FIFO is gone."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    try:
        while True:
            os.write(writer, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writer, True)
    try:
        child = spawn(
            """
            import logging, os, sys, time, elastic_timer
            logging.basicConfig(level="INFO")
            server = elastic_timer.FileTimerServer(sys.argv[1], "run")
            # From another thread, as INFO of start() would block the caller, which is its own log.
            elastic_timer.api.logger.setLevel("ERROR")
            logging.getLogger("elastic_timer").setLevel("WARNING")
            server.start()
            os.write(os.open(sys.argv[1], os.O_WRONLY), b"rubbish, of which the log tells\\n")
            while not server._source.has_read:
                time.sleep(0.01)
            time.sleep(0.2)
            print("ready", flush=True)
            """,
            fifo_path,
            stderr=writer,
        )
        assert child.readline() == "ready"
        assert child.wait(20) == 0
    finally:
        os.close(reader)
        os.close(writer)
    assert not os.path.exists(fifo_path)


# The end of a process (B9) ------------------------------------------------------------------------

IN_A_CHILD = """
    import multiprocessing, sys, time, elastic_timer

    def serve(path, is_started, daemon):
        global server
        server = elastic_timer.FileTimerServer(path, "run", daemon=daemon)
        if is_started:
            server.start()

    if __name__ == "__main__":
        path, method, is_started, daemon = sys.argv[1:]
        context = multiprocessing.get_context(method)
        child = context.Process(target=serve, args=(path, is_started == "y", daemon == "y"))
        child.start()
        child.join(30)
        print(child.exitcode, flush=True)
        child.kill()
    """


@pytest.mark.parametrize("daemon", ["y", "n"])
@pytest.mark.parametrize("is_started", ["y", "n"])
@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_b9_server_in_a_child_of_multiprocessing(
    method: str, is_started: str, daemon: str, spawn: Callable[..., Child], tmp_path: Path
) -> None:
    """The child ends, and no FIFO is left, though multiprocessing ends it past `atexit`."""
    script = tmp_path / "serve.py"
    script.write_text(textwrap.dedent(IN_A_CHILD))
    fifo = tmp_path / "timers"
    child = spawn(
        """
        import runpy, sys
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
        """,
        *(str(script), str(fifo), method, is_started, daemon),
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert child.readline(60) == "0", child.stderr_text()
    assert not fifo.exists()
    # Killed, it would leave the folder of its fork server behind.
    assert child.wait(60) == 0


def test_b9_server_that_was_never_started(spawn: Callable[..., Child], fifo_path: str) -> None:
    """Its FIFO is gone when the server is, at the latest at the interpreter's end."""
    child = spawn(
        """
        import gc, os, sys, elastic_timer
        server = elastic_timer.FileTimerServer(sys.argv[1], "run")
        assert os.path.exists(sys.argv[1])
        del server
        gc.collect()
        print(os.path.exists(sys.argv[1]), flush=True)
        server = elastic_timer.FileTimerServer(sys.argv[1], "run")
        """,
        fifo_path,
    )
    assert child.readline() == "False"
    assert child.wait() == 0, child.stderr_text()
    assert not os.path.exists(fifo_path)


def test_servers_of_the_queue_have_events_too(fork_worker: Fork) -> None:
    """`subscribe` is there for both kinds."""
    import multiprocessing

    told: list[Event] = []
    queue: Any = multiprocessing.get_context("fork").Queue()
    server = LocalTimerServer(queue)
    server.subscribe(told.append)
    with running(server):
        pass
    assert [event.name for event in told] == ["watchdog started", "watchdog stopped"]
    queue.close()
