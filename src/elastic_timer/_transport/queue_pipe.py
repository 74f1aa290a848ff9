"""The pipe inside a `multiprocessing.Queue`, read and written without its locks and its thread.

`Queue.put` leaves it to a thread to send a request. That thread needs the GIL, and it takes a lock
that nobody can take any more if the process is killed at that moment.

The frames on the pipe are those of `multiprocessing.connection`: the length as a signed 32-bit
integer in network order, then the pickle. A longer pickle has -1 there and is no request.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import stat
import struct
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from elastic_timer._clock import monotonic
from elastic_timer._server.callbacks import contained_logger
from elastic_timer._transport.pipe import (
    CAPACITY,
    PIPE_BUF,
    UNREACHABLE_AFTER,
    close_descriptors,
    enlarge,
    has_room,
    is_ready,
    may_wait,
    too_large,
    write,
)

if TYPE_CHECKING:
    from typing import TypeGuard

logger = contained_logger(__name__)

_OPEN_FLAGS = os.O_WRONLY | getattr(os, "O_NONBLOCK", 0)

_LENGTH = struct.Struct("!i")

# What claims to be longer is no frame: to wait for its end could take for ever.
_LONGEST_FRAME = 1 << 24


class _HasFileno(Protocol):
    def fileno(self) -> int: ...


class _Semaphore(Protocol):
    def acquire(self, block: bool = ..., timeout: float | None = ...) -> bool: ...
    def release(self) -> None: ...


class ReadablePipe(Protocol):
    """A queue of multiprocessing whose reading end is open in this process."""

    _reader: _HasFileno


class WritablePipe(Protocol):
    """A `multiprocessing.Queue`, whose semaphore counts the free places; `qsize` goes by it."""

    _writer: _HasFileno
    _sem: _Semaphore
    _closed: bool


def has_readable_pipe(queue: object) -> TypeGuard[ReadablePipe]:
    """Whether requests can be read from the queue's pipe; on POSIX they can."""
    return os.name == "posix" and hasattr(getattr(queue, "_reader", None), "fileno")


def has_writable_pipe(queue: object) -> TypeGuard[WritablePipe]:
    """Whether requests can be written to the queue's pipe directly; on POSIX they can.

    Not those of a JoinableQueue, which keeps a second count of its requests.
    """
    return (
        os.name == "posix"
        and hasattr(getattr(queue, "_writer", None), "fileno")
        and hasattr(queue, "_sem")
        and hasattr(queue, "_closed")
        and not hasattr(queue, "_unfinished_tasks")
    )


class PipeWriter:
    """Sends requests through a queue's pipe: each is in the pipe when `send` returns.

    Args:
        queue: The queue.
        dumps: Pickles a request.
    """

    def __init__(self, queue: WritablePipe, dumps: Callable[[Any], bytes]) -> None:
        self._queue = queue
        self._dumps = dumps
        self._fd: int | None = None
        self._identity: tuple[int, int] | None = None
        # Here, while the descriptor's number can't have been given to another file yet.
        self._check(queue._writer.fileno())

    def __reduce__(self) -> tuple[type[PipeWriter], tuple[object, ...]]:
        # The descriptor means something in this process only. The queue can be sent to others.
        return PipeWriter, (self._queue, self._dumps)

    def send(self, request: object) -> None:
        """Send a request whole, or not at all.

        Raises:
            BrokenPipeError: For about a second the pipe or the queue was full: nobody reads.
            RuntimeError: The request does not fit in one atomic write.
            ValueError: The queue was closed.
        """
        if self._queue._closed:
            raise ValueError(f"queue {self._queue!r} is closed")
        pickled = self._dumps(request)
        frame = _LENGTH.pack(len(pickled)) + pickled
        if len(frame) > PIPE_BUF:
            raise too_large(frame)
        patience = UNREACHABLE_AFTER if may_wait() else 0.0
        give_up_at = monotonic() + patience
        is_free: list[bool] = []
        sent: list[int] = []
        try:
            # Acquired before the request is sent, as `put` does, or the reader could release first.
            # In one call into C: no interrupt comes between that and the note of it.
            is_free.extend(map(self._queue._sem.acquire, (True,), (patience,)))
            if not is_free[0]:
                raise _unread("the queue")
            self._write(frame, give_up_at, sent)
        except BaseException:
            if any(is_free) and not sent:
                self._queue._sem.release()
            raise

    def _write(self, frame: bytes, give_up_at: float, sent: list[int]) -> None:
        while True:
            fd, may_block = self._open()
            # Atomic up to PIPE_BUF (pipe(7)), so writers need no lock. A descriptor that may block
            # does so only if another writer takes the room that was seen a moment ago.
            if not may_block or has_room(fd, 0):
                try:
                    write(fd, frame, sent)
                    return
                except BlockingIOError:
                    pass
            if not has_room(fd, give_up_at - monotonic()):
                raise _unread("the pipe of the queue")

    def _open(self) -> tuple[int, bool]:
        """The descriptor to write to, and whether a write to it may block."""
        if self._fd is not None:
            self._check(self._fd)
            return self._fd, False
        # Opened anew, since the queue shares its descriptor with other processes, which would find
        # theirs non-blocking, too. This needs /proc, and the pipe must belong to this user.
        shared = self._queue._writer.fileno()
        self._check(shared)
        try:
            (self._fd,) = map(os.open, (f"/proc/self/fd/{shared}",), (_OPEN_FLAGS,))
        except OSError:
            return shared, True
        # But not at the interpreter's exit, when daemon threads may still release their timers.
        self._finalizer = weakref.finalize(self, os.close, self._fd)
        self._finalizer.atexit = False
        return self._fd, False

    def _check(self, fd: int) -> None:
        """Raise OSError if the descriptor's number has been given to another file."""
        try:
            status = os.fstat(fd)
            identity = status.st_dev, status.st_ino
            if self._identity is None and stat.S_ISFIFO(status.st_mode):
                self._identity = identity
            is_ours = identity == self._identity
        except OSError:
            is_ours = False
        if not is_ours:
            if fd == self._fd:
                # The number is somebody else's now, who is not to find it closed.
                self._finalizer.detach()
                self._fd = None
            raise OSError(
                errno.EBADF, "this program has closed the descriptor of the timers' queue"
            )


def _unread(what: str) -> BrokenPipeError:
    return BrokenPipeError(
        errno.EPIPE, f"{what} is full: the timer server does not read; is it alive?"
    )


class PipeReader:
    """Cuts what is in a queue's pipe into pickles, without ever waiting for a writer.

    A queue can have one reader only, as it reads more from the pipe than it has given out.
    """

    def __init__(self, queue: ReadablePipe) -> None:
        self._queue = queue
        self._sem: Any = getattr(queue, "_sem", None)  # A SimpleQueue has none.
        # Empty, or the one descriptor, opened and put here in one call into C: no interrupt comes
        # in between.
        self._fds: list[int] = []
        # Not at the interpreter's exit, which would close it before the server is stopped.
        weakref.finalize(self, close_descriptors, self._fds).atexit = False
        self._buffer = bytearray()

    def fileno(self) -> int:
        """The descriptor that becomes readable when there are requests; opened if need be."""
        if not self._fds:
            # A copy, or closing the queue would close what a selector is waiting for.
            self._fds.extend(map(os.dup, [self._queue._reader.fileno()]))
            enlarge(self._fds[0])
        return self._fds[0]

    def close(self) -> None:
        """Close the descriptor; the queue itself stays open, and so does what was read ahead."""
        close_descriptors(self._fds)

    def take(self, limit: float, timeout: float) -> list[bytes]:
        """Take out pickles that have arrived whole.

        Args:
            limit: How many at most.
            timeout: How many seconds to wait for the first one at most.
        """
        taken = self._cut(limit)
        # Only after waiting: reads of this pipe block, as other processes share it and rely on
        # that.
        if len(taken) < limit and is_ready(self.fileno(), select.POLLIN, 0 if taken else timeout):
            # All that the pipe holds, in one read. A server killed between two reads would leave
            # half a frame in the pipe, and the next server would take it for the begin of one.
            self._buffer += os.read(self.fileno(), CAPACITY)
            taken += self._cut(limit - len(taken))
        return taken

    def _cut(self, limit: float) -> list[bytes]:
        taken: list[bytes] = []
        end = 0
        while len(taken) < limit and len(self._buffer) >= end + _LENGTH.size:
            start = end + _LENGTH.size
            (length,) = _LENGTH.unpack_from(self._buffer, end)
            if not 0 <= length <= _LONGEST_FRAME:
                logger.error("Dropped %d bytes from the queue: no request", len(self._buffer) - end)
                end = len(self._buffer)
                break
            if len(self._buffer) < start + length:
                break
            end = start + length
            taken.append(bytes(self._buffer[start:end]))
            # ValueError: somebody wrote to the pipe without acquiring the semaphore.
            with contextlib.suppress(AttributeError, ValueError):
                self._sem.release()
        del self._buffer[:end]
        return taken
