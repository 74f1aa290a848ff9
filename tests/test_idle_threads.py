"""The threads that libraries keep waiting do not bury the one that hangs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_timer._evidence.expiry import describe_stacks
from elastic_timer.debug_info_logging import log_debug_info_for_expired_timers
from tests.evidence_support import expired, logged
from tests.support import Child, eventually, process_state

Spawn = Callable[..., Child]

BUSY_LIBRARIES = """
    import concurrent.futures, multiprocessing, os, queue, sys, tempfile, threading, time
    import logging.handlers
    import multiprocessing.pool, multiprocessing.resource_sharer
    from elastic_timer import FileTimerServer

    samples = multiprocessing.Queue()
    samples.put(1)
    samples.get()
    executor = concurrent.futures.ThreadPoolExecutor(2)
    list(executor.map(abs, [1, 2]))
    listener = logging.handlers.QueueListener(queue.Queue())
    listener.start()
    timer = threading.Timer(600, print)
    timer.daemon = True
    timer.start()
    pool = multiprocessing.pool.ThreadPool(1)
    multiprocessing.resource_sharer.DupFd(0)
    server = FileTimerServer(os.path.join(tempfile.mkdtemp(), "timers"), "inner")
    server.start()

    def hidden():
        threading.Event().wait()  # user code in the middle of waiting

    threading.Thread(target=hidden, name="users", daemon=True).start()
    print("stuck", flush=True)
    time.sleep(600)
    """


def test_s8_idle_threads_of_libraries_are_one_line(
    spawn: Spawn, caplog: pytest.LogCaptureFixture, short_folder: Path
) -> None:
    """They are counted and named; the main thread and the user's own are shown, the fields full."""
    child = spawn(BUSY_LIBRARIES, env={"TMPDIR": str(short_folder)})
    assert child.readline() == "stuck"
    eventually(lambda: process_state(child.pid) == "S")
    log_debug_info_for_expired_timers("run", {child.pid: expired(child.pid)})
    (record,) = logged(caplog)
    text = record.getMessage()
    shown = [line for line in text.split("\n") if line.startswith("  thread ")]
    assert shown == ["  thread MainThread (idle):", "  thread users (idle):"]
    names = [thread["name"] for thread in record.timer_stacks]
    assert "QueueFeederThread" in names
    folded = [name for name in names if name not in ("MainThread", "users")]
    assert len(folded) >= 9
    assert f"\n  {len(folded)} idle threads of libraries not shown: {folded[0]}, " in text


STDLIB = "/usr/lib/python3.11/"
BOOTSTRAP = [(STDLIB + "threading.py", "Thread._bootstrap"), (STDLIB + "threading.py", "run")]
TORCH = "/venv/lib/python3.11/site-packages/torch/utils/data/_utils/pin_memory.py"


def stack(name: str, *frames: tuple[str, str], **changes: Any) -> Any:
    """A thread that waits."""
    return {
        "id": 1,
        "name": name,
        "active": False,
        "gil": False,
        "frames": [{"file": file, "line": 1, "function": function} for file, function in frames],
        **changes,
    }


MAIN = stack("MainThread", ("train.py", "<module>"), (STDLIB + "threading.py", "wait"))
GET = (STDLIB + "queue.py", "Queue.get")


@pytest.mark.parametrize(
    "thread",
    [
        stack("feeder", *BOOTSTRAP, (STDLIB + "threading.py", "Condition.wait")),
        stack("pin", *BOOTSTRAP, (TORCH, "_pin_memory_loop"), (STDLIB + "selectors.py", "select")),
        stack(
            "tqdm",
            *BOOTSTRAP,
            ("/opt/lib/python3.10/site-packages/tqdm/_monitor.py", "run"),
            ("/opt/lib/python3.10/threading.py", "wait"),
        ),
        stack("executor", *BOOTSTRAP, (STDLIB + "concurrent/futures/thread.py", "_worker")),
        stack("frozen", ("<frozen runpy>", "_run_code"), *BOOTSTRAP, GET),
        stack(
            "native",
            ("/usr/bin/python3.11", "thread_run"),
            *BOOTSTRAP,
            GET,
            ("/usr/bin/python3.11", "PyThread_acquire_lock_timed"),
            ("/usr/lib/x86_64-linux-gnu/libc.so.6", "0x7f3120aa3e96"),
        ),
        stack(
            "server",
            *BOOTSTRAP,
            (STDLIB + "multiprocessing/resource_sharer.py", "_ResourceSharer._serve"),
            (STDLIB + "multiprocessing/connection.py", "Listener.accept"),
            (STDLIB + "socket.py", "socket.accept"),
        ),
        stack(
            "watchdog",
            *BOOTSTRAP,
            ("/opt/site-packages/elastic_timer/_server/loop.py", "Loop._run"),
            (STDLIB + "selectors.py", "EpollSelector.select"),
        ),
        stack("reader", *BOOTSTRAP, (STDLIB + "multiprocessing/connection.py", "Connection._recv")),
    ],
    ids=lambda thread: thread["name"],
)
def test_s8_folded(thread: Any) -> None:
    """A thread in nothing but library code, at a place where such threads wait."""
    lines = describe_stacks({"stacks": [MAIN, thread], "stacks_missing": None})
    assert lines[0] == "thread MainThread (idle):"
    assert lines[3:] == [f"1 idle thread of libraries not shown: {thread['name']}"]


@pytest.mark.parametrize(
    "thread",
    [
        stack("active", *BOOTSTRAP, GET, active=True),
        stack("gil", *BOOTSTRAP, GET, gil=True),
        stack("user", *BOOTSTRAP, ("/home/me/loader.py", "load"), GET),
        stack("installed", *BOOTSTRAP, ("/lib/python3.11/site-packages/mine/load.py", "load"), GET),
        stack("debian", *BOOTSTRAP, ("/usr/lib/python3/dist-packages/mine.py", "load"), GET),
        stack("home", *BOOTSTRAP, ("/home/me/python3.11/load.py", "load"), GET),
        stack("network", *BOOTSTRAP, (STDLIB + "socket.py", "readinto")),
        stack("full", *BOOTSTRAP, (STDLIB + "multiprocessing/connection.py", "Connection._send")),
        stack("empty"),
    ],
    ids=lambda thread: thread["name"],
)
def test_s8_shown(thread: Any) -> None:
    """Whatever may be the one that hangs."""
    lines = describe_stacks({"stacks": [MAIN, thread], "stacks_missing": None})
    assert any(line.startswith(f"thread {thread['name']} (") for line in lines)
    assert not any("not shown" in line for line in lines)


def test_s8_the_main_thread_is_always_shown() -> None:
    """Even where it runs a library and waits."""
    main = stack("MainThread", (STDLIB + "multiprocessing/spawn.py", "main"), GET)
    lines = describe_stacks({"stacks": [main], "stacks_missing": None})
    assert lines[0] == "thread MainThread (idle):"


def test_s8_names_cannot_add_lines() -> None:
    """Of many threads with odd names there is one line of a sane length."""
    threads = [stack(f"odd\nname {n} " + os.sep * 50, *BOOTSTRAP, GET) for n in range(20)]
    line = describe_stacks({"stacks": [MAIN, *threads], "stacks_missing": None})[-1]
    assert line.startswith("20 idle threads of libraries not shown: odd name 0 ///")
    assert "\n" not in line
    assert len(line) < 400
