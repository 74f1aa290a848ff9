"""The command `elastic-timer demo`: what it shows, and what its exit status says."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import FileTimerClient, FileTimerServer, configure
from elastic_timer._command import demo as _demo
from tests.support import ALLOWED_LATENESS, Child, ForkedWorker, child_pids, running

DEMO = "import sys; from elastic_timer._command.main import main; sys.exit(main(['demo']))"
SOURCE = Path(_demo.__file__).read_text().splitlines()

# The demo that they look at runs once.
pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """One demo that went well: its live lines, and those behind."""
    folder = tmp_path_factory.mktemp("demo")
    started = time.monotonic()
    child = Child(DEMO, env={"TMPDIR": str(folder)})
    with contextlib.closing(child):
        assert child.process.stdout is not None
        lines = child.process.stdout.read().splitlines()
        assert child.wait() == 0, "\n".join(lines)
    assert time.monotonic() - started < 6
    assert list(folder.iterdir()) == []
    blank = lines.index("")
    return lines[:blank], lines[blank + 1 :]


def test_table(shown: tuple[list[str], list[str]]) -> None:
    """In under 6 s exactly the two stuck workers are reaped, each at its own line, and on time."""
    table = [re.split("  +", line) for line in shown[1][:5]]
    assert table[0] == ["worker", "scope", "deadline", "how it ended", "late"]
    ends = {row[0]: row[3:] for row in table[1:]}
    assert ends["short block"] == ends["three steps"] == ["exit code 0", "-"]
    for name in ("overslept", "stuck in C with the GIL"):
        how, late = ends[name]
        assert how == "killed by SIGKILL"
        assert 0 <= float(late.removesuffix(" ms")) < 1000
    scopes = [row[1] for row in table[1:]]
    assert len(set(scopes)) == 4
    for scope in scopes:
        file, _, number = scope.partition("#")
        assert file == "demo.py"
        assert "with expires(" in SOURCE[int(number) - 1]


def test_live_lines(shown: tuple[list[str], list[str]]) -> None:
    """Every block entered or left, every expiry, kill and end has its line with its time."""
    moments = []
    told: dict[str, list[str]] = {}
    for line in shown[0]:
        moment, worker, what = line[:10], line[10:34].rstrip(), line[35:]
        assert re.fullmatch(r" *\d+\.\d{3} s  ", moment), line
        moments.append(float(moment.rstrip(" s")))
        if not what.startswith("  "):  # The stacks have a test of their own.
            told.setdefault(worker, []).append(re.sub(r" demo.py.*| as process.*", "", what))
    assert moments == sorted(moments)
    for worker, blocks in (("short block", 1), ("three steps", 3)):
        assert sorted(told[worker]) == sorted(
            ["started", "ended: exit code 0", *blocks * ["entered", "left"]]
        )
    for worker in ("overslept", "stuck in C with the GIL"):
        assert sorted(told[worker]) == [
            "ended: killed by SIGKILL",
            "entered",
            "server: kill worker process",
            "server: timer expired",
            "started",
        ]


def test_stacks(shown: tuple[list[str], list[str]]) -> None:
    """The last frame shown of each stuck worker names the very line in which it hangs."""
    for worker, hangs_in in (("overslept", "time.sleep"), ("stuck in C", "libc.sleep")):
        frames = [line for line in shown[0] if line[10:].startswith(worker) and 'File "' in line]
        match = re.search(r'demo.py", line (\d+), in ', frames[-1])
        assert match is not None
        assert hangs_in in SOURCE[int(match[1]) - 1]


def test_demo_that_goes_wrong(spawn: Callable[..., Child]) -> None:
    """A server that only claims to reap: exit status 1, and no worker is left."""
    child = spawn(
        f"""
        from elastic_timer._command import demo as _demo
        _demo._PATIENCE = 2.2
        _demo.FileTimerServer._reap_worker = lambda self, pid, signal: True
        {DEMO}
        """
    )
    assert child.process.stdout is not None
    output = child.process.stdout.read()
    assert child.wait() == 1
    assert "Something went wrong" in output
    workers = re.findall(r"started as process (\d+)", output)
    assert len(workers) == 4
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_demo_interrupted(spawn: Callable[..., Child], tmp_path: Path) -> None:
    """Ctrl-C in the middle: status 130, no worker and no folder left."""
    child = spawn(DEMO, env={"TMPDIR": str(tmp_path)})
    while "overslept" not in (line := child.readline()) or "entered" not in line:
        pass
    workers = child_pids(child.pid)
    assert workers
    os.kill(child.pid, signal.SIGINT)
    assert child.wait() == 130
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert list(tmp_path.iterdir()) == []


def hang_until_signalled(channel: Any, fifo_path: str, hang: Callable[[], None]) -> None:
    """Hang as a worker of the demo does, but live on to tell how many seconds that took."""

    def interrupt(*_: object) -> None:
        raise InterruptedError

    signal.signal(signal.SIGUSR1, interrupt)
    configure(FileTimerClient(fifo_path, signal.SIGUSR1))
    entered = time.monotonic()
    with contextlib.suppress(InterruptedError):
        hang()
    channel.send(time.monotonic() - entered)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
@pytest.mark.parametrize(("hang", "after"), [(_demo.overslept, 1.0), (_demo.stuck_in_c, 1.5)])
def test_stuck_worker_hangs_until_its_deadline(
    hang: Callable[[], None],
    after: float,
    fifo_path: str,
    fork_worker: Callable[..., ForkedWorker],
) -> None:
    """Of itself it would stay for a minute; the signal at its deadline ends that."""
    with running(FileTimerServer(fifo_path, "run")):
        worker = fork_worker(hang_until_signalled, fifo_path, hang)
        seconds = worker.receive()
        assert worker.wait() == 0
    assert after <= seconds < after + ALLOWED_LATENESS
