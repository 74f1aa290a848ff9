"""The way to the right deadline: measured in a dry run, suggested, and then each hang is found."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from elastic_timer._command.block_table import block_table
from tests.interop.conftest import JOBS, UPSTREAM, Launch, read_lines

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")

PHASES = ("load", "step", "validate", "checkpoint")
RANKS = 2
# 16 passes, of all ranks, make a suggestion.
EPOCHS = 9
# All deadlines are so many times shorter than the table suggests, as if the job were so many times
# slower than it is: the shortest, a minute, would make of four hangs a long test.
FASTER = 15
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]


def slower(event: dict[str, Any], times: float) -> dict[str, Any]:
    """The same event "blocks" as a job would leave it that takes so many times longer."""
    event = json.loads(json.dumps(event))
    for block in event["blocks"]:
        block["after"] *= times
        for durations in (block, block["first"]):
            durations["longest"] = durations["longest"] and durations["longest"] * times
    return event


def suggested(table: str) -> dict[str, float]:
    """The deadlines that a table suggests, as one reads them off it."""
    header, *lines = table.splitlines()
    end = header.index("suggested") + len("suggested")
    found = (re.fullmatch(r"(\w+) .* ([\d,]+) s", line[:end]) for line in lines)
    return {match[1]: float(match[2].replace(",", "")) for match in found if match}


@pytest.fixture
def phases_that_hang(request: pytest.FixtureRequest) -> tuple[str, ...]:
    """One after the other, each in an attempt of its own."""
    is_every = request.config.getoption("--every-phase", False)
    return PHASES if is_every else ("step",)


@pytest.mark.timeout(600)  # Four hangs, one after the other.
def test_each_hang_is_found_by_the_suggested_deadlines(
    launch: Launch, tmp_path: Path, phases_that_hang: tuple[str, ...]
) -> None:
    """A hang in a phase is ended by its deadline, and no phase that goes on is disturbed."""
    deadlines, record, events = (tmp_path / name for name in ("deadlines", "record", "events"))

    def job(*options: str, restarts: int, epochs: int, hanging: tuple[str, ...]) -> str:
        for file in (record, events):
            file.write_text("")
        run = ["-m", "elastic_timer", "run", "--events", str(events), *options, "--"]
        torchrun = [*TORCHRUN, "--nproc-per-node", str(RANKS), "--max-restarts", str(restarts)]
        script = [str(JOBS / "phases.py"), str(deadlines), str(record), str(epochs), *hanging]
        started = launch(*run, sys.executable, *torchrun, *script)
        assert started.wait(240) == 0, started.output
        return started.output

    # Deadlines out of the blue: all of them too short. Nobody is killed for that.
    deadlines.write_text(json.dumps(dict.fromkeys(PHASES, 0.05)))
    output = job("--dry-run", "--summary", restarts=0, epochs=EPOCHS, hanging=())
    [*_, measured] = [line for line in read_lines(events) if line["event"] == "blocks"]
    assert block_table([measured]) in output
    check_durations(measured, read_lines(record))
    told = {line["event"] for line in read_lines(events)}
    assert "would kill worker process" in told
    assert "kill worker process" not in told

    table = block_table([slower(measured, FASTER)])
    print(table)
    found = suggested(table)
    assert set(found) == set(PHASES), table
    deadlines.write_text(json.dumps({name: found[name] / FASTER for name in PHASES}))

    hangs = phases_that_hang
    output = job(restarts=len(hangs), epochs=HANGING_EPOCHS, hanging=hangs)
    lines = read_lines(record)
    hanging = [line for line in lines if line["event"] == "hanging"]
    assert [line["phase"] for line in hanging] == list(hangs), output
    finished = [(line["attempt"], line["rank"]) for line in lines if line["event"] == "finished"]
    assert sorted(finished) == [(len(hangs), rank) for rank in range(RANKS)]
    kills = [line for line in read_lines(events) if line["event"] == "kill worker process"]
    for line in hanging:
        # The rank that hangs, or one that waits for it: torchrun ends the others then.
        ended = [
            kill
            for kill in kills
            if 0 < kill["time"] - line["time"] - found[line["phase"]] / FASTER < 5
        ]
        assert ended, f"nobody noticed {line}: {kills}"
        assert {kill["scope"] for kill in ended} == {line["phase"]}
        kills = [kill for kill in kills if kill not in ended]
    assert not kills, "a phase that went on was disturbed"


HANGING_EPOCHS = 2
"""The fewest: it hangs in the second."""


def check_durations(measured: dict[str, Any], lines: list[dict[str, Any]]) -> None:
    """The longest of each phase is what its slowest rank found, too."""
    for block in measured["blocks"]:
        own = [line for line in lines if line.get("phase") == block["scope"]]
        assert block["entered"] == len(own)
        longest = max(line["seconds"] for line in own)
        found = max(block["longest"], block["first"]["longest"])
        # Wider than promised: here the machine is busy with the job itself.
        assert found == pytest.approx(longest, abs=0.5), block


@pytest.mark.parametrize("library", ["elastic_timer", UPSTREAM])
def test_blocks_of_torchs_own_client(launch: Launch, tmp_path: Path, library: str) -> None:
    """They are measured as ours are: the server needs no more than what they send anyway."""
    events = tmp_path / "events"
    source = f"""
import os, time
from {library} import FileTimerClient, configure, expires
configure(FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"]))
for step in range(3):
    with expires(after=60, scope="step"):
        time.sleep(0.25)
"""
    job = launch(
        *("-m", "elastic_timer", "run", "--events", str(events), "--summary", "--"),
        *(sys.executable, "-c", source),
    )
    assert job.wait() == 0, job.output
    [*_, event] = [line for line in read_lines(events) if line["event"] == "blocks"]
    [block] = event["blocks"]
    assert (block["scope"], block["entered"], block["left"], block["after"]) == ("step", 3, 2, 60)
    assert block["longest"] == pytest.approx(0.25, abs=0.1)
    assert re.search(r"^step +3 ", job.output, re.M)
