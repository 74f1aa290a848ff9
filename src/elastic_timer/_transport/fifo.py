"""The server's end of a FIFO: it is made, read and removed, and nobody else's file is touched."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from elastic_timer import _clock
from elastic_timer._server.callbacks import contained_logger
from elastic_timer._transport.pipe import CAPACITY, close_descriptors, enlarge
from elastic_timer._transport.rubbish import RubbishLog
from elastic_timer._transport.wire import SHORTEST_REQUEST, LineBuffer, decode

logger = contained_logger(__name__)

_R = TypeVar("_R")

_READ_SIZE = 1 << 16

# So many bytes an ordinary round reads. Even if all of it is rubbish, that takes some hundredths of
# a second, so writers that never pause do not keep the server from its deadlines. With much less a
# busy client could keep the pipe full, and others would find no room in it.
_ROUND_SIZE = CAPACITY // 2

# How long to wait for another server's lock on the folder, in seconds. Servers hold it for less
# than a millisecond, but anybody who may read the folder could hold it for ever.
_FOLDER_PATIENCE = 1.0
# The same while clients are being served, whose deadlines come first.
_MEND_PATIENCE = 0.05

_IN_USE = "a timer server reads it already; stop that one, or give another path"
_MEDDLED_WITH = (
    "another user has put something in the FIFO's place; "
    "give a path in a folder that only this user may write to"
)


# Lines that are long enough to be requests.
_LIKELY = re.compile(rb"[^\n]{%d,}" % SHORTEST_REQUEST)


class FifoSource(Generic[_R]):
    """The requests that come through a FIFO, which is made here and readable for its owner alone.

    If several servers are given one path, the first to read the FIFO has it, and the others are
    refused. To be used by one thread at a time. Whatever interrupted a method, `close` closes and
    removes everything.

    Args:
        path: Where to make it. A FIFO that nobody reads is replaced, nothing else is.
        make_request: Makes a request of what a line says.

    Raises:
        FileExistsError: Something lies there that is no FIFO, or a FIFO that somebody reads.
        FileNotFoundError: The folder does not exist.
        NotImplementedError: The platform has no FIFOs.
        PermissionError: Another user meddles with what lies there.
    """

    def __init__(self, path: str, make_request: Callable[[int, str, float, int], _R]) -> None:
        if not hasattr(os, "mkfifo"):
            raise NotImplementedError(
                "this platform has no FIFOs; run the workers and their server on a POSIX system"
            )
        self.has_read = False
        self._make_request = make_request
        # Absolute, or a later chdir() would make us remove a file somewhere else.
        self._path = os.path.abspath(path)
        # Each of these three lists is filled and emptied within one call into C, so that no
        # interrupt comes between making or opening something and noting it. The status of the FIFO
        # made here, by which it is recognised; else empty.
        self._made: list[os.stat_result] = []
        # The reading end and the writing end.
        self._ends: list[int] = []
        # The folder, while it is locked.
        self._folder: list[int] = []
        self._lines = LineBuffer()
        # What had arrived in a FIFO by the moment that it was closed for another one.
        self._rest: list[_R] = []
        self._rubbish = RubbishLog(logger)
        try:
            with self._locked_folder(_FOLDER_PATIENCE):
                self._make()
        except BaseException:
            self.close()
            raise

    def open(self, patience: float = _FOLDER_PATIENCE) -> int:
        """Open it, and make it anew where it is not in place.

        Args:
            patience: How many seconds to wait for another server's lock on the folder.

        Returns:
            The descriptor to wait on.

        Raises:
            FileExistsError: Since it was made, something else was put in its place, or another
                server has begun to read it.
            PermissionError: Another user meddles with what lies there.
        """
        before = len(self._ends)
        flags = os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            with self._locked_folder(patience):
                self._make()
                # Without a writer of our own a FIFO reads as ended as soon as a client has closed
                # it, and waiting for it would return at once for ever.
                self._ends.extend(
                    map(os.open, [self._path] * 2, [os.O_RDONLY | flags, os.O_WRONLY | flags])
                )
            if not all(map(self._is_ours, map(os.fstat, self._ends[before:]))):
                raise self._error(errno.EPERM, _MEDDLED_WITH)
        except BaseException:
            close_descriptors(self._ends, [-1] * (len(self._ends) - before))
            self._remove()  # Or clients would find a FIFO that nobody reads.
            raise
        if before:
            # Who had the earlier one open may have written meanwhile.
            self._rest = self.drain(everything=True)
        close_descriptors(self._ends, [0] * before)
        # A line that was begun in an earlier FIFO will not be continued in this one.
        self._lines = LineBuffer()
        enlarge(self.fileno())
        return self.fileno()

    def drain(self, everything: bool = False) -> list[_R]:
        """Take out the requests that have arrived, without waiting; other lines are dropped.

        Args:
            everything: Whether to read all that was written before the call, or no more than a
                round can read without being late for a deadline.
        """
        data = bytearray()
        limit = CAPACITY if everything else _ROUND_SIZE
        with contextlib.suppress(BlockingIOError):
            # A read returns nothing only if somebody closed our descriptor, and its number was
            # given to another file. With our own writing end open, the FIFO itself never ends.
            while len(data) < limit and (chunk := os.read(self.fileno(), _READ_SIZE)):
                data += chunk
        self.has_read = self.has_read or bool(data)
        lines = self._lines.feed(bytes(data))
        # Short lines are not looked at one by one: with as many as fit in a pipe that takes long.
        likely: list[bytes] = _LIKELY.findall(lines)
        each = lines.split(b"\n")
        short = len(each) - each.count(b"") - len(likely)
        if short:
            example = next(line for line in each if 0 < len(line) < SHORTEST_REQUEST)
            self._rubbish.add(example, "too short", short)
        requests, self._rest = self._rest, []
        for line in likely:
            try:
                requests.append(self._make_request(*decode(line)))
            except ValueError as error:
                self._rubbish.add(line, error)
        return requests

    def fileno(self) -> int:
        """The descriptor to wait on.

        Raises:
            ValueError: The FIFO is not open.
        """
        if not self._ends:
            raise ValueError(f"{self._path} is not open for reading")
        return self._ends[0]

    def is_in_place(self) -> bool:
        """Whether the path still leads to the FIFO made here."""
        found = self._found()
        return found is not None and self._is_ours(found)

    def is_missing(self) -> bool:
        """Whether nothing at all is at the path."""
        return self._found() is None

    def mend(self) -> int:
        """Make the FIFO anew that was removed from its folder, and read that one from now on.

        Returns:
            The descriptor to wait on now. The one from before is closed.

        Raises:
            OSError: That can't be done; the FIFO from before stays open.
        """
        if not self.is_missing():
            raise self._error(errno.EEXIST, "something else was put in its place")
        return self.open(_MEND_PATIENCE)

    def close(self) -> None:
        """Close it, and remove it from its folder if it is still the one made here."""
        try:
            self._remove()
        finally:
            close_descriptors(self._ends)
            close_descriptors(self._folder)

    def forget_parent(self) -> None:
        """Close, in a forked child, what belongs to the parent, and leave its FIFO where it is."""
        self._made.clear()
        self.close()

    @contextlib.contextmanager
    def _locked_folder(self, patience: float) -> Iterator[None]:
        """Have what lies at the path looked at and changed by one server at a time.

        The lock can't be had if the folder may not be read, if its file system has no locks, or if
        somebody holds it for longer than `patience` seconds. Then the body runs without it, which
        makes a difference only to servers that start at the very same moment.
        """
        import fcntl  # Not at the top: Windows has none, and is refused before it comes here.

        give_up_at = _clock.monotonic() + patience
        close_descriptors(self._folder)  # What is left of a call that was interrupted.
        try:
            with contextlib.suppress(OSError):
                folder = os.path.dirname(self._path)
                self._folder.extend(map(os.open, [folder], [os.O_RDONLY | os.O_DIRECTORY]))
                while _clock.monotonic() < give_up_at:
                    with contextlib.suppress(BlockingIOError):
                        fcntl.flock(self._folder[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    time.sleep(0.002)
            yield
        finally:
            # Not by closing it alone: a child forked by another thread may hold a copy.
            with contextlib.suppress(OSError, IndexError):
                fcntl.flock(self._folder[0], fcntl.LOCK_UN)
            close_descriptors(self._folder)

    def _make(self) -> None:
        """Make it anew, unless it is there."""
        found = self._found()
        if found is not None:
            if not stat.S_ISFIFO(found.st_mode):
                raise self._error(errno.EEXIST, "it is no FIFO; give another path")
            if self._is_read():
                raise self._error(errno.EEXIST, _IN_USE)
            if self._is_ours(found):
                return
            os.unlink(self._path)
        self._made.clear()
        path = [self._path]
        made = itertools.chain(map(os.mkfifo, path, [0o600]), map(os.lstat, path))
        try:
            self._made.extend(filter(None, made))
        except FileNotFoundError as error:
            raise self._error(errno.ENOENT, "its folder does not exist; make it first") from error
        except FileExistsError as error:
            raise self._error(errno.EEXIST, _IN_USE) from error
        (status,) = self._made
        if not self._is_ours(status):
            raise self._error(errno.EPERM, _MEDDLED_WITH)
        # The umask may have taken rights from the owner. Of a link nothing is changed.
        if stat.S_IMODE(status.st_mode) != 0o600:
            os.chmod(self._path, 0o600, follow_symlinks=False)

    def _remove(self) -> None:
        if self.is_in_place():
            with self._locked_folder(_MEND_PATIENCE):
                # Once it is closed, the system may give its number to another server's.
                is_anothers = False
                with contextlib.suppress(OSError):  # As where no descriptor is left.
                    is_anothers = not self._ends and self._is_read()
                if self.is_in_place() and not is_anothers:
                    os.unlink(self._path)
        self._made.clear()

    def _is_read(self) -> bool:
        """Whether somebody has it open for reading, be it any server."""
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            any(map(os.close, map(os.open, [self._path], [flags])))
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return False
            raise
        return True

    def _is_ours(self, status: os.stat_result) -> bool:
        """Whether this is the FIFO made here, and belongs to this user."""
        return (
            stat.S_ISFIFO(status.st_mode)
            and status.st_uid == os.geteuid()
            and any(os.path.samestat(status, made) for made in self._made)
        )

    def _found(self) -> os.stat_result | None:
        try:
            return os.lstat(self._path)
        except OSError:
            return None

    def _error(self, number: int, problem: str) -> OSError:
        """The error of that number, which is of the class that Python has for it."""
        return OSError(number, problem, self._path)
