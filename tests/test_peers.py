"""The ranks of a job are looked at together, before the first of them is signalled."""

from __future__ import annotations

import json
import os
import shlex
import signal
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import FileTimerRequest, FileTimerServer
from elastic_timer._evidence import collector, facts
from elastic_timer._server.events import Event, JobHangs, TimerExpired, WorkerSignalled
from elastic_timer._server.job import Job, job_of
from elastic_timer.debug_info_logging import set_native_stacks, set_stacks_timeout
from tests.evidence_support import REAL_PY_SPY, install_py_spy, logged
from tests.servers import Link
from tests.support import (
    FAR,
    Child,
    Spawn,
    child_pids,
    eventually,
    is_alive,
    process_state,
    running,
    wait_dead,
)

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")

RANK = """
    import os, signal, subprocess, sys, time

    def wait():
        os.write(1, b"there\\n")
        time.sleep(600)

    def load():
        os.write(1, b"there\\n")
        time.sleep(600)  # here

    def stop():
        os.write(1, b"there\\n")
        os.kill(os.getpid(), signal.SIGSTOP)

    def work():
        # Tells for how long it was stopped at most. What else keeps it from running is that others
        # have the processors: how long it waited for one the kernel counts.
        def waited():
            return int(os.pread(counts, 99, 0).split()[1]) / 1e9

        counts = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        asked = []
        signal.signal(signal.SIGUSR1, lambda *_: asked.append(True))
        longest = 0.0
        os.write(1, b"there\\n")
        while True:
            before, began = waited(), time.monotonic()
            while (now := time.monotonic()) < began + 0.001:
                pass
            longest = max(longest, now - began - 0.001 - (waited() - before))
            if asked:
                asked.clear()
                print(longest, flush=True)
                longest = 0.0

    def launch():
        # Ranks whose parent it is, or helpers of its own rank.
        for number, doing in enumerate(sys.argv[2:]):
            subprocess.Popen([sys.executable, "-c", os.environ["SOURCE"], doing],
                             env={"RANK": str(number), **os.environ})
        time.sleep(600)

    locals()[sys.argv[1]]()
    """

# Ranks are looked for in all processes of a user, those of tests beside this one included.
RUN_ID = f"nightly-{uuid.uuid4().hex}"


class Ranks:
    """The ranks of a job, each where it was told to be."""

    def __init__(self, spawn: Spawn, doing: list[str], job: Mapping[str, str] = {}) -> None:
        job = {"WORLD_SIZE": str(len(doing)), "TORCHELASTIC_RUN_ID": RUN_ID, **job}
        self.children: list[Child] = []
        for rank, name in enumerate(doing):
            env = {**job, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            self.children.append(spawn(RANK, name, env=env))
        for child, name in zip(self.children, doing, strict=True):
            assert child.readline() == "there"
            eventually(lambda child=child, name=name: is_there(child.pid, name))  # type: ignore[misc]
        self.pids = [child.pid for child in self.children]


def is_there(pid: int, doing: str) -> bool:
    """Whether a rank has come to where it stays."""
    return process_state(pid) == {"stop": "T", "work": "R"}.get(doing, "S")


@pytest.fixture
def dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of the arguments of each py-spy, which is the real one."""
    return install_py_spy(f'exec {shlex.quote(REAL_PY_SPY)} "$@"', tmp_path, monkeypatch)


def dumped(log: Path) -> list[int]:
    """Whose stacks were taken, in the order of their pids."""
    return sorted(int(line.split()[3]) for line in log.read_text().splitlines())


@pytest.fixture
def records() -> list[Event]:
    """What happened, in its order."""
    return []


@pytest.fixture
def server(link: Link, records: list[Event]) -> Iterator[Any]:
    """A server of either kind, whose events are noted."""
    with running(link.server()) as started:
        started.subscribe(records.append)
        yield started


def pictures(records: list[Event]) -> list[Any]:
    """The pictures that were taken, as they are written to a file."""
    taken = [record.picture for record in records if isinstance(record, JobHangs)]
    return [json.loads(json.dumps(picture, allow_nan=False)) for picture in taken]


def members(picture: Any) -> dict[int, Any]:
    """The members of a picture by rank."""
    return {member["rank"]: member for member in picture["members"]}


def innermost(known: Any) -> str:
    """The function that a process is in."""
    return str(known["stacks"][0]["frames"][-1]["function"])


def answers(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the log says of jobs."""
    texts = [record.getMessage() for record in caplog.records]
    return [text for text in texts if " of stacks\n" in text]


def test_the_odd_one_out_is_named(
    link: Link,
    server: Any,
    spawn: Spawn,
    dumps: Path,
    records: list[Event],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Once, above all else, though it is the last to expire; each is dumped once for all."""
    job = Ranks(spawn, ["wait", "wait", "load", "wait"])
    now = time.time()
    for pid, after in zip(job.pids, (0.3, 0.4, 0.8, 0.5), strict=True):
        link.put(pid, "train.py#42", now + after)
    for pid in job.pids:
        wait_dead(pid)
    eventually(lambda: sum(isinstance(record, WorkerSignalled) for record in records) == 4)
    assert dumped(dumps) == sorted(job.pids)

    (answer,) = answers(caplog)
    first, second, *groups = answer.splitlines()
    assert first == "4 ranks on 1 host, 2 groups of stacks"
    host = os.uname().nodename
    assert second.startswith(f"suspect: rank 2 ({host}, pid {job.pids[2]}), ")
    assert groups[0].startswith("  rank 2 ")
    assert groups[1].startswith("  ranks 0-1,3 ")
    line = next(n for n, text in enumerate(RANK.split("\n"), 1) if "# here" in text)
    assert f'File "<string>", line {line}, in load' in answer
    assert caplog.records[0].getMessage() == answer

    told = {record.timer_pid: record for record in logged(caplog)}
    assert set(told) == set(job.pids)
    for rank, pid in enumerate(job.pids):
        assert "\n" not in told[pid].getMessage()
        assert innermost({"stacks": told[pid].timer_stacks}) == ("load" if rank == 2 else "wait")
        assert told[pid].timer_scopes == ["train.py#42"]
        assert told[pid].timer_rank == rank

    (picture,) = pictures(records)
    assert picture["job"] == {"run_id": RUN_ID, "world_size": 4, "restart_count": None}
    assert [member["pid"] for member in picture["members"]] == job.pids
    assert picture["members"][0]["expired"]
    for member in picture["members"]:
        assert member["scope"] == "train.py#42"
        assert member["passes"] == {"train.py#42": 1}
        assert 0 < member["seconds"] < 20
        assert member["local_rank"] == member["rank"]
    order = [type(record) for record in records]
    assert order.index(JobHangs) < order.index(TimerExpired)
    for record in records:
        if isinstance(record, TimerExpired):
            assert record.evidence is not None
            assert record.evidence["stacks"]


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="not counted here")
def test_one_that_works_is_held_up_for_less_than_50_ms(
    link: Link,
    server: Any,
    spawn: Spawn,
    records: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """For its stack, and it goes on; the least of some counts, for py-spy may have to wait, too."""
    monkeypatch.setattr(collector, "_PICTURE_SERVES", 0.0)
    job = Ranks(spawn, ["work", "wait", "wait", "wait"])
    for pid in job.pids:
        link.put(pid, "train.py#42", time.time() + FAR)
    held_up = []
    for pid in job.pids[1:]:
        link.put(pid, "train.py#42", time.time())
        wait_dead(pid)
        os.kill(job.pids[0], signal.SIGUSR1)
        held_up.append(float(job.children[0].readline()))
    eventually(lambda: len(pictures(records)) == 3)
    for picture in pictures(records):
        frames = members(picture)[0]["stacks"][0]["frames"]
        assert "work" in [frame["function"] for frame in frames]
    assert 0 < min(held_up) < 0.05


def test_one_in_no_block(
    link: Link, server: Any, spawn: Spawn, records: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    """A rank that has left the block and not come back is a member, and the suspect."""
    job = Ranks(spawn, ["wait", "wait", "wait"])
    for pid in job.pids:
        link.put(pid, "train.py#42", time.time() + FAR)
        link.put(pid, "train.py#42", -1)
    for pid in job.pids[:2]:
        link.put(pid, "train.py#42", time.time() + 0.3)
    for pid in job.pids[:2]:
        wait_dead(pid)
    eventually(lambda: pictures(records))
    (picture,) = pictures(records)
    last = members(picture)[2]
    assert (last["scope"], last["seconds"], last["expired"]) == (None, None, False)
    assert last["passes"] == {"train.py#42": 1}
    assert members(picture)[0]["passes"] == {"train.py#42": 2}
    (answer,) = answers(caplog)
    assert answer.splitlines()[1].startswith("suspect: rank 2 ")
    assert is_alive(job.pids[2])


def test_one_that_never_asked_for_a_timer(
    link: Link, server: Any, spawn: Spawn, records: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    """It is found by its environment, and the suspect; what it has started is its descendant."""
    job = Ranks(spawn, ["wait", "wait"], {"WORLD_SIZE": "3"})
    launcher = spawn(
        RANK,
        *("launch", "load"),
        env={
            "RANK": "2",
            "WORLD_SIZE": "3",
            "TORCHELASTIC_RUN_ID": RUN_ID,
            "SOURCE": textwrap.dedent(RANK),
        },
    )
    assert launcher.readline() == "there"
    (child,) = child_pids(launcher.pid)
    for pid in job.pids:
        link.put(pid, "train.py#42", time.time() + 0.3)
    for pid in job.pids:
        wait_dead(pid)
    (picture,) = eventually(lambda: pictures(records))
    stranger = members(picture)[2]
    assert stranger["pid"] == launcher.pid
    assert (stranger["scope"], stranger["passes"]) == (None, {"train.py#42": 0})
    assert innermost(stranger) == "launch"
    assert [each["pid"] for each in stranger["descendants"]] == [child]
    assert innermost(stranger["descendants"][0]) == "load"
    (answer,) = answers(caplog)
    assert answer.splitlines()[1].startswith("suspect: rank 2 ")
    assert is_alive(launcher)
    assert is_alive(child)


def test_a_stopped_one(
    link: Link, server: Any, spawn: Spawn, records: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    """It can't be paused, and its stack is there all the same."""
    job = Ranks(spawn, ["wait", "stop", "wait", "wait"])
    for pid in job.pids:
        link.put(pid, "train.py#42", time.time() + 0.3)
    for pid in job.pids:
        wait_dead(pid)
    (picture,) = eventually(lambda: pictures(records))
    stopped = members(picture)[1]
    assert stopped["state"] == "T"
    assert innermost(stopped) == "stop"
    (answer,) = answers(caplog)
    assert "stopped" in answer.splitlines()[1]


@pytest.mark.parametrize(
    "other",
    [{"TORCHELASTIC_RUN_ID": "daily"}, {"WORLD_SIZE": "5"}, {"TORCHELASTIC_RESTART_COUNT": "1"}],
    ids=["run id", "world size", "attempt"],
)
def test_two_jobs_on_one_host_are_not_mixed(
    other: dict[str, str], link: Link, server: Any, spawn: Spawn, records: list[Event], dumps: Path
) -> None:
    """Neither is told of in the other's picture, nor is its stack taken for it."""
    mine = Ranks(spawn, ["wait", "load"], {"WORLD_SIZE": "4"})
    others = Ranks(spawn, ["wait", "wait"], {"WORLD_SIZE": "4", **other})
    for pid in others.pids:
        link.put(pid, "train.py#42", time.time() + FAR)
    for pid in mine.pids:
        link.put(pid, "train.py#42", time.time() + 0.3)
    for pid in mine.pids:
        wait_dead(pid)
    (picture,) = eventually(lambda: pictures(records))
    assert [member["pid"] for member in picture["members"]] == mine.pids
    assert dumped(dumps) == sorted(mine.pids)
    assert all(map(is_alive, others.pids))


def test_two_jobs_that_expire_at_once(
    link: Link, server: Any, spawn: Spawn, records: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    """Each has a picture and an answer of its own."""
    doing = ["wait", "wait", "load"]
    jobs = [Ranks(spawn, doing, {"TORCHELASTIC_RUN_ID": name}) for name in ("daily", "nightly")]
    pids = [pid for job in jobs for pid in job.pids]
    now = time.time()
    server.register_timers([FileTimerRequest(pid, "train.py#42", now, 9) for pid in pids])
    for pid in pids:
        wait_dead(pid)
    eventually(lambda: len(pictures(records)) == 2)
    told = {picture["job"]["run_id"]: members(picture) for picture in pictures(records)}
    for job, name in zip(jobs, ("daily", "nightly"), strict=True):
        assert [told[name][rank]["pid"] for rank in sorted(told[name])] == job.pids
    assert len(answers(caplog)) == 2


def test_jobs_that_look_alike_are_told_apart_by_their_launchers(
    link: Link, server: Any, spawn: Spawn, records: list[Event]
) -> None:
    """As two torchruns with a static rendezvous do; what a rank has started is no rank."""
    env = {"WORLD_SIZE": "2", "SOURCE": textwrap.dedent(RANK)}
    launchers = [spawn(RANK, "launch", "wait", "wait", env=env) for _ in range(2)]
    for launcher in launchers:
        for _ in range(2):
            assert launcher.readline() == "there"
    first, second = ([*sorted(child_pids(launcher.pid))] for launcher in launchers)
    for pid in (*second, *first):
        link.put(pid, "train.py#42", time.time() + FAR)
    link.put(first[0], "train.py#42", time.time())
    wait_dead(first[0])
    (picture,) = eventually(lambda: pictures(records))
    assert [member["pid"] for member in picture["members"]] == first
    # The other one's picture was not taken: its stacks are its own.
    link.put(second[1], "train.py#42", time.time())
    wait_dead(second[1])
    eventually(lambda: sum(isinstance(record, TimerExpired) for record in records) == 2)
    assert len(pictures(records)) == 1


def test_a_helper_that_bears_its_parents_rank_is_no_rank(
    link: Link, server: Any, spawn: Spawn, records: list[Event]
) -> None:
    """A data loader with a timer of its own expires alone, and has no picture."""
    job = Ranks(spawn, ["wait", "wait"], {"WORLD_SIZE": "3"})
    env = {"WORLD_SIZE": "3", "TORCHELASTIC_RUN_ID": RUN_ID, "RANK": "2"}
    parent = spawn(RANK, "launch", "load", env={**env, "SOURCE": textwrap.dedent(RANK)})
    assert parent.readline() == "there"
    (helper,) = child_pids(parent.pid)
    for pid in (*job.pids, helper, parent.pid):
        link.put(pid, "train.py#42", time.time() + FAR)
    link.put(helper, "load", time.time())
    wait_dead(helper)
    eventually(lambda: any(isinstance(record, WorkerSignalled) for record in records))
    assert pictures(records) == []
    link.put(job.pids[0], "train.py#42", time.time())
    wait_dead(job.pids[0])
    (picture,) = eventually(lambda: pictures(records))
    assert [member["pid"] for member in picture["members"]] == [*job.pids, parent.pid]


def test_one_that_dies_meanwhile(
    link: Link,
    server: Any,
    spawn: Spawn,
    records: list[Event],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is there without stacks, and holds up nobody."""
    job = Ranks(spawn, ["wait", "wait", "load"])
    # On a busy machine it takes a while to die.
    script = f"""
        if [ "$4" = {job.pids[1]} ]; then
            kill -9 "$4"
            while grep -q "State:.[^Z]" "/proc/$4/status"; do sleep 0.01; done
        fi
        exec {shlex.quote(REAL_PY_SPY)} "$@"
        """
    install_py_spy(script, tmp_path, monkeypatch)
    for pid in job.pids:
        link.put(pid, "train.py#42", time.time() + FAR)
    link.put(job.pids[0], "train.py#42", time.time())
    wait_dead(job.pids[0])
    (picture,) = eventually(lambda: pictures(records))
    dead = members(picture)[1]
    assert dead["stacks"] is None
    assert dead["stacks_missing"]
    assert innermost(members(picture)[2]) == "load"


def test_they_share_one_bound(
    link: Link,
    server: Any,
    spawn: Spawn,
    records: list[Event],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where a peer's py-spy hangs, the worker dies when the time for stacks is over."""
    job = Ranks(spawn, ["wait", "wait"])
    script = f'[ "$4" = {job.pids[1]} ] && exec sleep 600\nexec {shlex.quote(REAL_PY_SPY)} "$@"'
    install_py_spy(script, tmp_path, monkeypatch)
    set_stacks_timeout(0.7)
    link.put(job.pids[1], "train.py#42", time.time() + FAR)
    started = time.monotonic()
    link.put(job.pids[0], "train.py#42", time.time())
    assert started + 0.6 < wait_dead(job.pids[0]) < started + 0.7 + 1
    (picture,) = eventually(lambda: pictures(records))
    assert innermost(members(picture)[0]) == "wait"
    assert members(picture)[1]["stacks_missing"] == "py-spy did not end in time"
    assert [member["expired"] for member in picture["members"]] == [True, False]
    assert is_alive(job.pids[1])


def test_one_that_went_on_is_looked_at_anew(
    link: Link,
    server: Any,
    spawn: Spawn,
    dumps: Path,
    records: list[Event],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A peer that was seen in one block and expires in another one has stacks of then."""
    job = Ranks(spawn, ["wait", "wait"])
    link.put(job.pids[1], "train.py#42", time.time() + FAR)
    link.put(job.pids[0], "train.py#42", time.time())
    wait_dead(job.pids[0])
    link.put(job.pids[1], "train.py#42", -1)
    link.put(job.pids[1], "save.py#1", time.time())
    wait_dead(job.pids[1])
    eventually(lambda: sum(isinstance(record, WorkerSignalled) for record in records) == 2)
    assert dumped(dumps) == sorted([*job.pids, job.pids[1]])
    assert len(pictures(records)) == len(answers(caplog)) == 1
    # It has all of its text: the answer has told of another place.
    assert "thread MainThread" in logged(caplog)[-1].getMessage()


def test_after_some_seconds_there_is_a_new_picture(
    link: Link,
    server: Any,
    spawn: Spawn,
    records: list[Event],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With those who are left."""
    monkeypatch.setattr(collector, "_PICTURE_SERVES", 0.0)
    job = Ranks(spawn, ["wait", "wait", "wait"])
    for pid in job.pids:
        link.put(pid, "train.py#42", time.time() + FAR)
    for pid in job.pids[:2]:
        link.put(pid, "train.py#42", time.time())
        wait_dead(pid)
        eventually(lambda: not server._workers.is_held(pid))  # noqa: B023 - asked at once
    eventually(lambda: len(pictures(records)) == 2)
    first, second = pictures(records)
    assert sorted(members(first)) == [0, 1, 2]
    assert sorted(members(second)) == [1, 2]


def test_where_nobody_stands_out_one_is_shown(
    link: Link, server: Any, spawn: Spawn, caplog: pytest.LogCaptureFixture
) -> None:
    """All are at the same place: nobody is named, and the first one's details are there."""
    job = Ranks(spawn, ["wait", "wait", "wait"])
    for pid in job.pids:
        link.put(pid, "train.py#42", time.time() + 0.3)
    for pid in job.pids:
        wait_dead(pid)
    eventually(lambda: len(logged(caplog)) == 3)
    (answer,) = answers(caplog)
    assert answer.splitlines()[1] == "no suspect: all ranks are at the same place"
    assert sum("thread MainThread" in record.getMessage() for record in logged(caplog)) == 1


def test_where_stacks_are_switched_off(
    link: Link, server: Any, spawn: Spawn, records: list[Event]
) -> None:
    """What is known without them is told."""
    set_stacks_timeout(0)
    job = Ranks(spawn, ["wait", "stop"])
    for pid in job.pids:
        link.put(pid, "train.py#42", time.time())
    for pid in job.pids:
        wait_dead(pid)
    (picture,) = eventually(lambda: pictures(records))
    assert [member["stacks_missing"] for member in picture["members"]] == ["switched off"] * 2
    assert [member["descendants"] for member in picture["members"]] == [[], []]
    assert members(picture)[1]["state"] == "T"


# C frames -----------------------------------------------------------------------------------------


def test_native_stacks(
    link: Link, server: Any, spawn: Spawn, records: list[Event], caplog: pytest.LogCaptureFixture
) -> None:
    """C frames are in the evidence and the suspect's details; one that is stopped has none."""
    set_native_stacks(True)
    set_stacks_timeout(20)
    job = Ranks(spawn, ["wait", "wait", "load", "stop"])
    for pid in job.pids:
        link.put(pid, "train.py#42", time.time() + 0.3)
    for pid in job.pids:
        wait_dead(pid)
    eventually(lambda: len(logged(caplog)) == 4)
    for record in logged(caplog):
        files = [frame["file"] for frame in record.timer_stacks[0]["frames"]]
        assert any("libc" in file for file in files) == (record.timer_rank != 3)
    (picture,) = pictures(records)
    for rank, member in members(picture).items():
        files = [frame["file"] for frame in member["stacks"][0]["frames"]]
        assert any("libc" in file for file in files) == (rank != 3)
    assert "load (<string>:" in answers(caplog)[0]


def test_native_stacks_that_do_not_come_in_time(
    link: Link,
    server: Any,
    spawn: Spawn,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The Python stack is kept."""
    script = f'case "$*" in *--native*) exec sleep 600;; esac\nexec {shlex.quote(REAL_PY_SPY)} "$@"'
    install_py_spy(script, tmp_path, monkeypatch)
    set_native_stacks(True)
    set_stacks_timeout(0.7)
    worker = spawn(RANK, "load")
    assert worker.readline() == "there"
    link.put(worker.pid, "train.py#42", time.time())
    wait_dead(worker)
    (record,) = eventually(lambda: logged(caplog))
    assert innermost({"stacks": record.timer_stacks}) == "load"
    assert record.timer_stacks_missing is None


# What makes workers peers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"RANK": "1"}, None),
        ({"WORLD_SIZE": "1", "TORCHELASTIC_RUN_ID": "x"}, None),
        ({"WORLD_SIZE": "8"}, Job(None, 8, None)),
        ({"TORCHELASTIC_RUN_ID": "x"}, Job("x", None, None)),
        (
            {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "TORCHELASTIC_RESTART_COUNT": "2"},
            Job("x", 8, 2),
        ),
        ({"TORCHELASTIC_RUN_ID": "", "WORLD_SIZE": "many"}, None),
    ],
)
def test_job(environment: dict[str, str], expected: Job | None) -> None:
    """A run id or a size; a job of one rank is none."""
    assert job_of(environment) == expected


def test_the_search_for_ranks_is_bounded(spawn: Spawn) -> None:
    """In time, and to processes of the same user; siblings come first."""
    worker = spawn(RANK, "wait")
    found = list(facts.processes_beside(worker.pid, time.monotonic() + 20))
    assert worker.pid in found
    assert found.index(worker.pid) < found.index(os.getpid())
    assert list(facts.processes_beside(worker.pid, time.monotonic())) == []
    worker.kill()
    assert list(facts.processes_beside(worker.pid, time.monotonic() + 20)) == []


# What goes wrong ----------------------------------------------------------------------------------


def test_an_error_of_the_collector_costs_the_evidence_alone(
    fifo_path: str,
    spawn: Spawn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The worker is reaped at once, and the next one has evidence again."""
    failed = threading.Event()

    def fail(pid: int) -> None:
        failed.set()
        raise MemoryError("no room")

    with running(FileTimerServer(fifo_path, "run", 60)):
        link = Link("file", fifo_path)
        with monkeypatch.context() as patched:
            patched.setattr(collector, "read_facts", fail)
            worker = spawn(RANK, "wait")
            assert worker.readline() == "there"
            started = time.monotonic()
            link.put(worker.pid, "train.py#42", time.time())
            assert wait_dead(worker) < started + 2
            assert failed.is_set()
        other = spawn(RANK, "wait")
        assert other.readline() == "there"
        link.put(other.pid, "train.py#42", time.time())
        assert other.wait() == -signal.SIGKILL
    assert "no room" in caplog.text
    assert [record.timer_pid for record in logged(caplog)] == [other.pid]


def test_a_picture_that_failed_serves_nobody(
    fifo_path: str,
    spawn: Spawn,
    monkeypatch: pytest.MonkeyPatch,
    records: list[Event],
) -> None:
    """The next one to expire has a picture of its own, and does not wait for what never comes."""
    job = Ranks(spawn, ["wait", "wait"])
    with running(FileTimerServer(fifo_path, "run", 60)) as server:
        server.subscribe(records.append)
        link = Link("file", fifo_path)
        link.put(job.pids[1], "train.py#42", time.time() + 1)
        with monkeypatch.context() as patched:
            patched.setattr(collector, "_answer", lambda case, picture: 1 / 0)
            link.put(job.pids[0], "train.py#42", time.time())
            wait_dead(job.pids[0])
        wait_dead(job.pids[1])
        (picture,) = eventually(lambda: pictures(records))
    assert sorted(members(picture)) == [1]


def test_an_error_before_the_collector_costs_the_evidence_alone(
    fifo_path: str,
    spawn: Spawn,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Where a server can't even say what it wants to know, the worker is reaped at once."""
    with running(FileTimerServer(fifo_path, "run", 60)) as server:
        monkeypatch.setattr(server, "_evidence_wanted", lambda: 1 / 0)
        worker = spawn(RANK, "wait")
        assert worker.readline() == "there"
        started = time.monotonic()
        Link("file", fifo_path).put(worker.pid, "train.py#42", time.time())
        assert wait_dead(worker) < started + 2
    assert "ZeroDivisionError" in caplog.text
