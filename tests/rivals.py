"""What a server at a path has to stand: rivals, a user who meddles with it, endless rubbish."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from elastic_timer import FileTimerClient, FileTimerServer
from tests.support import FAR, Fork, eventually, wire_line

NOBODY = 65534


def compete(channel: Any, path: str) -> None:
    """Start a server at each time (monotonic) that is received, and stop it at the next message."""
    while (at := channel.recv()) is not None:
        while time.monotonic() < at:
            pass
        try:
            server = FileTimerServer(path, "run", 60)
            server.start()
        except BaseException as error:
            channel.send(f"{type(error).__name__}: {error}")
            continue
        channel.send("won")
        channel.recv()
        channel.send(server._request_count)
        server.stop()


def assert_one_of_two_starts_wins(path: str, fork_worker: Fork, times: int) -> None:
    """Start two servers at the same moment, so many times: one serves, the other is told why not.

    Every second time a FIFO lies there that nobody reads.
    """
    rivals = [fork_worker(compete, path) for _ in range(2)]
    client = FileTimerClient(path)
    for number in range(times):
        with contextlib.suppress(FileExistsError):
            if number % 2:
                os.mkfifo(path)
        # Now and then one of them a little later: what both do has many steps.
        at = time.monotonic() + 0.005
        for rival in rivals:
            rival.send(at + random.uniform(0, 0.0003))
        outcomes = [rival.receive() for rival in rivals]
        assert sorted(outcome == "won" for outcome in outcomes) == [False, True], outcomes
        winner = rivals[outcomes.index("won")]
        (reason,) = set(outcomes) - {"won"}
        assert reason.startswith("FileExistsError"), reason
        assert "reads it already" in reason
        client.acquire("s", time.time() + FAR)
        eventually(lambda: not _has_data(path))
        assert winner.ask("stop") <= 1
    for rival in rivals:
        rival.send(None)
        assert rival.wait() == 0


def _has_data(path: str) -> bool:
    import fcntl
    import termios

    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        try:
            return bool(
                int.from_bytes(fcntl.ioctl(descriptor, termios.FIONREAD, b"\0" * 4), "little")
            )
        finally:
            os.close(descriptor)
    return False


def meddle(channel: Any, path: str, victim: str) -> None:
    """As another user, put something else in the place of whatever lies at the path, for ever.

    A link to a file of root's; a FIFO through which a request comes; nothing.
    """
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    request = wire_line(pid=os.getppid(), expiration_time=time.time() + FAR)
    channel.send("meddling")
    while True:
        with contextlib.suppress(OSError):
            os.unlink(path)
        kind = random.randrange(3)
        with contextlib.suppress(OSError):
            if kind == 0:
                os.symlink(victim, path)
            elif kind == 1:
                os.mkfifo(path)
                os.chmod(path, 0o666)
                until = time.monotonic() + 0.002
                while time.monotonic() < until:
                    with contextlib.suppress(OSError):
                        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
                        os.write(descriptor, request)
                        os.close(descriptor)
            elif kind == 2:
                time.sleep(random.uniform(0, 0.001))


def assert_nobody_can_meddle(folder: Path, fork_worker: Fork, seconds: float) -> None:
    """Root's server in a folder of another user's takes no request of his, and changes no file."""
    theirs = folder / "theirs"
    theirs.mkdir()
    os.chown(theirs, NOBODY, NOBODY)
    for parent in [folder, *folder.parents][:3]:
        with contextlib.suppress(OSError):
            parent.chmod(stat.S_IMODE(parent.stat().st_mode) | 0o711)
    victim = folder / "victim"
    victim.write_text("precious")
    victim.chmod(0o644)
    path = str(theirs / "timers")
    meddler = fork_worker(meddle, path, str(victim))
    assert meddler.receive() == "meddling"
    started = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError), FileTimerServer(path, "run", 60) as server:
            started += 1
            server.run_once()
            assert server._request_count == 0
        assert stat.S_IMODE(victim.stat().st_mode) == 0o644
    assert victim.read_text() == "precious"
    assert started


@contextlib.contextmanager
def endless_rubbish(path: str) -> Iterator[None]:
    """While in it, `yes` writes into the FIFO as fast as it can."""
    with open(path, "wb", buffering=0) as fifo:
        process = subprocess.Popen(["yes"], stdout=fifo, stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


def overrun_amid_rubbish(channel: Any, path: str, after: float) -> None:
    """A worker that overruns; it sends its deadline (monotonic). The pipe may be full for long."""
    client = FileTimerClient(path)
    while True:
        deadline = time.monotonic() + after
        with contextlib.suppress(BrokenPipeError):
            client.acquire("overrun", time.time() + after)
            break
    channel.send(deadline)
    time.sleep(FAR)
