"""`elastic-timer status`: the table, `--watch`, `--json`, `--stacks`, `--check`."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pty
import re
import resource
import selectors
import signal
import socket
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import FileTimerClient, FileTimerServer
from elastic_timer._command import status as command
from elastic_timer._command.main import main
from elastic_timer._command.status_table import Style, table
from elastic_timer._transport.status_socket import find
from tests.servers import Serve
from tests.support import (
    CLI,
    FAR,
    UNMEASURED,
    Child,
    Fork,
    Spawn,
    eventually,
    overrun,
    process_state,
    running,
    wait_to_be_killed,
    wire_line,
)
from tests.test_status_socket import VALIDATOR, hold, told

pytestmark = pytest.mark.skipif(
    not hasattr(socket, "SO_PEERCRED"), reason="this system does not tell who connects"
)


@pytest.fixture(autouse=True)
def _no_server_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_TIMER_FILE", raising=False)


@pytest.fixture
def server(fifo_path: str) -> Iterator[FileTimerServer]:
    """A server that can be asked, in this process."""
    with running(FileTimerServer(fifo_path, "mine", status=True)) as started:
        yield started


Status = Callable[..., str]


@pytest.fixture
def status(capsys: pytest.CaptureFixture[str]) -> Status:
    """`status(*arguments, exits=0)`: what `elastic-timer status` prints on stdout."""

    def call(*arguments: str, exits: int = 0) -> str:
        capsys.readouterr()
        status = main(["status", *arguments])
        told = capsys.readouterr()
        assert status == exits, told
        return told.out

    return call


def columns(line: str) -> list[str]:
    """The columns of a line of the table."""
    return re.split(r"(?<=[\w#-]) {2,}|(?<=[#-]) +(?=\d)", line.strip())


# The table ----------------------------------------------------------------------------------------

# Two ranks that are in a block each, a third that is in none.
JOB = """
    import os, sys, time
    import elastic_timer
    elastic_timer.configure()
    for rank, after in ((0, 90), (1, 60)):
        os.environ["RANK"] = str(rank)
        program = (
            "import elastic_timer, os, time; elastic_timer.configure()\\n"
            f"with elastic_timer.expires({after}, '/home/me/train.py#8{rank}'):\\n"
            "    os.write(1, b'in\\\\n'); time.sleep(60)"
        )
        os.spawnv(os.P_NOWAIT, sys.executable, [sys.executable, "-c", program])
    with elastic_timer.expires(60):
        pass
    time.sleep(60)
    """


@pytest.fixture
def job(run: Callable[..., Child], fifo_path: str) -> Child:
    """`elastic-timer run` with a job that hangs."""
    program = [sys.executable, "-c", textwrap.dedent(JOB)]
    child = run("--run-id", "nightly", "--timer-file", fifo_path, "--", *program)
    for _ in range(2):
        assert child.readline() == "in"
    eventually(lambda: len(told(fifo_path)["timers"]) == 2)
    eventually(lambda: told(fifo_path)["worker_count"] == 3)
    return child


def test_what_ten_thousand_timers_cost(spawn: Spawn, fifo_path: str, tmp_path: Path) -> None:
    """The command and the server together take less than 200 ms of a processor.

    Not of the clock, which tells more of what else the machine does; and the best of some counts.
    """
    # As installed: compiled once, and measured by nobody else.
    env = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path / "compiled")}
    env |= UNMEASURED
    source = """
        import sys
        from elastic_timer import FileTimerServer
        with FileTimerServer(sys.argv[1], "run", status=True):
            print("ready", flush=True)
            sys.stdin.readline()
        """
    server = spawn(source, fifo_path, env=env)
    assert server.readline() == "ready"
    hold(fifo_path, os.getpid(), [f"/home/me/train.py#{number}" for number in range(10_000)])
    eventually(lambda: told(fifo_path)["timer_count"] == 10_000)

    def seconds_used() -> float:
        # The clock of that process, as clock_getcpuclockid(3) builds it.
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.clock_gettime(~server.pid << 3 | 2) + children.ru_utime + children.ru_stime

    def seconds_of_a_look() -> float:
        before = seconds_used()
        command = spawn(CLI, "status", "--json", "--timer-file", fifo_path, env=env)
        assert len(json.loads(command.readline())["timers"]) == 10_000
        assert command.wait() == 0
        return seconds_used() - before

    eventually(lambda: seconds_of_a_look() < 0.2)


def test_table_of_a_run(job: Child, fifo_path: str, status: Status) -> None:
    """Whoever has the least time left is first; every column is there."""
    head, names, *rows = status("--timer-file", fifo_path).splitlines()
    assert re.fullmatch(
        rf"run nightly  pid {job.pid}  up \d+ s  3 workers  2 timers  0 reaped", head
    )
    assert names.split() == ["LEFT", "USED", "AFTER", "SCOPE", "RANK", "PID", "STATE", "PASS"]
    for row, rank, after in zip(rows, (1, 0), (60, 90), strict=True):
        match = re.fullmatch(
            rf"\d\d\.\d s  #*-{{10,20}}  (\d\d) s  train\.py#8{rank} +{rank}  +\d+  [SRD] +1", row
        )
        # A busy machine takes a moment to bring it the request.
        assert match, row
        assert after - 5 <= int(match[1]) <= after
    assert {len(line) for line in rows} <= {len(rows[0])}


def test_json_of_a_run(job: Child, fifo_path: str, status: Status) -> None:
    """One object, by its schema, with the state of each worker."""
    [line] = status("--timer-file", fifo_path, "--json").splitlines()
    answer = json.loads(line)
    VALIDATOR.validate(answer)
    assert (answer["run_id"], answer["pid"], answer["timer_file"]) == (
        "nightly",
        job.pid,
        fifo_path,
    )
    assert {timer["rank"] for timer in answer["timers"]} == {0, 1}
    assert {timer["state"] for timer in answer["timers"]} <= {"S", "R", "D"}
    assert all(0 < timer["left"] <= timer["after"] for timer in answer["timers"])


def test_stacks_of_a_run(job: Child, fifo_path: str, status: Status) -> None:
    """Below the table each worker's stack, the ranks in their order; or the reason for none."""
    told = status("--timer-file", fifo_path, "--stacks")
    first, second = re.findall(r"^rank (\d), pid \d+\n((?:  .*\n)+)", told, re.M)
    assert (first[0], second[0]) == ("0", "1")
    for _, lines in (first, second):
        assert "in <module>" in lines or "no stacks: " in lines
    answer = json.loads(status("--timer-file", fifo_path, "--stacks", "--json"))
    VALIDATOR.validate(answer)
    assert [worker["rank"] for worker in answer["stacks"]] == [0, 1]


def test_servers_without_a_path(
    tmp_path: Path, serve: Serve, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every server of this user, one after the other."""

    def find_ours() -> list[str]:  # Without those of other tests that may run meanwhile.
        return [path for path in find() if path.startswith(str(tmp_path))]

    monkeypatch.setattr(command, "find", find_ours)
    for name in ("first", "second"):
        path = str(tmp_path / name)
        serve(lambda path=path, name=name: FileTimerServer(path, name, status=True))
    told = status()
    assert re.fullmatch(r"run first  pid .*\n\nrun second  pid .*\n", told)
    objects = [json.loads(line) for line in status("--json").splitlines()]
    assert [each["run_id"] for each in objects] == ["first", "second"]
    assert len(status("--check").splitlines()) == 2


def test_server_of_the_environment(
    server: FileTimerServer, fifo_path: str, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within a job it is the job's own."""
    monkeypatch.setenv("TORCHELASTIC_TIMER_FILE", fifo_path)
    [line] = status("--json").splitlines()
    assert json.loads(line)["timer_file"] == fifo_path


def test_no_server(
    fifo_path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, and the exit status is 1."""
    for options in ([], ["--json"]):
        assert main(["status", "--timer-file", fifo_path, *options]) == 1
        told = capsys.readouterr()
        assert f"there is no {fifo_path}.sock" in told.out + told.err
    monkeypatch.setattr(command, "find", lambda: [])
    assert main(["status"]) == 1
    assert capsys.readouterr().err == "no timer server of this user runs on this host\n"
    assert main(["status", "--check"]) == 1
    assert capsys.readouterr().out == "no timer server of this user runs on this host\n"
    # One that has ended since it was found is nothing to tell of.
    monkeypatch.setattr(command, "find", lambda: [fifo_path])
    assert main(["status"]) == 1
    assert capsys.readouterr().out == ""


# What a server tells first, of two timers of which the second is not all there.
CUT_OFF = (
    b'{"run_id":"r","pid":1,"uptime":1.0,"last_round_age":0.0,'
    b'"timers":[{"pid":1,"scope":"s"},{"pid":1,"sc'
)


def test_states_whatever_scopes_are(
    server: FileTimerServer, fifo_path: str, status: Status, fork_worker: Fork
) -> None:
    """Each worker's is its own, though a scope may look like what comes before it."""
    worker = fork_worker(wait_to_be_killed)
    eventually(lambda: process_state(worker.pid) == "S")
    hostile = [f'{{"pid":{worker.pid},"state":"X",', '"', "\\", '\\{"pid":1,', "plain"]
    hold(fifo_path, worker.pid, hostile)
    hold(fifo_path, -os.getpgrp(), hostile)
    answer = json.loads(status("--timer-file", fifo_path, "--json"))
    VALIDATOR.validate(answer)
    assert [(timer["pid"], timer["scope"], timer["state"]) for timer in answer["timers"]] == [
        *((worker.pid, scope, "S") for scope in hostile),
        *((-os.getpgrp(), scope, None) for scope in hostile),
    ]


@pytest.mark.parametrize(
    "text", [b"", b"{}", b"[]", b"rubbish", b"\xff", b'{"run_id": ', CUT_OFF, b'{"pid":1,']
)
def test_what_is_no_server(fifo_path: str, status: Status, text: bytes) -> None:
    """Something else that listens there is no server, whatever it says."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{fifo_path}.sock")
        listener.listen()

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.sendall(text)

        thread = threading.Thread(target=answer)
        thread.start()
        told = status("--timer-file", fifo_path, exits=1)
        thread.join()
    assert told == f"{fifo_path}: what listens there gives no answer\n"


def test_what_is_no_socket(fifo_path: str, status: Status) -> None:
    """The system's own word for any other reason."""
    Path(f"{fifo_path}.sock").write_text("")
    told = status("--timer-file", fifo_path, exits=1)
    assert told == f"{fifo_path}: {os.strerror(errno.ENOTSOCK)}\n"


def test_server_whose_queue_is_full(fifo_path: str, status: Status) -> None:
    """One that does not even see that it is asked has not answered."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(f"{fifo_path}.sock")
        listener.listen(0)
        waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
        waiting.connect(f"{fifo_path}.sock")
        assert why_not(status, fifo_path).endswith("the server has not answered for 0.5 s\n")


def test_status_takes_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    """What is behind -- would be lost on it."""
    with pytest.raises(SystemExit):
        main(["status", "--", "true"])
    assert "status takes no COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--stacks", "--watch"])
def test_check_shows_nothing_else(capsys: pytest.CaptureFixture[str], option: str) -> None:
    """What it would leave out is refused."""
    with pytest.raises(SystemExit) as exit_:
        main(["status", "--check", option])
    assert exit_.value.code == 2
    assert "leave out --json, --stacks, --watch" in capsys.readouterr().err


def test_reader_that_has_seen_enough(server: FileTimerServer, fifo_path: str, spawn: Spawn) -> None:
    """A closed pipe is no error to make words about."""
    reader, writer = os.pipe()
    os.close(reader)
    child = spawn(CLI, "status", "--timer-file", fifo_path, stdout=writer)
    os.close(writer)
    assert child.wait() == 1
    assert child.stderr_text() == ""


# How it looks -------------------------------------------------------------------------------------


def server_with(*timers: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What a server might tell."""
    usual = {"pid": 4711, "rank": None, "scope": "s", "after": 60.0, "left": 30.0, "pass": 1}
    return {
        "run_id": "run-4710",
        "pid": 4710,
        "uptime": 11_525.0,
        "worker_count": 8,
        "timer_count": len(timers),
        "reaped_count": 2,
        "timers": [{**usual, "state": "S", **timer} for timer in timers],
        **changes,
    }


def test_table_as_documented() -> None:
    """It is what the documentation shows."""
    busy = {"scope": "/home/me/train.py#86", "after": 119.99}
    server = server_with(
        {**busy, "rank": 0, "pid": 25721, "state": "R", "left": 118.9, "pass": 1201},
        {**busy, "rank": 3, "pid": 25724, "state": "S", "left": 12.1, "pass": 1200},
        worker_count=8,
    )
    assert table(server, Style()) == [
        "run run-4710  pid 4710  up 3 h 12 min  8 workers  2 timers  2 reaped",
        "LEFT     USED                 AFTER  SCOPE        RANK    PID  STATE  PASS",
        " 12.1 s  ##################-- 120 s  train.py#86     3  25724  S      1200",
        "118.9 s  #------------------- 120 s  train.py#86     0  25721  R      1201",
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(12.4, "12 s"), (200, "3 min"), (11_525, "3 h 12 min"), (273_600, "3 d 4 h")],
)
def test_durations(seconds: float, shown: str) -> None:
    """The two largest units."""
    [head] = table(server_with(uptime=seconds, worker_count=1), Style())
    assert head == f"run run-4710  pid 4710  up {shown}  1 worker  0 timers  2 reaped"


@pytest.mark.parametrize(
    ("timer", "shown"),
    [
        ({"after": 0.5, "left": 0.21}, "0.2 s  ############-------- 0.5 s"),
        ({"after": 60.0, "left": -1.5}, "-1.5 s  ####################  60 s"),
        ({"after": 86_400.0, "left": 43_200.0}, "12.0 h  ##########---------- 24.0 h"),
        ({"after": 0.0, "left": 0.0}, "0.0 s  #################### 0.0 s"),
        # Acquired anew since the snapshot was begun.
        ({"after": 60.0, "left": 61.0}, "61.0 s  --------------------  60 s"),
    ],
)
def test_times(timer: dict[str, float], shown: str) -> None:
    """From tenths of a second to days, and overdue ones."""
    _, _, row = table(server_with(timer), Style())
    assert row.strip().startswith(shown)


def test_unknown_values() -> None:
    """A dash stands for what is not known, as of a process group."""
    _, _, row = table(server_with({"pid": -4711, "state": None, "pass": None}), Style())
    assert row.split()[-4:] == ["-", "-4711", "-", "-"]


@pytest.mark.parametrize(
    "scope", ["s", "train.py#86", "/very/" + "long" * 50 + ".py#1234", "é" * 99]
)
def test_eighty_columns_and_64_ranks(scope: str) -> None:
    """No line is longer than the terminal is wide, and all timers are on it."""
    timers = [
        {"rank": rank, "scope": scope, "pid": 1_000_000 + rank, "pass": 123_456, "after": 3600.0}
        for rank in range(64)
    ]
    server = server_with(*timers, run_id="long" * 30)
    for width in (80, 100, 132):
        lines = table(server, Style(width))
        assert len(lines) == 66
        assert max(map(len, lines)) <= width
        assert len({len(line) for line in lines[2:]}) == 1
        # Rather a shorter bar than no line of the file.
        assert scope[-20:] in lines[2]


def test_escape_sequences_of_others_do_nothing() -> None:
    """A scope can't clear the terminal, or pretend to be another line."""
    server = server_with({"scope": "\x1b[2Jfree\nrow"}, run_id="\x1b]0;title\x07")
    lines = table(server, Style(80))
    assert len(lines) == 3
    assert all(line.isprintable() for line in lines)
    assert "[2Jfree row" in lines[2]


def test_colours_say_how_much_is_used() -> None:
    """Green, yellow, red; a stopped process is red; without colours the text is the same."""
    server = server_with(
        {"left": 55.0}, {"left": 20.0}, {"left": 5.0, "state": "T"}, run_id="coloured"
    )
    plain, coloured = table(server, Style(80)), table(server, Style(80, True))
    assert [re.sub(r"\x1b\[\d+m", "", line) for line in coloured] == plain
    assert [re.findall(r"\x1b\[(\d+)m", line)[0] for line in coloured[2:]] == ["31", "33", "32"]
    assert coloured[2].count("\x1b[31m") == 2
    assert coloured[3].count("\x1b[31m") == 0


# --watch ------------------------------------------------------------------------------------------


class Terminal:
    """A terminal of 80 columns on which the command runs."""

    def __init__(
        self,
        spawn: Spawn,
        *arguments: str,
        rows: int = 24,
        env: dict[str, str] | None = None,
        source: str = CLI,
        **options: Any,
    ) -> None:
        self._master, slave = pty.openpty()
        environment = {"TERM": "xterm", "NO_COLOR": "", "LINES": str(rows), "COLUMNS": "80"}
        self.child = spawn(
            *(source, "status", *arguments),
            stdout=slave,
            env={**environment, **(env or {})},
            **options,
        )
        os.close(slave)
        self.shown = ""

    def wait_for(self, text: str, count: int = 1) -> None:
        """Read until the text was shown so many times."""
        deadline = time.monotonic() + 20
        with selectors.DefaultSelector() as selector:
            selector.register(self._master, selectors.EVENT_READ)
            while self.shown.count(text) < count:
                assert selector.select(max(0, deadline - time.monotonic())), self.shown
                self.shown += os.read(self._master, 1 << 16).decode()

    def end(self, number: int) -> int:
        """Send a signal; the exit status."""
        os.kill(self.child.pid, number)
        status = self.child.wait()
        with contextlib.suppress(OSError):  # EIO: nobody has the other end any more.
            while piece := os.read(self._master, 1 << 16):
                self.shown += piece.decode()
        return status

    def close(self) -> None:
        os.close(self._master)


def test_watch_on_a_terminal(server: FileTimerServer, fifo_path: str, spawn: Spawn) -> None:
    """It is drawn anew on a screen of its own until Ctrl-C; what was last seen stays."""
    arguments = ("--timer-file", fifo_path, "--watch", "0.05")
    with contextlib.closing(Terminal(spawn, *arguments)) as terminal:
        terminal.wait_for("run mine", 3)
        FileTimerClient(fifo_path).acquire("entered meanwhile", time.time() + FAR)
        terminal.wait_for("entered meanwhile", 2)
        assert terminal.end(signal.SIGINT) == 0
    assert terminal.shown.startswith("\x1b[?1049h\x1b[?25l\x1b[H")
    frames, _, last = terminal.shown.partition("\x1b[?25h\x1b[?1049l")
    assert frames.count("\x1b[H") >= 5
    assert "entered meanwhile" in last
    assert "\x1b[1m" in frames
    assert terminal.child.stderr_text() == ""


def test_watch_restores_the_terminal(server: FileTimerServer, fifo_path: str, spawn: Spawn) -> None:
    """Also when it is ended by SIGTERM."""
    with contextlib.closing(Terminal(spawn, "--timer-file", fifo_path, "--watch")) as terminal:
        terminal.wait_for("run mine")
        assert terminal.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert terminal.shown.endswith("\x1b[?25h\x1b[?1049l")


def test_watch_that_is_stopped(server: FileTimerServer, fifo_path: str, spawn: Spawn) -> None:
    """After Ctrl-Z the shell has its own screen and a cursor, and `fg` shows the table again."""
    arguments = ("--timer-file", fifo_path, "--watch", "0.05")
    # As a job of a shell's: what nobody in the session could continue, the system does not stop.
    source = f"import os; os.setpgid(0, 0)\n{CLI}"
    terminal = Terminal(spawn, *arguments, source=source, start_new_session=False)
    with contextlib.closing(terminal):
        for shown in (1, 2):
            terminal.wait_for("run mine", terminal.shown.count("run mine") + 2)
            assert terminal.shown.count("\x1b[?1049h\x1b[?25l") == shown
            os.kill(terminal.child.pid, signal.SIGTSTP)
            eventually(lambda: process_state(terminal.child.pid) == "T")
            terminal.wait_for("\x1b[?25h\x1b[?1049l", shown)
            assert terminal.shown.endswith("\x1b[?25h\x1b[?1049l")
            os.kill(terminal.child.pid, signal.SIGCONT)
        terminal.wait_for("\x1b[?1049h\x1b[?25l", 3)
        assert terminal.end(signal.SIGINT) == 0
    assert terminal.shown.count("\x1b[?25h\x1b[?1049l") == 3


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_no_colours(
    server: FileTimerServer, fifo_path: str, spawn: Spawn, variable: dict[str, str]
) -> None:
    """Who wants none has none."""
    terminal = Terminal(spawn, "--timer-file", fifo_path, env=variable)
    with contextlib.closing(terminal):
        terminal.wait_for("0 reaped\r\n")
        assert "\x1b" not in terminal.shown


def test_watch_on_a_terminal_that_can_not_draw(
    server: FileTimerServer, fifo_path: str, spawn: Spawn
) -> None:
    """In a shell of an editor's the tables follow each other."""
    arguments = ("--timer-file", fifo_path, "--watch", "0.05")
    with contextlib.closing(Terminal(spawn, *arguments, env={"TERM": "dumb"})) as terminal:
        terminal.wait_for("run mine", 3)
        assert terminal.end(signal.SIGINT) == 0
    assert "\x1b" not in terminal.shown


def test_watch_of_more_than_fits(server: FileTimerServer, fifo_path: str, spawn: Spawn) -> None:
    """What does not fit on the screen is counted."""
    with open(fifo_path, "wb", buffering=0) as fifo:
        for number in range(30):
            fifo.write(wire_line(scope_id=f"scope {number}"))
    arguments = ("--timer-file", fifo_path, "--watch", "0.05")
    with contextlib.closing(Terminal(spawn, *arguments, rows=10)) as terminal:
        terminal.wait_for("... and 23 lines more")
        terminal.end(signal.SIGINT)


def test_watch_into_a_pipe(server: FileTimerServer, fifo_path: str, spawn: Spawn) -> None:
    """Plain lines, one table after the other; with `--json` one object a line."""
    options = ("status", "--timer-file", fifo_path, "--watch", "0.01")
    child = spawn(CLI, *options)
    for _ in range(3):
        assert child.readline().startswith("run mine  pid ")
        assert child.readline() == ""
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 0
    child = spawn(CLI, *options, "--json")
    for _ in range(3):
        VALIDATOR.validate(json.loads(child.readline()))
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 0


def test_watch_goes_on_without_a_server(fifo_path: str, spawn: Spawn) -> None:
    """It waits for the next one."""
    child = spawn(CLI, "status", "--timer-file", fifo_path, "--watch", "0.01")
    assert "there is no" in child.readline()
    with running(FileTimerServer(fifo_path, "late", status=True)):
        eventually(lambda: child.readline().startswith("run late"))
    eventually(lambda: "there is no" in child.readline())
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 0


def test_output_that_can_not_be_encoded(
    server: FileTimerServer, fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal that has no such letters shows their numbers."""
    FileTimerClient(fifo_path).acquire("é", time.time() + FAR)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert main(["status", "--timer-file", fifo_path]) == 0
    stream.seek(0)
    assert "\\xe9" in stream.read()


# --check ------------------------------------------------------------------------------------------

# How long a sick server may take to be known as one here, in seconds.
SOON = 0.5


def is_well(status: Status, path: str) -> None:
    """The probe says so, in one line."""
    told = status("--check", "--timer-file", path)
    assert re.fullmatch(rf"{path}: ok, the last round \d+\.\d s ago\n", told)


def why_not(status: Status, path: str, within: float = SOON) -> str:
    """The probe says within its time that a server is ill, in one line, and why."""
    began = time.monotonic()
    told = status("--check", "--max-age", str(within), "--timer-file", path, exits=1)
    assert time.monotonic() - began < within + 5
    assert told.startswith(f"{path}: ")
    assert told.count("\n") == 1
    return told


def test_check_of_a_stopped_server(fifo_path: str, serve: Serve, status: Status) -> None:
    """A server that is stopped, and one that is dead, turn the probe to 1."""
    server = serve(lambda: FileTimerServer(fifo_path, "run", status=True))
    is_well(status, fifo_path)
    server.pause()
    assert f"the server, process {server.pid} (state T), has not answered for 0.5 s" in why_not(
        status, fifo_path
    )
    server.go_on()
    is_well(status, fifo_path)
    server.kill()
    assert "its server has ended" in why_not(status, fifo_path)
    with running(FileTimerServer(fifo_path, "next", status=True)):
        is_well(status, fifo_path)


def test_check_of_a_server_beside_a_stopped_one(
    fifo_path: str, serve: Serve, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are asked after one that does not answer have all the time to do so."""
    stopped = serve(lambda: FileTimerServer(fifo_path, "stopped", status=True))
    stopped.pause()
    well = f"{fifo_path}-well"
    monkeypatch.setattr(command, "find", lambda: [fifo_path, well])
    with running(FileTimerServer(well, "well", status=True)):
        told = status("--check", "--max-age", str(SOON), exits=1).splitlines()
    assert [line.split(": ")[0] for line in told] == [fifo_path, well]
    assert "has not answered for 0.5 s" in told[0]
    assert ": ok, " in told[1]


def test_check_of_a_wedged_server(fifo_path: str, status: Status) -> None:
    """A hook that does not come back turns it to 1, until it does."""
    gate = threading.Event()
    gate.set()

    class Wedged(FileTimerServer):
        def get_expired_timers(self, deadline: float) -> Any:
            gate.wait()
            return super().get_expired_timers(deadline)

    with running(Wedged(fifo_path, "run", status=True)):
        is_well(status, fifo_path)
        gate.clear()
        try:
            assert "has not answered for 0.5 s" in why_not(status, fifo_path)
        finally:
            gate.set()
        is_well(status, fifo_path)


def test_check_of_a_server_whose_rounds_fail(
    server: FileTimerServer, fifo_path: str, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that answers, and does not get through a round, turns it to 1 as well."""
    is_well(status, fifo_path)
    with monkeypatch.context() as patch:
        patch.setattr(server, "_drop_exited", lambda: 1 / 0)
        # After each round that fails it pauses, and an answer takes some of these.
        eventually(lambda: told(fifo_path)["last_round_age"] > 1.5)
        assert "the watchdog makes no rounds, the last round" in why_not(status, fifo_path, 1.5)
    is_well(status, fifo_path)


def test_check_of_an_idle_server(fifo_path: str, status: Status) -> None:
    """The longest pause between rounds has nothing to do with it: the question causes one."""
    with running(FileTimerServer(fifo_path, "run", max_interval=FAR, status=True)) as server:
        rounds = server._progress.rounds
        is_well(status, fifo_path)
        assert told(fifo_path)["rounds"] > rounds


def test_check_while_workers_hang(
    server: FileTimerServer, fifo_path: str, fork_worker: Fork, status: Status
) -> None:
    """A hanging job does not make its watchdog ill."""
    worker = fork_worker(overrun, FileTimerClient(fifo_path), FAR)
    worker.receive()
    is_well(status, fifo_path)
