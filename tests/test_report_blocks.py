"""`elastic-timer report`: what the blocks of all hosts took, from the last event of each run."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from elastic_timer._command.block_table import measured
from elastic_timer._command.main import main
from tests.support import Child
from tests.test_block_table import block, durations
from tests.test_summary import command

SCHEMA = json.loads((resources.files("elastic_timer") / "report.schema.json").read_text())


def event(
    host: str, time: float, run_id: str = "nightly", count: int = 20, since: float = 0.5
) -> dict[str, Any]:
    """An event of a host in the order of fields in which `run --events` writes them."""
    nothing = dict.fromkeys(("pid", "scope", "expiration_time", "signal"))
    blocks = [block("train.py#1", 60.0, durations(*[0.5] * count), durations(0.5))]
    head = {"time": time, "event": "blocks", "run_id": run_id, **nothing, "host": host}
    return {**head, "since": since, "blocks": blocks, "unmeasured": 0}


def write(path: Path, *lines: dict[str, Any] | str) -> Path:
    """A file of events, or of lines that are none."""
    texts = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
    path.write_text("".join(texts))
    return path


def test_last_of_each_server_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In whatever order files and lines come, and however many a run has written."""
    files = [
        write(tmp_path / "a-again", event("a", 2, count=100)),
        write(tmp_path / "a", event("a", 1, count=1), event("a", 1.5), event("a", 1, "second")),
        # Two of one run on one host, each with its last event behind one of the other's.
        write(
            tmp_path / "b",
            *(event("b", time, count=30, since=time % 2) for time in (3, 4, 5, 6)),
            event("c", 3, count=40),
        ),
    ]
    assert main(["report", *map(str, files)]) == 0
    _, _, title, header, line = capsys.readouterr().out.splitlines()
    assert title == "what the blocks took"
    assert header.split()[:3] == ["scope", "blocks", "median"]
    # What is told of a, its second run, b twice and c, and the first pass of each.
    assert line.split()[:2] == ["train.py#1", str(100 + 20 + 2 * 30 + 40 + 5)]


def test_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is known is there, by the schema."""
    path = write(tmp_path / "a", event("a", 1), event("b", 2))
    assert main(["report", "--json", str(path)]) == 0
    found = json.loads(capsys.readouterr().out)
    jsonschema.Draft202012Validator(SCHEMA).validate(found)
    assert [(each["host"], each["time"]) for each in found["blocks"]] == [("a", 1), ("b", 2)]
    assert found["blocks"][0]["blocks"][0]["histogram"] == durations(*[0.5] * 20)["histogram"]


def test_no_blocks_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is said of what was not measured."""
    path = write(tmp_path / "a", {"time": 1, "event": "watchdog started"})
    assert main(["report", str(path)]) == 0
    assert "blocks" not in capsys.readouterr().out


def test_line_that_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one before it counts then."""
    path = write(tmp_path / "a", event("a", 1), json.dumps(event("a", 2, count=99))[:-9])
    assert main(["report", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "train.py#1      21" in out
    assert "cut off in the middle of a line" in err


WRONG: list[Callable[[dict[str, Any]], object]] = [
    lambda event: event.pop("unmeasured"),
    lambda event: event.pop("since"),
    lambda event: event.update(blocks=7),
    lambda event: event["blocks"][0].pop("first"),
    lambda event: event["blocks"][0].update(longest=None),
    lambda event: event["blocks"][0].update(longest=math.inf),
    lambda event: event["blocks"][0].update(longest=-1),
    lambda event: event["blocks"][0].update(longest=math.nan),
    lambda event: event["blocks"][0].update(after="soon"),
    lambda event: event["blocks"][0].update(histogram=[1]),
]


@pytest.mark.parametrize("spoil", WRONG)
def test_event_of_nobody_knows_whom(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], spoil: Callable[[dict[str, Any]], object]
) -> None:
    """What is not as it should be is left out and said to be broken; the report goes on."""
    wrong = event("b", 1)
    spoil(wrong)
    with pytest.raises((KeyError, TypeError, ValueError)):
        measured(wrong)
    path = write(tmp_path / "b", wrong, event("a", 1))
    assert main(["report", str(path)]) == 0
    out, err = capsys.readouterr()
    assert "train.py#1      21" in out
    assert "cut off" in err


def test_absurd_buckets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No number is too large for the table."""
    absurd = event("a", 1)
    absurd["blocks"][0]["histogram"] = [[10**30, 1], [-(10**30), 1]]
    assert main(["report", str(write(tmp_path / "a", absurd))]) == 0
    assert "train.py#1      21" in capsys.readouterr().out


def test_what_run_writes_is_what_report_reads(
    run: Callable[..., Child], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table at the end of a run and that of the report are the same; of several the sum."""
    path = tmp_path / "events"
    options = ("--summary", "--run-id", "nightly", "--events", str(path))
    child = run(*options, *command())
    assert child.wait() == 0
    assert main(["report", str(path)]) == 0
    _, _, table = capsys.readouterr().out.partition("what the blocks took\n")
    assert table
    assert child.stderr_text().endswith(table)
    # The next attempt of a job, or another task of it on this host.
    assert run(*options, *command()).wait() == 0
    assert main(["report", str(path)]) == 0
    assert re.search(r"^train\.py#7 +40 ", capsys.readouterr().out, re.M)
