"""Fixtures of all tests; one of them sees to it that no test leaves anything behind."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import importlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import textwrap
import threading
import uuid
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import elastic_timer
from elastic_timer import FileTimerClient, FileTimerServer, debug_info_logging
from tests.jobs import PRELUDE
from tests.servers import Link, Serve, Server, ServerProcess, serve_questions
from tests.support import (
    CLI,
    Child,
    Fork,
    ForkedWorker,
    Spawn,
    child_pids,
    eventually,
    kill_marked,
    open_descriptors,
    running,
    taking_turns,
)

_FAILED = pytest.StashKey[bool]()

# How long an example takes tells of what else the machine does.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")

# Each takes a second or two of a core to begin.
_WORKERS_PER_CORE = 4
_MOST_WORKERS = 16

_IS_WORKER = "PYTEST_XDIST_WORKER" in os.environ

# nohup and a shell's `&` start programs with these signals ignored. The children of the tests would
# inherit that, and `elastic-timer run` leaves ignored signals ignored.
for _name in ("SIGHUP", "SIGINT", "SIGQUIT"):
    _number = getattr(signal, _name, None)
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, signal.default_int_handler if _name == "SIGINT" else signal.SIG_DFL)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run the whole suite in more workers than there are cores, as most tests wait.

    A few files are quicker without the start of workers, and can be stopped in a debugger.
    """
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None  # By which the plugin itself is told.
    is_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return min(_WORKERS_PER_CORE * (os.cpu_count() or 1), _MOST_WORKERS) if is_suite else 0


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Keep what stays from the garbage collector, and let the workers share the imports' work."""
    gc.disable()
    try:
        if _IS_WORKER and session.config.args_source is pytest.Config.ArgsSource.TESTPATHS:
            _import_tests()
        return (yield)
    finally:
        # It would look at all of this after each test that leaves something to be collected.
        gc.freeze()
        gc.enable()


def _import_tests() -> None:
    """Import the test modules, each worker beginning with other ones.

    In a fresh checkout the asserts in them have to be rewritten, which takes seconds. Workers that
    go through them in the same order each do it all, as none finds what another has made.
    """
    names = sorted(path.stem for path in Path(__file__).parent.glob("test_*.py"))
    number = int(os.environ["PYTEST_XDIST_WORKER"].removeprefix("gw"))
    first = len(names) * number // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    for name in names[first:] + names[:first]:
        # What is wrong with one is told when pytest imports it.
        with contextlib.suppress(Exception, pytest.skip.Exception):
            importlib.import_module(f"tests.{name}")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what is long, and end with what nothing else may run beside.

    So cores have nothing to do once only, and not for long.
    """

    def place(item: pytest.Item) -> int:
        if item.get_closest_marker("alone"):
            return 2
        return 0 if item.get_closest_marker("long") else 1

    if _IS_WORKER:
        items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Note which tests have failed: their tracebacks keep open what they had opened."""
    report = yield
    item.stash[_FAILED] = item.stash.get(_FAILED, False) or report.failed
    return report


@pytest.fixture(autouse=True)
def _default_evidence() -> Iterator[None]:
    """Undo what a test has said of the evidence for all servers of its process."""
    yield
    debug_info_logging.set_stacks_timeout(2.0)
    debug_info_logging.set_native_stacks(False)
    debug_info_logging._handlers.clear()


@pytest.fixture(scope="session", autouse=True)
def _resource_tracker() -> None:
    """Start multiprocessing's helper process now, as it lives on until the interpreter ends."""
    if sys.platform != "win32":
        from multiprocessing import resource_tracker

        resource_tracker.ensure_running()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this run of the tests, the same one for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if _IS_WORKER else folder


@pytest.fixture
def made_once(shared_folder: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """`made_once(name, make)`: a folder that `make` has filled, once for all tests and workers."""

    def get(name: str, make: Callable[[Path], object]) -> Path:
        folder = shared_folder / name
        with taking_turns(shared_folder / f"{name}.lock"):
            if not folder.exists():
                folder.mkdir()
                try:
                    make(folder)
                except BaseException:
                    shutil.rmtree(folder)
                    raise
        return folder

    return get


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder for sockets, as multiprocessing has them: 107 characters are all of a path."""
    with tempfile.TemporaryDirectory("", "et-", "/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def _chooses_pids(shared_folder: Path) -> Iterator[None]:
    """For tests that choose pids: they would take them from each other."""
    with taking_turns(shared_folder / "pids.lock"):
        yield


@pytest.fixture(scope="session")
def _doors(shared_folder: Path) -> Iterator[list[int]]:
    """Files on which the workers of pytest-xdist lock each other out; none without workers."""
    names = ("first", "outer", "inner") if _IS_WORKER else ()
    doors = [
        os.open(shared_folder / f"{name}-door", os.O_RDWR | os.O_CREAT, 0o600) for name in names
    ]
    if doors:
        fcntl.flock(doors[0], fcntl.LOCK_SH)
    yield doors
    for door in doors:
        # Not by closing it alone: processes that tests have forked may have it open, too.
        fcntl.flock(door, fcntl.LOCK_UN)
        os.close(door)


@pytest.fixture(autouse=True)
def _runs_beside_others(request: pytest.FixtureRequest, _doors: list[int]) -> Iterator[None]:
    """Let a test that is marked `alone` run while no other test does."""
    if not _doors:
        yield
        return
    first, outer, inner = _doors
    kind = fcntl.LOCK_SH
    if request.node.get_closest_marker("alone"):
        kind = fcntl.LOCK_EX
        # Until all workers are that far: with those that have others left it would take turns.
        fcntl.flock(first, fcntl.LOCK_EX)
        fcntl.flock(first, fcntl.LOCK_UN)
    # Without the outer one a test that is to be alone would wait for as long as others follow each
    # other within the inner.
    fcntl.flock(outer, kind)
    try:
        fcntl.flock(inner, kind)
    finally:
        fcntl.flock(outer, fcntl.LOCK_UN)
    yield
    fcntl.flock(inner, fcntl.LOCK_UN)


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    _resource_tracker: None,
    _runs_beside_others: None,
) -> Iterator[None]:
    """Fail a test that leaves a thread, a child process or an open descriptor behind."""
    descriptors = set(open_descriptors())
    children = child_pids()
    yield
    elastic_timer.configure(None)
    # pytest keeps the fixtures' values, and log records keep tracebacks with all frames. What these
    # refer to, queues with their pipes for one, would stay open.
    caplog.get_records("call").clear()
    if isinstance(request.node, pytest.Function):
        request.node.funcargs.clear()

    def left() -> list[str]:
        multiprocessing.active_children()
        if os.getpid() == 1:  # In a container without an init orphans become our children.
            _reap_adopted()
        threads = [
            thread.name
            for thread in threading.enumerate()
            if thread.name.startswith("elastic-timer")
        ]
        processes = [f"process {pid}" for pid in child_pids() - children]
        opened = [
            f"descriptor {number} -> {target}"
            for number, target in open_descriptors().items()
            if number not in descriptors
        ]
        return threads + processes + opened

    def nothing_left() -> bool:
        # Collecting garbage takes 50 ms, so it is done only if something is left.
        return not left() or (gc.collect() >= 0 and not left())

    try:
        if not request.node.stash[_FAILED]:
            eventually(nothing_left, timeout=5)
    except AssertionError:
        pytest.fail(f"left behind: {', '.join(left())}", pytrace=False)
    finally:
        _reap(child_pids() - children)


def _reap_adopted() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass


def _reap(pids: set[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """`spawn(source, *args, env=None, **popen_kwargs)`: a Child, killed and reaped at the end."""
    children: list[Child] = []

    def start(
        source: str, *args: str, env: dict[str, str] | None = None, **popen_kwargs: Any
    ) -> Child:
        child = Child(source, args, env, **popen_kwargs)
        children.append(child)
        return child

    yield start
    for child in children:
        child.close()


@pytest.fixture
def run(spawn: Spawn, tmp_path: Path) -> Callable[..., Child]:
    """`run(*arguments)`: a Child that is `elastic-timer run`, with `tmp_path` as its TMPDIR."""

    def start(*arguments: str, source: str = CLI, **popen_kwargs: Any) -> Child:
        environment = {**popen_kwargs.pop("env", {}), "TMPDIR": str(tmp_path)}
        return spawn(source, "run", *arguments, env=environment, **popen_kwargs)

    return start


@pytest.fixture
def mark() -> Iterator[str]:
    """A mark in the environment, as name=value; who began with it does not outlive the test."""
    mark = f"ELASTIC_TIMER_TEST_JOB={uuid.uuid4()}"
    yield mark
    eventually(lambda: not kill_marked(mark))


@pytest.fixture
def job(spawn: Spawn, mark: str) -> Callable[..., Child]:
    """`job(source, *arguments)`: a Child with the mark, which has what stands in PRELUDE."""

    def start(source: str, *arguments: str) -> Child:
        name, _, value = mark.partition("=")
        return spawn(PRELUDE + textwrap.dedent(source), *arguments, env={name: value})

    return start


@pytest.fixture
def fork_worker() -> Iterator[Fork]:
    """`fork_worker(target, *args)`: a ForkedWorker, killed and reaped at the end."""
    workers: list[ForkedWorker] = []

    def start(target: Callable[..., None], *args: Any) -> ForkedWorker:
        worker = ForkedWorker(target, *args)
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        worker.close()


@pytest.fixture
def fifo_path(tmp_path: Path) -> str:
    """A path for a FIFO; nothing is there yet."""
    return str(tmp_path / "timers.fifo")


@pytest.fixture
def client(fifo_path: str) -> FileTimerClient:
    """A client of the server that reads the FIFO, whichever that is."""
    return FileTimerClient(fifo_path)


@pytest.fixture
def server(fifo_path: str) -> Iterator[FileTimerServer]:
    """A file server that runs for this test, in the test's own process."""
    with running(FileTimerServer(fifo_path, "run", 0.05)) as started:
        yield started


@pytest.fixture
def reader(fifo_path: str) -> Iterator[int]:
    """The reading end of a FIFO that no server reads."""
    os.mkfifo(fifo_path)
    descriptor = os.open(fifo_path, os.O_RDONLY | os.O_NONBLOCK)
    yield descriptor
    os.close(descriptor)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(fifo_path)


@pytest.fixture
def mp_queue() -> Iterator[Any]:
    """A queue for tests that write into its pipe themselves; both are closed at the end."""
    queue: Any = multiprocessing.get_context("fork").Queue()
    yield queue
    queue.close()
    queue._writer.close()


@pytest.fixture(params=["file", "queue"])
def link(request: pytest.FixtureRequest, fifo_path: str) -> Iterator[Link]:
    """The test runs twice: over the FIFO, and over the queue."""
    with contextlib.closing(Link(request.param, fifo_path)) as made:
        yield made


@pytest.fixture
def file_link(fifo_path: str) -> Link:
    """For tests of the FIFO alone."""
    return Link("file", fifo_path)


@pytest.fixture
def queue_link(fifo_path: str) -> Iterator[Link]:
    """For tests of the queue alone."""
    with contextlib.closing(Link("queue", fifo_path)) as made:
        yield made


@pytest.fixture
def serve(fork_worker: Fork, tmp_path: Path) -> Serve:
    """`serve(make_server, prepare=...)`: a ServerProcess, in which `prepare` is called first."""
    count = 0

    def start(
        make_server: Callable[[], Server], prepare: Callable[[], object] = lambda: None
    ) -> ServerProcess:
        nonlocal count
        count += 1
        log_path = tmp_path / f"server-{count}.log"
        return ServerProcess(fork_worker(serve_questions, make_server, log_path, prepare), log_path)

    return start
