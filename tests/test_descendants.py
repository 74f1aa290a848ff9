"""What an expired worker has started, and waits for: its data loaders above all."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from elastic_timer import FileTimerServer
from elastic_timer._evidence import facts, stacks
from elastic_timer._server.process import state_of
from elastic_timer.debug_info_logging import log_debug_info_for_expired_timers, set_stacks_timeout
from tests.evidence_support import expired, install_py_spy, logged
from tests.support import Child, child_pids, eventually, process_state, wait_dead

Spawn = Callable[..., Child]

pytestmark = pytest.mark.skipif(
    not os.path.exists(f"/proc/self/task/{os.getpid()}/children"),
    reason="needs /proc with the lists of children",
)

# It waits for the next sample of a loader, which hangs in the line marked with "here".
WORKER = """
    import multiprocessing, sys, time

    def load(queue):
        print("loading", flush=True)
        time.sleep(600)  # here
        queue.put(None)

    if __name__ == "__main__":
        context = multiprocessing.get_context("fork")
        samples = context.Queue()
        loader = context.Process(target=load, args=(samples,), daemon=True)
        loader.start()
        samples.get()
    """

# Starts a shell that starts a program, and waits.
SHELL = """
    import subprocess
    subprocess.run(["sh", "-c", "echo started; sleep 600; true"])
    """


@pytest.fixture
def loading(spawn: Spawn) -> tuple[Child, int]:
    """A worker that waits for its loader, and that loader's pid."""
    worker = spawn(WORKER)
    assert worker.readline() == "loading"
    (loader,) = child_pids(worker.pid)
    eventually(lambda: process_state(loader) == "S")
    return worker, loader


def test_s9_the_line_that_a_loader_hangs_in_is_told(
    loading: tuple[Child, int], caplog: pytest.LogCaptureFixture
) -> None:
    """The worker's own stack ends in its wait, its loader's in the line that hangs."""
    worker, loader = loading
    log_debug_info_for_expired_timers("run", {worker.pid: expired(worker.pid)})
    (record,) = logged(caplog)
    functions = [frame["function"] for frame in record.timer_stacks[0]["frames"]]
    assert "load" not in functions
    (descendant,) = record.timer_descendants
    assert descendant.keys() == {
        "pid",
        "command",
        "state",
        "system_call",
        "stacks",
        "stacks_missing",
    }
    assert descendant["pid"] == loader
    assert descendant["state"] == "S"
    line = next(n for n, text in enumerate(WORKER.split("\n"), 1) if "# here" in text)
    innermost = descendant["stacks"][0]["frames"][-1]
    assert innermost == {"file": "<string>", "line": line, "function": "load"}
    own, marked, its = record.getMessage().partition(f"\n  descendant {loader}: ")
    assert marked
    assert ", in load" not in own
    assert f'      File "<string>", line {line}, in load' in its
    json.dumps(descendant, allow_nan=False)


def test_s9_a_server_tells_of_the_loader(
    spawn: Spawn, fifo_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is looked at before the worker is killed, and with it what the worker started."""
    source = WORKER.replace(
        "samples.get()",
        "from elastic_timer import FileTimerClient, expires\n"
        "        with expires(0.5, client=FileTimerClient(sys.argv[1])):\n"
        "            samples.get()",
    )
    with FileTimerServer(fifo_path, "run", max_interval=60):
        worker = spawn(source, fifo_path)
        wait_dead(worker)
    (record,) = logged(caplog)
    (descendant,) = record.timer_descendants
    assert descendant["stacks"][0]["frames"][-1]["function"] == "load"


def test_s9_what_runs_no_python_takes_one_line(
    spawn: Spawn, caplog: pytest.LogCaptureFixture
) -> None:
    """Of a shell and its child there is a line each: what it is, and what it waits for."""
    worker = spawn(SHELL)
    assert worker.readline() == "started"
    (shell,) = child_pids(worker.pid)
    (program,) = eventually(lambda: child_pids(shell))
    eventually(lambda: Path(f"/proc/{program}/cmdline").read_text().startswith("sleep"))
    eventually(lambda: {state_of(shell), state_of(program)} == {"S"})
    log_debug_info_for_expired_timers("run", {worker.pid: expired(worker.pid)})
    (record,) = logged(caplog)
    assert [each["pid"] for each in record.timer_descendants] == [shell, program]
    assert [each["stacks"] for each in record.timer_descendants] == [None, None]
    first, second = record.getMessage().split("\n")[-2:]
    assert first.startswith(f"  descendant {shell}: sh -c echo started; sleep 600; true; state S")
    assert second.startswith(f"  descendant {program}: sleep 600; state S (sleeping)")
    assert "; no stacks: py-spy: " in first
    assert "; no stacks: py-spy: " in second


def test_s9_expired_workers_come_first(
    loading: tuple[Child, int], spawn: Spawn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """All workers are dumped before the first descendant, which a child that expired is not."""
    dumps = install_py_spy("exit 1", tmp_path, monkeypatch)
    monkeypatch.setattr(stacks, "_PARALLEL_DUMPS", 1)
    worker, loader = loading
    other = spawn(SHELL)
    assert other.readline() == "started"
    (shell,) = child_pids(other.pid)
    (program,) = eventually(lambda: child_pids(shell))
    workers = [worker.pid, other.pid, shell]
    collected = log_debug_info_for_expired_timers("run", {pid: expired(pid) for pid in workers})
    dumped = [int(line.split()[3]) for line in dumps.read_text().splitlines()]
    assert set(dumped[:3]) == set(workers)
    assert set(dumped[3:]) == {loader, program}
    descendants = {
        pid: [each["pid"] for each in evidence["descendants"]]
        for pid, evidence in collected.items()
    }
    assert descendants == {worker.pid: [loader], other.pid: [], shell: [program]}


def test_s9_they_share_the_bound_of_their_worker(
    loading: tuple[Child, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where the worker's own py-spy hangs its loader is looked at all the same, and no longer."""
    worker, loader = loading
    dumps = install_py_spy(f'[ "$4" = {worker.pid} ] && exec sleep 600', tmp_path, monkeypatch)
    set_stacks_timeout(0.5)
    started = time.monotonic()
    collected = log_debug_info_for_expired_timers("run", {worker.pid: expired(worker.pid)})
    assert time.monotonic() - started < 1.5
    assert collected[worker.pid]["stacks_missing"] == "py-spy did not end in time"
    (descendant,) = collected[worker.pid]["descendants"]
    reason = "py-spy: it gave neither stacks nor a reason"
    assert (descendant["pid"], descendant["stacks_missing"]) == (loader, reason)
    assert len(dumps.read_text().splitlines()) == 2


def test_s9_a_loader_whose_py_spy_hangs_is_bounded(
    loading: tuple[Child, int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The worker's stacks are there, its loader's are not, and the reap is not held up longer."""
    worker, loader = loading
    install_py_spy(f'[ "$4" = {loader} ] && exec sleep 600', tmp_path, monkeypatch)
    set_stacks_timeout(0.5)
    started = time.monotonic()
    collected = log_debug_info_for_expired_timers("run", {worker.pid: expired(worker.pid)})
    assert 0.4 < time.monotonic() - started < 1.5
    (descendant,) = collected[worker.pid]["descendants"]
    assert descendant["stacks_missing"] == "py-spy did not end in time"


def test_s9_their_number_is_bounded(spawn: Spawn, caplog: pytest.LogCaptureFixture) -> None:
    """Of forty children thirty-two are told."""
    worker = spawn(
        """
        import subprocess, time
        children = [subprocess.Popen(["sleep", "600"]) for _ in range(40)]
        print("started", flush=True)
        time.sleep(600)
        """
    )
    assert worker.readline() == "started"
    set_stacks_timeout(30)
    log_debug_info_for_expired_timers("run", {worker.pid: expired(worker.pid)})
    (record,) = logged(caplog)
    assert len(record.timer_descendants) == 32
    assert record.getMessage().count("\n  descendant ") == 32


def test_descendants_are_left_out_where_stacks_are_switched_off(
    loading: tuple[Child, int],
) -> None:
    """A bound of 0 asks for the shortest way to the kill."""
    worker, _ = loading
    set_stacks_timeout(0)
    collected = log_debug_info_for_expired_timers("run", {worker.pid: expired(worker.pid)})
    assert collected[worker.pid]["descendants"] == []


def test_descendants_of_a_process_that_is_never_signalled_are_left_alone(
    loading: tuple[Child, int],
) -> None:
    """Those of the server are all its workers, those of init everybody: they are not paused."""
    pid = os.getpid()
    assert loading[0].pid in facts.descendants_of(pid, {}, 32)
    collected = log_debug_info_for_expired_timers("run", {pid: expired(pid)})
    assert collected[pid]["descendants"] == []


def test_a_descendant_that_has_ended_takes_one_line(
    spawn: Spawn, caplog: pytest.LogCaptureFixture
) -> None:
    """One that the worker has not waited for is there, without a command."""
    worker = spawn(
        """
        import subprocess, time
        child = subprocess.Popen(["true"])
        print(child.pid, flush=True)
        time.sleep(600)
        """
    )
    ended = int(worker.readline())
    eventually(lambda: process_state(ended) == "Z")
    log_debug_info_for_expired_timers("run", {worker.pid: expired(worker.pid)})
    (record,) = logged(caplog)
    assert record.getMessage().endswith(
        f"\n  descendant {ended}: state Z (ended, not waited for); no stacks: the process has ended"
    )


def test_descendants_of_a_process_that_is_gone() -> None:
    """There are none, nor of a group."""
    process = subprocess.Popen(["true"])
    process.wait()
    assert facts.descendants_of(process.pid, {}, 32) == []
    assert facts.descendants_of(-process.pid, {}, 32) == []


def test_facts_of_a_process_that_ends_while_they_are_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What its files can't tell any more is None."""
    monkeypatch.setattr(facts, "stat_of", lambda pid: ["S"] + ["1"] * 30)
    process = subprocess.Popen(["true"])
    process.wait()
    known = facts.read_facts(process.pid)
    assert (known["state"], known["threads"]) == ("S", 1)
    assert known["command"] is known["wait_channel"] is known["system_call"] is None


def test_a_process_in_two_lists_is_told_once(
    loading: tuple[Child, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one is that changed its parent while the lists were read."""
    worker, loader = loading
    monkeypatch.setattr(facts, "children_of", lambda pid: [loader])
    assert facts.descendants_of(worker.pid, {}, 32) == [loader]
