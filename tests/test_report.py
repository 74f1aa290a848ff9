"""`elastic-timer report`: from files of events of many hosts to who hung the job."""

from __future__ import annotations

import copy
import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_timer._command import event_reader
from elastic_timer._command.event_reader import EventReader
from elastic_timer._command.hangs import hangs_of
from elastic_timer._command.main import main
from elastic_timer._evidence.picture import Picture, describe, who_hangs
from tests.picture_support import (
    LOADS,
    MAIN,
    NOW,
    WAITS,
    event,
    member,
    picture,
    recorded,
    thread,
)
from tests.support import CLI, Child, Spawn
from tests.test_report_blocks import event as blocks_event

SCHEMA = json.loads((resources.files("elastic_timer") / "report.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
MEMBER = jsonschema.Draft202012Validator({"$ref": "#/$defs/member", "$defs": SCHEMA["$defs"]})

STUCK = 6

Report = Callable[..., tuple[int, str, str]]


@pytest.fixture
def report(capsys: pytest.CaptureFixture[str]) -> Report:
    """`report(argument, ...)`: the exit status, and what the command wrote to stdout and stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        status = main(["report", *map(str, arguments)])
        return status, *capsys.readouterr()

    return call


def host(number: int, **changes: Any) -> Picture:
    """What a host with four of eight ranks has seen, one of which hangs."""
    ranks = [
        member(rank, *(LOADS if rank == STUCK else WAITS), **changes)
        for rank in range(4 * number, 4 * number + 4)
    ]
    return picture(ranks, world_size=8)


def lines_of(*events: dict[str, Any]) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in events)


@pytest.fixture
def two_hosts(tmp_path: Path) -> list[Path]:
    """The files of two hosts, with other events around the pictures."""
    paths = []
    for number in range(2):
        expired = {"time": NOW, "event": "timer expired", "evidence": {"command": "job hangs"}}
        unknown = {"time": NOW, "event": "something new", "picture": {"job hangs": 1}}
        seen = event(host(number), NOW + 1.9 * number)
        paths.append(tmp_path / f"node-{number}.jsonl")
        paths[-1].write_bytes(lines_of({"event": "watchdog started"}, expired, seen, unknown))
    return paths


# What it says -------------------------------------------------------------------------------------


def test_two_hosts(report: Report, two_hosts: list[Path]) -> None:
    """The rank and its host, in whatever order the files are given."""
    loads = "load (data.py:41) < __next__ (data.py:77) < main (train.py:71)"
    waits = "all_reduce (distributed_c10d.py:2950) < step (train.py:88) < main (train.py:71)"
    status, text, errors = report(*two_hosts)
    assert (status, errors) == (0, "")
    assert text.splitlines()[:5] == [
        "2026-11-20 04:55:03 UTC, run nightly, world size 8, restart 0",
        "elastic-timer: 8 ranks on 2 hosts, 2 groups of stacks",
        "suspect: rank 6 (node-1, pid 4006), the only one that does not wait in a collective",
        f"  rank 6       {loads:{len(waits)}}   in train.py#86, pass 7, 60.0 s",
        f"  ranks 0-5,7  {waits}   in train.py#86, pass 7, 60.0 s",
    ]
    assert report(*reversed(two_hosts)) == (status, text, errors)
    assert report(*two_hosts, *two_hosts) == (status, text, errors)


def test_missing_file(report: Report, two_hosts: list[Path]) -> None:
    """It says of which ranks it knows nothing, also where it has a suspect."""
    _, text, _ = report(two_hosts[0])
    assert (
        "\nsuspects: ranks 4-7, of which no file tells; "
        "all 4 ranks that are known wait in a collective\n"
    ) in text
    assert "  no file tells of ranks 4-7\n" in text
    _, text, _ = report(two_hosts[1])
    assert "\nsuspect: rank 6 (node-1, pid 4006), the only one" in text
    assert "  no file tells of ranks 0-3\n" in text


def test_several_hangs(report: Report, tmp_path: Path) -> None:
    """Each has its answer, in the order of time; a job says of itself what it knows."""
    seen = host(0)
    seen["job"] = {"run_id": None, "world_size": None, "restart_count": None}
    (tmp_path / "a").write_bytes(lines_of(event(seen, NOW + 100), event(host(1), NOW + 9000)))
    (tmp_path / "b").write_bytes(lines_of(event(host(0), NOW + 9001)))
    _, text, _ = report(tmp_path / "a", tmp_path / "b")
    first, second = text.split("\n\n")
    assert first.startswith(
        "hang 1 of 2: 2026-11-20 04:56:43 UTC\nelastic-timer: 4 ranks on 1 host"
    )
    assert "no suspect: all ranks are at the same place" in first
    assert second.startswith("hang 2 of 2: 2026-11-20 07:25:03 UTC, run nightly, world size 8")
    assert "8 ranks on 2 hosts" in second


def test_texts_of_others(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They can't draw on the terminal, and what that has no letter for is shown by its number."""
    evil = "é\x1b[2J\nfree\udcff"
    took = blocks_event("node-0", NOW)
    took["blocks"][0]["scope"] = evil
    seen = picture([member(0, *WAITS, scope=evil, passes={evil: 7})], run_id=evil)
    (tmp_path / "a").write_bytes(lines_of(event(seen), took))
    text = report(tmp_path / "a")[1]
    assert text.count("é [2J free") == 3
    assert all(line.isprintable() for line in text.splitlines())
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert report(tmp_path / "a")[0] == 0
    stream.seek(0)
    assert stream.read() == text.replace("é", "\\xe9")


def test_containers_of_one_host_name(report: Report, tmp_path: Path) -> None:
    """Their ranks may have the same pids, as where a container has the host's network and name."""
    for number in range(2):
        seen = host(number)
        for index, each in enumerate(seen["members"]):
            each["host"], each["pid"] = "node", 7 + index
        (tmp_path / f"{number}").write_bytes(lines_of(event(seen, NOW + number)))
    text = report(tmp_path / "0", tmp_path / "1")[1]
    assert "\nelastic-timer: 8 ranks on 1 host, 2 groups of stacks\nsuspect: rank 6 (node, " in text


RANKS = """
    import os, sys, time, elastic_timer

    def meet(): time.sleep(60)
    def load(): time.sleep(60)

    elastic_timer.configure()
    with elastic_timer.expires(after=1, scope=sys.argv[1]):
        print("there", flush=True)
        globals()[sys.argv[1]]()
"""


def test_each_rank_with_a_server_of_its_own(
    report: Report, run: Callable[..., Child], tmp_path: Path
) -> None:
    """As `srun` starts them: no server takes another rank's for that, and all are one hang."""
    job = {"WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": str(uuid.uuid4())}
    command = [sys.executable, "-c", textwrap.dedent(RANKS)]
    tasks, files = [], []
    for rank, place in enumerate(["meet", "load", "meet"]):
        files.append(tmp_path / f"{rank}.jsonl")
        options = ("--collective", "meet", "--events", str(files[-1]))
        tasks.append(run(*options, "--", *command, place, env={**job, "SLURM_PROCID": str(rank)}))
    for task in tasks:
        assert task.readline() == "there"
    for task in tasks:
        assert task.wait() == 128 + signal.SIGKILL
    for task in (tasks[0], tasks[2]):
        assert "the only rank here waits in a collective; the suspect is another rank: elastic" in (
            task.stderr_text()
        )
    text = report("--collective", "meet", *files)[1]
    assert text.count("suspect") == 1
    assert "\nelastic-timer: 3 ranks on 1 host, 2 groups of stacks\nsuspect: rank 1 (" in text
    assert "), the only one that does not wait in a collective\n" in text


def test_no_hang(report: Report, tmp_path: Path) -> None:
    """That is said, and is no failure."""
    path = tmp_path / "events"
    path.write_bytes(lines_of({"event": "watchdog started"}))
    assert report(path) == (0, "elastic-timer: no hang in 1 file\n", "")
    path.write_bytes(b"")
    assert report(path, path) == (0, "elastic-timer: no hang in 2 files\n", "")


def test_no_events(report: Report, tmp_path: Path) -> None:
    """Of a file that is something else nothing is concluded, nor of one that is not there."""
    log = tmp_path / "log"
    log.write_text("elastic-timer 12:34:56.789: Reaped worker 4711\n")
    missing = tmp_path / "missing"
    complaints = (
        f"elastic-timer: cannot read {log}: there are no events in it\n"
        f"elastic-timer: cannot read {missing}: No such file or directory\n"
    )
    assert report(log, missing) == (1, "", complaints)
    empty = tmp_path / "empty"
    empty.touch()
    assert report(empty) == (0, "elastic-timer: no hang in 1 file\n", "")


def test_reader_that_has_seen_enough(spawn: Spawn, tmp_path: Path) -> None:
    """A closed pipe is no wrong usage, and no error to make words about."""
    path = tmp_path / "events"
    path.write_bytes(lines_of(event(host(0))))
    reader, writer = os.pipe()
    os.close(reader)
    # The second has more to say than what is written at the end.
    reports = ([str(path)], ["--json", *500 * [str(path)]])
    children = [spawn(CLI, "report", *arguments, stdout=writer) for arguments in reports]
    os.close(writer)
    for child in children:
        assert child.wait() == 1
        assert child.stderr_text() == ""


def test_named_collective(report: Report, tmp_path: Path) -> None:
    """Where ranks wait by other means than torch's, somebody has to say so."""
    places = {True: ("sync (train.py:5)",), False: LOADS}
    ranks = [member(rank, *places[rank == 0], *MAIN) for rank in range(2)]
    path = tmp_path / "events"
    path.write_bytes(lines_of(event(picture(ranks))))
    assert "no suspect" in report(path)[1]
    assert "suspect: rank 1 " in report("--collective", "other", "--collective", "sync", path)[1]


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No files, a command, a file for the stacks that can't be made: status 2."""
    (tmp_path / "events").touch()
    given = str(tmp_path / "events")
    for arguments in ([], [given, "--", "true"], [given, "--folded", str(tmp_path)]):
        with pytest.raises(SystemExit) as exit_:
            main(["report", *arguments])
        assert exit_.value.code == 2
    assert "a report takes no COMMAND" in capsys.readouterr().err


def test_events_are_not_written_over(
    two_hosts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Who takes `--folded` for a flag loses no file; the stacks of an earlier report may go."""
    before = [path.read_bytes() for path in two_hosts]
    with pytest.raises(SystemExit) as exit_:
        main(["report", "--folded", *map(str, two_hosts)])
    assert exit_.value.code == 2
    assert f"is not written over: '{two_hosts[0]}'" in capsys.readouterr().err
    assert [path.read_bytes() for path in two_hosts] == before
    for _ in range(2):
        assert main(["report", "--folded", f"{two_hosts[0]}.folded", *map(str, two_hosts)]) == 0


# Files --------------------------------------------------------------------------------------------


def test_unreadable_files(report: Report, two_hosts: list[Path], tmp_path: Path) -> None:
    """Each is named with the reason; the others are reported, and the status is 1."""
    status, text, errors = report(tmp_path / "nothing", *two_hosts, tmp_path)
    assert status == 1
    assert "suspect: rank 6 " in text
    assert errors.splitlines() == [
        f"elastic-timer: cannot read {tmp_path / 'nothing'}: No such file or directory",
        f"elastic-timer: cannot read {tmp_path}: Is a directory",
    ]


def test_cut_off_at_any_place(two_hosts: list[Path], tmp_path: Path) -> None:
    """What was whole before the cut is there, and what was cut off is said to be."""
    whole = two_hosts[0].read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in (*range(0, len(whole), 97), *ends, *(end - 1 for end in ends)):
        path = tmp_path / "cut"
        path.write_bytes(whole[:length])
        reader = EventReader()
        reader.read(str(path))
        # The end of a line may be missing alone; what was in it counts.
        assert len(reader.sightings) == (length >= ends[2] - 1)
        [file] = reader.files
        at_an_end = length in (0, *ends) or length + 1 in ends[1:]
        assert file.broken == (not at_an_end), length


def test_many_cut_off_files(report: Report, tmp_path: Path) -> None:
    """They are named in one line."""
    for number in range(5):
        (tmp_path / str(number)).write_bytes(lines_of(event(host(number)))[:-20])
    (tmp_path / "whole").write_bytes(lines_of(event(host(0))))
    status, text, errors = report(*sorted(tmp_path.iterdir()))
    assert status == 0
    assert "no file tells of ranks " in text
    names = ", ".join(str(tmp_path / str(number)) for number in range(3))
    assert errors == f"elastic-timer: cut off in the middle of a line: {names} and 2 more\n"


def test_line_behind_one_that_was_cut_off(tmp_path: Path) -> None:
    """A server that was started again has appended to it."""
    (tmp_path / "events").write_bytes(lines_of(event(host(1)))[:-300] + lines_of(event(host(0))))
    reader = EventReader()
    reader.read(str(tmp_path / "events"))
    assert [sighting.host for sighting in reader.sightings] == ["node-0"]
    assert reader.files[0].broken == 1
    # There is an end to what is looked for behind a cut.
    (tmp_path / "events").write_bytes(b'{"time"' * 300_000 + b"job hangs\n")
    reader.read(str(tmp_path / "events"))
    assert reader.files[1].broken == 1


def test_stacks_that_are_alike_are_kept_once(two_hosts: list[Path]) -> None:
    """A thousand ranks that wait in one place take the memory of one."""
    reader = EventReader()
    reader.read(str(two_hosts[0]))
    members = reader.sightings[0].picture["members"]
    frames = [(each["stacks"] or [])[0]["frames"] for each in members]
    assert len(frames) == 4
    assert all(each is frames[0] for each in frames)


def test_long_lines_are_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a file is, no more of it is in memory than a line can have."""
    monkeypatch.setattr(event_reader, "_LONGEST_LINE", 1000)
    (tmp_path / "events").write_bytes(b"x" * 5000 + b"\n" + lines_of({"event": "job hangs"}))
    reader = EventReader()
    reader.read(str(tmp_path / "events"))
    assert reader.files[0].broken == 6
    assert reader.sightings == []


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to all values within a JSON value."""
    if not isinstance(value, (dict, list)):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [path, *itertools.chain(*(paths_in(item, (*path, key)) for key, item in items))]


def sample() -> dict[str, Any]:
    seen = picture(recorded("data_loader")[2:])
    seen["members"][0]["passes"] = {"a": 1}
    del seen["members"][0]["descendants"][1:]
    return event(seen)


SAMPLE = sample()
PATHS = paths_in(SAMPLE)


@given(
    st.sampled_from(PATHS[1:]),
    st.sampled_from([None, 7, -1.5, 1e999, 10**400, "x", "1", True, [], {}, [None], {"a": None}]),
)
def test_whatever_a_line_is(path: tuple[Any, ...], value: Any) -> None:
    """A value of another kind anywhere in it loses the line at most; what is kept can be used."""
    changed = copy.deepcopy(SAMPLE)
    where = changed
    for key in path[:-1]:
        where = where[key]
    where[path[-1]] = value
    reader = EventReader()
    line = json.dumps(changed).encode()
    is_whole = reader._take(line)
    for sighting in reader.sightings:
        assert is_whole
        for each in sighting.picture["members"]:
            MEMBER.validate(each)
    for hang in hangs_of(reader.sightings):
        assert describe(who_hangs(hang.pictures))


@pytest.mark.parametrize(
    "changes", [{"time": float("inf")}, {"time": 1e20}, {"time": "now"}, {"host": None}]
)
def test_event_that_can_not_be_placed(changes: dict[str, Any]) -> None:
    """It has to be of some time and some host."""
    reader = EventReader()
    assert not reader._take(json.dumps({**SAMPLE, **changes}).encode())
    assert not reader.sightings


@pytest.mark.parametrize(
    "line", [b"job hangs", b'"job hangs"', b"[" * 100_000 + b"job hangs", b"\xff job hangs", b"1"]
)
def test_line_that_is_no_event(line: bytes) -> None:
    """It is one that is broken."""
    assert not EventReader()._take(line)


# Other formats ------------------------------------------------------------------------------------


def test_json(report: Report, two_hosts: list[Path], tmp_path: Path) -> None:
    """All that is known, as its schema has it."""
    status, text, _ = report("--json", *two_hosts, tmp_path / "nothing")
    found = json.loads(text)
    VALIDATOR.validate(found)
    assert status == 1
    assert [file["error"] is None for file in found["files"]] == [True, True, False]
    [hang] = found["hangs"]
    assert hang["suspected"] == [6]
    assert [each["rank"] for each in hang["members"]] == list(range(8))
    assert [each["in_collective"] for each in hang["members"]] == [True] * 6 + [False, True]
    assert hang["members"][:4] == [{**each, "in_collective": True} for each in host(0)["members"]]
    # Several hangs, and none.
    (tmp_path / "later").write_bytes(lines_of(event(host(0), NOW + 9000)))
    found = json.loads(report("--json", *two_hosts, tmp_path / "later")[1])
    VALIDATOR.validate(found)
    assert len(found["hangs"]) == 2
    (tmp_path / "later").write_bytes(b"")
    found = json.loads(report("--json", tmp_path / "later")[1])
    VALIDATOR.validate(found)
    assert found["hangs"] == []


def test_folded(report: Report, two_hosts: list[Path], tmp_path: Path) -> None:
    """One line for each stack, as wide as it has ranks, which stand at its tip."""
    report("--folded", tmp_path / "folded", *two_hosts)
    assert sorted((tmp_path / "folded").read_text().splitlines()) == [
        "<module> (train.py:99);main (train.py:71);__next__ (data.py:77);load (data.py:41);"
        "rank 6 1",
        "<module> (train.py:99);main (train.py:71);step (train.py:88);wrapper (c10d_logger.py:83);"
        "all_reduce (distributed_c10d.py:2950);ranks 0-5,7 7",
    ]


def test_folded_children_and_hangs(report: Report, tmp_path: Path) -> None:
    """A child at work goes on where its parent waits for it; several hangs are apart."""
    ranks = recorded("data_loader")
    ranks[0]["stacks"] = None
    ranks[1]["descendants"] = ranks[2]["descendants"]  # At work while it waits for other ranks.
    stack = thread("a;b (c.py:1)")
    other = event(picture([member(0, stacks=[stack])], run_id="other;one"), NOW + 1)
    path = tmp_path / "events"
    path.write_bytes(lines_of(event(picture(ranks)), other))
    report("--folded", tmp_path / "folded", path)
    lines = (tmp_path / "folded").read_text().splitlines()
    assert all(re.fullmatch(r"[^;]+(;[^;]+)+ \d+", line) for line in lines)
    assert lines[0].endswith("restart 0;no stacks;rank 0 1")
    [child] = [line for line in lines if "its child process" in line]
    assert child.startswith(
        "hang 1: 2026-11-20 04:55:03 UTC, run nightly, world size 3, restart 0;<"
    )
    assert "select (selectors.py:415);its child process;BaseProcess._bootstrap" in child
    assert child.endswith("Images.fetch (data.py:20);rank 2 1")
    assert lines[3].endswith("run other,one, world size 1, restart 0;a,b (c.py:1);rank 0 1")


# Many hosts ---------------------------------------------------------------------------------------

HOSTS = 100
"""The figures for 1,000 are in the documentation."""


def write_hosts(folder: Path, hosts: int, stuck: int) -> set[int]:
    """Write the events of hosts with eight ranks each, one of which hangs in its data loader.

    Clocks are up to two seconds apart, and every tenth host was cut off in its picture.

    Returns:
        The ranks whose pictures were cut off.
    """
    rng = random.Random(7)
    victim, _, culprit = recorded("data_loader")
    lost: set[int] = set()
    for number in range(hosts):
        name, now, ranks = f"node-{number:04}", NOW + rng.uniform(-1, 1), []
        for rank in range(8 * number, 8 * number + 8):
            is_stuck = rank == stuck
            each = member(
                rank,
                host=name,
                pid=5000 + rank,
                local_rank=rank % 8,
                scope="/job/data.py#70" if is_stuck else "/job/train.py#86",
                passes={"/job/data.py#70": 12, "/job/train.py#86": 12 - is_stuck},
                seconds=60 + rng.random(),
                expired=rng.random() < 0.5,
            )
            like = copy.deepcopy(culprit if is_stuck else victim)
            each["stacks"], each["descendants"] = like["stacks"], like["descendants"]
            for stack in each["stacks"] or []:
                stack["id"] = rng.randrange(1 << 47)
            ranks.append(each)
        seen = event(picture(ranks, world_size=8 * hosts), now + rng.random())
        evidence = [
            {"time": now + 1, "event": "timer expired", "host": name, "evidence": each}
            for each in ranks
        ]
        written = lines_of({"event": "watchdog started"}, seen, *evidence)
        if number % 10 == 3:
            written = written[: rng.randrange(500, len(json.dumps(seen)) - 1)]
            lost.update(range(8 * number, 8 * number + 8))
        (folder / f"{name}.jsonl").write_bytes(written)
    return lost


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_many_hosts(spawn: Spawn, tmp_path: Path) -> None:
    """The one stuck rank of many is told in seconds, in little memory, on one screen."""
    stuck = 8 * (HOSTS // 2) + 5
    lost = write_hosts(tmp_path, HOSTS, stuck)
    # Not what getrusage tells: that begins with what the parent had when it forked.
    used = """if True:
        import atexit, pathlib, re, time
        status = pathlib.Path("/proc/self/status")
        peak = lambda: re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]
        atexit.register(lambda: print(peak(), time.process_time()))"""
    files = sorted(map(str, tmp_path.iterdir()), reverse=True)
    child = spawn(f"{used}\n{CLI}", "report", *files, stderr=subprocess.STDOUT)
    output, _ = child.process.communicate(timeout=60)
    assert child.process.returncode == 0, output
    cut, _, counted, suspect, stack, others, unknown, *details = output.splitlines()
    assert cut.startswith("elastic-timer: cut off in the middle of a line: ")
    assert cut.endswith(" and 7 more")
    assert (
        counted == f"elastic-timer: {8 * HOSTS - len(lost)} ranks on 90 hosts, 2 groups of stacks"
    )
    assert suspect.startswith(
        f"suspect: rank {stuck} (node-0050, pid {5000 + stuck}), behind: pass 11"
    )
    assert "its child: Images.fetch (data.py:20)" in stack
    assert "all_reduce" in others
    assert "no file tells of ranks " in unknown
    assert len(details) < 40
    kibibytes, seconds = map(float, details[-1].split())
    # A tenth of the hosts, in a tenth of the time and memory that there is for a thousand.
    assert seconds < 5
    assert kibibytes < 100 * 1024
