"""What the tests share: real child processes, and ways to wait for them without sleeping."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import json
import multiprocessing
import os
import resource
import selectors
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

from elastic_timer import FileTimerRequest, TimerClient, expires
from elastic_timer._server import callbacks

REPOSITORY = Path(__file__).resolve().parent.parent
SOURCE = REPOSITORY / "src"

CLI = "import sys; from elastic_timer._command.main import main; sys.exit(main())"
"""The command as Python source, before which a test can put lines of its own."""

FAR = 600.0
"""So many seconds that no test lives to see their end."""

ALLOWED_LATENESS = 2.0
"""How late a reap may be in tests, in seconds: a bound for busy machines; a few ms are usual."""

NOBODY = 65534
"""A user that has no rights."""

_T = TypeVar("_T")


class HasPid(Protocol):
    """Anything with a process id: a Child, a Popen, a multiprocessing.Process."""

    @property
    def pid(self) -> int | None: ...


class Startable(Protocol):
    """Either timer server, ours or a subclass of a test."""

    def start(self) -> None: ...
    def stop(self) -> None: ...


_S = TypeVar("_S", bound=Startable)


UNMEASURED = {"COVERAGE_PROCESS_START": "", "COVERAGE_PROCESS_CONFIG": ""}
"""The environment of a child whose coverage is not measured: an interrupt at any moment may come
within the measuring, and leave the lock of that taken."""


class Child:
    """A Python process that runs `source`; the test exchanges lines with it."""

    def __init__(
        self,
        source: str,
        args: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        **popen_kwargs: Any,
    ) -> None:
        environment = {**os.environ, **(env or {})}
        paths = [str(SOURCE), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        # In a session of its own, so that kill() also ends grandchildren.
        self._owns_group = bool(popen_kwargs.setdefault("start_new_session", True))
        # A file: unlike a pipe it lets the child write on while nobody reads.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close()
        self._lines = b""
        popen_kwargs.setdefault("stdin", subprocess.PIPE)
        popen_kwargs.setdefault("stdout", subprocess.PIPE)
        popen_kwargs.setdefault("stderr", self._stderr)
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(source), *args],
            text=True,
            env=environment,
            **popen_kwargs,
        )
        self.pid: int = self.process.pid

    def readline(self, timeout: float = 20) -> str:
        """The next line of stdout without its end, waiting at most `timeout` seconds."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._lines:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise AssertionError(self._complaint(f"no line within {timeout} s"))
                chunk = os.read(descriptor, 65536)
                if not chunk:
                    raise AssertionError(self._complaint("end of output"))
                self._lines += chunk
        line, _, self._lines = self._lines.partition(b"\n")
        return line.decode()

    def send_line(self, text: str) -> None:
        """Write one line to the child's stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text + "\n")
        self.process.stdin.flush()

    def wait(self, timeout: float = 20) -> int:
        """The exit code, negative for a signal; an AssertionError after `timeout` seconds."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(self._complaint(f"still running after {timeout} s")) from None

    def stderr_text(self) -> str:
        """What the child wrote to stderr so far."""
        if self._stderr.closed:
            return ""
        return os.pread(self._stderr.fileno(), 10_000_000, 0).decode(errors="replace")

    def kill(self) -> None:
        """Kill the child and its group, and reap it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self._owns_group:
                os.killpg(self.pid, signal.SIGCONT)
                os.killpg(self.pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Kill the child and close every descriptor that leads to it."""
        self.kill()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()
        with contextlib.suppress(BrokenPipeError):
            if self.process.stdin is not None:
                self.process.stdin.close()
        self._stderr.close()

    def _complaint(self, what: str) -> str:
        code = self.process.poll()
        return f"child {self.pid} (exit code {code}): {what}; stderr:\n{self.stderr_text()}"


class ForkedWorker:
    """A fork of this process that runs `target(channel, *args)`; the channel goes both ways."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._channel, theirs = context.Pipe()
        self.process = context.Process(target=target, args=(theirs, *args))
        self.process.start()
        theirs.close()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def receive(self, timeout: float = 20) -> Any:
        """The next object that the worker sent, waiting at most `timeout` seconds."""
        assert self._channel.poll(timeout), f"worker {self.pid} sent nothing within {timeout} s"
        return self._channel.recv()

    def send(self, message: object) -> None:
        """Send an object to the worker."""
        self._channel.send(message)

    def ask(self, message: object, timeout: float = 20) -> Any:
        """Send an object and return what the worker answers."""
        self.send(message)
        return self.receive(timeout)

    def wait(self, timeout: float = 20) -> int:
        """The exit code, negative for a signal; an AssertionError after `timeout` seconds."""
        wait_dead(self, timeout)
        self.process.join()
        assert self.process.exitcode is not None
        return self.process.exitcode

    def close(self) -> None:
        """Kill and reap the worker, and close every descriptor that leads to it."""
        self.process.kill()
        self.process.join()
        self.process.close()
        self._channel.close()


Spawn = Callable[..., Child]
"""The fixture `spawn`."""

Fork = Callable[..., ForkedWorker]
"""The fixture `fork_worker`."""

Event = tuple[str, FileTimerRequest | None]
"""What `log_event` is called with."""


def eventually(predicate: Callable[[], _T], timeout: float = 20, message: str = "") -> _T:
    """Poll until `predicate` returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while True:
        value = predicate()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(message or f"not so within {timeout} s: {predicate}")
        time.sleep(0.005)


def wait_dead(process: int | HasPid, timeout: float = 20) -> float:
    """Wait until a process has ended (a zombie counts) and return `time.monotonic()` of then."""
    if isinstance(process, Child) and process.process.returncode is not None:
        return time.monotonic()
    pid = process if isinstance(process, int) else process.pid
    assert pid is not None, "the process was never started"
    if not hasattr(os, "pidfd_open"):
        eventually(lambda: not is_alive(pid), timeout, f"{pid} still runs after {timeout} s")
        return time.monotonic()
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return time.monotonic()
    try:
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            assert selector.select(timeout), f"process {pid} still runs after {timeout} s"
        return time.monotonic()
    finally:
        os.close(descriptor)


def is_alive(process: int | HasPid) -> bool:
    """Whether the process exists and is not a zombie."""
    pid = process if isinstance(process, int) else process.pid
    assert pid is not None, "the process was never started"
    try:
        return process_state(pid) not in ("Z", "X")
    except ProcessLookupError:
        return False


def process_state(pid: int) -> str:
    """The letter `ps` shows: R, S, D, T, Z ...; ProcessLookupError where there is none."""
    if not os.path.isdir("/proc/self"):
        found = subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
        )
        if not found.stdout.strip():
            raise ProcessLookupError(pid)
        return found.stdout.strip()[0]
    return _stat_fields(pid)[0]


LAST_PID = Path("/proc/sys/kernel/ns_last_pid")
"""Whoever may write to this file can choose the pid of the next process."""


def start_with_pid(pid: int, **options: Any) -> subprocess.Popen[bytes] | None:
    """A sleeping process with this very pid; None if it can't be had."""
    for _ in range(50):
        try:
            before = LAST_PID.read_text()
            LAST_PID.write_text(str(pid - 1))
        except OSError:
            return None
        process = subprocess.Popen(["sleep", str(FAR)], **options)
        # Or the next processes of other tests are given pids that were others' a moment ago.
        LAST_PID.write_text(before)
        if process.pid == pid:
            return process
        # Somebody else was quicker, or the pid is taken.
        process.kill()
        process.wait()
    return None


@contextlib.contextmanager
def taking_turns(lock: Path) -> Iterator[None]:
    """Wait until no other process is in a block like this with the same file."""
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # Who was forked meanwhile may have it open still.


def child_pids(pid: int | None = None) -> set[int]:
    """The children of `pid` (default: this process), zombies included; needs /proc."""
    children: set[int] = set()
    # Each thread has its own list, of the children that it forked.
    for file in Path(f"/proc/{os.getpid() if pid is None else pid}/task").glob("*/children"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            children.update(map(int, file.read_text().split()))
    return children


def marked_processes(mark: str) -> dict[int, str]:
    """The running processes that were started with the mark, and their command lines."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # They come and go while this looks.
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(process.name)] = command.decode(errors="replace").strip()
    return found


def kill_marked(mark: str) -> dict[int, str]:
    """Kill those that run with the mark, and return them."""
    left = marked_processes(mark)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return left


def _stat_fields(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        raise ProcessLookupError(pid) from None
    # The name before it may hold blanks and parentheses of its own.
    return text.rpartition(")")[2].split()


def open_descriptors() -> dict[int, str]:
    """This process's open descriptors, and what each leads to."""
    found = {}
    for name in os.listdir("/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"):
        # The one by which the directory was listed is closed by now.
        with contextlib.suppress(OSError):
            os.fstat(int(name))
            found[int(name)] = _leads_to(name)
    return found


def _leads_to(name: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/self/fd/{name}")
    return "?"


@contextlib.contextmanager
def running(server: _S) -> Iterator[_S]:
    """Start a server, and stop it whatever happens."""
    server.start()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def no_more_descriptors() -> Iterator[None]:
    """Let this process open no further file; what is open stays open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Not lower: poll(2) refuses to wait for more descriptors than the limit.
    lowest_free = os.dup(0)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def no_more_threads() -> Iterator[None]:
    """Let this process start no thread, by asking for stacks that don't fit into memory."""
    before = threading.stack_size(1 << 60)
    try:
        yield
    finally:
        threading.stack_size(before)
        # What was logged meanwhile is kept until more is, and that may be in another test.
        callbacks.the_log().submit(lambda: None)
        assert callbacks.flush_log(20)


def become_nobody() -> None:
    """Give up all rights for good."""
    # What a server imports: nobody may not be let read where it is installed.
    for module in (
        "_evidence.collector",
        "_server.loop",
        "_server.status",
        "_transport.status_socket",
    ):
        importlib.import_module(f"elastic_timer.{module}")
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def wait_to_be_killed(channel: Any) -> None:
    """A worker that does nothing; others may send requests in its name."""
    channel.recv()


def overrun(channel: Any, client: TimerClient, after: float) -> None:
    """A worker that never leaves its block; it sends its deadline (monotonic) once it is in."""
    deadline = time.monotonic() + after
    with expires(after=after, scope="overrun", client=client):
        channel.send(deadline)
        time.sleep(FAR)


def assert_reaped_in_time(worker: ForkedWorker, deadline: float) -> None:
    """The worker dies at its deadline (monotonic): never before, and not much later."""
    died = wait_dead(worker, deadline + ALLOWED_LATENESS - time.monotonic())
    assert died >= deadline
    assert worker.wait() == -signal.SIGKILL


def wire_line(**changes: Any) -> bytes:
    """A valid request of this process as it goes over the FIFO, with changes."""
    request = {
        "version": 1,
        "pid": os.getpid(),
        "scope_id": "valid",
        "expiration_time": time.time() + FAR,
        "signal": 9,
    }
    return json.dumps({**request, **changes}).encode() + b"\n"


def write_raw(fifo_path: str, data: bytes) -> None:
    """Write bytes into a FIFO at once, as any process could."""
    descriptor = os.open(fifo_path, os.O_WRONLY | os.O_NONBLOCK)
    try:
        assert os.write(descriptor, data) == len(data)
    finally:
        os.close(descriptor)


def fill_pipe(descriptor: int) -> None:
    """Write into a pipe or FIFO until nothing more goes in; it is non-blocking from then on."""
    os.set_blocking(descriptor, False)
    for size in (65536, 1):
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(descriptor, bytes(size))
