"""`elastic-timer run --summary` and `--dry-run`, with real workers and their events."""

from __future__ import annotations

import json
import os
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elastic_timer._command.block_table import block_table
from tests.support import CLI, Child, fill_pipe
from tests.test_events import records_in

# 20 steps of some 10 ms, and one block that overruns its deadline by far.
COMMAND = """
    import sys, time, elastic_timer
    from elastic_timer import expires

    elastic_timer.configure()
    for step in range(20):
        with expires(after=60, scope="/job/train.py#7"):
            time.sleep(0.01)
    with expires(after=0.2, scope="long"):
        time.sleep(float(sys.argv[1]))
    print("at the end", flush=True)
"""


def command(seconds: float = 0.1) -> list[str]:
    """A COMMAND whose last block takes so long."""
    return ["--", sys.executable, "-c", textwrap.dedent(COMMAND), str(seconds)]


def test_summary(run: Callable[..., Child]) -> None:
    """Once COMMAND has ended, a table in the log says what its blocks took."""
    child = run("--summary", *command())
    assert child.readline() == "at the end"
    assert child.wait() == 0
    lines = child.stderr_text().splitlines()
    assert re.fullmatch(r"elastic-timer [\d:.]+: what the blocks took", lines[0])
    assert re.sub(" +", " ", lines[1]) == "scope blocks median p99 longest after used suggested"
    assert re.fullmatch(r"train\.py#7 +20  +1\d ms  .*  60 s +\d+(\.\d)? % +60 s.*", lines[2])
    assert re.fullmatch(r"long +1 .* 0\.2 s +\d+ % +too few  too tight", lines[3])
    assert len(lines) == 4


def test_summary_of_nothing(run: Callable[..., Child]) -> None:
    """A COMMAND without blocks is said to have none."""
    child = run("--summary", "--", "true")
    assert child.wait() == 0
    assert child.stderr_text().endswith(": no blocks were entered\n")


def test_summary_that_nobody_reads(run: Callable[..., Child]) -> None:
    """It holds the end up for no more than a second or two, and the status is COMMAND's."""
    reader, writer = os.pipe()
    try:
        fill_pipe(writer)
        os.set_blocking(writer, True)
        child = run("--summary", "--", "sh", "-c", "exit 7", stderr=writer)
        assert child.wait(15) == 7
    finally:
        os.close(reader)
        os.close(writer)


def test_blocks_among_the_events(run: Callable[..., Child], tmp_path: Path) -> None:
    """Every ten minutes, here every tenth of a second, and at the end; the last has everything."""
    path = tmp_path / "events"
    often = "import elastic_timer._server.server as server; server._BLOCKS_INTERVAL = 0.1\n"
    child = run("--summary", "--events", str(path), *command(0.15), source=often + CLI)
    assert child.wait() == 0
    told = [record for record in records_in(path) if record["event"] == "blocks"]
    assert len(told) >= 2
    entered = [sum(block["entered"] for block in record["blocks"]) for record in told]
    assert entered == sorted(entered)
    assert entered[-1] == 21
    last: dict[str, Any] = {block["scope"]: block for block in told[-1]["blocks"]}
    step = last["/job/train.py#7"]
    assert (step["left"], step["first"]["left"], step["after"]) == (19, 1, 60)
    assert sum(count for _, count in step["histogram"]) == 19
    # What is printed is made of nothing else.
    assert child.stderr_text().endswith(f"what the blocks took\n{block_table(told[-1:])}\n")


def test_dry_run(run: Callable[..., Child], tmp_path: Path) -> None:
    """A worker that would be killed comes to its end, and all is told; its block counts."""
    path = tmp_path / "events"
    child = run("--dry-run", "--summary", "--events", str(path), *command(0.6))
    assert child.readline() == "at the end"
    assert child.wait() == 0
    names = [record["event"] for record in records_in(path)]
    assert names == [
        "watchdog started",
        "timer expired",
        "would kill worker process",
        "worker exited",
        "blocks",
        "watchdog stopped",
    ]
    text = child.stderr_text()
    assert "Dry run: would have reaped worker" in text
    assert re.search(r"^long +1 .* 0\.2 s +3\d\d % +too few  too tight, 1 expired$", text, re.M)


def test_without_dry_run(run: Callable[..., Child], tmp_path: Path) -> None:
    """The same worker is killed; its block has expired, and nobody left it."""
    path = tmp_path / "events"
    child = run("--summary", "--events", str(path), *command(60))
    assert child.wait() == 137
    [_, *last] = [json.loads(line) for line in path.read_text().splitlines()][-3:]
    assert [record["event"] for record in last] == ["blocks", "watchdog stopped"]
    assert re.search(r"^long +1 +- .* too few  1 expired$", child.stderr_text(), re.M)
