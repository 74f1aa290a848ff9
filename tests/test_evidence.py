"""What is logged about an expired worker before it is signalled: facts, stacks, own handlers."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from elastic_timer import FileTimerServer, LocalTimerServer, _clock
from elastic_timer._evidence import stacks
from elastic_timer._evidence.expiry import describe_stacks
from elastic_timer._server.events import TimerExpired
from elastic_timer._server.process import refusal
from elastic_timer.debug_info_logging import (
    add_debug_info_handler,
    log_debug_info_for_expired_timers,
    remove_debug_info_handler,
    set_stacks_timeout,
    stacks_timeout,
)
from tests.evidence_support import expired, install_py_spy, logged
from tests.support import Child, ForkedWorker, eventually, is_alive, process_state, wait_dead

# Forking while a watchdog thread runs is what servers are for; Python warns of it since 3.12.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")

Spawn = Callable[..., Child]

linux_only = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")

# Each hangs in the line marked with "here", in the main thread, once it has said "stuck".
STUCK = {
    "asleep": """
        import time
        def hang():
            print("stuck", flush=True)
            time.sleep(600)  # here
        hang()
        """,
    "in C with the GIL held": """
        import ctypes
        def hang():
            print("stuck", flush=True)
            ctypes.PyDLL(None).sleep(600)  # here
        hang()
        """,
    "in a deadlock of two threads": """
        import threading
        mine, theirs = threading.Lock(), threading.Lock()
        met = threading.Barrier(2)
        def other_way_round():
            with theirs:
                met.wait()
                with mine:
                    pass
        def hang():
            with mine:
                met.wait()
                print("stuck", flush=True)
                theirs.acquire()  # here
        threading.Thread(target=other_way_round, name="other", daemon=True).start()
        hang()
        """,
    "stopped": """
        import os, signal
        def hang():
            print("stuck", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)  # here
        hang()
        """,
}


def hang_line(source: str) -> int:
    """The number of the line that a worker's source hangs in."""
    return next(n for n, line in enumerate(source.split("\n"), 1) if "# here" in line)


@pytest.fixture
def stuck(spawn: Spawn) -> Callable[[str], Child]:
    """`stuck(kind)`: a process that hangs as told, and does so already."""

    def start(kind: str) -> Child:
        child = spawn(STUCK[kind])
        assert child.readline() == "stuck"
        expected = "T" if kind == "stopped" else "S"
        eventually(lambda: process_state(child.pid) == expected)
        return child

    return start


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """`stand_in(script)`: has a shell script run as py-spy; returns the log of its arguments."""
    return lambda script: install_py_spy(script, tmp_path, monkeypatch)


def last_frame(record: Any) -> tuple[str, int]:
    """Function and line of the innermost frame of a record's main thread."""
    frame = record.timer_stacks[0]["frames"][-1]
    return frame["function"], frame["line"]


def log_one(caplog: pytest.LogCaptureFixture, pid: int, *scopes: str) -> Any:
    """Log one expired worker and return its record."""
    log_debug_info_for_expired_timers("run", {pid: expired(pid, *scopes)})
    (record,) = logged(caplog)
    return record


@pytest.mark.parametrize("kind", STUCK)
def test_the_last_frame_names_the_line_a_worker_is_stuck_in(
    kind: str, stuck: Callable[[str], Child], caplog: pytest.LogCaptureFixture
) -> None:
    """However a worker hangs, the main thread's last frame is the line it hangs in."""
    record = log_one(caplog, stuck(kind).pid)
    assert record.timer_stacks_missing is None
    main = record.timer_stacks[0]
    line = hang_line(STUCK[kind])
    assert main["name"] == "MainThread"
    assert [frame["function"] for frame in main["frames"]] == ["<module>", "hang"]
    assert main["frames"][-1] == {"file": "<string>", "line": line, "function": "hang"}
    assert f'File "<string>", line {line}, in hang' in record.getMessage()


def test_the_holder_of_the_gil_is_named(
    stuck: Callable[[str], Child], caplog: pytest.LogCaptureFixture
) -> None:
    """A worker stuck in C with the GIL held shows as the one that holds it."""
    record = log_one(caplog, stuck("in C with the GIL held").pid)
    assert record.timer_stacks[0]["gil"] is True
    assert "thread MainThread (idle, holds the GIL):" in record.getMessage()


def test_every_thread_has_its_stack(
    stuck: Callable[[str], Child], caplog: pytest.LogCaptureFixture
) -> None:
    """Of two threads that wait for each other's lock both are shown."""
    record = log_one(caplog, stuck("in a deadlock of two threads").pid)
    main, other = record.timer_stacks
    assert main["name"] == "MainThread"
    assert other["name"] == "other"
    assert other["frames"][-1]["function"] == "other_way_round"


@linux_only
def test_a_worker_stuck_in_the_kernel_is_shown(
    spawn: Spawn, fifo_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A process in state D, which cannot be paused, is dumped without pausing it."""
    os.mkfifo(fifo_path)
    # posix_spawn does not return, nor can it be interrupted, until the new process has opened
    # the FIFO, which it never does while nobody writes to it.
    child = spawn(
        """
        import os, sys
        print("stuck", flush=True)
        os.posix_spawn("/bin/true", ["true"], {},
                       file_actions=[(os.POSIX_SPAWN_OPEN, 0, sys.argv[1], os.O_RDONLY, 0)])
        """,
        fifo_path,
    )
    child.readline()
    eventually(lambda: process_state(child.pid) == "D")
    record = log_one(caplog, child.pid)
    assert record.timer_state == "D"
    assert record.timer_stacks[0]["frames"][-1]["line"] == 4


def test_one_warning_a_worker_with_stable_fields(
    stuck: Callable[[str], Child], caplog: pytest.LogCaptureFixture
) -> None:
    """Each worker has one WARNING of this module's logger, whose fields can be written as JSON."""
    first, second = stuck("asleep"), stuck("stopped")
    log_debug_info_for_expired_timers(
        "run 7",
        {
            first.pid: expired(first.pid, "b", late=0.5) + expired(first.pid, "a", late=1.5),
            second.pid: expired(second.pid, "c"),
        },
    )
    records = logged(caplog)
    assert [record.timer_pid for record in records] == [first.pid, second.pid]
    record = records[0]
    assert record.levelno == logging.WARNING
    assert record.name == "elastic_timer.debug_info_logging"
    assert record.timer_run_id == "run 7"
    assert record.timer_scopes == ["a", "b"]
    assert 1.5 <= record.timer_seconds_late < 10
    fields = {name for name in vars(record) if name.startswith("timer_")}
    assert fields == {
        "timer_run_id",
        "timer_pid",
        "timer_rank",
        "timer_local_rank",
        "timer_scopes",
        "timer_seconds_late",
        "timer_command",
        "timer_state",
        "timer_wait_channel",
        "timer_system_call",
        "timer_threads",
        "timer_resident_bytes",
        "timer_age_seconds",
        "timer_stacks",
        "timer_stacks_missing",
        "timer_descendants",
    }
    json.dumps({name: getattr(record, name) for name in fields}, allow_nan=False)
    assert record.getMessage().startswith(
        f"worker {first.pid} of run 'run 7' is past its deadline: 'a', 'b', 1.5"
    )


@linux_only
def test_the_facts_are_those_of_the_process(
    stuck: Callable[[str], Child], caplog: pytest.LogCaptureFixture
) -> None:
    """State, threads, memory, age and command line agree with what the system says elsewhere."""
    before = time.monotonic()
    child = stuck("in a deadlock of two threads")
    record = log_one(caplog, child.pid)
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{child.pid}/status").read_text().splitlines()
    )
    assert record.timer_state == "S"
    assert record.timer_threads == int(status["Threads"]) == 2
    resident = int(status["VmRSS"].split()[0]) * 1024
    assert resident / 2 < record.timer_resident_bytes < resident * 2
    # The start time is known to one tick of 10 ms.
    assert -0.02 <= record.timer_age_seconds <= time.monotonic() - before + 0.02
    assert record.timer_command.startswith(f"{sys.executable} -c ")
    assert "\n" not in record.timer_command
    assert len(record.timer_command) <= 300


@linux_only
def test_the_system_call_is_named_where_it_may_be_read(
    stuck: Callable[[str], Child], caplog: pytest.LogCaptureFixture
) -> None:
    """A worker in a deadlock waits for a futex, and the record says so if the system does."""
    child = stuck("in a deadlock of two threads")
    record = log_one(caplog, child.pid)
    try:
        number = Path(f"/proc/{child.pid}/syscall").read_text().split()[0]
    except OSError:
        assert record.timer_system_call is None
    else:
        assert record.timer_system_call in ("futex", number)
        assert f"in system call {record.timer_system_call}" in record.getMessage()


def test_a_worker_that_is_gone_has_no_facts(spawn: Spawn, caplog: pytest.LogCaptureFixture) -> None:
    """A pid whose process has ended still has its record, which says so."""
    child = spawn("")
    child.wait()
    record = log_one(caplog, child.pid)
    assert record.timer_state is None
    assert record.timer_stacks is None
    assert record.timer_stacks_missing == "the process has ended"


@linux_only
def test_a_worker_that_was_not_waited_for_is_not_dumped(
    spawn: Spawn, caplog: pytest.LogCaptureFixture, stand_in: Callable[[str], Path]
) -> None:
    """A process that has ended but was not waited for is state Z, and py-spy is not tried on it."""
    child = spawn("")
    eventually(lambda: process_state(child.pid) == "Z")
    dumps = stand_in("exit 1")
    record = log_one(caplog, child.pid)
    assert record.timer_state == "Z"
    assert record.timer_stacks_missing == "the process has ended"
    assert dumps.read_text() == ""


def test_a_process_group_has_no_facts(
    caplog: pytest.LogCaptureFixture, stuck: Callable[[str], Child]
) -> None:
    """A worker named by a negative pid has its record, with the reason for its emptiness."""
    record = log_one(caplog, -stuck("asleep").pid)
    assert record.timer_state is None
    assert record.timer_stacks_missing == "a process group, not a process"


@pytest.mark.parametrize("pid", [os.getpid(), 1], ids=["its own", "init"])
def test_a_process_that_is_never_signalled_is_never_dumped(pid: int) -> None:
    """Least of all the server's own: nobody could end a py-spy that has stopped it."""
    taken = stacks.take_stacks({pid: "S"}, _clock.monotonic() + 2)[pid]
    assert refusal(pid) is not None
    assert taken == {"stacks": None, "stacks_missing": refusal(pid)}


def test_nothing_is_logged_for_no_worker(caplog: pytest.LogCaptureFixture) -> None:
    """An empty mapping is silent and does not reach the handlers."""
    calls: list[object] = []
    add_debug_info_handler(lambda *given: calls.append(given))
    log_debug_info_for_expired_timers("run", {})
    assert (caplog.records, calls) == ([], [])


def test_text_that_is_no_request_is_shown(
    caplog: pytest.LogCaptureFixture, stuck: Callable[[str], Child]
) -> None:
    """Whatever the mapping's texts are, the worker has its record."""
    pid = stuck("asleep").pid
    log_debug_info_for_expired_timers("run", {pid: ["rubbish", "[]"]})
    (record,) = logged(caplog)
    assert record.timer_scopes == ["[]", "rubbish"]
    assert record.timer_seconds_late == 0


def test_what_cannot_be_collected_at_all_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A mapping that makes no sense raises nothing and is logged as an error."""
    nonsense: Any = {"four": None}
    assert log_debug_info_for_expired_timers("run", nonsense) == {}
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_neither_locals_nor_environment_are_logged(
    spawn: Spawn, caplog: pytest.LogCaptureFixture
) -> None:
    """A value in the worker's environment and local variables shows nowhere in the record."""
    child = spawn(
        """
        import os, time
        def hang(secret):
            print("stuck", flush=True)
            time.sleep(600)
        hang(os.environ["PASSWORD"])
        """,
        env={"PASSWORD": "dont-tell"},
    )
    child.readline()
    record = log_one(caplog, child.pid)
    assert record.timer_stacks[0]["frames"]
    assert "dont-tell" not in f"{record.getMessage()} {vars(record)}"


def test_names_from_the_worker_cannot_add_lines(
    spawn: Spawn, caplog: pytest.LogCaptureFixture
) -> None:
    """A line break in a scope, a thread's name or a file's is not one in the text."""
    child = spawn(
        r"""
        import threading, time
        code = compile("import time; print('stuck', flush=True); time.sleep(600)", "a\nb", "exec")
        threading.Thread(target=exec, args=(code,), name="c\nd").start()
        """
    )
    child.readline()
    record = log_one(caplog, child.pid, "e\nf")
    assert r"'e\nf', 0." in record.getMessage()
    assert "\n  thread c d (" in record.getMessage()
    assert '\n    File "a b", line 1, in <module>\n' in record.getMessage() + "\n"
    (thread,) = (thread for thread in record.timer_stacks if thread["name"] == "c\nd")
    assert thread["frames"][-1]["file"] == "a\nb"


def test_a_deep_stack_is_cut_to_its_inner_end(
    spawn: Spawn, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a recursion of 900 calls the innermost 100 frames are kept."""
    child = spawn(
        """
        import time
        def descend(depth):
            if depth:
                descend(depth - 1)
            print("stuck", flush=True)
            time.sleep(600)
        descend(900)
        """
    )
    child.readline()
    eventually(lambda: process_state(child.pid) == "S")
    record = log_one(caplog, child.pid)
    assert len(record.timer_stacks[0]["frames"]) == 100
    assert last_frame(record) == ("descend", 7)


@pytest.mark.skipif(not os.path.exists("/bin/sh"), reason="the stand-ins are shell scripts")
class TestPySpyFails:
    """A py-spy that is missing, forbidden, broken or slow costs one line and bounded time."""

    def test_absent(
        self,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        """Without py-spy the facts are there, and the way to install it."""
        child = stuck("asleep")
        monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
        monkeypatch.setenv("PATH", str(tmp_path))
        record = log_one(caplog, child.pid)
        assert record.timer_stacks is None
        assert "pip install py-spy" in record.timer_stacks_missing
        assert record.timer_stacks_missing in record.getMessage()

    def test_found_on_the_path(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Where none is installed beside this Python, the one on PATH is used."""
        program = tmp_path / "py-spy"
        program.write_text("")
        program.chmod(0o755)
        monkeypatch.setattr(sys, "executable", "")
        monkeypatch.setenv("PATH", str(tmp_path))
        assert stacks.find_py_spy() == str(program)

    def test_not_permitted(
        self,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        stand_in: Callable[[str], Path],
    ) -> None:
        """What py-spy says when it may not trace becomes one line that says what to do."""
        child = stuck("asleep")
        stand_in(
            """cat >&2 <<'END'
Permission Denied: Try running again with elevated permissions by going 'sudo env "PATH=$PATH" !!'
Error: Failed to suspend process

Caused by:
    0: EPERM: Operation not permitted

Stack backtrace:
   0: py_spy::main
END
exit 1"""
        )
        record = log_one(caplog, child.pid)
        assert record.timer_stacks_missing == (
            "py-spy: Error: Failed to suspend process Caused by: 0: EPERM: Operation not permitted "
            "(it may not read the process: run the server as the workers' user; in a container "
            "add the capability SYS_PTRACE; see kernel.yama.ptrace_scope)"
        )

    @pytest.mark.parametrize(
        ("script", "reason"),
        [
            ("exit 3", "py-spy: it gave neither stacks nor a reason"),
            ("echo broken", "py-spy: it gave neither stacks nor a reason"),
            ("echo '{}'; echo no idea >&2", "py-spy: no idea"),
            ("echo '[{}]'; echo no idea >&2", "py-spy: no idea"),
            ("echo '[1]'; echo no idea >&2", "py-spy: no idea"),
        ],
    )
    def test_no_stacks_in_its_output(
        self,
        script: str,
        reason: str,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        stand_in: Callable[[str], Path],
    ) -> None:
        """Output that is not what py-spy writes is a dump that failed."""
        child = stuck("asleep")
        stand_in(script)
        assert log_one(caplog, child.pid).timer_stacks_missing == reason

    def test_not_executable(
        self,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        stand_in: Callable[[str], Path],
    ) -> None:
        """A py-spy that the system cannot start is a reason like any other."""
        child = stuck("asleep")
        program = stand_in("").parent / "scripts" / "py-spy"
        program.write_bytes(b"\x7fELF not really")
        record = log_one(caplog, child.pid)
        assert record.timer_stacks_missing == "py-spy: OSError(8, 'Exec format error')"

    def test_hanging(
        self,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        stand_in: Callable[[str], Path],
        tmp_path: Path,
    ) -> None:
        """A py-spy that never ends is killed at the bound, with all that it started."""
        child = stuck("asleep")
        pids = tmp_path / "pids"
        stand_in(f"sleep 600 & echo $$ $! > {pids}; wait")
        set_stacks_timeout(0.5)
        started = time.monotonic()
        record = log_one(caplog, child.pid)
        assert 0.5 <= time.monotonic() - started < 1.5
        assert record.timer_stacks_missing == "py-spy did not end in time"
        started_pids = [int(pid) for pid in pids.read_text().split()]
        assert len(started_pids) == 2
        eventually(lambda: not any(map(is_alive, started_pids)))

    def test_its_output_counts_though_its_pipe_stays_open(
        self,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        stand_in: Callable[[str], Path],
    ) -> None:
        """A dump written in time is used even where another process keeps its output open."""
        child = stuck("asleep")
        real = shutil.which("py-spy", path=os.path.dirname(sys.executable)) or "py-spy"
        stand_in(f'{shlex.quote(real)} "$@"; sleep 600 &')
        set_stacks_timeout(1.0)
        assert log_one(caplog, child.pid).timer_stacks[0]["frames"][-1]["function"] == "hang"

    def test_many_share_one_bound(
        self,
        caplog: pytest.LogCaptureFixture,
        stand_in: Callable[[str], Path],
    ) -> None:
        """Twelve workers whose dumps all hang take no longer than one; eight run at a time."""
        dumps = stand_in("sleep 600")
        set_stacks_timeout(0.5)
        children = [
            subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL) for _ in range(12)
        ]
        try:
            started = time.monotonic()
            log_debug_info_for_expired_timers("run", {c.pid: expired(c.pid) for c in children})
            assert time.monotonic() - started < 1.5
        finally:
            for child in children:
                child.kill()
                child.wait()
        reasons = [record.timer_stacks_missing for record in logged(caplog)]
        assert reasons.count("py-spy did not end in time") == 8
        assert reasons.count("the time for stacks was used up by other processes") == 4
        assert len(dumps.read_text().splitlines()) == 8

    def test_no_threads_left(
        self,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Where no thread can be started, the dumps are taken one after the other."""

        def refuse(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        pids = [stuck("asleep").pid, stuck("stopped").pid]
        monkeypatch.setattr(threading.Thread, "start", refuse)
        log_debug_info_for_expired_timers("run", {pid: expired(pid) for pid in pids})
        assert all(record.timer_stacks for record in logged(caplog))

    def test_anything_else(
        self,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """An error that nobody thought of is a reason, too."""

        def fail(*command: object, **options: object) -> None:
            raise MemoryError("no room")

        child = stuck("asleep")
        monkeypatch.setattr(subprocess, "Popen", fail)
        record = log_one(caplog, child.pid)
        assert record.timer_stacks_missing == "py-spy: MemoryError('no room')"

    def test_no_descriptors_left(
        self, stuck: Callable[[str], Child], caplog: pytest.LogCaptureFixture
    ) -> None:
        """With all descriptors in use there is a record, without facts, and the reason."""
        child = stuck("asleep")
        shutil.which("py-spy")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
        try:
            log_debug_info_for_expired_timers("run", {child.pid: expired(child.pid)})
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        (record,) = logged(caplog)
        assert record.timer_state is None
        assert "Too many open files" in record.timer_stacks_missing

    def test_once_for_each_worker(
        self,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        stand_in: Callable[[str], Path],
    ) -> None:
        """A dump that fails is not tried again."""
        child = stuck("asleep")
        dumps = stand_in("exit 1")
        log_one(caplog, child.pid)
        assert dumps.read_text() == f"dump --json --pid {child.pid}\n"

    def test_switched_off(
        self,
        stuck: Callable[[str], Child],
        caplog: pytest.LogCaptureFixture,
        stand_in: Callable[[str], Path],
    ) -> None:
        """With a bound of 0 seconds py-spy is never started."""
        child = stuck("asleep")
        dumps = stand_in("exit 1")
        set_stacks_timeout(0)
        record = log_one(caplog, child.pid)
        assert record.timer_stacks_missing == "switched off"
        assert dumps.read_text() == ""


def test_the_bound_is_checked() -> None:
    """Only a finite time of 0 or more is taken; what is refused changes nothing."""
    for seconds in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="0 or more seconds"):
            set_stacks_timeout(seconds)
    assert stacks_timeout() == 2.0
    set_stacks_timeout(3)
    assert stacks_timeout() == 3.0


def test_handlers_are_called_until_removed(
    caplog: pytest.LogCaptureFixture, stuck: Callable[[str], Child]
) -> None:
    """A handler has run id and mapping, once though added twice, and nothing once removed."""
    calls: list[tuple[str, dict[int, list[str]]]] = []

    def handler(run_id: str, expired_timers: dict[int, list[str]]) -> None:
        calls.append((run_id, expired_timers))

    pid = stuck("asleep").pid
    timers = {pid: expired(pid)}
    remove_debug_info_handler(handler)
    add_debug_info_handler(handler)
    add_debug_info_handler(handler)
    log_debug_info_for_expired_timers("run", timers)
    assert calls == [("run", timers)]
    remove_debug_info_handler(handler)
    log_debug_info_for_expired_timers("run", timers)
    assert len(calls) == 1


def test_an_error_of_a_handler_is_contained(
    caplog: pytest.LogCaptureFixture, stuck: Callable[[str], Child]
) -> None:
    """A handler that raises is logged; the evidence and the next handler are not affected."""
    calls: list[str] = []

    def failing(run_id: str, expired_timers: dict[int, list[str]]) -> None:
        raise RuntimeError("no disk")

    add_debug_info_handler(failing)
    add_debug_info_handler(lambda run_id, timers: calls.append(run_id))
    pid = stuck("asleep").pid
    log_debug_info_for_expired_timers("run", {pid: expired(pid)})
    assert calls == ["run"]
    assert len(logged(caplog)) == 1
    assert "RuntimeError: no disk" in caplog.text


def test_what_was_collected_is_returned(
    stuck: Callable[[str], Child], caplog: pytest.LogCaptureFixture
) -> None:
    """The caller has the evidence by pid, with the fields of the record; nothing for nothing."""
    pid = stuck("asleep").pid
    collected = log_debug_info_for_expired_timers("run", {pid: expired(pid)})
    (record,) = logged(caplog)
    assert list(collected) == [pid]
    assert record.timer_stacks
    assert collected[pid] == {
        name.removeprefix("timer_"): value
        for name, value in vars(record).items()
        if name.startswith("timer_")
    }
    assert log_debug_info_for_expired_timers("run", {}) == {}


def test_importing_the_library_imports_nothing_for_evidence(spawn: Spawn) -> None:
    """What only an expiry needs is imported then: workers import the library, too."""
    child = spawn(
        """
        import sys
        before = set(sys.modules)
        import elastic_timer
        new = set(sys.modules) - before
        print([name for name in ("subprocess", "shutil", "tempfile") if name in new])
        """
    )
    assert child.readline() == "[]"


class Worker(NamedTuple):
    """A process that is going to hang in a block."""

    pid: int
    source: str


Guarded = Callable[[str], Worker]


@pytest.fixture(params=["file", "queue"])
def guarded(
    request: pytest.FixtureRequest,
    spawn: Spawn,
    fork_worker: Callable[..., ForkedWorker],
    fifo_path: str,
) -> Iterator[Guarded]:
    """`guarded(kind)`: a worker of a running server, which hangs in a block of 0.3 s."""
    if request.param == "file":
        with FileTimerServer(fifo_path, "run", max_interval=60):
            yield lambda kind: hang_in_a_block(spawn, fifo_path, kind)
    else:
        yield from guarded_by_queue(fork_worker)


def guarded_by_queue(fork_worker: Callable[..., ForkedWorker]) -> Iterator[Guarded]:
    """The queue variant, whose workers are forks of this process."""
    queue: Any = multiprocessing.get_context("fork").Queue()

    def start(kind: str) -> Worker:
        source = hanging_in_a_block("elastic_timer.LocalTimerClient(queue)", kind)
        worker = fork_worker(lambda channel: exec(source, {"queue": queue}))
        return Worker(worker.pid, source)

    with LocalTimerServer(queue, max_interval=60):
        yield start
    queue._reader.close()
    queue._writer.close()


def hang_in_a_block(spawn: Spawn, path: str, kind: str) -> Worker:
    """Start a worker of the file server at `path`."""
    source = hanging_in_a_block(f"elastic_timer.FileTimerClient({path!r})", kind)
    return Worker(spawn(source).pid, source)


def hanging_in_a_block(client: str, kind: str, setup: str = "") -> str:
    """Source of a worker that hangs as told, in a block of 0.3 s."""
    lines = [
        "import signal",
        "import elastic_timer",
        setup,
        f"with elastic_timer.expires(0.3, 'block', {client}):",
    ]
    return "\n".join(lines) + textwrap.indent(textwrap.dedent(STUCK[kind]), "    ")


def reaped(worker: Worker, deadlines: dict[int, float]) -> float:
    """Wait for a worker's death; by how many seconds it was late."""
    wait_dead(worker.pid, timeout=60)
    return time.time() - deadlines[worker.pid]


@pytest.fixture
def deadlines() -> dict[int, float]:
    """The epoch time at which the worker's timer ended, by pid, once it has."""
    found: dict[int, float] = {}

    def note(run_id: str, expired_timers: dict[int, list[str]]) -> None:
        for pid, timers in expired_timers.items():
            found[pid] = json.loads(timers[0])["expiration_time"]

    add_debug_info_handler(note)
    return found


@pytest.mark.parametrize("kind", STUCK)
def test_a_server_tells_where_a_worker_hung_and_reaps_it(
    kind: str, guarded: Guarded, deadlines: dict[int, float], caplog: pytest.LogCaptureFixture
) -> None:
    """Either server, however the worker hangs: the line is in the log, and it dies in time."""
    worker = guarded(kind)
    lateness = reaped(worker, deadlines)
    assert lateness < stacks_timeout() + 1.5
    (record,) = logged(caplog)
    assert record.timer_pid == worker.pid
    assert record.timer_scopes == ["block"]
    assert last_frame(record) == ("hang", hang_line(worker.source))


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        (None, "pip install"),
        ("echo Permission denied >&2; exit 1", "SYS_PTRACE"),
        ("sleep 600", "did not end in time"),
    ],
    ids=["absent", "not permitted", "hanging"],
)
def test_a_server_reaps_without_stacks(
    script: str | None,
    reason: str,
    guarded: Guarded,
    deadlines: dict[int, float],
    caplog: pytest.LogCaptureFixture,
    stand_in: Callable[[str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Either server, whatever is wrong with py-spy: the reason is in the log, it dies in time."""
    if script is None:
        monkeypatch.setattr(stacks, "find_py_spy", lambda: None)
    else:
        stand_in(script)
    set_stacks_timeout(0.5)
    lateness = reaped(guarded("in C with the GIL held"), deadlines)
    assert lateness < stacks_timeout() + 1.5
    (record,) = logged(caplog)
    assert record.timer_stacks is None
    assert reason in record.timer_stacks_missing


def test_the_kill_goes_ahead_of_a_handler_that_never_returns(
    guarded: Guarded, deadlines: dict[int, float]
) -> None:
    """A handler that blocks delays the reap by the bound for stacks and one second at most."""
    release = threading.Event()
    add_debug_info_handler(lambda run_id, timers: release.wait(60))
    set_stacks_timeout(0.2)
    try:
        assert reaped(guarded("asleep"), deadlines) < 2.2
    finally:
        release.set()


def test_a_handler_that_blocks_is_waited_for_once(
    fifo_path: str, spawn: Spawn, caplog: pytest.LogCaptureFixture
) -> None:
    """Later workers are reaped at once, and have evidence again when it has come back."""
    release = threading.Event()
    blocks = [True]
    add_debug_info_handler(lambda run_id, timers: blocks[0] and release.wait(60))
    set_stacks_timeout(0.5)
    with FileTimerServer(fifo_path, "run", max_interval=60) as server:
        events: list[Any] = []
        server.subscribe(events.append, TimerExpired)
        try:
            wait_dead(hang_in_a_block(spawn, fifo_path, "asleep").pid)
            second = hang_in_a_block(spawn, fifo_path, "asleep")
            wait_dead(second.pid)
        finally:
            blocks.clear()
            blocks.append(False)
            release.set()
        eventually(lambda: len(logged(caplog)) == 2)
        third = hang_in_a_block(spawn, fifo_path, "asleep")
        wait_dead(third.pid)
        eventually(lambda: len(events) == 3)
    assert [event.evidence is None for event in events] == [True, True, False]
    assert events[1].seconds_late < 0.5
    assert "No evidence on worker" in caplog.text


def test_one_dump_though_the_reap_is_tried_again(
    spawn: Spawn,
    fifo_path: str,
    caplog: pytest.LogCaptureFixture,
    stand_in: Callable[[str], Path],
) -> None:
    """Evidence is taken once, before the first attempt, however often the signal fails."""
    dumps = stand_in("exit 1")
    records_at_attempts = []

    class Failing(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            records_at_attempts.append(len(logged(caplog)))
            return len(records_at_attempts) > 2 and super()._reap_worker(worker_pid, signal)

    with Failing(fifo_path, "run", max_interval=0.05):
        worker = hang_in_a_block(spawn, fifo_path, "asleep")
        wait_dead(worker.pid)
    assert records_at_attempts == [1, 1, 1]
    assert dumps.read_text() == f"dump --json --pid {worker.pid}\n"


@pytest.mark.parametrize("number", [0, -1])
def test_evidence_without_a_signal(
    number: int, spawn: Spawn, fifo_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that is only to be reported has its record with stacks, and goes on."""
    with FileTimerServer(fifo_path, "run", max_interval=60):
        worker = spawn(
            """
            import sys
            from elastic_timer import FileTimerClient, expires
            with expires(after=0.1, client=FileTimerClient(sys.argv[1], signal=int(sys.argv[2]))):
                sys.stdin.readline()
            print("done", flush=True)
            """,
            fifo_path,
            str(number),
        )
        (record,) = eventually(lambda: logged(caplog))
        assert last_frame(record) == ("<module>", 5)
        worker.send_line("go on")
        assert worker.readline() == "done"
        assert worker.wait() == 0
    assert len(logged(caplog)) == 1


def test_the_worker_can_tell_itself_where_it_hangs(spawn: Spawn, fifo_path: str) -> None:
    """With SIGABRT and faulthandler the traceback is in the worker's stderr, GIL held or not."""
    setup = (
        "import faulthandler, resource; faulthandler.enable(); "
        "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))"
    )
    client = f"elastic_timer.FileTimerClient({fifo_path!r}, signal=signal.SIGABRT)"
    source = hanging_in_a_block(client, "in C with the GIL held", setup)
    with FileTimerServer(fifo_path, "run", max_interval=60):
        worker = spawn(source)
        assert worker.wait() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in worker.stderr_text()
    assert f'File "<string>", line {hang_line(source)} in hang' in worker.stderr_text()


def test_frame_without_a_line() -> None:
    """A frame in C of which the line is not known has none, rather than 0."""
    frames = [
        {"file": "/home/me/train.py", "line": 3, "function": "load"},
        {"file": "/usr/lib/libc.so.6", "line": 0, "function": "clock_nanosleep"},
    ]
    thread: Any = {"id": 1, "name": "main", "active": False, "gil": False, "frames": frames}
    assert describe_stacks({"stacks": [thread], "stacks_missing": None})[1:] == [
        '  File "/home/me/train.py", line 3, in load',
        '  File "/usr/lib/libc.so.6", in clock_nanosleep',
    ]
