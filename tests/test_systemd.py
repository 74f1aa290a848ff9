"""`elastic-timer run` under systemd: a socket of the test's stands for systemd."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import socket
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_timer._command.systemd import Notifier
from elastic_timer._server.events import WatchdogRound
from tests.support import CLI, Child, eventually

# COMMAND lives until the file that it is given is there, and says what it has of the variables.
COMMAND = """
    import os, pathlib, sys, time
    print(sorted(set(os.environ) & {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}), flush=True)
    while not pathlib.Path(sys.argv[1]).exists():
        time.sleep(0.01)
    """

# The command, with a watchdog that a hook of somebody's wedges once the file that it is given is
# there.
WEDGED = f"""
    import os, time
    from elastic_timer import FileTimerServer
    from elastic_timer._command import run

    class Wedged(FileTimerServer):
        def get_expired_timers(self, deadline):
            while os.path.exists(os.environ["WEDGE"]):
                time.sleep(0.01)
            return super().get_expired_timers(deadline)

    run.FileTimerServer = Wedged
    {CLI}
    """


class Systemd:
    """The socket that is told how things stand."""

    def __init__(self, address: str) -> None:
        self.variable = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def receive(self, timeout: float = 20) -> list[str]:
        """The lines of the next message; none where none comes in time."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            if not selector.select(timeout):
                return []
        return self._socket.recv(4096).decode().split("\n")

    def wait_for(self, line: str) -> None:
        """Receive until a message has this line."""
        seen: list[list[str]] = []
        while line not in (lines := self.receive()):
            assert lines, f"no {line} after {seen}"
            seen.append(lines)

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Systemd]:
    """Both kinds of addresses in turn."""
    path = str(tmp_path / "notify")
    address = path if request.param == "path" else f"@elastic-timer-test-{uuid.uuid4()}"
    if request.param == "abstract" and sys.platform != "linux":
        pytest.skip("only Linux has abstract addresses")
    with contextlib.closing(Systemd(address)) as made:
        yield made


def start(
    run: Callable[..., Child], systemd: Systemd, end: Path, source: str = CLI, **variables: str
) -> Child:
    """`elastic-timer run` as systemd starts it."""
    command = [sys.executable, "-c", textwrap.dedent(COMMAND), str(end)]
    environment = {"NOTIFY_SOCKET": systemd.variable, **variables}
    return run("--", *command, source=source, env=environment)


def test_from_ready_to_stopping(
    run: Callable[..., Child], systemd: Systemd, tmp_path: Path
) -> None:
    """Ready once COMMAND runs, three rounds in the time, stopping when it has ended."""
    child = start(run, systemd, tmp_path / "end", WATCHDOG_USEC="600000")
    systemd.wait_for("READY=1")
    # Not its own, or COMMAND's word would count as that of `run`.
    assert child.readline() == "[]"
    systemd.wait_for("WATCHDOG=1")
    began = time.monotonic()
    for _ in range(5):
        systemd.wait_for("WATCHDOG=1")
    # Not ten seconds apart, as the rounds of an idle server are.
    assert time.monotonic() - began < 5 * 0.6
    (tmp_path / "end").touch()
    systemd.wait_for("STOPPING=1")
    assert child.wait() == 0
    assert child.stderr_text() == ""


def test_status_line(run: Callable[..., Child], systemd: Systemd, tmp_path: Path) -> None:
    """`systemctl status` shows how many workers are watched."""
    program = """
        import elastic_timer
        elastic_timer.configure()
        with elastic_timer.expires(60):
            print("in", flush=True)
            input()
        input()
        """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    environment = {"NOTIFY_SOCKET": systemd.variable, "WATCHDOG_USEC": "300000"}
    child = run("--", *command, env=environment)
    systemd.wait_for("STATUS=workers: 1, timers: 1, reaped: 0")
    child.send_line("")
    systemd.wait_for("STATUS=workers: 1, timers: 0, reaped: 0")
    child.send_line("")
    assert child.wait() == 0


@pytest.mark.parametrize("systemd", ["path"], indirect=True)
@pytest.mark.parametrize("how", ["stopped", "wedged"])
def test_watchdog_that_makes_no_rounds(
    run: Callable[..., Child], systemd: Systemd, tmp_path: Path, how: str
) -> None:
    """Its WATCHDOG=1 is no more, until the rounds go on."""
    wedge = tmp_path / "wedge"
    environment = {"WATCHDOG_USEC": "300000", "WEDGE": str(wedge)}
    child = start(run, systemd, tmp_path / "end", textwrap.dedent(WEDGED), **environment)
    systemd.wait_for("WATCHDOG=1")
    if how == "wedged":
        wedge.touch()
    else:
        os.kill(child.pid, signal.SIGSTOP)
    eventually(lambda: systemd.receive(1) == [])
    if how == "wedged":
        wedge.unlink()
    else:
        os.kill(child.pid, signal.SIGCONT)
    systemd.wait_for("WATCHDOG=1")
    (tmp_path / "end").touch()
    assert child.wait() == 0


@pytest.mark.parametrize("systemd", ["path"], indirect=True)
def test_no_watchdog_is_wanted(run: Callable[..., Child], systemd: Systemd, tmp_path: Path) -> None:
    """Without WATCHDOG_USEC, and with that of another process, there is no WATCHDOG=1."""
    for variables in ({}, {"WATCHDOG_USEC": "50000", "WATCHDOG_PID": "1"}):
        child = start(run, systemd, tmp_path / "end", **variables)
        systemd.wait_for("READY=1")
        (tmp_path / "end").touch()
        lines: list[str] = []
        while "STOPPING=1" not in lines:
            lines += systemd.receive()
        assert "WATCHDOG=1" not in lines
        assert child.wait() == 0


@pytest.mark.parametrize("systemd", ["path"], indirect=True)
def test_command_that_can_not_be_started(run: Callable[..., Child], systemd: Systemd) -> None:
    """Nobody is told that it is ready."""
    child = run("--", "/no/such/command", env={"NOTIFY_SOCKET": systemd.variable})
    assert child.wait() == 127
    assert not any("READY=1" in lines for lines in iter(lambda: systemd.receive(0.1), []))


def test_nobody_there(run: Callable[..., Child], tmp_path: Path) -> None:
    """A socket that nobody has costs one line of the log, and nothing else."""
    environment = {"NOTIFY_SOCKET": str(tmp_path / "none"), "WATCHDOG_USEC": "60000"}
    child = run("--", "sleep", "0.3", env=environment)
    assert child.wait() == 0
    assert child.stderr_text().count("Can't tell systemd how things stand") == 1


@pytest.mark.parametrize(
    ("variables", "interval"),
    [
        ({}, 10.0),
        ({"WATCHDOG_USEC": "3000000"}, 10.0),  # Nobody would hear of it.
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000"}, 1.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "300000000"}, 10.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "rubbish"}, 10.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "0"}, 10.0),
        ({"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 10.0),
    ],
)
def test_interval(variables: dict[str, str], interval: float) -> None:
    """Three rounds come within the time after which a watchdog is taken for dead."""
    assert Notifier(variables).interval(10.0) == interval


def test_status_is_told_when_it_changes(tmp_path: Path) -> None:
    """Not with every round."""
    with contextlib.closing(Systemd(str(tmp_path / "notify"))) as systemd:
        notifier = Notifier({"NOTIFY_SOCKET": systemd.variable})
        for timers in (1, 1, 2):
            notifier.made_round(WatchdogRound(0.0, 1, timers, 0))
        assert systemd.receive() == ["STATUS=workers: 1, timers: 1, reaped: 0"]
        assert systemd.receive() == ["STATUS=workers: 1, timers: 2, reaped: 0"]
        assert systemd.receive(0) == []
