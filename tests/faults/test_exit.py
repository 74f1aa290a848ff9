"""The interpreter exits, in any of its ways, while a server runs."""

from __future__ import annotations

import os
import signal

import pytest

from tests.servers import Link
from tests.support import Fork, Spawn, assert_reaped_in_time, overrun

START_FILE = """
    import os, sys, threading, time
    import elastic_timer
    client = elastic_timer.FileTimerClient(sys.argv[1])
    server = elastic_timer.FileTimerServer(sys.argv[1], "run", 60)
"""
START_QUEUE = """
    import multiprocessing, os, sys, threading, time
    import elastic_timer
    queue = multiprocessing.get_context("fork").Queue()
    client = elastic_timer.LocalTimerClient(queue)
    server = elastic_timer.LocalTimerServer(queue, 60)
"""
WORK = """
    server.start()
    client.acquire("block", time.time() + 600)
    print("started", flush=True)
"""


@pytest.fixture(params=["file", "queue"])
def start(request: pytest.FixtureRequest) -> str:
    """Source of a program that starts a server of either kind and acquires a timer there."""
    return (START_FILE if request.param == "file" else START_QUEUE) + WORK


@pytest.mark.parametrize(
    ("end", "status", "last_words"),
    [
        ("", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("raise LookupError('its own')", 1, "LookupError: its own"),
        ("import signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(60)", -2, "Interrupt"),
    ],
    ids=["end of the script", "sys.exit", "exception", "Ctrl-C"],
)
def test_exit_with_a_server_running(
    spawn: Spawn, fifo_path: str, start: str, end: str, status: int, last_words: str
) -> None:
    """It ends at once, as it would without the server, which says nothing and leaves no FIFO."""
    child = spawn(start + f"    {end}\n", fifo_path)
    assert child.readline() == "started"
    assert child.wait(10) == status, child.stderr_text()
    assert child.stderr_text().count("Traceback") == (1 if last_words else 0)
    assert last_words in child.stderr_text()
    assert not os.path.exists(fifo_path)


def test_exit_while_a_callback_blocks(spawn: Spawn, file_link: Link, fork_worker: Fork) -> None:
    """A callback that never returns holds up the exit for a moment only."""
    child = spawn(
        """
        import sys, threading, time
        import elastic_timer
        def log_event(name, request):
            if request is not None:
                entered.set()
                time.sleep(600)
        entered = threading.Event()
        server = elastic_timer.FileTimerServer(sys.argv[1], "run", 60, log_event=log_event)
        server.start()
        print("started", flush=True)
        entered.wait()
        """,
        file_link.path,
    )
    assert child.readline() == "started"
    fork_worker(overrun, file_link.client, 0.2).receive()
    assert child.wait(10) == 0, child.stderr_text()
    assert "Traceback" not in child.stderr_text()
    assert not os.path.exists(file_link.path)


def test_server_that_is_no_daemon_outlives_the_script(
    spawn: Spawn, file_link: Link, fork_worker: Fork
) -> None:
    """With daemon=False the interpreter does not exit, and the server goes on."""
    child = spawn(
        """
        import sys, elastic_timer
        elastic_timer.FileTimerServer(sys.argv[1], "run", 60, daemon=False).start()
        print("ending", flush=True)
        """,
        file_link.path,
    )
    assert child.readline() == "ending"
    worker = fork_worker(overrun, file_link.client, 0.5)
    assert_reaped_in_time(worker, worker.receive())
    assert child.process.poll() is None


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_next_server_replaces_what_a_killed_one_left(
    spawn: Spawn, file_link: Link, fork_worker: Fork, how: signal.Signals
) -> None:
    """Python ends without a word on SIGTERM, too: the FIFO is left, and the next server's."""
    child = spawn(START_FILE + WORK + "    time.sleep(600)", file_link.path)
    assert child.readline() == "started"
    child.process.send_signal(how)
    assert child.wait() == -how
    assert os.path.exists(file_link.path)
    with file_link.server():
        worker = fork_worker(overrun, file_link.client, 0.2)
        assert_reaped_in_time(worker, worker.receive())
    assert not os.path.exists(file_link.path)
