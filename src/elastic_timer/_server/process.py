"""A worker's process, held so that no other process can be mistaken for it.

Linux has the pidfd (pidfd_open(2), Linux 5.3), which names the process itself. Elsewhere a pid is
a number that the system may give to another process once its owner is gone.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal as signals
from collections.abc import Iterator

from elastic_timer._server.callbacks import contained_logger

logger = contained_logger(__name__)

_NO_PROCESS = -1

# All that is ever read of an environment: the rest may hold passwords.
_NAMES_READ = frozenset(
    {
        "RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RESTART_COUNT",
        "TORCHELASTIC_RUN_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK",
    }
)  # fmt: skip


def refusal(pid: int) -> str | None:
    """Why this pid is never signalled; None where it may be."""
    if pid == 0:
        return "pid 0 means every process of the server's own group"
    if pid == -1:
        return "pid -1 means every process there is"
    if pid == 1:
        return "pid 1 is the init process"
    if pid == os.getpid():
        return "it is the server's own process"
    if os.path.exists(f"/proc/self/task/{pid}"):
        return "it is a thread of the server's own process"
    if pid == -os.getpgrp():
        return "it is the server's own process group"
    return None


def is_running(pid: int) -> bool:
    """Whether the process runs; one that has ended but was not waited for does not.

    A process group (negative pid) is taken to run: only a signal tells whether it has members.
    """
    try:
        with ProcessHandle(pid) as process:
            return not process.has_exited()
    except ProcessLookupError:
        return False


class SpareDescriptor:
    """Kept for the moment when there is no other: to read in /proc who a process is."""

    def __init__(self) -> None:
        self._fd: int | None = None
        self._take()

    @contextlib.contextmanager
    def lent(self) -> Iterator[None]:
        """Have one descriptor free meanwhile."""
        self.close()
        try:
            yield
        finally:
            self._take()

    def close(self) -> None:
        """Give it back."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _take(self) -> None:
        with contextlib.suppress(OSError):  # Somebody was faster; next time, then.
            self._fd = os.open(os.devnull, os.O_RDONLY)


class ProcessHandle:
    """Holds a process by its pidfd or, failing that, by its number and the time it started at.

    A negative pid names a process group, as in kill(2). No descriptor holds a group. It is held
    by its leader's start: while the group lives the kernel gives the leader's number to nobody
    else, so another start means that the group is gone.

    Args:
        pid: The process, or with a minus sign the process group.
        spare: What helps out where no descriptor is left. None means nothing does.

    Raises:
        ProcessLookupError: There is no such process.
    """

    def __init__(self, pid: int, spare: SpareDescriptor | None = None) -> None:
        self.pid = pid
        self._spare = spare
        self.pidfd: int | None = _open_pidfd(pid) if pid > 0 else None
        self._start = self._read_start() if self.pidfd is None else None
        if pid > 0 and self.pidfd is None and not _number_runs(pid):
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def __enter__(self) -> ProcessHandle:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the descriptor back."""
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None

    def has_exited(self) -> bool:
        """Whether the process has ended, waited for or not; never true for a group."""
        if self.pidfd is not None:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            return bool(poll.poll(0))
        if self.pid <= 0:
            return False
        return not _number_runs(self.pid) or self._is_somebody_else()

    def send(self, signal: int) -> None:
        """Send a signal to this process and to no other.

        Raises:
            ProcessLookupError: It is gone.
            PermissionError: The system does not let us.
        """
        if self.pidfd is not None:
            signals.pidfd_send_signal(self.pidfd, signal)
        elif self._is_somebody_else():
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        else:
            os.kill(self.pid, signal)

    def _is_somebody_else(self) -> bool:
        start = self._read_start()
        if self._start is None or start is None:
            return False
        if self.pid <= 0 and start == _NO_PROCESS:
            return False  # The leader has ended; a group lives on without it.
        return start != self._start

    def _read_start(self) -> int | None:
        """When the process started, in clock ticks since boot; None where that can't be known."""
        with contextlib.nullcontext() if self._spare is None else self._spare.lent():
            stat = stat_of(abs(self.pid))
        if stat is None:
            return None
        return int(stat[19]) if stat else _NO_PROCESS


def _open_pidfd(pid: int) -> int | None:
    """A descriptor that names the process; None where the system has none to give."""
    if not hasattr(os, "pidfd_open") or not hasattr(signals, "pidfd_send_signal"):
        return None
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOENT):
            # A thread of some process: kill(2) would signal all of that process.
            raise ProcessLookupError(errno.ESRCH, f"pid {pid} is no process") from error
        if error.errno in (errno.EMFILE, errno.ENFILE):
            _warn_once("no descriptors left: workers are now held by their pids alone")
        else:
            _warn_once(f"pidfd_open does not work here ({error}): workers are held by their pids")
        return None


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning("%s", message)


def _number_runs(pid: int) -> bool:
    stat = stat_of(pid)
    if stat:
        return stat[0] not in ("Z", "X")
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True  # It is there, if somebody else's.
    return True


def stat_of(pid: int | str) -> list[str] | None:
    """The fields of /proc/PID/stat from the state on (proc(5)); PID/task/TID is a thread's.

    Empty where there is no such process, None where that can't be known.
    """
    try:
        # Before it stands the process's name, which may hold blanks and brackets of its own.
        return read_file(f"/proc/{pid}/stat").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return [] if os.path.exists("/proc/self/stat") else None
    except OSError:
        return None


def user_of(pid: int) -> int | None:
    """The user whose process it is, whatever rights it has; None where that can't be known."""
    user = status_field(pid, "Uid")
    return None if user is None else int(user)


def status_field(pid: int, name: str) -> str | None:
    """The first word of a field of /proc/PID/status (proc(5)); None where that can't be known."""
    try:
        return read_file(f"/proc/{pid}/status").partition(f"\n{name}:")[2].split(None, 1)[0]
    except (OSError, IndexError):
        return None


def children_of(pid: int) -> list[int]:
    """The children that the kernel lists (CONFIG_PROC_CHILDREN); of very many not all."""
    threads: list[str] = []
    with contextlib.suppress(OSError):
        threads = os.listdir(f"/proc/{pid}/task")
    found: list[int] = []
    for thread in threads:
        with contextlib.suppress(OSError):
            listed = read_file(f"/proc/{pid}/task/{thread}/children")
            # Cut at the last blank: the file may be longer than what is read of it.
            found += map(int, listed.rpartition(" ")[0].split())
    return found


def name_of(pid: int) -> str:
    """The name of the program that a process runs, cut at 15 bytes; empty where it is gone."""
    try:
        return read_file(f"/proc/{pid}/comm").rstrip("\n")
    except OSError:
        return ""


def read_file(path: str, most: int = 4096) -> str:
    """The beginning of a file in /proc; what `os.open` and `os.read` raise is raised."""
    # open() takes twice as long, and there may be thousands of processes.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.read(descriptor, most).decode(errors="replace")
    finally:
        os.close(descriptor)


def environment_of(pid: int) -> dict[str, str]:
    """What a process was started with of the few variables that place it in its job."""
    try:
        with open(f"/proc/{pid}/environ", encoding="utf-8", errors="replace") as file:
            entries = [entry.partition("=") for entry in file.read().split("\0")]
    except OSError:
        return {}
    return {name: value for name, _, value in entries if name in _NAMES_READ}


def state_of(pid: int | str) -> str:
    """The letter the kernel has for a process's state (proc(5)); "unknown" where it has none."""
    stat = stat_of(pid)
    return stat[0] if stat else "unknown"
