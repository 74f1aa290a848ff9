"""`elastic-timer run --before-kill`: a command of the user's, before a worker is signalled."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import FileTimerRequest, FileTimerServer
from elastic_timer._command.before_kill import BeforeKill
from elastic_timer._server.events import Event, TimerExpired, WorkerSignalled
from tests.servers import Link
from tests.support import (
    FAR,
    Child,
    Fork,
    assert_reaped_in_time,
    eventually,
    is_alive,
    no_more_threads,
    overrun,
    running,
    wait_dead,
    wait_to_be_killed,
)

# It prints how each of its workers ended; each overruns a block of its own.
WORKERS = """
    import os, sys, time, elastic_timer
    elastic_timer.configure()
    pids = []
    for after in sys.argv[1:]:
        pid = os.fork()
        if pid == 0:
            with elastic_timer.expires(float(after), scope=f"block {after}"):
                time.sleep(60)
        pids.append(pid)
    for pid in pids:
        print(pid, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""

Run = Callable[..., Child]


def workers(*after: str) -> list[str]:
    """The command that has one worker for each of these deadlines."""
    return ["--", sys.executable, "-c", textwrap.dedent(WORKERS), *after]


def test_it_has_the_worker_and_the_evidence(run: Run, tmp_path: Path) -> None:
    """Once for each worker, while that lives: pid, rank and scope, and the evidence as JSON."""
    folder = shlex.quote(str(tmp_path))
    save = f'f={folder}/$ELASTIC_TIMER_PID; cat > "$f"; kill -0 $ELASTIC_TIMER_PID && '
    save += 'echo "$ELASTIC_TIMER_RANK,$ELASTIC_TIMER_SCOPE" >> "$f.told"; echo printed'
    child = run("--before-kill", save, *workers("0.2", "0.2"), env={"RANK": "5"})
    lines = [child.readline().split() for _ in range(2)]
    assert child.wait() == 0
    assert [int(code) for _, code in lines] == [-signal.SIGKILL] * 2
    for pid, _ in lines:
        evidence = json.loads((tmp_path / pid).read_text())
        assert (evidence["pid"], evidence["scopes"]) == (int(pid), ["block 0.2"])
        assert evidence["stacks"]
        assert (tmp_path / f"{pid}.told").read_text() == "5,block 0.2\n"
    assert child.stderr_text().count("printed\n") == 2


def test_native_stacks(run: Run, tmp_path: Path) -> None:
    """With --native the evidence has C frames."""
    path = tmp_path / "evidence"
    child = run("--native", "--before-kill", f"cat > {shlex.quote(str(path))}", *workers("0.2"))
    assert child.wait() == 0
    frames = json.loads(path.read_text())["stacks"][0]["frames"]
    assert any("libc" in frame["file"] for frame in frames)


def test_one_that_hangs_is_killed_with_its_children(run: Run, tmp_path: Path) -> None:
    """At the end of its time, and with it what it has started; then the worker is killed."""
    pids = tmp_path / "pids"
    hang = f"sleep 600 & echo $$ $! > {shlex.quote(str(pids))}; wait"
    child = run("--before-kill", hang, "--before-kill-timeout", "0.3", *workers("0.1"))
    assert child.readline().split()[1] == str(-signal.SIGKILL)
    assert child.wait() == 0
    assert not any(is_alive(int(pid)) for pid in pids.read_text().split())
    assert "not done with worker" in child.stderr_text()


@pytest.mark.parametrize(
    ("command", "how"), [("exit 3", "exit status 3"), ("kill -TERM $$", "signal 15")]
)
def test_one_that_fails_is_told_of(run: Run, command: str, how: str) -> None:
    """And delays nothing."""
    child = run("--before-kill", f"sleep 600 & {command}", *workers("0.1"))
    pid, code = child.readline().split()
    assert int(code) == -signal.SIGKILL
    assert child.wait() == 0
    assert f"--before-kill: ended with {how} for worker {pid}" in child.stderr_text()


def test_nothing_of_it_outlives_run(run: Run, tmp_path: Path) -> None:
    """One that runs when COMMAND has ended is killed."""
    pid_file = tmp_path / "pid"
    hang = f"echo $$ > {shlex.quote(str(pid_file))}; exec sleep 600"
    source = f"""
        import elastic_timer, os, pathlib, time
        elastic_timer.configure()
        if os.fork() == 0:
            with elastic_timer.expires(0.1):
                time.sleep(60)
        while not pathlib.Path({str(pid_file)!r}).exists():
            time.sleep(0.01)
        """
    child = run("--before-kill", hang, "--", sys.executable, "-c", textwrap.dedent(source))
    assert child.wait() == 0
    eventually(pid_file.read_text)
    wait_dead(int(pid_file.read_text()))


def test_after_close_nothing_is_run(tmp_path: Path) -> None:
    """A worker that is found when all is over has nothing run for it."""
    hook = BeforeKill(f"touch {shlex.quote(str(tmp_path / 'run'))}", 5)
    hook.close()
    hook(TimerExpired(1.5, 4711, None, None, FileTimerRequest(4711, "x", 1.0, 9), 0.0, None))
    assert not (tmp_path / "run").exists()


# The hook of the server ---------------------------------------------------------------------------


def blocking(pid: int, called: list[int]) -> Callable[[TimerExpired[Any]], None]:
    """A hook that takes long for one worker, and no time for others."""

    def hook(event: TimerExpired[Any]) -> None:
        called.append(event.pid)
        if event.pid == pid:
            eventually(lambda: not is_alive(pid) or 0 in called)

    return hook


@pytest.mark.long
def test_one_that_blocks_holds_up_its_own_worker_alone(link: Link, fork_worker: Fork) -> None:
    """Others are reaped in time meanwhile, and it is too when its time is over."""
    called: list[int] = []
    with running(link.server()) as server:
        slow = fork_worker(overrun, link.client, 0.3)
        server.before_signal(blocking(slow.pid, called), 3)
        deadline = slow.receive()
        eventually(lambda: called)
        other = fork_worker(overrun, link.client, 0.1)
        assert_reaped_in_time(other, other.receive())
        assert is_alive(slow)
        assert wait_dead(slow) >= deadline + 3
    assert called == [slow.pid, other.pid]


def test_release_meanwhile_is_honoured(link: Link, fork_worker: Fork) -> None:
    """A worker that leaves its block while the hook runs lives on."""
    called: list[int] = []
    records: list[Event] = []
    with running(link.server()) as server:
        worker = fork_worker(wait_to_be_killed)
        server.subscribe(records.append)
        server.before_signal(blocking(worker.pid, called), FAR)
        link.put(worker.pid, "block", time.time())
        eventually(lambda: called)
        link.put(worker.pid, "block", -1)
        eventually(lambda: not server._timers)
        called.append(0)
        other = fork_worker(overrun, link.client, 0.1)
        assert_reaped_in_time(other, other.receive())
        assert is_alive(worker)
        eventually(lambda: any(isinstance(record, WorkerSignalled) for record in records))
        signalled = [record.pid for record in records if isinstance(record, WorkerSignalled)]
        assert signalled == [other.pid]
        # When it overruns again, all of it is done again.
        link.put(worker.pid, "block", time.time())
        assert worker.wait() == -signal.SIGKILL
    assert called == [worker.pid, 0, other.pid, worker.pid]


def test_one_that_only_reports_has_none(file_link: Link, fork_worker: Fork) -> None:
    """Nor has a worker that is never signalled, nor one of a server that is being stopped."""
    called: list[int] = []
    with running(file_link.server()) as server:
        server.before_signal(lambda event: called.append(event.pid), 5)
        worker = fork_worker(wait_to_be_killed)
        server.register_timers(
            [
                FileTimerRequest(worker.pid, "only said", time.time(), 0),
                FileTimerRequest(os.getpid(), "never", time.time(), 9),
            ]
        )
        eventually(lambda: not server._timers)
    assert called == []


def test_a_server_that_stops_does_not_wait_for_it(file_link: Link, fork_worker: Fork) -> None:
    """The worker is killed, though the hook has not come back."""
    called: list[int] = []
    with running(file_link.server()) as server:
        worker = fork_worker(overrun, file_link.client, 0.1)
        server.before_signal(blocking(worker.pid, called), FAR)
        eventually(lambda: called)
        started = time.monotonic()
    assert time.monotonic() - started < 8
    assert worker.wait() == -signal.SIGKILL


def test_hook_that_raises_and_hook_without_a_thread(
    fifo_path: str, fork_worker: Fork, caplog: pytest.LogCaptureFixture
) -> None:
    """The worker is killed all the same."""

    def fail(event: TimerExpired[Any]) -> None:
        raise RuntimeError("the hook's own")

    server = FileTimerServer(fifo_path, "run", 60)
    server.before_signal(fail, FAR)
    with running(server):
        worker = fork_worker(wait_to_be_killed)
        server.register_timers([FileTimerRequest(worker.pid, "block", time.time(), 9)])
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: "the hook's own" in caplog.text)
        other = fork_worker(wait_to_be_killed)
        with no_more_threads():
            server.register_timers([FileTimerRequest(other.pid, "block", time.time(), 9)])
            assert other.wait() == -signal.SIGKILL
