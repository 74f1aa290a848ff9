"""Ctrl-C while a server starts or stops: nothing is lost, nothing half alive is left (A5)."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import UNMEASURED, Child

Spawn = Callable[..., Child]

PROGRAM = """
    import multiprocessing, os, random, signal, subprocess, sys, threading, time, elastic_timer
    from elastic_timer import debug_info_logging
    debug_info_logging.set_stacks_timeout(0)
    kind, path, moment, rounds = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
    random.seed(moment + kind)
    queue = multiprocessing.Queue() if kind == "queue" else None

    def make():
        if kind == "queue":
            return elastic_timer.LocalTimerServer(queue)
        return elastic_timer.FileTimerServer(path, "run")

    def interrupted(function, after):
        # SIGALRM stands for Ctrl-C: it raises KeyboardInterrupt at any moment, here and again.
        try:
            count.clear()
            signal.setitimer(signal.ITIMER_REAL, after, 0.0003)
            function()
        # threading's own waiting may make a RuntimeError of it.
        except (KeyboardInterrupt, RuntimeError):
            return True
        finally:
            while True:
                try:
                    signal.setitimer(signal.ITIMER_REAL, 0)
                    count.extend([1, 1])  # What is under way still raises no more.
                    break
                except KeyboardInterrupt:
                    pass

    count = [1, 1]

    def interrupt(*_):
        if len(count) < 2:
            count.append(1)
            raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    server = make()
    server.start()
    server.stop()
    before = len(os.listdir("/proc/self/fd"))
    interrupts = 0
    for number in range(10 * rounds):
        if number >= rounds and interrupts > 1:  # On some machines a start is over in no time.
            break
        if moment == "start":
            after = random.uniform(0.00002, 0.0012)
            try:
                interrupts += bool(interrupted(server.start, after))
            except KeyboardInterrupt:
                interrupts += 1
        else:
            server.start()
            try:
                interrupts += bool(interrupted(server.stop, random.uniform(0.00002, 0.0008)))
            except KeyboardInterrupt:
                interrupts += 1
        # What was interrupted can be done again, and the server then does its work.
        server.stop()
        assert kind == "queue" or not os.path.exists(path), number
        server.start()
        worker = subprocess.Popen(["sleep", "600"])
        request = elastic_timer.TimerRequest(worker.pid, "block", time.time())
        if kind == "file":
            request = elastic_timer.FileTimerRequest(worker.pid, "block", time.time(), 9)
        server.register_timers([request])
        assert worker.wait(20) == -9, number
        server.stop()
        end = time.monotonic() + 10
        while time.monotonic() < end and any(
            thread.is_alive() and thread.name.startswith("elastic-timer ")
            for thread in threading.enumerate()  # Also those that were never begun.
        ):
            time.sleep(0.005)
    assert interrupts > 1, interrupts
    left = [thread.name for thread in threading.enumerate() if thread.is_alive()]
    assert not [name for name in left if name.startswith("elastic-timer ")], left
    assert len(os.listdir("/proc/self/fd")) <= before, os.listdir("/proc/self/fd")
    print("unharmed", flush=True)
    """


@pytest.mark.parametrize("moment", ["start", "stop"])
@pytest.mark.parametrize("kind", ["file", "queue"])
def test_a5_interrupted_twice(kind: str, moment: str, spawn: Spawn, fifo_path: str) -> None:
    """Whatever was cut short can be repeated, and serves; no thread and no descriptor is left."""
    child = spawn(PROGRAM, kind, fifo_path, moment, "30", env=UNMEASURED)
    assert child.readline(80) == "unharmed"
    assert child.wait() == 0, child.stderr_text()
