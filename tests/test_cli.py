"""The command `elastic-timer run`: what it hands to COMMAND, and what it leaves behind."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pty
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

import elastic_timer
from elastic_timer._command.main import main
from tests.support import CLI, Child, is_alive

# A COMMAND that tells of every signal it gets, and of how often when it gets SIGUSR2.
LISTENER = """
    import collections, os, signal, sys, time

    seen = collections.Counter()

    def handle(number, frame):
        seen[signal.Signals(number).name] += 1

    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1]
    for number in numbers:
        signal.signal(number, handle)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
"""


def python(source: str) -> list[str]:
    """A COMMAND that runs this source."""
    return [sys.executable, "-c", textwrap.dedent(source)]


def events_in(path: Path) -> list[dict[str, Any]]:
    """The objects that `--events` wrote."""
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- exit status


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("exit 0", 0),
        ("exit 7", 7),
        ("kill -KILL $$", 128 + signal.SIGKILL),
        ("kill -TERM $$", 128 + signal.SIGTERM),
        # Python ignores SIGPIPE; COMMAND must not.
        ("kill -PIPE $$", 128 + signal.SIGPIPE),
    ],
)
def test_exit_status_is_the_commands(run: Callable[..., Child], script: str, status: int) -> None:
    """COMMAND's exit status comes back, 128+N where signal N ended it."""
    assert run("--", "sh", "-c", script).wait() == status


@pytest.mark.parametrize("kind", ["missing", "missing-on-path"])
def test_command_not_found(run: Callable[..., Child], tmp_path: Path, kind: str) -> None:
    """A COMMAND that does not exist: status 127, its name on stderr, no folder left."""
    command = "no-such-command" if kind == "missing-on-path" else str(tmp_path / "none")
    child = run("--", command)
    assert child.wait() == 127
    line = child.stderr_text()
    assert re.fullmatch(r"elastic-timer \d\d:\d\d:\d\d\.\d{3}: .*\n", line)
    assert line.endswith(f": cannot run {command}: {os.strerror(errno.ENOENT)}\n")
    assert list(tmp_path.iterdir()) == []


def test_command_not_executable(run: Callable[..., Child], tmp_path: Path) -> None:
    """A COMMAND that is there and cannot be executed: status 126."""
    script = tmp_path / "script"
    script.write_text("exit 0\n")
    assert run("--", str(script)).wait() == 126
    assert run("--", str(tmp_path)).wait() == 126


def test_exit_status_survives_an_ignored_sigchld(run: Callable[..., Child]) -> None:
    """COMMAND's status comes back also from where SIGCHLD was ignored by the parent."""
    source = f"import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n{CLI}"
    assert run("--", "sh", "-c", "exit 7", source=source).wait() == 7


def test_max_interval_is_the_servers(run: Callable[..., Child]) -> None:
    """`--max-interval` is the longest pause between two rounds; without it that is 10 s."""
    source = f"""
        from elastic_timer._command import run

        class Server(run.FileTimerServer):
            def start(self):
                print(self._max_interval, flush=True)
                super().start()

        run.FileTimerServer = Server
        {CLI}
        """
    for options, interval in (([], "10.0"), (["--max-interval", "7.5"], "7.5")):
        child = run(*options, "--", "true", source=source)
        assert child.readline() == interval
        assert child.wait() == 0


def test_command_that_was_stopped_is_waited_for(run: Callable[..., Child]) -> None:
    """SIGCHLD, which tells of a stop, too, is no end: COMMAND's status is its last."""
    source = f"""
        import os
        waitpid = os.waitpid

        def tell(pid, options):
            ended, status = waitpid(pid, options)
            print("ended" if ended else "not yet", flush=True)
            return ended, status

        os.waitpid = tell
        {CLI}
        """
    stop = "import os, signal; print(os.getpid(), flush=True); os.kill(os.getpid(), signal.SIGSTOP)"
    child = run("--", *python(f"{stop}; os._exit(7)"), source=source)
    pid = int(child.readline())
    assert child.readline() == "not yet"
    os.kill(pid, signal.SIGCONT)
    while (line := child.readline()) == "not yet":  # Some systems tell of that, too.
        pass
    assert line == "ended"
    assert child.wait() == 7


# --- wrong usage


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ([], "what is to be run?"),
        (["--", ""], "what is to be run?"),
        (["sh", "-c", "exit 0"], "unrecognized arguments: sh -c exit 0"),
        (["--unknown", "--", "true"], "unrecognized arguments: --unknown"),
        (["--max-interval", "0", "--", "true"], "0 is not a positive number"),
        (["--max-interval", "-1", "--", "true"], "-1 is not a positive number"),
        (["--max-interval", "nan", "--", "true"], "nan is not a positive number"),
        (["--max-interval", "inf", "--", "true"], "inf is not a positive number"),
        (["--max-interval", "soon", "--", "true"], "soon is not a positive number"),
    ],
)
def test_wrong_usage(
    capsys: pytest.CaptureFixture[str], options: list[str], complaint: str
) -> None:
    """Options that make no sense: status 2 and what is wrong, before anything is started."""
    with pytest.raises(SystemExit) as exit_:
        main(["run", *options])
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "name"), [("--timer-file", "missing/timers"), ("--events", "missing/events")]
)
def test_file_that_cannot_be_made(
    run: Callable[..., Child], tmp_path: Path, option: str, name: str
) -> None:
    """A file in a folder that is not there: status 2 and its name, COMMAND is not started."""
    child = run(option, str(tmp_path / name), "--", "touch", str(tmp_path / "started"))
    assert child.wait() == 2
    assert str(tmp_path / "missing") in child.stderr_text()
    assert "Traceback" not in child.stderr_text()
    assert list(tmp_path.iterdir()) == []


def test_timer_file_is_something_else(run: Callable[..., Child], tmp_path: Path) -> None:
    """A file in the FIFO's place is left alone: status 2, COMMAND is not started."""
    precious = tmp_path / "precious"
    precious.write_text("data")
    child = run("--timer-file", str(precious), "--", "touch", str(tmp_path / "started"))
    assert child.wait() == 2
    assert str(precious) in child.stderr_text()
    assert precious.read_text() == "data"
    assert list(tmp_path.iterdir()) == [precious]


def test_platform_without_processes_to_spawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the platform has neither FIFOs nor signals: status 2, and the reason."""
    monkeypatch.delattr(os, "posix_spawnp")
    with pytest.raises(SystemExit) as exit_:
        main(["run", "--", "true"])
    assert exit_.value.code == 2
    assert "which this platform does not have" in capsys.readouterr().err


# Runs the source that follows with the streams closed that its first argument says.
CLOSING = """
    import os, sys

    closing = f'exec "$0" "$@" {sys.argv[1]}'
    os.execl("/bin/sh", "sh", "-c", closing, sys.executable, "-c", *sys.argv[2:])
"""


@pytest.mark.parametrize(
    ("closed", "count"), [("<&-", 1), (">&-", 1), ("2>&-", 1), ("<&- >&- 2>&-", 3)]
)
def test_streams_that_are_closed(
    spawn: Callable[..., Child], tmp_path: Path, closed: str, count: int
) -> None:
    """They are so for COMMAND, whose status comes back; the log is not written elsewhere."""
    path = tmp_path / "events"
    options = ("--summary", "--events", str(path))
    look = """
        for fd in 0 1 2; do [ -e /proc/$$/fd/$fd ] || closed=$((closed + 1)); done
        exit $((70 + closed))
        """
    child = spawn(CLOSING, closed, CLI, "run", *options, "--", "sh", "-c", look)
    assert child.wait() == 70 + count
    assert [event["event"] for event in events_in(path)] == ["watchdog started", "watchdog stopped"]
    child = spawn(CLOSING, closed, CLI, "report", str(path), str(tmp_path / "none"))
    assert child.wait() == 1
    # In particular no complaint is where the report would be.
    assert child.process.stdout is not None
    assert child.process.stdout.read() == (
        "" if ">&-" in closed.split() else "elastic-timer: no hang in 1 file\n"
    )


@pytest.mark.parametrize("arguments", [[], ["demo", "--", "true"], ["fly"]])
def test_wrong_action(arguments: list[str]) -> None:
    """No action, an unknown one, a COMMAND for the demo: status 2."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`--version` prints the library's version."""
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"elastic-timer {elastic_timer.__version__}\n"
    # Into whatever takes the place of stdout.
    with contextlib.redirect_stdout(io.StringIO()) as shown, pytest.raises(SystemExit):
        main(["--version"])
    assert shown.getvalue() == f"elastic-timer {elastic_timer.__version__}\n"


def test_module_is_the_command(spawn: Callable[..., Child]) -> None:
    """`python -m elastic_timer` is the command `elastic-timer`."""
    child = spawn(
        "import runpy; runpy.run_module('elastic_timer', run_name='__main__')", "--version"
    )
    assert child.readline() == f"elastic-timer {elastic_timer.__version__}"
    assert child.wait() == 0


def test_library_does_not_import_the_command(spawn: Callable[..., Child]) -> None:
    """Importing the library imports neither the command nor argparse."""
    child = spawn(
        """
        import sys, elastic_timer
        commands = {"argparse", "elastic_timer._command.main", "elastic_timer._command.demo"}
        print(sorted(commands & set(sys.modules)))
        """
    )
    assert child.readline() == "[]"


# --- what COMMAND gets


def test_environment_and_fifo(run: Callable[..., Child], tmp_path: Path) -> None:
    """COMMAND finds a private FIFO in a private folder, no switch for torchrun's own server."""
    child = run(
        "--",
        *python(
            """
            import os, stat
            path = os.environ["TORCHELASTIC_TIMER_FILE"]
            print(path)
            print(stat.filemode(os.stat(path).st_mode))
            print(stat.filemode(os.stat(os.path.dirname(path)).st_mode))
            print("TORCHELASTIC_ENABLE_FILE_TIMER" in os.environ)
            print(os.environ["OTHER"])
            """
        ),
        env={"TORCHELASTIC_ENABLE_FILE_TIMER": "1", "OTHER": "kept"},
    )
    path = Path(child.readline())
    assert path.parent.parent == tmp_path
    assert [child.readline() for _ in range(4)] == ["prw-------", "drwx------", "False", "kept"]
    assert child.wait() == 0
    assert list(tmp_path.iterdir()) == []


def test_timer_file_is_made_absolute(run: Callable[..., Child], tmp_path: Path) -> None:
    """A relative `--timer-file` is handed on absolute, and only the FIFO is removed at the end."""
    child = run(
        "--timer-file",
        "timers",
        "--",
        *python("import os; print(os.environ['TORCHELASTIC_TIMER_FILE'])"),
        cwd=tmp_path,
    )
    assert child.readline() == str(tmp_path / "timers")
    assert child.wait() == 0
    assert list(tmp_path.iterdir()) == []


def test_command_keeps_its_arguments(run: Callable[..., Child]) -> None:
    """All behind the first `--` is COMMAND's, another `--` and options of ours included."""
    arguments = ["--", "--max-interval", "x y", ""]
    child = run("--", *python("import sys; print(sys.argv[1:])"), *arguments)
    assert child.readline() == repr(arguments)


def test_command_has_no_signal_blocked(run: Callable[..., Child]) -> None:
    """The signals that `run` waits for are not blocked in COMMAND."""
    child = run(
        "--",
        *python("import signal; print(*signal.pthread_sigmask(signal.SIG_BLOCK, []), 'none')"),
    )
    assert child.readline() == "none"


def test_sighup_stays_ignored_under_nohup(run: Callable[..., Child]) -> None:
    """SIGHUP ignored from the start, as by nohup, neither ends `run` nor reaches COMMAND."""
    source = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{CLI}"
    child = run(
        "--",
        *python(
            LISTENER
            + """
    print("ready", flush=True)
    signal.sigwait([signal.SIGUSR2])
    print(*seen)
            """
        ),
        source=source,
    )
    assert child.readline() == "ready"
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(child.pid, number)
    assert child.readline() == "SIGUSR1"
    assert child.wait() == 0


# --- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2"])
def test_signal_is_forwarded(run: Callable[..., Child], tmp_path: Path, name: str) -> None:
    """A signal sent to `run` reaches COMMAND, which decides what to do; no folder is left."""
    number = signal.Signals[name]
    child = run(
        "--",
        *python(
            """
            import signal, sys
            number = int(sys.argv[1])
            signal.pthread_sigmask(signal.SIG_BLOCK, [number])
            print("ready", flush=True)
            signal.sigwait([number])
            sys.exit(42)
            """
        ),
        str(int(number)),
    )
    assert child.readline() == "ready"
    os.kill(child.pid, number)
    assert child.wait() == 42
    assert list(tmp_path.iterdir()) == []


def test_signal_is_forwarded_without_sigwaitinfo(run: Callable[..., Child]) -> None:
    """Where the system does not tell who sent a signal (macOS), it is forwarded all the same."""
    source = f"import signal\nif hasattr(signal, 'sigwaitinfo'): del signal.sigwaitinfo\n{CLI}"
    child = run("--", "sh", "-c", "echo ready; exec sleep 60", source=source)
    assert child.readline() == "ready"
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT"])
def test_signal_that_ends_the_command(run: Callable[..., Child], tmp_path: Path, name: str) -> None:
    """A forwarded signal that ends COMMAND: status 128+N, and no folder is left."""
    child = run("--", "sh", "-c", "ulimit -c 0; echo ready; exec sleep 60")
    assert child.readline() == "ready"
    os.kill(child.pid, signal.Signals[name])
    assert child.wait() == 128 + signal.Signals[name]
    assert list(tmp_path.iterdir()) == []


def test_signal_to_a_command_that_cannot_be_signalled(
    run: Callable[..., Child], tmp_path: Path
) -> None:
    """A signal that cannot be forwarded is named in a warning, and the waiting goes on."""
    source = f"""
import os, signal
def refuse(pid, number):
    raise PermissionError(1, "Operation not permitted")
os.kill = refuse
{CLI}
"""
    child = run("--", *python("print('ready', flush=True); input(); print('end')"), source=source)
    assert child.readline() == "ready"
    os.kill(child.pid, signal.SIGTERM)
    child.send_line("")
    assert child.readline() == "end"
    assert child.wait() == 0


def test_signal_of_the_commands_own_is_not_handed_back(run: Callable[..., Child]) -> None:
    """What COMMAND sends to its parent, as with a signal to the group, does not come back."""
    child = run(
        "--",
        *python(
            LISTENER
            + """
    os.kill(os.getppid(), signal.SIGUSR1)
    print("ready", flush=True)
    signal.sigwait([signal.SIGUSR2])
    print(sum(seen.values()))
            """
        ),
    )
    assert child.readline() == "ready"
    # Of pending signals the lower number is taken first: SIGUSR1 is dealt with by now.
    os.kill(child.pid, signal.SIGUSR2)
    assert child.readline() == "0"


# Makes the terminal on stdin the session's own, as a login would, and tells of what is forwarded:
# COMMAND cannot count, for two signals of a kind that come close together count as one.
IN_TERMINAL = f"""
import fcntl, os, signal, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
kill = os.kill
def observed_kill(pid, number):
    os.write(1, f"forwarded {{signal.Signals(number).name}}\\n".encode())
    kill(pid, number)
os.kill = observed_kill
{CLI}
"""


@pytest.fixture
def terminal() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A pseudo-terminal: the side of the keyboard, the side of the processes."""
    keyboard, processes = pty.openpty()
    with open(keyboard, "r+b", buffering=0) as near, open(processes, "r+b", buffering=0) as far:
        yield near, far


@pytest.mark.parametrize("group", ["same", "own"])
@pytest.mark.parametrize(("key", "name"), [(b"\x03", "SIGINT"), (b"\x1c", "SIGQUIT")])
def test_key_reaches_the_command_once(
    run: Callable[..., Child],
    terminal: tuple[BinaryIO, BinaryIO],
    group: str,
    key: bytes,
    name: str,
) -> None:
    """Ctrl-C and Ctrl-backslash reach COMMAND; forwarded only if it left the terminal's group."""
    child = run(
        "--",
        *python(
            LISTENER
            + """
    if sys.argv[1] == "own":
        os.setpgid(0, 0)
    print("ready", flush=True)
    while not seen:
        time.sleep(0.005)
    print("seen", *seen, flush=True)
    signal.sigwait([signal.SIGUSR2])
            """
        ),
        group,
        source=IN_TERMINAL,
        stdin=terminal[1],
    )
    assert child.readline() == "ready"
    terminal[0].write(key)
    if group == "own":
        assert child.readline() == f"forwarded {name}"
    assert child.readline() == f"seen {name}"
    # Of pending signals the lower number is taken first: the key's is dealt with by now.
    os.kill(child.pid, signal.SIGUSR2)
    assert child.readline() == "forwarded SIGUSR2"
    assert child.wait() == 0


def test_hang_up_reaches_the_command(
    run: Callable[..., Child], terminal: tuple[BinaryIO, BinaryIO], tmp_path: Path
) -> None:
    """A terminal that goes away tells only the session's leader: `run` tells COMMAND."""
    child = run(
        "--",
        "sh",
        "-c",
        "trap 'exit 5' HUP; echo ready; while :; do sleep 60 & wait $!; done",
        source=IN_TERMINAL,
        stdin=terminal[1],
    )
    assert child.readline() == "ready"
    for end in terminal:
        end.close()
    assert child.readline() == "forwarded SIGHUP"
    assert child.wait() == 5
    assert list(tmp_path.iterdir()) == []


# --- the timers


OVERRUN = """
    import os, sys, time, elastic_timer
    if os.fork() == 0:
        elastic_timer.configure()
        with elastic_timer.expires(after=60, scope="fine"):
            pass
        with elastic_timer.expires(after=0.1, scope="too long"):
            time.sleep(60)
    pid, status = os.wait()
    print(pid, os.waitstatus_to_exitcode(status), time.time())
"""


def test_stuck_process_is_reaped(run: Callable[..., Child], tmp_path: Path) -> None:
    """A process below COMMAND that overruns is reaped, logged and written to the events."""
    events = tmp_path / "events.jsonl"
    before = time.time()
    child = run("--events", str(events), "--run-id", "nightly", "--", *python(OVERRUN))
    pid, code, died = child.readline().split()
    assert child.wait() == 0
    assert int(code) == -signal.SIGKILL
    log = [line for line in child.stderr_text().splitlines() if f" {pid} " in line]
    assert log
    assert all(line.startswith("elastic-timer ") and "too long" in line for line in log)

    records = events_in(events)
    # Whether its end is noticed before COMMAND's end is chance.
    exits = [record for record in records if record["event"] == "worker exited"]
    assert {record["pid"] for record in exits} <= {int(pid)}
    records = [record for record in records if record not in exits]
    assert [list(record)[:7] for record in records] == 5 * [
        ["time", "event", "run_id", "pid", "scope", "expiration_time", "signal"]
    ]
    assert [record["event"] for record in records] == [
        "watchdog started",
        "timer expired",
        "kill worker process",
        "blocks",
        "watchdog stopped",
    ]
    assert {record["run_id"] for record in records} == {"nightly"}
    for record in (records[0], *records[-2:]):
        assert [record[key] for key in ("pid", "scope", "expiration_time", "signal")] == 4 * [None]
    for record in records[1:3]:
        assert record["pid"] == int(pid)
        assert record["scope"] == "too long"
        assert before < record["expiration_time"] < float(died)
        assert record["signal"] == signal.SIGKILL
    evidence = records[1]["evidence"]
    assert evidence["pid"] == int(pid)
    assert evidence["scopes"] == ["too long"]
    assert [set(frame) for frame in evidence["stacks"][0]["frames"]] == [
        {"file", "line", "function"}
    ]
    times = [record["time"] for record in records]
    assert before < times[0]
    assert times == sorted(times)


def test_events_are_appended(run: Callable[..., Child], tmp_path: Path) -> None:
    """`--events` adds to what the file holds, under a run id of its own by default."""
    events = tmp_path / "events.jsonl"
    children = [run("--events", str(events), "--", "true") for _ in range(2)]
    assert [child.wait() for child in children] == [0, 0]
    assert sorted(record["run_id"] for record in events_in(events)) == sorted(
        f"run-{child.pid}" for child in children for _ in range(2)
    )


def test_timers_end_with_the_command(run: Callable[..., Child], tmp_path: Path) -> None:
    """A process that outlives COMMAND is left alone, whatever timer it holds."""
    child = run(
        "--timer-file",
        str(tmp_path / "timers"),
        "--",
        *python(
            """
            import os, time, elastic_timer
            ready, tell = os.pipe()
            pid = os.fork()
            if pid == 0:
                elastic_timer.configure()
                with elastic_timer.expires(after=10):
                    os.write(tell, b".")
                    time.sleep(60)
            os.read(ready, 1)
            print(pid, flush=True)
            """
        ),
    )
    pid = int(child.readline())
    assert child.wait() == 0
    assert not (tmp_path / "timers").exists()
    assert is_alive(pid)


def test_command_that_removes_its_folder(run: Callable[..., Child], tmp_path: Path) -> None:
    """COMMAND's status comes back even where it removed the FIFO and its folder."""
    script = 'rm -r "$(dirname "$TORCHELASTIC_TIMER_FILE")"; exit 3'
    assert run("--", "sh", "-c", script).wait() == 3
    assert list(tmp_path.iterdir()) == []


def test_pending_signal_does_not_change_the_status(
    run: Callable[..., Child], tmp_path: Path
) -> None:
    """Many signals while COMMAND ends: its status comes back, and no folder is left."""
    child = run("--", "sh", "-c", "trap '' TERM INT; echo ready; read line; exit 9")
    assert child.readline() == "ready"
    for _ in range(20):
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    child.send_line("")
    while True:
        try:
            os.kill(child.pid, signal.SIGTERM)
        except ProcessLookupError:
            break
        if child.process.poll() is not None:
            break
    assert child.wait() == 9
    assert list(tmp_path.iterdir()) == []
