"""What a handle asks for is understood by torch's own server: the requests are its own."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.interop.conftest import UPSTREAM
from tests.interop.workers import FILE_SERVER
from tests.support import Spawn, eventually

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

WORKER = """
import sys, time
from elastic_timer import FileTimerClient, current, expires

def wait(seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        current().tick()
        time.sleep(0.05)

with expires(after=2, scope="s", client=FileTimerClient(sys.argv[1])) as timer:
    print(timer.when(), flush=True)
    wait(3)
    print(timer.when(), flush=True)
    with timer.paused():
        print("paused", flush=True)
        sys.stdin.readline()
        time.sleep(2.5)
    timer.reschedule(600)
    print(timer.when(), flush=True)
    sys.stdin.readline()
print("left", flush=True)
with expires(after=600, scope="s", client=FileTimerClient(sys.argv[1])) as timer:
    timer.reschedule(1)
    print(timer.when(), flush=True)
    time.sleep(600)
"""


def test_torchs_server_and_our_handle(fifo_path: str, spawn: Spawn) -> None:
    """Ticks, a pause and a longer time keep the worker alive; a shorter time ends it."""
    watchdog = spawn(FILE_SERVER, UPSTREAM, fifo_path)
    assert watchdog.readline(60) == "ready"
    worker = spawn(WORKER, fifo_path)

    def timers() -> object:
        watchdog.send_line("timers")
        return json.loads(watchdog.readline())

    first = float(worker.readline())
    assert float(worker.readline()) > first + 2
    assert worker.readline() == "paused"
    assert timers() == [[worker.pid, "s"]]
    worker.send_line("go on")
    assert float(worker.readline()) > time.time() + 500
    worker.send_line("leave")
    assert worker.readline() == "left"
    deadline = float(worker.readline())
    assert worker.wait() == -signal.SIGKILL
    assert time.time() >= deadline
    # It ends its own process with the worker's signal.
    assert watchdog.wait() == -signal.SIGKILL
    eventually(lambda: os.path.exists(fifo_path))
    os.unlink(fifo_path)
