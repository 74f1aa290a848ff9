"""A py-spy that hangs, or prints without end, costs the time and the memory that are documented."""

from __future__ import annotations

import contextlib
import os
import resource
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_timer import FileTimerServer
from elastic_timer._evidence import stacks
from elastic_timer.debug_info_logging import (
    log_debug_info_for_expired_timers,
    set_stacks_timeout,
    stacks_timeout,
)
from tests.evidence_support import REAL_PY_SPY, expired, install_py_spy, logged
from tests.support import Child, eventually, is_alive, open_descriptors, wait_dead

Spawn = Callable[..., Child]

HANG_IN_A_BLOCK = """
    import sys, time
    from elastic_timer import FileTimerClient, expires
    sys.stdin.readline()
    with expires(float(sys.argv[2]), client=FileTimerClient(sys.argv[1])):
        print(time.time() + float(sys.argv[2]), flush=True)
        time.sleep(600)
    """


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`stand_in(script)`: has a shell script run as py-spy; returns the log of its arguments."""
    return lambda script: install_py_spy(script, tmp_path, monkeypatch)


@pytest.fixture
def sleepers() -> Iterator[list[int]]:
    """Two processes that do nothing."""
    processes = [subprocess.Popen(["sleep", "600"]) for _ in range(2)]
    yield [process.pid for process in processes]
    for process in processes:
        process.kill()
        process.wait()


def test_b5_the_second_worker_waits_no_longer_than_the_first(
    spawn: Spawn, fifo_path: str, stand_in: Callable[[str], Path]
) -> None:
    """One that expires while the first one's py-spy hangs has waited for that already."""
    dumps = stand_in("exec sleep 600")
    with FileTimerServer(fifo_path, "run", max_interval=60):
        workers = [spawn(HANG_IN_A_BLOCK, fifo_path, after) for after in ("0.4", "0.6", "1.2")]
        for worker in workers:
            worker.send_line("go")
        deadlines = [float(worker.readline()) for worker in workers]
        lateness = []
        for worker, deadline in zip(workers, deadlines, strict=True):
            wait_dead(worker)
            lateness.append(time.time() - deadline)
    assert len(dumps.read_text().splitlines()) == 3
    assert max(lateness) < stacks_timeout() + 1, lateness


def test_nobody_waits_for_a_strangers_stacks(
    spawn: Spawn, fifo_path: str, stand_in: Callable[[str], Path], tmp_path: Path
) -> None:
    """While the py-spy of one worker hangs, another one expires, is dumped, and dies at once."""
    with FileTimerServer(fifo_path, "run", max_interval=60):
        workers = [spawn(HANG_IN_A_BLOCK, fifo_path, after) for after in ("0.3", "0.4", "0.5")]
        hung = workers[0]
        go_on = tmp_path / "go on"
        hang = f"until [ -e {shlex.quote(str(go_on))} ]; do sleep 0.02; done"
        dumps = stand_in(f'[ "$4" != {hung.pid} ] || {hang}')
        set_stacks_timeout(20)
        for worker in workers:
            worker.send_line("go")
        for worker in workers[1:]:
            wait_dead(worker)
        assert is_alive(hung)
        go_on.touch()
        wait_dead(hung)
        pids = [int(line.split()[3]) for line in dumps.read_text().splitlines()]
        assert sorted(pids) == sorted(worker.pid for worker in workers)


def test_b5_output_without_end_is_cut(
    stand_in: Callable[[str], Path], sleepers: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """A py-spy that prints for ever is ended at 4 MiB, long before its time is over."""
    stand_in('exec yes \'{"a long line that is": "repeated for ever"}\'')
    set_stacks_timeout(20)
    started = time.monotonic()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log_debug_info_for_expired_timers("run", {pid: expired(pid) for pid in sleepers})
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert time.monotonic() - started < 10
    assert grown < 64 << 20
    assert [record.timer_stacks_missing for record in logged(caplog)] == [
        "py-spy wrote more than 4 MiB"
    ] * 2


def test_what_is_given_up_is_ended(
    stand_in: Callable[[str], Path], sleepers: list[int], tmp_path: Path
) -> None:
    """Dumps that nobody waits for any more leave no py-spy behind."""
    pid_file = tmp_path / "pid"
    stand_in(f"echo $$ > {shlex.quote(str(pid_file))}; exec sleep 600")
    dumps = stacks.Dumps()
    dumps.order("key", sleepers[0], "S", time.monotonic() + 60)
    assert dumps.wait(0) == []
    pid = int(eventually(lambda: pid_file.exists() and pid_file.read_text()))
    dumps.close()
    assert not is_alive(pid)


@pytest.mark.parametrize("way", ["stdout", "stderr"])
def test_b5_output_without_end_of_one_does_not_hold_up_the_other(
    way: str, stand_in: Callable[[str], Path], sleepers: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Beside one that prints for ever another one's reason is read."""
    flood, other = sleepers
    redirect = " >&2" if way == "stderr" else ""
    stand_in(f'[ "$4" = {flood} ] && exec yes{redirect}\necho another reason >&2')
    set_stacks_timeout(20)
    collected = log_debug_info_for_expired_timers("run", {pid: expired(pid) for pid in sleepers})
    assert collected[flood]["stacks_missing"] == "py-spy wrote more than 4 MiB"
    assert collected[other]["stacks_missing"] == "py-spy: another reason"


def test_deeply_nested_output_is_a_dump_that_failed(
    stand_in: Callable[[str], Path], sleepers: list[int]
) -> None:
    """Even where reading it raises what nobody thinks of."""
    stand_in("exec head -c 1000000 /dev/zero | tr '\\0' '['")
    pid = sleepers[0]
    collected = log_debug_info_for_expired_timers("run", {pid: expired(pid)})
    assert collected[pid]["stacks_missing"] == "py-spy: it gave neither stacks nor a reason"


def test_b5_a_frozen_clock_does_not_stop_the_bound(spawn: Spawn, tmp_path: Path) -> None:
    """In a server's process whose clock a test has frozen, a py-spy that hangs is ended as well."""
    program = tmp_path / "py-spy"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    child = spawn(
        """
        import subprocess, sys
        import freezegun
        from elastic_timer import debug_info_logging
        import elastic_timer._evidence.expiry
        sys.executable = sys.argv[1]
        worker = subprocess.Popen(["sleep", "600"])
        debug_info_logging.set_stacks_timeout(0.3)
        with freezegun.freeze_time("2020-01-01"):
            found = debug_info_logging.log_debug_info_for_expired_timers("run", {worker.pid: []})
        worker.kill()
        worker.wait()
        print(found[worker.pid]["stacks_missing"], flush=True)
        """,
        str(tmp_path / "python"),
    )
    assert child.readline() == "py-spy did not end in time"


def test_a_py_spy_that_closes_its_output_is_ended(
    stand_in: Callable[[str], Path], sleepers: list[int], tmp_path: Path
) -> None:
    """Whoever says nothing more is not waited for, and leaves no process and no descriptor."""
    pid_file = tmp_path / "pid"
    stand_in(f"echo $$ > {shlex.quote(str(pid_file))}; exec sleep 600 >&- 2>&-")
    set_stacks_timeout(20)
    descriptors = open_descriptors()
    started = time.monotonic()
    log_debug_info_for_expired_timers("run", {sleepers[0]: expired(sleepers[0])})
    assert time.monotonic() - started < 10
    assert not is_alive(int(pid_file.read_text()))
    assert open_descriptors().keys() == descriptors.keys()


def test_a_py_spy_that_cannot_be_ended_is_not_waited_for(
    stand_in: Callable[[str], Path],
    sleepers: list[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that the kernel does not let die is left behind, to be reaped later."""
    pid_file = tmp_path / "pid"
    stand_in(f"echo $$ > {shlex.quote(str(pid_file))}; exec sleep 600")
    started_processes: list[subprocess.Popen[bytes]] = []
    start = stacks._Dump.__init__

    def note(dump: stacks._Dump, *given: object) -> None:
        start(dump, *given)  # type: ignore[arg-type]  # handed on as they are
        started_processes.append(dump.process)

    monkeypatch.setattr(stacks._Dump, "__init__", note)
    # No signal: as if the process were in state D.
    monkeypatch.setattr(os, "killpg", lambda pid, signal: None)
    set_stacks_timeout(0.5)
    started = time.monotonic()
    log_debug_info_for_expired_timers("run", {sleepers[0]: expired(sleepers[0])})
    assert time.monotonic() - started < 1.5
    assert eventually(pid_file.read_text)
    (process,) = started_processes
    assert is_alive(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


# A process that somebody else traces --------------------------------------------------------------

TRACER = """
    import ctypes, sys
    libc = ctypes.CDLL(None, use_errno=True)
    PTRACE_SEIZE = 0x4206
    failed = libc.ptrace(PTRACE_SEIZE, int(sys.argv[1]), None, None)
    print("failed" if failed else "traces", flush=True)
    sys.stdin.readline()
    """

HANGS = """
    import time
    def hang():
        print("there", flush=True)
        time.sleep(600)
    hang()
    """


def test_process_that_another_server_looks_at(
    spawn: Spawn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It can't be paused meanwhile, which is tried again; in the end it is read all the same."""
    log = install_py_spy(f'exec {shlex.quote(REAL_PY_SPY)} "$@"', tmp_path, monkeypatch)
    worker = spawn(HANGS)
    assert worker.readline() == "there"
    tracer = spawn(TRACER, str(worker.pid))
    if tracer.readline() != "traces":
        pytest.skip("no process may trace another one here")
    try:
        log_debug_info_for_expired_timers("run", {worker.pid: expired(worker.pid)})
    finally:
        tracer.kill()  # As long as it traces nobody else is told of the worker's end.
    (record,) = logged(caplog)
    assert record.timer_stacks[0]["frames"][-1]["function"] == "hang"
    dump = f"dump --json --pid {worker.pid}"
    assert log.read_text().splitlines() == [dump, dump, dump, f"{dump} --nonblocking"]


def test_process_that_no_other_server_looks_at_any_more(
    stand_in: Callable[[str], Path], sleepers: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """It is read at once, without C frames where these were not to be had."""
    refuses = 'echo "EPERM: not permitted" >&2; exit 1'
    log = stand_in(f'case "$*" in *--nonblocking*) echo "[]";; *) {refuses};; esac')
    pid = sleepers[0]
    taken = stacks.take_stacks({pid: "S"}, time.monotonic() + 20)
    assert taken == {pid: {"stacks": [], "stacks_missing": None}}
    with contextlib.closing(stacks.Dumps()) as dumps:
        dumps.order("native", pid, "S", time.monotonic() + 20, native=True)
        (found,) = eventually(lambda: dumps.wait(1))
    assert found[1]["stacks"] is None
    dump = f"dump --json --pid {pid}"
    assert log.read_text().splitlines() == [dump, f"{dump} --nonblocking", f"{dump} --native"]
