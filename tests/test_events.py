"""`elastic-timer run --events`: what is written, by its schema, and to files that are none."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from elastic_timer import FileTimerRequest
from elastic_timer._command.event_file import EventFile
from elastic_timer._server import events as kinds
from elastic_timer._server.callbacks import flush_log
from tests.support import REPOSITORY, Child, fill_pipe

SCHEMA = json.loads((resources.files("elastic_timer") / "events.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def records_in(path: Path) -> list[dict[str, Any]]:
    """The objects in a file of events, each of which the schema allows."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        VALIDATOR.validate(record)
    return records


# It has a worker that overruns, one that only wants that to be reported, and one that ends within
# its block, which is known once others have expired; and it waits until all ends were noticed.
COMMAND = """
    import os, pathlib, sys, time, elastic_timer
    from elastic_timer import FileTimerClient, expires

    def start(work):
        pid = os.fork()
        if pid == 0:
            work()
            os._exit(0)
        return pid

    def overrun():
        with expires(after=0.1, scope="too long"):
            time.sleep(60)

    def report():
        client = FileTimerClient(os.environ["TORCHELASTIC_TIMER_FILE"], signal=0)
        with expires(after=0.1, scope="only said", client=client):
            time.sleep(0.5)

    def leave():
        expires(after=60, scope="left").__enter__()
        wait_for("timer expired", 2)
        os._exit(3)

    def wait_for(event, count):
        give_up = time.monotonic() + 15
        while pathlib.Path(sys.argv[1]).read_text().count(f'"{event}"') < count:
            assert time.monotonic() < give_up
            time.sleep(0.01)

    elastic_timer.configure()
    pids = [start(leave), start(overrun), start(report)]
    for pid in pids:
        os.waitpid(pid, 0)
    wait_for("worker exited", 3)
    print(*pids)
"""


def test_every_event_of_a_run(run: Callable[..., Child], tmp_path: Path) -> None:
    """Each line of a real run is what the schema says, and has what belongs to its event."""
    path = tmp_path / "events.jsonl"
    options = ["--events", str(path), "--run-id", "nightly"]
    command = [sys.executable, "-c", textwrap.dedent(COMMAND), str(path)]
    before = time.time()
    child = run(*options, "--", *command)
    gone, late, reported = map(int, child.readline().split())
    assert child.wait() == 0
    records = records_in(path)
    assert {record["run_id"] for record in records} == {"nightly"}
    assert {record["host"] for record in records} == {os.uname().nodename}
    assert all(before < record["time"] < time.time() for record in records)
    told = [(record["event"], record["pid"], record["scope"]) for record in records]
    assert told[0] == ("watchdog started", None, None)
    assert told[-2:] == [("blocks", None, None), ("watchdog stopped", None, None)]
    assert sorted(told[1:-2]) == sorted(
        [
            ("timer expired", late, "too long"),
            ("kill worker process", late, "too long"),
            ("timer expired", reported, "only said"),
            *(("worker exited", pid, None) for pid in (late, reported, gone)),
        ]
    )
    for record in records[1:-2]:
        assert record["rank"] is record["local_rank"] is None
    [kill] = [record for record in records if record["event"] == "kill worker process"]
    assert (kill["signal"], kill["scopes"]) == (signal.SIGKILL, ["too long"])
    assert 0 <= kill["seconds_late"] < 5
    for record in records:
        if record["event"] == "timer expired":
            assert record["signal"] == (signal.SIGKILL if record["pid"] == late else 0)
            assert 0 <= record["seconds_late"] < 5
            assert record["evidence"]["pid"] == record["pid"]


TIMER = FileTimerRequest(4711, "train.py#42", 1795150503.21, 9)
PICTURE = {
    "job": {"run_id": "nightly", "world_size": 8, "restart_count": 0},
    "members": [
        {
            "host": "node-a",
            "pid": 4711,
            "rank": 3,
            "local_rank": 1,
            "scope": "train.py#42",
            "passes": {"train.py#42": 1200},
            "seconds": 60.1,
            "expired": True,
            "state": "S",
            "stacks": [],
            "stacks_missing": None,
            "descendants": [],
        }
    ],
}
DURATIONS: dict[str, object] = {
    "left": 1,
    "longest": 0.5,
    "pid": 4711,
    "rank": 3,
    "histogram": [(-7, 1)],
}
NONE: dict[str, object] = {"left": 0, "longest": None, "pid": None, "rank": None, "histogram": []}
COUNTS = {"scope": "train.py#42", "entered": 3, "expired": 1, "unfinished": 1, "after": 60.0}
BLOCK = {**COUNTS, **DURATIONS, "first": NONE}
ALL_KINDS: list[kinds.Event] = [
    kinds.ServerStarted(1.5),
    kinds.ServerStopped(2.5),
    kinds.WatchdogRound(1.5, 8, 16, 2),
    kinds.TimerAcquired(1.5, 4711, 3, 1, TIMER),
    kinds.TimerReleased(1.5, -4711, None, None, FileTimerRequest(-4711, "x", -1)),
    kinds.TimerExpired(1.5, 4711, 3, 1, TIMER, 0.01, None),
    kinds.WorkerSignalled(1.5, 4711, 3, 1, TIMER, 15, 0.02, ["train.py#42"]),
    kinds.WorkerSpared(1.5, 4711, 3, 1, TIMER, 15, 0.02, ["train.py#42"]),
    kinds.WorkerExited(1.5, 4711, 3, 1, ["train.py#42"]),
    kinds.JobHangs(1.5, PICTURE),
    kinds.BlocksMeasured(1.5, 0.5, [BLOCK], 1),
]


def write(path: Path, event: kinds.Event) -> dict[str, Any]:
    """What becomes of an event in a file."""
    file = EventFile(str(path), "run")
    file.append(event)
    os.close(file._fd)
    record: dict[str, Any] = json.loads(path.read_text())
    return record


@pytest.mark.parametrize("event", ALL_KINDS, ids=lambda event: event.name)
def test_schema_knows_every_kind(tmp_path: Path, event: kinds.Event) -> None:
    """Each kind of event has its fields in the schema: no other, and none may be missing."""
    record = write(tmp_path / "events", event)
    VALIDATOR.validate(record)
    assert (record["time"], record["event"], record["run_id"]) == (event.time, event.name, "run")
    own = {field.name for field in dataclasses.fields(event)} - {"timer"}
    assert own <= set(record)
    for name in record:
        without = {key: value for key, value in record.items() if key != name}
        assert not VALIDATOR.is_valid(without), name
    assert not VALIDATOR.is_valid({**record, "more": 1})
    assert not VALIDATOR.is_valid({**record, "time": "now"})
    assert not VALIDATOR.is_valid({**record, "event": "something else"})


def test_signal_is_the_one_that_was_sent(tmp_path: Path) -> None:
    """A worker that was sent another signal than its timer asked for: the event has that one."""
    [signalled] = [event for event in ALL_KINDS if isinstance(event, kinds.WorkerSignalled)]
    record = write(tmp_path / "events", signalled)
    assert record["signal"] == 15
    assert (record["scope"], record["expiration_time"]) == ("train.py#42", 1795150503.21)


def test_every_kind_is_known() -> None:
    """The schema, the tests here and the page of the reference have all kinds of events."""
    names = {
        kind.name
        for kind in vars(kinds).values()
        if isinstance(kind, type) and issubclass(kind, kinds.Event) and "name" in vars(kind)
    }
    assert names == {event.name for event in ALL_KINDS}
    assert names == {kind["properties"]["event"]["const"] for kind in SCHEMA["oneOf"]}


def test_reference_has_every_field() -> None:
    """docs/reference/events.md and the schema have the same fields, and its example is valid."""
    page = (REPOSITORY / "docs/reference/events.md").read_text()
    rows = re.findall(r"^\| `([\w ]+)` \|(.*)\|$", page, re.M)
    told = {name for name, _ in rows}
    [example] = re.findall(r"^```json\n(.*)\n```$", page, re.M)
    VALIDATOR.validate(json.loads(example))
    names = {kind["properties"]["event"]["const"] for kind in SCHEMA["oneOf"]}
    fields = {name for kind in SCHEMA["oneOf"] for name in kind["properties"]}
    assert told == names | fields
    common = set.intersection(*(set(kind["properties"]) for kind in SCHEMA["oneOf"]))
    for kind in SCHEMA["oneOf"]:
        # The table of events comes before that of fields, and one of either is "blocks".
        [has, *_] = [rest for name, rest in rows if name == kind["properties"]["event"]["const"]]
        own = set(re.findall(r"`(\w+)`", has))
        assert own == set(kind["properties"]) - common, kind


# --- a file that is not one


def test_b1_fifo_without_a_reader(run: Callable[..., Child], tmp_path: Path) -> None:
    """It is refused at once, with the reason; COMMAND is not started."""
    path = tmp_path / "events"
    os.mkfifo(path)
    child = run("--events", str(path), "--", "touch", str(tmp_path / "started"))
    assert child.wait() == 2
    assert f"nobody reads it; start its reader first: '{path}'" in child.stderr_text()
    assert list(tmp_path.iterdir()) == [path]


def test_b1_fifo_with_a_reader(run: Callable[..., Child], tmp_path: Path) -> None:
    """It gets every event, also where it reads them later."""
    path = tmp_path / "events"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        child = run("--events", str(path), "--", "true")
        assert child.wait() == 0
        lines = os.read(reader, 65536).decode().splitlines()
    finally:
        os.close(reader)
    assert [json.loads(line)["event"] for line in lines] == ["watchdog started", "watchdog stopped"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_b1_full_pipe(run: Callable[..., Child], tmp_path: Path, name: str) -> None:
    """Nobody empties it: COMMAND starts, workers are reaped, signals answered, and `run` ends."""
    path = tmp_path / "events"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    writer = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        fill_pipe(writer)
        script = """
            import os, time, elastic_timer
            if os.fork() == 0:
                elastic_timer.configure()
                with elastic_timer.expires(after=0.1):
                    time.sleep(60)
            print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
            time.sleep(60)
            """
        child = run("--events", str(path), "--", sys.executable, "-c", textwrap.dedent(script))
        assert child.readline() == str(-signal.SIGKILL)
        asked = time.monotonic()
        os.kill(child.pid, signal.Signals[name])
        assert child.wait() == 128 + signal.Signals[name]
        # A second for the listener, as documented, and as much again for a busy machine.
        assert time.monotonic() - asked < 4
    finally:
        os.close(writer)
        os.close(reader)


def test_events_that_can_not_be_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A reader that has gone: one line in the log until there is another, not one for each."""
    path = tmp_path / "events"
    os.mkfifo(path)
    readers = [os.open(path, os.O_RDONLY | os.O_NONBLOCK)]
    file = EventFile(str(path), "run")
    try:
        for times in (1, 2):
            os.close(readers.pop())
            for _ in range(3):
                file.append(kinds.ServerStarted(1.5))
            flush_log(20)
            told = f"Events are lost, as {path} takes none: {os.strerror(errno.EPIPE)}"
            assert [record.getMessage() for record in caplog.records] == [told] * times
            readers.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
            file.append(kinds.ServerStopped(2.5))
            [line] = os.read(readers[0], 65536).splitlines()
            assert json.loads(line)["event"] == "watchdog stopped"
    finally:
        os.close(file._fd)
        for reader in readers:
            os.close(reader)


def test_disk_that_is_full(run: Callable[..., Child]) -> None:
    """COMMAND runs all the same, and the log has one line on it."""
    child = run("--events", "/dev/full", "--", "true")
    assert child.wait() == 0
    [line] = child.stderr_text().splitlines()
    assert line.endswith(f"as /dev/full takes none: {os.strerror(errno.ENOSPC)}")
