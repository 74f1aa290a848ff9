"""`elastic-timer run`: what COMMAND leaves behind is waited for, named, and ended on request."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.jobs import PRELUDE, pids, told_twice
from tests.support import (
    CLI,
    Child,
    Spawn,
    child_pids,
    eventually,
    marked_processes,
    process_state,
)

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux lets a process adopt orphans"
)

# The time that processes are given to end is shorter in most tests.
PATIENCE = 0.3
IMPATIENT = f"""
from elastic_timer._command import leftovers
leftovers._PATIENCE = {PATIENCE}
{CLI}
"""

Run = Callable[..., Child]


@pytest.fixture
def run_job(run: Run, mark: str) -> Run:
    """`run_job(source, *options)`: a Child that is `run` with a COMMAND of the job."""

    def start(source: str, *options: str, runner: str = IMPATIENT, **popen_kwargs: Any) -> Child:
        name, _, value = mark.partition("=")
        # `run` itself has no mark: it hands on its environment, and takes that out of its own.
        command = [sys.executable, "-c", PRELUDE + textwrap.dedent(source)]
        marking = ["env", f"{name}={value}"]
        return run(*options, "--", *marking, *command, source=runner, **popen_kwargs)

    return start


def named(child: Child) -> dict[int, str]:
    """The processes that the warning names, each with what it says of it."""
    text = child.stderr_text().partition("COMMAND has left behind")[2]
    return {int(pid): told for pid, told in re.findall(r"^  (\d+) \((.*)\)$", text, re.M)}


# Named -------------------------------------------------------------------------------------------


def test_each_that_is_left_is_named(run_job: Run, mark: str) -> None:
    """Children, orphans, sessions of their own: command, state, memory; the status is COMMAND's."""
    child = run_job(
        """
        start()
        start(start)
        start(os.setsid, leave_an_orphan)
        leave_an_orphan()
        os.read(0, 1)
        os._exit(7)
        """
    )
    found = set(pids(child, 6))
    child.send_line("")
    assert child.wait() == 7
    assert marked_processes(mark).keys() == found
    told = named(child)
    assert told.keys() == found
    for line in told.values():
        assert re.fullmatch(r".*python.*, state S, \d+\.\d MiB", line)
    assert child.stderr_text().count("COMMAND") == 1


def test_dry_run_ends_nothing(run_job: Run, mark: str) -> None:
    """With `--kill-tree` it says what that would end."""
    child = run_job("start(); os.read(0, 1)", "--kill-tree", "--dry-run")
    found = set(pids(child, 1))
    child.send_line("")
    assert child.wait() == 0
    assert marked_processes(mark).keys() == found == named(child).keys()
    assert "(it would be ended with --kill-tree)" in child.stderr_text()


def test_what_ends_by_itself_is_not_named(run_job: Run, mark: str) -> None:
    """A helper that ends when COMMAND has, as those of multiprocessing do, is no news."""
    child = run_job(
        """
        reader, writer = os.pipe()
        if not os.fork():
            os.close(writer)
            os.read(reader, 1)
            time.sleep(0.2)
            os._exit(0)
        """
    )
    assert child.wait() == 0
    assert child.stderr_text() == ""


def test_most_that_is_named(run_job: Run) -> None:
    """Of very many some are named, and the others counted."""
    runner = f"from elastic_timer._command import leftovers; leftovers._MOST_NAMED = 2\n{CLI}"
    child = run_job("start(); start(); start(); os.read(0, 1)", runner=runner)
    pids(child, 3)
    child.send_line("")
    assert child.wait() == 0
    assert len(named(child)) == 2
    assert child.stderr_text().endswith("\n  and 1 more\n")


# Adopted -----------------------------------------------------------------------------------------


def test_orphans_are_adopted_and_waited_for(run_job: Run) -> None:
    """While COMMAND runs `run` is their parent, and none of them stays behind as a zombie."""
    child = run_job("say(os.getpid()); leave_an_orphan(); signal.pause()")
    command, orphan = pids(child, 2)
    eventually(lambda: {orphan, command} < child_pids(child.pid))
    os.kill(orphan, signal.SIGKILL)
    eventually(lambda: not os.path.exists(f"/proc/{orphan}"))
    os.kill(command, signal.SIGKILL)
    assert child.wait() == 128 + signal.SIGKILL
    assert child.stderr_text() == ""


def test_children_of_the_servers_threads_are_theirs(run_job: Run, mark: str) -> None:
    """A py-spy that has ended is waited for by the thread that has started it, and is no leftover.

    Nor do those hide the orphans that have ended after them.
    """
    runner = f"""
        import subprocess, threading
        from elastic_timer._command import run

        supervise, see_to = run._supervise, run.Leftovers.see_to
        begun, ended = threading.Event(), threading.Event()

        def help():
            helpers = [subprocess.Popen(["sh", "-c", f"exit {{n}}"]) for n in range(3, 6)]
            helpers.append(subprocess.Popen(["sleep", "600"]))
            begun.set()
            ended.wait()
            helpers[-1].kill()
            print(*(helper.wait() for helper in helpers), flush=True)

        thread = threading.Thread(target=help)

        def supervised(*args):
            thread.start()
            begun.wait()
            return supervise(*args)

        def seen_to(*args):
            see_to(*args)
            ended.set()
            thread.join()

        run._supervise, run.Leftovers.see_to = supervised, seen_to
        {CLI}
        """
    child = run_job("leave_an_orphan(); os.read(0, 1)", "--kill-tree", runner=runner)
    (orphan,) = pids(child, 1)
    eventually(lambda: sum(process_state(pid) == "Z" for pid in child_pids(child.pid)) == 3)
    os.kill(orphan, signal.SIGKILL)
    eventually(lambda: not os.path.exists(f"/proc/{orphan}"))
    child.send_line("")
    assert child.readline() == f"3 4 5 {-signal.SIGKILL}"
    assert child.wait() == 0
    assert child.stderr_text() == ""


def test_own_children_are_left_to_who_waits_for_them(spawn: Spawn) -> None:
    """COMMAND and the process that tells of signals keep their status; a user is noted if known."""
    child = spawn(
        """
        import os, signal
        from elastic_timer._command.leftovers import Leftovers

        leftovers = Leftovers({signal.SIGCHLD}, True)
        pid = os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", "exit 7")
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        leftovers.bury({pid})
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        leftovers.note_user(pid)
        leftovers.bury()
        leftovers.see_to()
        import ctypes
        del ctypes.CDLL
        Leftovers({signal.SIGCHLD}, True).bury()
        """
    )
    assert child.readline() == "7"
    assert child.wait() == 0
    assert child.stderr_text() == ""


@pytest.mark.parametrize("lack", ["raise OSError", "return types.SimpleNamespace()"])
def test_without_adoption(run_job: Run, mark: str, lack: str) -> None:
    """Where the system can't be asked for orphans none are told of, and all else works."""
    runner = f"""
        import ctypes, types

        def lacking(*args, **options):
            {lack}

        ctypes.CDLL = lacking
        {CLI}
        """
    child = run_job("start(); leave_an_orphan(); os.read(0, 1)", "--kill-tree", runner=runner)
    found = set(pids(child, 2))
    child.send_line("")
    assert child.wait() == 0
    assert child.stderr_text() == ""
    assert marked_processes(mark).keys() == found


# Ended -------------------------------------------------------------------------------------------


def test_what_is_left_is_ended(run_job: Run, mark: str) -> None:
    """SIGTERM for all, stopped ones too, SIGKILL for the deaf a while later; named all the same."""
    child = run_job(
        """
        def had(number, frame):
            say("had", number)
            os._exit(0)

        start(os.setsid, ignore_sigterm)
        say(start(lambda: signal.signal(signal.SIGTERM, had)))
        start(leave_an_orphan)
        os.read(0, 1)
        os._exit(7)
        """,
        "--kill-tree",
    )
    told = pids(child, 5)
    os.kill(told_twice(told), signal.SIGSTOP)
    child.send_line("")
    ended = time.monotonic()
    assert child.readline() == "had 15"
    assert child.wait() == 7
    assert PATIENCE < time.monotonic() - ended < PATIENCE + 4
    assert not marked_processes(mark)
    assert set(told) == named(child).keys()


def test_what_begins_others_all_the_time_is_ended(run_job: Run, mark: str) -> None:
    """Nothing is left of processes that fork in a loop, nor of those that leave their session."""
    child = run_job(
        """
        if not os.fork():
            ignore_sigterm()
            os.setsid()
            say("begins")
            while True:
                if not os.fork():
                    if os.fork():
                        os._exit(0)
                    stay()
                os.wait()
                time.sleep(0.002)
        os.read(0, 1)
        """,
        "--kill-tree",
        stdout=subprocess.DEVNULL,
    )
    eventually(lambda: len(marked_processes(mark)) > 10)
    child.send_line("")
    assert child.wait() == 0
    assert not marked_processes(mark)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_second_signal_cuts_the_patience_short(run_job: Run, mark: str, name: str) -> None:
    """Who asks again does not wait for 5 s."""
    runner = IMPATIENT.replace(f"_PATIENCE = {PATIENCE}", "_PATIENCE = 60")
    child = run_job("start(ignore_sigterm); signal.pause()", "--kill-tree", runner=runner)
    pids(child, 1)
    os.kill(child.pid, signal.SIGTERM)
    eventually(lambda: "COMMAND has left behind" in child.stderr_text())
    os.kill(child.pid, signal.Signals[name])
    assert child.wait() == 128 + signal.SIGTERM
    assert not marked_processes(mark)


def test_sigkill_ends_run_at_once(run_job: Run, mark: str) -> None:
    """It leaves what was left."""
    child = run_job("start(ignore_sigterm); os.read(0, 1)", "--kill-tree", runner=CLI)
    found = set(pids(child, 1))
    child.send_line("")
    eventually(lambda: "COMMAND has left behind" in child.stderr_text())
    child.process.kill()
    assert child.wait() == -signal.SIGKILL
    assert marked_processes(mark).keys() == found


def test_what_does_not_die_is_named(run_job: Run, mark: str) -> None:
    """It hangs in the kernel: `run` ends without it, after naming it again."""
    runner = f"""
        from elastic_timer._command import leftovers
        from elastic_timer._server.process import ProcessHandle

        # Forged: what hangs in the kernel for seconds would hang the test's machine.
        ProcessHandle.send = lambda *args: None
        leftovers._PATIENCE = leftovers.UNKILLABLE_AFTER = 0.1
        {CLI}
        """
    child = run_job("start(); os.read(0, 1)", "--kill-tree", runner=runner)
    (pid,) = pids(child, 1)
    child.send_line("")
    assert child.wait() == 0
    _, first, second = child.stderr_text().split("COMMAND has left behind")
    assert f"  {pid} (" in first
    assert second.startswith(", and it is still there:\n")
    assert f"  {pid} (" in second


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can change a process's user")


@as_root
def test_process_of_another_user_is_named_alone(run_job: Run, mark: str) -> None:
    """Root might end it; it is left."""
    child = run_job("start(lambda: os.setuid(65534)); os.read(0, 1)", "--kill-tree")
    (pid,) = pids(child, 1)
    child.send_line("")
    assert child.wait() == 0
    assert marked_processes(mark).keys() == named(child).keys() == {pid}


@as_root
def test_processes_of_the_commands_user_are_ended(run_job: Run, mark: str) -> None:
    """Root runs COMMAND, which gives up its rights; what it leaves behind is its own."""
    child = run_job("os.setuid(65534); start(); os.read(0, 1)", "--kill-tree")
    pids(child, 1)
    child.send_line("")
    assert child.wait() == 0
    assert not marked_processes(mark)


# Process 1 ---------------------------------------------------------------------------------------

UNSHARE = ["unshare", "--pid", "--fork", "--mount-proc"]


@pytest.mark.parametrize("adopts", [True, False])
def test_process_1(spawn: Spawn, tmp_path: Path, mark: str, adopts: bool) -> None:
    """In a container without an init: orphans are buried, signals handed on, leftovers ended."""
    if not shutil.which("unshare") or subprocess.run([*UNSHARE, "true"], check=False).returncode:
        pytest.skip("this system gives us no container")
    lack = "" if adopts else "import ctypes; del ctypes.CDLL"
    name, _, value = mark.partition("=")
    command = """
        say(os.getpid(), os.getppid())
        leave_an_orphan()
        start(ignore_sigterm)
        signal.pause()
        """
    child = spawn(
        "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])",
        *UNSHARE,
        *(sys.executable, "-c", f"{lack}\n{IMPATIENT}"),
        "run",
        "--kill-tree",
        "--",
        *("env", f"{name}={value}", sys.executable, "-c", PRELUDE + textwrap.dedent(command)),
        env={"TMPDIR": str(tmp_path)},
    )
    assert child.readline().endswith(" 1")
    pids(child, 2)
    (runner,) = child_pids(child.pid)
    children = child_pids(runner)
    found = marked_processes(mark).keys()
    (orphan,) = {pid for pid in found & children if child_pids(pid) == set()}
    os.kill(orphan, signal.SIGKILL)
    eventually(lambda: not os.path.exists(f"/proc/{orphan}"))
    os.kill(runner, signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM
    assert not marked_processes(mark)
    assert child.stderr_text().count("COMMAND has left behind, and it is ended now:") == 1
