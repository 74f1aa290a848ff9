"""`kill_tree`: a worker that is reaped takes what it has started along, and nobody else.

Who is left is told by a mark in the environment that all of a job were started with.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_timer import FileTimerClient, FileTimerRequest, FileTimerServer
from elastic_timer._command.main import main
from elastic_timer._server import tree as _tree
from elastic_timer._server.process import ProcessHandle
from elastic_timer.debug_info_logging import set_stacks_timeout
from tests.jobs import pids, told_twice
from tests.servers import Link
from tests.support import (
    Child,
    ForkedWorker,
    eventually,
    is_alive,
    marked_processes,
    no_more_descriptors,
    process_state,
    running,
    wait_dead,
)

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")


@pytest.fixture(autouse=True)
def _no_stacks() -> None:
    set_stacks_timeout(0)


# Who is killed -----------------------------------------------------------------------------------


def test_tree_dies_with_its_worker(
    link: Link, job: Callable[..., Child], mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Children, theirs, sessions of their own and what is left in them, the deaf, the stopped."""
    worker = job(
        """
        start()
        start(start)
        start(os.setsid)
        start(ignore_sigterm)
        leave_an_orphan()
        start(os.setsid, leave_an_orphan)
        stay()
        """
    )
    found = set(pids(worker, 9))
    assert found == marked_processes(mark).keys()
    (stopped, *_) = sorted(found - {worker.pid})
    os.kill(stopped, signal.SIGSTOP)
    eventually(lambda: process_state(stopped) == "T")
    with running(link.server(kill_tree=True)):
        link.put(worker.pid, "block", time.time() + 0.1)
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: not marked_processes(mark), timeout=5)
        (line,) = eventually(lambda: records(caplog, "Killed what"))
    assert set(map(int, line.rpartition(": ")[2].split(", "))) == found - {worker.pid}


def records(caplog: pytest.LogCaptureFixture, beginning: str) -> list[str]:
    """The messages that begin so."""
    found = [record.getMessage() for record in caplog.records]
    return [message for message in found if message.startswith(beginning)]


def test_tree_lives_without_the_option(link: Link, job: Callable[..., Child], mark: str) -> None:
    """As ever, nobody but the worker is signalled."""
    worker = job("start(); stay()")
    found = set(pids(worker, 2))
    with running(link.server()):
        link.put(worker.pid, "block", time.time() + 0.1)
        assert worker.wait() == -signal.SIGKILL
    assert marked_processes(mark).keys() == found - {worker.pid}


@pytest.mark.alone
@pytest.mark.parametrize("next_step", ["continue", "break"])
def test_tree_that_grows_all_the_time(
    link: Link, job: Callable[..., Child], mark: str, next_step: str
) -> None:
    """A worker that forks in a loop, and one whose children do, end with all of them."""
    worker = job(
        """
        say("begins")
        for _ in range(5000):
            if os.fork():
                if sys.argv[1] == "continue":
                    time.sleep(0.002)
                    continue
                break
            elif sys.argv[1] == "continue":
                break
            time.sleep(0.002)
        while True:
            signal.pause()
        """,
        next_step,
    )
    assert worker.readline() == "begins"
    with running(link.server(kill_tree=True)):
        eventually(lambda: len(marked_processes(mark)) > 10)
        link.put(worker.pid, "block", time.time())
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: not marked_processes(mark), timeout=5)


def test_tree_whose_processes_come_and_go(link: Link, job: Callable[..., Child], mark: str) -> None:
    """They end while they are counted, and others begin; at the end there is none."""
    worker = job(
        """
        for _ in range(4):
            if not os.fork():
                break
        say("begins")
        while True:
            pid = os.fork()
            if not pid:
                time.sleep(0.001)
                os._exit(0)
            os.waitpid(pid, 0)
        """
    )
    for _ in range(5):
        assert worker.readline() == "begins"
    with running(link.server(kill_tree=True)):
        link.put(worker.pid, "block", time.time())
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: not marked_processes(mark), timeout=5)


# Who is not --------------------------------------------------------------------------------------


def test_bystanders_live(link: Link, job: Callable[..., Child], mark: str) -> None:
    """Of the worker's user, session and group are its parent, a brother, and somebody's orphan."""
    parent = job(
        """
        leave_an_orphan()
        start()
        worker = start(start)
        say(worker)
        say(os.waitpid(worker, 0)[1])
        stay()
        """
    )
    worker = told_twice(pids(parent, 5))
    found = marked_processes(mark).keys()
    assert len(found) == 5
    with running(link.server(kill_tree=True)):
        link.put(worker, "block", time.time() + 0.1)
        assert parent.readline() == str(int(signal.SIGKILL))
        assert parent.readline() == str(parent.pid)
        eventually(lambda: len(marked_processes(mark)) == 3, timeout=5)
    left = marked_processes(mark)
    assert len(left) == 3
    assert parent.pid in left
    assert worker not in left


def test_server_below_its_worker_lives(
    job: Callable[..., Child], mark: str, fifo_path: str
) -> None:
    """A server that the worker has started lives on, with its ancestors and what it has started."""
    worker = job(
        """
        import elastic_timer
        from elastic_timer.debug_info_logging import set_stacks_timeout

        def serve():
            start()
            set_stacks_timeout(0)
            with elastic_timer.FileTimerServer(sys.argv[1], "run", kill_tree=True):
                stay()

        start()
        start(lambda: start(serve))
        stay()
        """,
        fifo_path,
    )
    found = set(pids(worker, 5))
    eventually(lambda: os.path.exists(fifo_path))
    request = FileTimerRequest(worker.pid, "block", time.time() + 0.1, signal.SIGKILL)
    FileTimerClient(fifo_path)._send_request(request)
    assert worker.wait() == -signal.SIGKILL
    # The server, what it has started, and who has started it.
    eventually(lambda: len(marked_processes(mark)) == 3)
    assert marked_processes(mark).keys() < found
    time.sleep(0.2)
    assert len(marked_processes(mark)) == 3


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change a process's user")
def test_process_of_another_user_is_left_alone(
    link: Link, job: Callable[..., Child], mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Root's server might signal it; it is named instead."""
    worker = job("say(start(lambda: os.setuid(65534))); start(); stay()")
    other = told_twice(pids(worker, 4))
    with running(link.server(kill_tree=True)):
        link.put(worker.pid, "block", time.time() + 0.1)
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: marked_processes(mark).keys() == {other})
        (line,) = eventually(lambda: records(caplog, f"Worker {worker.pid} had started"))
    assert line.endswith(f"left alone: {other}")
    assert process_state(other) == "S"


def test_dry_run_spares_the_tree(
    file_link: Link, job: Callable[..., Child], mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody is signalled, so nobody is looked for or stopped either."""
    worker = job("start(); stay()")
    found = pids(worker, 2)
    with running(file_link.server(kill_tree=True, dry_run=True)):
        file_link.put(worker.pid, "block", time.time() + 0.1)
        eventually(lambda: records(caplog, "Dry run: would have"))
    assert states(found) <= {"R", "S"}


# Soft signals ------------------------------------------------------------------------------------

SOFT = """
def told(number, frame):
    say("worker had", number)
    if sys.argv[1] == "dies":
        os._exit(3)

def child_told(number, frame):
    say("child had", number)

start(lambda: signal.signal(signal.SIGTERM, child_told))
signal.signal(signal.SIGTERM, told)
stay()
"""


def put_soft(link: Link, pid: int, after: float = 0.1, scope: str = "block") -> None:
    """Ask for SIGTERM."""
    request = FileTimerRequest(pid, scope, time.time() + after, signal.SIGTERM)
    assert isinstance(link.client, FileTimerClient)
    link.client._send_request(request)


def test_soft_signal_is_for_the_worker_alone(
    file_link: Link, job: Callable[..., Child], mark: str
) -> None:
    """Its tree gets SIGKILL once it is gone, and no other signal before."""
    worker = job(SOFT, "dies")
    pids(worker, 2)
    with running(file_link.server(kill_tree=True)):
        put_soft(file_link, worker.pid)
        assert worker.readline() == "worker had 15"
        assert worker.wait() == 3
        eventually(lambda: not marked_processes(mark), timeout=5)
        with pytest.raises(AssertionError, match="end of output"):
            worker.readline()


def test_nobody_is_stopped_for_a_soft_signal(file_link: Link, job: Callable[..., Child]) -> None:
    """The worker may have to talk to its children to end well."""
    seen: list[set[str]] = []

    class Looking(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            seen.append(states(found))
            return super()._reap_worker(worker_pid, signal)

    worker = job(SOFT, "dies")
    found = pids(worker, 2)
    with running(Looking(file_link.path, "run", kill_tree=True)):
        put_soft(file_link, worker.pid)
        assert worker.wait() == 3
    assert seen
    assert seen[0] <= {"R", "S"}


def test_soft_signal_that_is_ignored(file_link: Link, job: Callable[..., Child], mark: str) -> None:
    """The tree runs on with its worker until `kill_after` is over; then both are killed."""
    worker = job(SOFT, "lives")
    found = pids(worker, 2)
    with running(file_link.server(kill_tree=True, kill_after=0.5)):
        put_soft(file_link, worker.pid)
        assert worker.readline() == "worker had 15"
        told = time.monotonic()
        assert states(found) <= {"R", "S"}
        assert worker.wait() == -signal.SIGKILL
        assert time.monotonic() - told > 0.4
        eventually(lambda: not marked_processes(mark), timeout=5)


def test_child_that_is_started_after_a_soft_signal(
    file_link: Link, job: Callable[..., Child], mark: str
) -> None:
    """It is found when its worker is gone: in its session, or below one that is held."""
    worker = job(
        """
        def late(number, frame):
            os.kill(child, signal.SIGUSR1)
            start()
            os.read(0, 1)
            os._exit(0)

        start()
        child = start(lambda: signal.signal(signal.SIGUSR1, lambda *_: start()), os.setsid)
        signal.signal(signal.SIGTERM, late)
        stay()
        """
    )
    pids(worker, 3)
    with running(file_link.server(kill_tree=True)):
        put_soft(file_link, worker.pid)
        pids(worker, 2)
        assert len(marked_processes(mark)) == 5
        worker.send_line("")
        assert worker.wait() == 0
        eventually(lambda: not marked_processes(mark), timeout=5)


@pytest.mark.parametrize("kill_after", [None, 5.0])
def test_worker_that_obeys_keeps_its_tree(
    file_link: Link, job: Callable[..., Child], mark: str, kill_after: float | None
) -> None:
    """One that leaves its block is spared, and what it has started too, also when it ends later."""
    worker = job(SOFT, "lives")
    found = set(pids(worker, 2))
    with running(file_link.server(kill_tree=True, kill_after=kill_after)) as server:
        put_soft(file_link, worker.pid)
        assert worker.readline() == "worker had 15"
        eventually(lambda: server._signalled)
        file_link.put(worker.pid, "block", -1)
        eventually(lambda: not server._signalled)
        worker.process.kill()
        worker.process.wait()
        eventually(lambda: not server._workers.is_held(worker.pid))
    assert marked_processes(mark).keys() == found - {worker.pid}


def test_tree_that_is_held_is_let_go_at_the_end(
    file_link: Link, job: Callable[..., Child], mark: str
) -> None:
    """A server that is stopped gives back what it holds, and kills nobody."""
    worker = job(SOFT, "lives")
    found = set(pids(worker, 2))
    with running(file_link.server(kill_tree=True)):
        put_soft(file_link, worker.pid)
        assert worker.readline() == "worker had 15"
    assert marked_processes(mark).keys() == found


# The hook ----------------------------------------------------------------------------------------


def states(found: list[int]) -> set[str]:
    return {process_state(pid) for pid in found}


def test_hook_that_only_tells_leaves_nobody_stopped(
    file_link: Link, job: Callable[..., Child], mark: str
) -> None:
    """The worker and its tree run on; those that somebody else has stopped stay so."""
    seen: list[set[str]] = []

    class Telling(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            seen.append(states(found[:2]))
            return True

    worker = job("start(); start(); stay()")
    found = sorted(pids(worker, 3))
    os.kill(found[2], signal.SIGSTOP)
    eventually(lambda: process_state(found[2]) == "T")
    with running(Telling(file_link.path, "run", kill_tree=True)) as server:
        file_link.put(worker.pid, "block", time.time() + 0.1)
        eventually(lambda: seen)
        eventually(lambda: states(found[:2]) <= {"R", "S"})
        assert process_state(found[2]) == "T"
        assert server._signalled
        worker.process.kill()
        # What it was told of was its end, if not ours.
        eventually(lambda: not marked_processes(mark), timeout=5)
    assert seen == [{"T"}]


def release_late(link: Link, scope: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have the first worker that is stopped release a timer in that moment; who that was."""
    work = _tree.Trees.work
    late: list[int] = []

    def work_slowly(trees: _tree.Trees, until: float) -> bool:
        is_over = work(trees, until)
        for pid, worker in trees._workers.items():
            if worker.is_stopped and not late:
                late.append(pid)
                link.put(pid, scope, -1)
        return is_over

    monkeypatch.setattr(_tree.Trees, "work", work_slowly)
    return late


@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_release_of_the_last_moment_counts(
    file_link: Link,
    job: Callable[..., Child],
    mark: str,
    monkeypatch: pytest.MonkeyPatch,
    signal_: signal.Signals,
) -> None:
    """Written while the tree was looked for: the worker goes on, and another is killed as ever."""
    late = release_late(file_link, "block", monkeypatch)
    worker, other = job(SOFT, "lives"), job("start(); stay()")
    found = pids(worker, 2)
    pids(other, 2)
    with running(file_link.server(kill_tree=True, kill_after=0.3)) as server:
        request = FileTimerRequest(worker.pid, "block", time.time() + 0.1, signal_)
        server.register_timers([request])
        eventually(lambda: late == [worker.pid])
        eventually(lambda: not server._timers and not server._signalled)
        eventually(lambda: states(found) <= {"R", "S"})
        overrun = time.time() + 0.1
        for scope in ("block", "other"):
            file_link.put(other.pid, scope, overrun)
        assert other.wait() == -signal.SIGKILL
        eventually(lambda: marked_processes(mark).keys() == set(found), timeout=5)


def test_hook_that_fails_leaves_nobody_stopped(
    file_link: Link, job: Callable[..., Child], mark: str
) -> None:
    """Between two tries they run, and after the last one they are gone."""
    tries: list[int] = []

    class Reluctant(FileTimerServer):
        def _reap_worker(self, worker_pid: int, signal: int) -> bool:
            tries.append(signal)
            return len(tries) > 1 and super()._reap_worker(worker_pid, signal)

    worker = job("start(); stay()")
    found = pids(worker, 2)
    with running(Reluctant(file_link.path, "run", kill_tree=True)):
        file_link.put(worker.pid, "block", time.time() + 0.1)
        eventually(lambda: tries)
        eventually(lambda: states(found) <= {"R", "S"})
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: not marked_processes(mark), timeout=5)


@pytest.mark.parametrize("trait", ["is called sudo", "has job control"])
def test_parent_that_would_stop_with_its_child(
    link: Link, job: Callable[..., Child], mark: str, trait: str
) -> None:
    """It sees its child killed and not stopped; the others, which do not look for it, may."""
    parent = job(
        """
        with open("/proc/self/comm", "w") as file:
            file.write("sudo" if sys.argv[1] == "is called sudo" else "somebody")
        # Before it starts anything: a group that is left by all but what is stopped gets SIGHUP.
        lead = [lambda: os.setpgid(0, 0)] if sys.argv[1] == "has job control" else []
        worker = start(*lead, start)
        say(worker)
        _, status = os.waitpid(worker, os.WUNTRACED)
        say("stopped" if os.WIFSTOPPED(status) else "ended")
        stay()
        """,
        trait,
    )
    worker = told_twice(pids(parent, 3))
    with running(link.server(kill_tree=True)):
        link.put(worker, "block", time.time() + 0.1)
        assert parent.readline() == "ended"
        eventually(lambda: marked_processes(mark).keys() == {parent.pid}, timeout=5)


# While it is looked for ---------------------------------------------------------------------------


@pytest.fixture
def slow_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have it take long to hold what a worker has started."""
    hold = _tree.Tree.hold

    def hold_slowly(tree: _tree.Tree, known: _tree.Known) -> bool:
        time.sleep(0.05)
        return hold(tree, known)

    monkeypatch.setattr(_tree.Tree, "hold", hold_slowly)


MANY = """
for _ in range(15):
    start()
stay()
"""


@pytest.mark.usefixtures("slow_search")
def test_search_makes_nobody_late(link: Link, job: Callable[..., Child], mark: str) -> None:
    """One that is due meanwhile, and has started less, is reaped before; and both are."""
    worker, other = job(MANY), job("stay()")
    pids(worker, 16)
    pids(other, 1)
    with running(link.server(kill_tree=True)):
        now = time.time()
        link.put(worker.pid, "block", now + 0.1)
        link.put(other.pid, "block", now + 0.3)
        assert other.wait() == -signal.SIGKILL
        assert is_alive(worker.pid)
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: not marked_processes(mark), timeout=5)


@pytest.mark.usefixtures("slow_search")
def test_server_that_is_stopped_while_it_searches(
    file_link: Link, job: Callable[..., Child], mark: str
) -> None:
    """Its last round finds all, and kills it; nobody is left stopped."""
    worker = job(MANY)
    pids(worker, 16)
    with running(file_link.server(kill_tree=True)) as server:
        file_link.put(worker.pid, "block", time.time() + 0.1)
        eventually(server._trees.has_work)
    assert not server._trees.has_work()
    assert worker.wait() == -signal.SIGKILL
    eventually(lambda: not marked_processes(mark), timeout=5)


@pytest.mark.parametrize("stop", [True, False])
def test_worker_that_ends_while_its_tree_is_looked_for(
    stop: bool, job: Callable[..., Child], mark: str
) -> None:
    """It was due: what is held by then ends as well, also where nobody was stopped for it."""
    worker = job("start(); start(); stay()")
    pids(worker, 3)
    with contextlib.closing(_tree.Trees()) as trees, ProcessHandle(worker.pid) as process:
        trees.hold(process, stop, "4711")
        tree = trees._workers[worker.pid].tree
        while len(tree.pids()) < 2:
            assert not trees.work(0)
        worker.process.kill()
        assert worker.wait() == -signal.SIGKILL
        trees.kill(worker.pid)
        assert len(marked_processes(mark)) == 2
    eventually(lambda: not marked_processes(mark))


@pytest.mark.usefixtures("slow_search")
def test_release_while_the_tree_is_looked_for(
    file_link: Link, job: Callable[..., Child], mark: str
) -> None:
    """All that was stopped goes on, and lives."""
    worker = job(MANY)
    found = pids(worker, 16)
    with running(file_link.server(kill_tree=True)) as server:
        file_link.put(worker.pid, "block", time.time() + 0.1)
        eventually(lambda: process_state(worker.pid) == "T")
        file_link.put(worker.pid, "block", -1)
        eventually(lambda: states(found) <= {"R", "S"})
        assert not server._trees.has_work()
        assert not server._trees.held()
    assert marked_processes(mark).keys() == set(found)


@pytest.mark.usefixtures("slow_search")
@pytest.mark.parametrize("scope", ["soft", "hard"])
def test_release_while_the_last_round_searches(
    file_link: Link,
    job: Callable[..., Child],
    mark: str,
    monkeypatch: pytest.MonkeyPatch,
    scope: str,
) -> None:
    """It saves from the signal for that block, and from no other."""
    release_late(file_link, scope, monkeypatch)
    worker = job(SOFT, "lives")
    found = pids(worker, 2)
    with running(file_link.server(kill_tree=True)) as server:
        put_soft(file_link, worker.pid, scope="soft")
        assert worker.readline() == "worker had 15"
        eventually(lambda: server._signalled)
        with server._workers._lock:  # So that there is no round before the last one.
            file_link.put(worker.pid, "hard", time.time())
            server._run_once = True
        server.run_once()
    if scope == "hard":
        assert states(found) <= {"R", "S"}
    else:
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: not marked_processes(mark), timeout=5)


def test_server_that_waits_in_its_own_way(
    file_link: Link, job: Callable[..., Child], mark: str
) -> None:
    """Where nothing is looked for in the wait, the round does it."""

    class Polling(FileTimerServer):
        def _get_requests(self, fd: int, max_interval: float) -> list[FileTimerRequest]:
            time.sleep(0.02)
            return self._source.drain()

    worker = job("start(); stay()")
    pids(worker, 2)
    with running(Polling(file_link.path, "run", kill_tree=True)):
        file_link.put(worker.pid, "block", time.time() + 0.1)
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: not marked_processes(mark), timeout=5)


@pytest.mark.usefixtures("slow_search")
def test_release_of_a_second_block_while_the_tree_is_looked_for(
    file_link: Link, job: Callable[..., Child], mark: str
) -> None:
    """What is held since the soft signal for the first one stays held, and ends with the worker."""
    worker = job(SOFT, "lives")
    found = pids(worker, 2)
    with running(file_link.server(kill_tree=True)) as server:
        put_soft(file_link, worker.pid, scope="soft")
        assert worker.readline() == "worker had 15"
        eventually(lambda: server._signalled)
        file_link.put(worker.pid, "hard", time.time())
        eventually(lambda: process_state(worker.pid) == "T")
        file_link.put(worker.pid, "hard", -1)
        eventually(lambda: states(found) <= {"R", "S"})
        worker.process.kill()
        eventually(lambda: not marked_processes(mark), timeout=5)


def test_fork_of_the_server_while_it_searches(
    job: Callable[..., Child], fork_worker: Callable[..., ForkedWorker]
) -> None:
    """The child signals nobody, and lets go of all."""
    worker = job("start(); stay()")
    found = pids(worker, 2)
    with contextlib.closing(_tree.Trees()) as trees, ProcessHandle(worker.pid) as process:
        trees.hold(process, stop=True, name="4711")
        while states(found) != {"T"}:
            trees.work(0)

        def child(channel: Any) -> None:
            before = len(os.listdir("/proc/self/fd"))
            trees.forget_parent()
            channel.send((before - len(os.listdir("/proc/self/fd")), trees.has_work()))

        forked = fork_worker(child)
        assert forked.receive() == (2, False)
        assert forked.wait() == 0
        assert states(found) == {"T"}
    assert states(found) <= {"R", "S"}


def test_search_that_raises(
    job: Callable[..., Child], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is over, and the log says so."""
    worker = job("stay()")
    pids(worker, 1)
    monkeypatch.setattr(_tree, "_stops_with", mock_raising(MemoryError()))
    with contextlib.closing(_tree.Trees()) as trees, ProcessHandle(worker.pid) as process:
        assert not trees.hold(process, stop=True, name="4711")
        trees.finish()
        assert trees.hold(process, stop=True, name="4711")
    assert eventually(lambda: records(caplog, "Error looking for what worker 4711"))


def test_two_that_wait_are_waited_for_together(job: Callable[..., Child]) -> None:
    """The turn is given on, and nobody burns a core."""
    workers = [job("stay()") for _ in range(2)]
    for worker in workers:
        pids(worker, 1)
    with contextlib.closing(_tree.Trees()) as trees, contextlib.ExitStack() as held:
        for worker in workers:
            process = held.enter_context(ProcessHandle(worker.pid))
            assert not trees.hold(process, stop=True, name=str(worker.pid))
        trees.finish()
        assert states([worker.pid for worker in workers]) == {"T"}
    assert states([worker.pid for worker in workers]) <= {"R", "S"}


# Where it can't be done --------------------------------------------------------------------------


def test_what_does_not_die_is_named(
    file_link: Link,
    job: Callable[..., Child],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It hangs in the kernel: one error with its state, after a while."""
    monkeypatch.setattr(_tree, "UNKILLABLE_AFTER", 0.3)
    worker = job("say(start()); start(); stay()")
    spared = told_twice(pids(worker, 4))
    send = ProcessHandle.send

    # Forged: what hangs in the kernel for seconds would hang the test's machine.
    def send_in_vain(process: ProcessHandle, number: int) -> None:
        if process.pid != spared:
            send(process, number)

    monkeypatch.setattr(ProcessHandle, "send", send_in_vain)
    with running(file_link.server(kill_tree=True)):
        file_link.put(worker.pid, "block", time.time() + 0.1)
        (line,) = eventually(lambda: records(caplog, "Of what worker"))
    assert line.endswith(f"still there 0 s after SIGKILL: {spared} (state S)")


def test_what_dies_is_not_named(
    file_link: Link,
    job: Callable[..., Child],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A look some time after the kill finds nothing, and says nothing."""
    monkeypatch.setattr(_tree, "UNKILLABLE_AFTER", 0.3)
    worker = job("start(); stay()")
    pids(worker, 2)
    with running(file_link.server(kill_tree=True)) as server:
        file_link.put(worker.pid, "block", time.time() + 0.1)
        eventually(lambda: server._trees._killed)
        eventually(lambda: not server._trees._killed)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_search_that_takes_too_long_is_given_up(
    link: Link,
    job: Callable[..., Child],
    mark: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A tree that grows faster than it is found keeps no worker alive; a warning says so."""
    monkeypatch.setattr(_tree, "_LONGEST_SEARCH", 0)
    worker = job("start(); stay()")
    pids(worker, 2)
    with running(link.server(kill_tree=True)):
        link.put(worker.pid, "block", time.time() + 0.1)
        assert worker.wait() == -signal.SIGKILL
        eventually(
            lambda: records(caplog, f"What worker {worker.pid} has started could not all be found")
        )


def test_tree_that_can_not_be_looked_for(
    file_link: Link, job: Callable[..., Child], mark: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without a descriptor to read /proc with the worker is reaped all the same."""
    worker = job("stay()")
    pids(worker, 1)
    with running(file_link.server(kill_tree=True)) as server:
        file_link.put(worker.pid, "block", time.time() + 0.3)
        eventually(lambda: server._timers)
        with no_more_descriptors():
            worker.process.wait(20)
        eventually(lambda: records(caplog, f"What worker {worker.pid} has started can't be"))
    assert worker.wait() == -signal.SIGKILL


def test_worker_without_a_tree(
    link: Link, job: Callable[..., Child], caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing is told of what was not there."""
    worker = job("stay()")
    pids(worker, 1)
    with running(link.server(kill_tree=True)):
        link.put(worker.pid, "block", time.time() + 0.1)
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: records(caplog, "Reaped worker"))
    assert not records(caplog, "Killed what")


def test_without_proc(
    link: Link, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nobody tells who has started whom, the option is refused at once."""
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    with pytest.raises(NotImplementedError, match="kill_tree needs /proc"):
        link.server(kill_tree=True)
    with pytest.raises(SystemExit) as exit_:
        main(["run", "--kill-tree", "--", "true"])
    assert exit_.value.code == 2
    assert "kill_tree needs /proc" in capsys.readouterr().err


# The parts ---------------------------------------------------------------------------------------


def known(pid: int, parent: int, session: int = 1, start: str = "0") -> _tree.Known:
    return _tree.Known(pid, parent, session, session, start)


@pytest.mark.parametrize(
    ("processes", "sessions", "found"),
    [
        # Nearest first, whoever has the lower number.
        ([known(10, 1), known(30, 10), known(20, 30), known(40, 10)], set(), [30, 40, 20]),
        # In a session that one of them leads, also where its parent is another by now.
        ([known(10, 1, 10), known(20, 1, 10), known(30, 20)], set(), [20, 30]),
        ([known(10, 1), known(20, 10, 20), known(30, 1, 20)], set(), [20, 30]),
        # In a session that is known to be theirs, without its leader.
        ([known(30, 1, 20), known(40, 1, 50)], {20}, [30]),
        # Neither the server, nor what it has started, nor those in its session.
        ([known(10, 1, 10), known(5, 10, 10), known(6, 5, 10), known(7, 1, 10)], set(), []),
        # Not the child of whoever had the number before: its parent is never younger.
        ([known(10, 1), known(20, 10, start="7"), known(30, 20, start="6")], set(), [20]),
        # One that is above itself, as numbers that were given away can make it look like.
        ([known(10, 20), known(20, 10)], set(), [20]),
    ],
)
def test_descendants(processes: list[_tree.Known], sessions: set[int], found: list[int]) -> None:
    """Who is below process 10, when the server is process 5."""
    table = {each.pid: each for each in processes}
    assert [each.pid for each in _tree.descendants(table, [10], sessions, 5)] == found


@pytest.fixture
def tree() -> Iterator[_tree.Tree]:
    with contextlib.closing(_tree.Tree({os.getuid()})) as made:
        yield made


def test_only_what_was_seen_is_held(tree: _tree.Tree, job: Callable[..., Child]) -> None:
    """Not another process that has its number since, not one that has ended, none twice."""
    process = job("stay()")
    pids(process, 1)
    seen = _tree.look_at(process.pid)
    assert seen is not None
    assert not tree.hold(seen._replace(start="1"))
    assert tree.hold(seen)
    assert not tree.hold(seen)
    assert tree.starts() == {process.pid: seen.start}
    eventually(lambda: _tree.still_there(tree.starts()) == {process.pid: "S"})
    os.kill(process.pid, signal.SIGKILL)
    wait_dead(process)
    tree.forget_ended()
    assert tree.pids() == []
    assert _tree.still_there({process.pid: seen.start}) == {}
    assert not tree.hold(seen)
    process.wait()
    assert not tree.hold(seen)
    assert tree.others == {}


def test_signal_that_can_not_be_sent(
    tree: _tree.Tree,
    job: Callable[..., Child],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that has ended is no matter; what the system refuses is told."""
    process = job("stay()")
    pids(process, 1)
    seen = _tree.look_at(process.pid)
    assert seen is not None
    tree.hold(seen)
    monkeypatch.setattr(_tree, "user_of", lambda pid: os.getuid())
    process.close()
    tree.send(signal.SIGTERM)
    refuse = PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    monkeypatch.setattr(ProcessHandle, "send", mock_raising(refuse))
    tree.send(signal.SIGTERM)
    (line,) = eventually(lambda: records(caplog, "Process "))
    assert line.startswith(f"Process {process.pid} can't be sent signal {signal.SIGTERM:d}: ")


def test_user_that_changes_while_a_process_is_held(
    tree: _tree.Tree, job: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another user's by then, it is not signalled."""
    process = job("stay()")
    pids(process, 1)
    seen = _tree.look_at(process.pid)
    assert seen is not None
    assert tree.hold(seen)
    with monkeypatch.context() as patch:
        patch.setattr(_tree, "user_of", lambda pid: os.getuid() + 1)
        tree.send(signal.SIGKILL)
    tree.send(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM


@pytest.mark.parametrize("user", [os.getuid() + 1, None, "raises"])
def test_nobody_is_left_stopped(
    user: object, job: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is to be killed goes on where it can't be, and is killed where it may be."""

    def user_of(pid: int) -> object:
        if user == "raises":
            raise MemoryError
        return user

    worker = job("start(); stay()")
    found = pids(worker, 2)
    trees = _tree.Trees()
    with ProcessHandle(worker.pid) as process:
        assert not trees.hold(process, True, "worker")
        trees.finish()
        assert trees.hold(process, True, "worker")
    eventually(lambda: states(found) == {"T"})
    (child,) = set(found) - {worker.pid}
    # Whose stop was not seen to come may be another user's by now.
    tree = trees._workers[worker.pid].tree
    tree._held[child] = tree._held[child]._replace(is_still=False)
    monkeypatch.setattr(_tree, "user_of", user_of)
    with contextlib.suppress(MemoryError):
        trees.kill(worker.pid)
    if user is None:
        eventually(lambda: not is_alive(child))
    else:
        eventually(lambda: states(found) <= {"R", "S"})


def test_children_are_found_without_a_look_at_all(
    tree: _tree.Tree, job: Callable[..., Child]
) -> None:
    """The kernel lists them: each is stopped when its parent is, and seen to be."""
    worker = job("start(start); start(); stay()")
    found = pids(worker, 4)
    root = _tree.look_at(worker.pid)
    assert root is not None
    if not _tree._children_of(root):
        pytest.skip("the kernel lists no children")
    _tree.at_once(tree.chase(_tree.ProcessTable(), root, False, time.monotonic() + 20))
    assert {*tree.pids(), worker.pid} == set(found)
    assert states(tree.pids()) == {"T"}
    tree.resume()
    # Not those of a process that has the number since.
    assert _tree._children_of(root._replace(start="1")) == []


def test_children_that_the_kernel_does_not_list(
    job: Callable[..., Child], mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without CONFIG_PROC_CHILDREN the look at all processes finds them."""
    monkeypatch.setattr(_tree, "_children_of", lambda parent: [])
    worker = job("start(start); start(); stay()")
    pids(worker, 4)
    with contextlib.closing(_tree.Trees()) as trees, ProcessHandle(worker.pid) as process:
        trees.hold(process, stop=True, name="4711")
        trees.finish()
        trees.kill(worker.pid)
    eventually(lambda: marked_processes(mark).keys() == {worker.pid})


def test_farthest_is_killed_first(
    tree: _tree.Tree, job: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that none goes on, where its parent's end has the kernel continue its group."""
    worker = job("start(start); stay()")
    found = pids(worker, 3)
    root = _tree.look_at(worker.pid)
    assert root is not None
    _tree.at_once(tree.find(_tree.ProcessTable(), [worker.pid], stop=True))
    nearest_first = tree.pids()
    sent: list[int] = []
    monkeypatch.setattr(ProcessHandle, "send", lambda process, number: sent.append(process.pid))
    tree.send(signal.SIGKILL)
    tree.send(signal.SIGTERM)
    monkeypatch.undo()
    assert set(nearest_first) == set(found) - {worker.pid}
    assert sent == [*reversed(nearest_first), *nearest_first]
    tree.resume()


def test_process_that_does_not_stop_is_waited_for(
    tree: _tree.Tree, job: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that runs may be about to begin another; in the end it is not waited for."""
    process = job("say(os.getpid())\nwhile True: pass")
    pids(process, 1)
    root = _tree.look_at(process.pid)
    assert root is not None
    started = time.monotonic()
    _tree.at_once(tree.chase(_tree.ProcessTable(), root, True, started + 0.2))
    assert time.monotonic() - started >= 0.2
    # One that waits for something in the kernel may do so for ever.
    os.kill(process.pid, signal.SIGSTOP)
    eventually(lambda: process_state(process.pid) == "T")
    monkeypatch.setattr(_tree, "_STILL", frozenset())
    tree.resume()
    started = time.monotonic()
    _tree.at_once(tree.chase(_tree.ProcessTable(), root, True, started + 20))
    assert _tree._LONGEST_HANG <= time.monotonic() - started < 10


def mock_raising(error: Exception) -> Callable[..., None]:
    """A function that raises."""

    def raising(*_: object) -> None:
        raise error

    return raising


def test_nothing_is_held_of_a_worker_that_has_ended(job: Callable[..., Child]) -> None:
    """Its number may be somebody else's by now."""
    trees = _tree.Trees()
    process = job("stay()")
    pids(process, 1)
    with ProcessHandle(process.pid) as worker:
        os.kill(process.pid, signal.SIGKILL)
        wait_dead(process)
        trees.hold(worker, stop=True, name="4711")
        assert process.wait() == -signal.SIGKILL
        trees.hold(worker, stop=True, name="4711")
    assert trees._workers == {}


def test_search_that_fails_at_its_end(
    job: Callable[..., Child], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was found before is killed all the same."""
    process = job("start(); stay()")
    found = pids(process, 2)
    with contextlib.closing(_tree.Trees()) as trees, ProcessHandle(process.pid) as worker:
        trees.hold(worker, stop=False, name="4711 (rank 3)")
        trees.finish()
        no_more = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        monkeypatch.setattr(_tree.ProcessTable, "refresh", mock_raising(no_more))
        trees.kill(process.pid)
        trees.finish()
    (child,) = set(found) - {process.pid}
    wait_dead(child)
    assert eventually(lambda: records(caplog, "What worker 4711 (rank 3) has started can't be"))


def test_parent_outside_of_the_container_sees_no_stop() -> None:
    """Of process 1's parent nothing is known; it has seen worse."""
    assert not _tree._stops_with(known(1, 0))


def test_worker_that_is_forgiven_one_block_dies_for_another(
    file_link: Link, job: Callable[..., Child], mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It leaves the block of its soft signal when it is about to be killed: its tree dies, too."""
    release_late(file_link, "soft", monkeypatch)
    worker = job(SOFT, "lives")
    pids(worker, 2)
    with running(file_link.server(kill_tree=True)):
        put_soft(file_link, worker.pid, scope="soft")
        assert worker.readline() == "worker had 15"
        file_link.put(worker.pid, "hard", time.time() + 0.1)
        assert worker.wait() == -signal.SIGKILL
        eventually(lambda: not marked_processes(mark), timeout=5)


def test_release_of_the_last_moment_is_for_one_block(
    file_link: Link, job: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For another that it has overrun the worker gets what that asks for."""
    release_late(file_link, "hard", monkeypatch)
    worker = job(SOFT, "dies")
    pids(worker, 2)
    with running(file_link.server(kill_tree=True)) as server:
        past = time.time() - 1
        server.register_timers(
            [
                FileTimerRequest(worker.pid, "hard", past, signal.SIGKILL),
                FileTimerRequest(worker.pid, "soft", past + 0.5, signal.SIGTERM),
            ]
        )
        assert worker.readline() == "worker had 15"
        assert worker.wait() == 3
