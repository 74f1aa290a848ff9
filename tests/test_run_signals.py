"""`elastic-timer run`: COMMAND gets each signal once, whoever was sent it besides."""

from __future__ import annotations

import contextlib
import functools
import os
import pty
import re
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_timer._command.run import _is_pending
from tests.support import Child, child_pids, eventually, is_alive, process_state

# It tells of what it forwards, for COMMAND cannot count: two signals of a kind that come close
# together count as one.
RUN = """
    import os, signal, sys
    from elastic_timer._command.main import main

    kill = os.kill

    def observed_kill(pid, number):
        if number != signal.SIGKILL:
            os.write(1, f"forwarded {signal.Signals(number).name}\\n".encode())
        kill(pid, number)

    os.kill = observed_kill
    sys.exit(main())
"""

# A COMMAND that tells of each signal it gets, and exits with 42 at SIGUSR2.
COMMAND = """
    import os, signal, sys

    names = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGALRM"]
    signals = {signal.Signals[name] for name in names}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    if sys.argv[1:] == ["leaves the group"]:
        os.setpgid(0, 0)
    os.write(1, f"ready {os.getpid()}\\n".encode())
    while (number := signal.sigwait(signals)) != signal.SIGUSR2:
        os.write(1, f"seen {signal.Signals(number).name}\\n".encode())
    os._exit(42)
"""

pytestmark = pytest.mark.skipif(
    not hasattr(signal, "sigwaitinfo"), reason="this system does not tell who sent a signal"
)


@pytest.fixture
def run(spawn: Callable[..., Child], tmp_path: Path) -> Callable[..., Child]:
    """`run(*arguments)`: a Child that is `elastic-timer run -- COMMAND ARGUMENT ...`, and ready."""

    def start(*arguments: str, source: str = RUN, **popen_kwargs: Any) -> Child:
        child = spawn(
            source,
            "run",
            "--",
            sys.executable,
            "-c",
            textwrap.dedent(COMMAND),
            *arguments,
            env={"TMPDIR": str(tmp_path)},
            **popen_kwargs,
        )
        assert child.readline().startswith("ready")
        return child

    return start


def assert_seen_once(child: Child, name: str) -> None:
    """COMMAND has seen a signal that was not forwarded; one to `run` alone is forwarded still."""
    assert child.readline() == f"seen {name}"
    # Of pending signals the lower number is taken first. Taken, it is dealt with before the next.
    eventually(lambda: signal.Signals[name] not in _pending(child.pid))
    os.kill(child.pid, signal.SIGUSR2)
    assert child.readline() == "forwarded SIGUSR2"
    assert child.wait() == 42


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"])
def test_s1_signal_to_the_group_comes_once(run: Callable[..., Child], name: str) -> None:
    """`kill -- -GROUP`: COMMAND has had the signal already, and is not sent it again."""
    child = run()
    os.killpg(child.pid, signal.Signals[name])
    assert_seen_once(child, name)


def test_s1_signal_of_timeout_comes_once(run: Callable[..., Child]) -> None:
    """`timeout` signals its child, and right behind that the whole group: that is once."""
    if shutil.which("timeout") is None:
        pytest.skip("this system has no timeout")
    source = f"""
        import os, sys
        run = {textwrap.dedent(RUN)!r}
        os.execvp("timeout", ["timeout", "600", sys.executable, "-c", run, *sys.argv[1:]])
        """
    child = run(source=source)
    [elastic_timer] = child_pids(child.pid)
    os.kill(child.pid, signal.SIGTERM)  # Handed on in the same way as when the time is up.
    assert child.readline() == "seen SIGTERM"
    eventually(lambda: signal.SIGTERM not in _pending(elastic_timer))
    os.kill(elastic_timer, signal.SIGUSR2)
    assert child.readline() == "forwarded SIGUSR2"
    assert child.wait() in (42, 124)  # As the version of timeout has it.


def test_s1_several_signals_to_the_group(run: Callable[..., Child]) -> None:
    """One after the other, each comes once: the witness of the first has a successor."""
    child = run()
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGTERM"):
        os.killpg(child.pid, signal.Signals[name])
        assert child.readline() == f"seen {name}"
        number = signal.Signals[name]
        eventually(functools.partial(_is_not_pending, child.pid, number))
        os.kill(child.pid, signal.SIGUSR1)
        assert child.readline() == "forwarded SIGUSR1"
        assert child.readline() == "seen SIGUSR1"
    os.kill(child.pid, signal.SIGUSR2)
    assert child.readline() == "forwarded SIGUSR2"
    assert child.wait() == 42


def test_s1_witness_that_is_long_in_dying(run: Callable[..., Child]) -> None:
    """As on a busy machine: what it was sent is for the group, whenever it dies of it."""
    child = run()
    [witness] = eventually(
        lambda: [pid for pid in child_pids(child.pid) if _command_name(pid) == "cat"]
    )
    os.kill(witness, signal.SIGSTOP)
    eventually(lambda: process_state(witness) == "T")
    os.killpg(child.pid, signal.SIGTERM)
    assert_seen_once(child, "SIGTERM")


def test_s1_witness_whose_successor_is_long_in_starting(run: Callable[..., Child]) -> None:
    """As on a busy machine: what `run` is sent meanwhile was sent with what the witness died of."""
    start_slowly = """
        import os, time
        spawn, witnesses = os.posix_spawn, []

        def slow_spawn(*arguments, **named):
            witnesses.append(arguments)
            if len(witnesses) == 2:
                os.write(1, b"its successor\\n")
                time.sleep(0.5)
            return spawn(*arguments, **named)

        os.posix_spawn = slow_spawn
        """
    child = run(source=textwrap.dedent(start_slowly) + textwrap.dedent(RUN))
    [witness] = eventually(
        lambda: [pid for pid in child_pids(child.pid) if _command_name(pid) == "cat"]
    )
    [command] = set(child_pids(child.pid)) - {witness}
    os.kill(witness, signal.SIGTERM)  # Of the group it may be the first to be sent it.
    assert child.readline() == "its successor"
    os.kill(command, signal.SIGTERM)
    os.kill(child.pid, signal.SIGTERM)
    assert_seen_once(child, "SIGTERM")


def test_s1_witness_that_is_not_there() -> None:
    """Where nothing is known of it, it was sent nothing."""
    assert not _is_pending(2**31 - 1, signal.SIGTERM)


def test_s1_command_in_a_group_of_its_own(run: Callable[..., Child]) -> None:
    """A COMMAND that has left the group was not reached: it is forwarded what the group gets."""
    child = run("leaves the group")
    os.killpg(child.pid, signal.SIGTERM)
    assert child.readline() == "forwarded SIGTERM"
    assert child.readline() == "seen SIGTERM"
    os.kill(child.pid, signal.SIGUSR2)
    assert child.wait() == 42


def test_s1_signal_that_is_not_forwarded(run: Callable[..., Child]) -> None:
    """Another signal to the group, which COMMAND and `run` survive, leaves the next one single."""
    handles = "import signal; signal.signal(signal.SIGALRM, lambda *_: None)\n"
    child = run(source=handles + textwrap.dedent(RUN))
    before = _group(child.pid)
    os.killpg(child.pid, signal.SIGALRM)
    assert child.readline() == "seen SIGALRM"
    # Whoever has died of it has a successor.
    eventually(lambda: len(_group(child.pid)) == len(before) and _group(child.pid) != before)
    os.killpg(child.pid, signal.SIGTERM)
    assert_seen_once(child, "SIGTERM")


def test_s1_sigkill_to_the_group_ends_all(run: Callable[..., Child]) -> None:
    """`timeout -k`, `kill -9 -- -GROUP`: COMMAND is in the group still, and dies."""
    child = run()
    assert len(_group(child.pid)) > 1
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    eventually(lambda: not _group(child.pid))


def test_s1_nothing_is_left_when_run_is_killed(run: Callable[..., Child]) -> None:
    """SIGKILL to `run` alone: COMMAND lives on, and no other process of ours does."""
    child = run()
    child.process.kill()
    assert child.wait() == -signal.SIGKILL
    eventually(lambda: len(_group(child.pid)) == 1)


def _command_name(pid: int) -> str:
    return Path(f"/proc/{pid}/comm").read_text().strip()


def _is_not_pending(pid: int, number: int) -> bool:
    return number not in _pending(pid)


def _pending(pid: int) -> set[int]:
    """The signals that a process has not taken yet."""
    [mask] = re.findall(r"^ShdPnd:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return {number for number in range(1, 32) if int(mask, 16) >> (number - 1) & 1}


def _group(leader: int) -> list[int]:
    """The members of a process group, those that have ended left out."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(ProcessLookupError):
            if os.getpgid(pid) == leader and is_alive(pid):
                found.append(pid)
    return sorted(found)


# As a shell with job control starts a job in the foreground: in a group of its own, which gets the
# terminal; it tells when the job has stopped, and lets it go on when it is told to.
SHELL = f"""
import fcntl, os, signal, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
pid = os.posix_spawn(
    sys.executable,
    [sys.executable, "-c", {textwrap.dedent(RUN)!r}, *sys.argv[1:]],
    os.environ,
    setpgroup=0,
    setsigdef=[signal.SIGTTOU],
)
os.tcsetpgrp(0, pid)
_, status = os.waitpid(pid, os.WUNTRACED)
while os.WIFSTOPPED(status):
    print("stopped", flush=True)
    os.read(3, 1)
    os.killpg(pid, signal.SIGCONT)
    _, status = os.waitpid(pid, os.WUNTRACED)
sys.exit(os.waitstatus_to_exitcode(status))
"""


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    """A pseudo-terminal: the side of the keyboard, the side of the processes."""
    ends = pty.openpty()
    yield ends
    for end in ends:
        os.close(end)


def test_s1_job_control(spawn: Callable[..., Child], terminal: tuple[int, int]) -> None:
    """Ctrl-Z stops COMMAND with `run`, SIGCONT lets both go on, Ctrl-C then comes once."""
    read, write = os.pipe()
    try:
        child = spawn(
            f"import os; os.dup2({read}, 3)\n{SHELL}",
            "run",
            "--",
            sys.executable,
            "-c",
            textwrap.dedent(COMMAND),
            stdin=terminal[1],
            pass_fds=[read],
        )
        pid = int(child.readline().removeprefix("ready "))
        os.write(terminal[0], b"\x1a")
        assert child.readline() == "stopped"
        eventually(lambda: process_state(pid) == "T")
        os.write(write, b".")
        eventually(lambda: process_state(pid) != "T")
        os.write(terminal[0], b"\x03")
        assert child.readline() == "seen SIGINT"
        os.kill(pid, signal.SIGUSR2)
        assert child.wait() == 42
    finally:
        os.close(read)
        os.close(write)
