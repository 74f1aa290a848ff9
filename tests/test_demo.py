"""The command `elastic-timer demo`: what it shows, and what its exit status says."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_timer._command import demo as _demo
from tests.support import Child, eventually, marked_processes

pytestmark = pytest.mark.long

DEMO = "import sys; from elastic_timer._command.main import main; sys.exit(main(['demo']))"
SOURCE = Path(_demo.__file__).read_text().splitlines()


@pytest.fixture
def shown(made_once: Callable[[str, Callable[[Path], object]], Path]) -> list[str]:
    """The lines of one demo that went well."""
    return (made_once("demo", show_in) / "shown").read_text().splitlines()


def show_in(folder: Path) -> None:
    """Run it with the folder as its TMPDIR, and leave there what it has shown."""
    started = time.monotonic()
    child = Child(DEMO, env={"TMPDIR": str(folder)})
    with contextlib.closing(child):
        assert child.process.stdout is not None
        shown = child.process.stdout.read()
        assert child.wait() == 0, shown
    assert time.monotonic() - started < 30  # Some five on a machine that does nothing else.
    assert list(folder.iterdir()) == []
    (folder / "shown").write_text(shown)


def test_what_happens(shown: list[str]) -> None:
    """The rank that hangs is named and reaped, and the second attempt takes all steps."""
    assert [line[:3] for line in shown[-4:]] == ["yes"] * 4
    moments = [line[:10] for line in shown[:-5]]
    assert all(re.fullmatch(r" *\d+\.\d\d s  ", moment) for moment in moments)
    assert moments == sorted(moments)
    told = [line[10:] for line in shown[:-5]]
    steps = [line for line in told if line.startswith("step ")]
    assert steps == [f"step {step} is done" for step in (1, 2, 1, 2, 3, 4, 5)]
    suspects = [line for line in told if "suspect" in line]
    assert len(suspects) == 1
    assert re.match(r"  suspect: rank 3 \(.+, pid \d+\), ", suspects[0])
    groups = [line.split("  ")[2].strip() for line in told if line.startswith("    rank")]
    assert groups == ["rank 3", "ranks 0-2,4-7"]
    (reap,) = (line for line in told if line.startswith("the server reaps rank 3 and "))
    found = "the supervisor finds rank 3 dead (SIGKILL), and stops the other ranks"
    assert told.index(found) == told.index(reap) + 1


def test_place(shown: list[str]) -> None:
    """Shown of the stuck rank is the very line in which it hangs, in C code with the GIL held."""
    (place,) = [line for line in shown if "load_batch (demo.py:" in line]
    match = re.search(r"load_batch \(demo\.py:(\d+)\) < train", place)
    assert match is not None
    assert "PyDLL(None).sleep(60)" in SOURCE[int(match[1]) - 1]


def test_without_stacks(spawn: Callable[..., Child]) -> None:
    """Without py-spy the stuck rank is named as well: it is behind."""
    child = spawn(
        f"""
        from elastic_timer._evidence import stacks
        stacks.find_py_spy = lambda: None
        {DEMO}
        """
    )
    assert child.process.stdout is not None
    output = child.process.stdout.read()
    assert child.wait() == 0, output
    assert "load_batch" not in output


def test_demo_that_goes_wrong(spawn: Callable[..., Child]) -> None:
    """Ranks that take too long: exit status 1, it says so, and none is left."""
    child = spawn(
        f"""
        from elastic_timer._command import demo as _demo
        _demo._PATIENCE = 0.5
        _demo.FileTimerServer._reap_worker = lambda self, pid, signal: True
        {DEMO}
        """
    )
    assert child.process.stdout is not None
    output = child.process.stdout.read()
    assert child.wait() == 1
    assert "NO   It was reaped, and no other." in output
    assert "yes  No process is left of it." in output


def test_demo_interrupted(spawn: Callable[..., Child], tmp_path: Path) -> None:
    """Ctrl-C in the middle: status 130, no rank and no folder left, and no tracebacks of theirs."""
    child = spawn(DEMO, env={"TMPDIR": str(tmp_path)})
    while "step 1" not in child.readline():
        pass
    [folder] = tmp_path.iterdir()
    mark = f"{_demo._MARK}={folder}"
    assert len(marked_processes(mark)) >= _demo._RANKS
    os.killpg(child.pid, signal.SIGINT)  # As a terminal does.
    assert child.wait() == 130
    eventually(lambda: not marked_processes(mark))
    assert list(tmp_path.iterdir()) == []
    assert child.stderr_text() == ""


@pytest.mark.parametrize(("environment", "is_coloured"), [({}, True), ({"NO_COLOR": "1"}, False)])
def test_colour(environment: dict[str, str], is_coloured: bool) -> None:
    """On a terminal it has colours, unless NO_COLOR is set."""
    ours, theirs = pty.openpty()
    code = "from elastic_timer._command.demo import _coloured; print(_coloured('x', '31'))"
    with open(ours, "rb", buffering=0) as terminal:
        try:
            subprocess.run(
                [sys.executable, "-c", code],
                stdout=theirs,
                env={**os.environ, "TERM": "xterm", **environment},
                check=True,
            )
            assert (b"\x1b[31m" in terminal.read(100)) == is_coloured
        finally:
            os.close(theirs)
