"""What holds for every pipe that requests go through, with a name or inside a queue."""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # It has no stub.
import contextlib
import errno
import os
import select
import signal as signals
import stat
import threading
from collections.abc import Callable, Iterable

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

# The most bytes that one write puts into a pipe whole, whoever else writes to it (pipe(7)). POSIX
# lets every writer rely on 512; Windows has no such pipes and no constant.
PIPE_BUF: int = getattr(select, "PIPE_BUF", 512)

# What Linux lets everybody give a pipe unless the administrator says otherwise (pipe(7)). A burst
# of some 8,000 requests fits in it.
CAPACITY = 1 << 20

# How long a client goes on trying to reach a server that is not there, or does not read, in
# seconds.
UNREACHABLE_AFTER = 1.0


class _Mode(threading.local):
    """Per thread: whether a client may wait for its server."""

    waits = True


_mode = _Mode()


def at_once(request: Callable[..., object], *args: object) -> None:
    """Have a client send a request without waiting for its server: it fails instead."""
    _mode.waits = False
    try:
        request(*args)
    finally:
        _mode.waits = True


def may_wait() -> bool:
    """Whether a client may wait for its server now."""
    return _mode.waits


def enlarge(fd: int) -> None:
    """Give a pipe room for a burst, where the system allows it (F_SETPIPE_SZ, Linux)."""
    with contextlib.suppress(AttributeError, OSError):
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, CAPACITY)


def close_descriptors(fds: list[int], places: Iterable[int] | None = None) -> None:
    """Take descriptors out of a list and close them.

    Each is taken and closed within one call into C, as `fds.extend(map(os.open, ...))` opens and
    keeps it: an interrupt comes before or behind, and none is forgotten or closed twice.

    Args:
        fds: The descriptors.
        places: The index of each to be closed, as it is when those before it are gone. None means
            all.
    """
    any(map(os.close, map(fds.pop, [-1] * len(fds) if places is None else places)))


def check_status(fd: int, _: object = None) -> None:
    """Refuse what is no pipe: raises OSError."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        raise OSError(errno.ENXIO, "not a FIFO")


# `check_pipe(fd, CHECK)` raises OSError where a descriptor leads to no pipe. Asking for its size,
# which only Linux knows, takes a third of what asking for its status takes.
CHECK: int = getattr(fcntl, "F_GETPIPE_SZ", 0)
check_pipe: Callable[[int, int], object] = fcntl.fcntl if CHECK else check_status

# Zero is the default, by which a write to a pipe without a reader ends the process. The
# function of `signal` makes an enum of what it finds, in 1 us.
SIGPIPE = int(getattr(signals, "SIGPIPE", 0))
sigpipe_handler: Callable[[int], object] = _signal.getsignal


def write(fd: int, message: bytes, sent: list[int] | None = None) -> None:
    """Write a message; where nobody reads, that raises BrokenPipeError and ends no process.

    A program that restored the default of SIGPIPE, as many commands do, would die of the signal.

    Args:
        fd: Where to.
        message: What.
        sent: Is given an entry once the message is written, whatever interrupts behind that.
    """
    # Written and noted in one call into C: no interrupt comes in between.
    note = ([] if sent is None else sent).extend
    if sigpipe_handler(SIGPIPE):
        note(map(os.write, (fd,), (message,)))
        return
    # Held back in this thread, where it would arrive, and taken out of the way if it came. By the
    # functions in C: an interrupt within those around them would leave it held back.
    was_blocked = SIGPIPE in _signal.pthread_sigmask(_signal.SIG_BLOCK, ())
    try:
        _signal.pthread_sigmask(_signal.SIG_BLOCK, (SIGPIPE,))
        note(map(os.write, (fd,), (message,)))
    except BrokenPipeError:
        if not was_blocked:
            _signal.sigtimedwait((SIGPIPE,), 0)
        raise
    finally:
        if not was_blocked:
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, (SIGPIPE,))


def too_large(message: bytes) -> RuntimeError:
    """The error for a message that does not fit in one atomic write."""
    return RuntimeError(
        f"a timer request may take {PIPE_BUF} bytes, this one takes {len(message)}: "
        "give it a shorter scope"
    )


def has_room(fd: int, timeout: float) -> bool:
    """Wait until a pipe has room for a message, for `timeout` seconds at most; whether it has."""
    return is_ready(fd, select.POLLOUT, timeout)


def is_ready(fd: int, event: int, timeout: float) -> bool:
    """Wait for an event of poll(2) on a descriptor, for `timeout` seconds at most; whether it came.

    The end of the pipe counts as any event does.
    """
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(max(0.0, timeout) * 1000))
