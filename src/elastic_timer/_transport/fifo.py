"""The server's end of a FIFO: made, read and removed, and nobody else's file touched."""

from __future__ import annotations

import contextlib
import errno
import functools
import itertools
import os
import stat
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from elastic_timer import _clock
from elastic_timer._server.callbacks import contained_logger
from elastic_timer._transport.pipe import CAPACITY, close_descriptors, enlarge
from elastic_timer._transport.wire import SHORTEST_REQUEST, LineBuffer, decode

logger = contained_logger(__name__)

_R = TypeVar("_R")

_READ_SIZE = 1 << 16

# How much an ordinary round reads: as rubbish it takes some hundredths of a second, so that writers
# that never pause do not keep the server from its deadlines. With much less a busy client would
# keep the pipe full, and others would find no room in it.
_ROUND_SIZE = CAPACITY // 2

# How many unreadable lines of a second are named one by one: a warning takes longer than the line
# took to write.
_NAMED_LINES = 10

# How long to wait for other servers to be done with the folder, in seconds. They take less than a
# millisecond; anybody who may read the folder could have it locked for ever.
_FOLDER_PATIENCE = 1.0
# While clients are served, their deadlines come first.
_MEND_PATIENCE = 0.05


class FifoSource(Generic[_R]):
    """The requests that come through a FIFO, which is made here for its owner alone.

    Of the servers that are given one path, the first to read the FIFO has it; the others are
    refused. Used by one thread at a time. Whatever interrupts a method, `close` gives back all.

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
        self._identity: tuple[int, int] | None = None
        # Made perhaps, and not identified yet.
        self._is_making = False
        # Its reading end and its writing end, and what is open for a moment. Opened and closed
        # within one call into C each: an interrupt can't come between a descriptor and its list.
        self._ends: list[int] = []
        self._others: list[int] = []
        self._lines = LineBuffer()
        self._names_left = self._unnamed = 0
        self._names_again_at = 0.0
        try:
            with self._locked_folder(_FOLDER_PATIENCE):
                self._make()
        except BaseException:
            self.close()
            raise

    def open(self) -> int:
        """Open it, and make it anew where it is not in place.

        Returns:
            The descriptor to wait on.

        Raises:
            FileExistsError: Since it was made, something else was put in its place, or another
                server has begun to read it.
            PermissionError: Another user meddles with what lies there.
        """
        self._lines = LineBuffer()
        with self._locked_folder(_FOLDER_PATIENCE):
            self._make()
            self._open_ends()
        return self.fileno()

    def drain(self, everything: bool = False) -> list[_R]:
        """Take out requests that have arrived; never waits. Lines that are none are dropped.

        Args:
            everything: All that was written before the call. Else not more than a round can take
                without being late for a deadline.
        """
        data = bytearray()
        limit = CAPACITY if everything else _ROUND_SIZE
        with contextlib.suppress(BlockingIOError):
            # It never ends, unless somebody closed our descriptor and its number was given anew.
            while len(data) < limit and (chunk := os.read(self.fileno(), _READ_SIZE)):
                data += chunk
        self.has_read = self.has_read or bool(data)
        lines = self._lines.feed(bytes(data))
        # Decoded one by one, all the rubbish that a pipe holds would take seconds.
        likely = [line for line in lines if len(line) >= SHORTEST_REQUEST and b"{" in line]
        rejected = len(lines) - len(likely)
        refused: list[tuple[object, bytes]] = []
        if rejected:
            unlikely = (line for line in lines if len(line) < SHORTEST_REQUEST or b"{" not in line)
            refused += [("no object", line) for line in itertools.islice(unlikely, _NAMED_LINES)]
        requests = []
        for line in likely:
            try:
                requests.append(self._make_request(*decode(line)))
            except ValueError as error:
                rejected += 1
                # Kept by the thousand, exceptions and their tracebacks would cost more than all.
                if len(refused) < _NAMED_LINES:
                    refused.append((error, line))
        if rejected:
            self._warn(refused, rejected)
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
        return found is not None and _identity_of(found) == self._identity

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
            raise FileExistsError(errno.EEXIST, "something else was put in its place", self._path)
        before = len(self._ends)
        try:
            with self._locked_folder(_MEND_PATIENCE):
                self._make()
                self._open_ends()
        except BaseException:
            self._remove()  # If it was made and not opened, the next try would find it there.
            raise
        close_descriptors(self._ends, [0] * before)
        return self.fileno()

    def close(self) -> None:
        """Close it, and remove it from its folder if it is still the one made here."""
        try:
            self._remove()
        finally:
            self._close_ends()

    def forget_parent(self) -> None:
        """Close, in a forked child, what belongs to the parent, and leave its FIFO where it is."""
        self._is_making = False
        self._identity = None
        self._close_ends()

    def _close_ends(self) -> None:
        close_descriptors(self._ends)
        close_descriptors(self._others)

    @contextlib.contextmanager
    def _locked_folder(self, patience: float) -> Iterator[None]:
        """Have what lies at the path looked at and changed by one server at a time.

        It can't be had where the folder may not be read, where its file system has no locks, and
        where somebody keeps it locked for longer than `patience` seconds. What follows is done all
        the same: it then differs only for servers that start at the very same moment.
        """
        give_up_at = _clock.monotonic() + patience
        close_descriptors(self._others)  # What is left of a call that was interrupted.
        try:
            with contextlib.suppress(ImportError, OSError):
                import fcntl

                folder = os.path.dirname(self._path)
                self._others.extend(map(os.open, [folder], [os.O_RDONLY | os.O_DIRECTORY]))
                while _clock.monotonic() < give_up_at:
                    try:
                        fcntl.flock(self._others[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        time.sleep(0.002)
            yield
        finally:
            # Not by closing it alone: a child forked by another thread may hold a copy.
            with contextlib.suppress(ImportError, OSError, IndexError):
                import fcntl

                fcntl.flock(self._others[0], fcntl.LOCK_UN)
            close_descriptors(self._others)

    def _make(self) -> None:
        """Make it anew, unless it is there."""
        found = self._found()
        if found is not None:
            if not stat.S_ISFIFO(found.st_mode):
                raise FileExistsError(
                    errno.EEXIST, "not a FIFO, so it is left alone; give another path", self._path
                )
            if self._is_read():
                raise self._in_use()
            if self.is_in_place():
                return
            os.unlink(self._path)
        self._is_making = True
        try:
            os.mkfifo(self._path, 0o600)
        except FileNotFoundError as error:
            self._is_making = False
            raise FileNotFoundError(
                errno.ENOENT, "the folder for the FIFO does not exist; make it first", self._path
            ) from error
        except FileExistsError as error:
            self._is_making = False
            raise self._in_use() from error
        self._identify()
        self._is_making = False

    def _identify(self) -> None:
        """Note which FIFO was made, and give its owner the rights that the umask may have taken."""
        try:
            # Whatever another user puts in its place meanwhile, this one is looked at and changed.
            self._others.extend(map(os.open, [self._path], [os.O_PATH | os.O_NOFOLLOW]))
        except (AttributeError, OSError):  # It is Linux's; or no descriptor is left.
            status = os.lstat(self._path)
            make_private = functools.partial(os.chmod, self._path, follow_symlinks=False)
        else:
            status = os.fstat(self._others[-1])
            make_private = functools.partial(os.chmod, f"/proc/self/fd/{self._others[-1]}")
        if not _is_own_fifo(status):
            raise self._meddled_with()
        if stat.S_IMODE(status.st_mode) != 0o600:
            make_private(mode=0o600)
        self._identity = _identity_of(status)

    def _open_ends(self) -> None:
        # Without a writer of our own a FIFO reads as ended as soon as a client has closed it, and
        # waiting for it would return at once for ever.
        flags = os.O_NONBLOCK | os.O_NOFOLLOW
        before = len(self._ends)
        try:
            self._ends.extend(
                map(os.open, [self._path] * 2, [os.O_RDONLY | flags, os.O_WRONLY | flags])
            )
            for end in self._ends[before:]:
                status = os.fstat(end)
                if not _is_own_fifo(status) or _identity_of(status) != self._identity:
                    raise self._meddled_with()
        except BaseException:
            close_descriptors(self._ends, [-1] * (len(self._ends) - before))
            raise
        enlarge(self._ends[before])

    def _remove(self) -> None:
        if self._is_making or self.is_in_place():
            with self._locked_folder(_MEND_PATIENCE):
                if self._is_ours_to_remove():
                    os.unlink(self._path)
        self._identity = None
        self._is_making = False

    def _is_ours_to_remove(self) -> bool:
        # While it is open, nothing else has its number; later another server's FIFO may have it.
        if self._ends and self.is_in_place():
            return True
        found = self._found()
        if found is None or not _is_own_fifo(found):
            return False
        with contextlib.suppress(OSError):  # As where no descriptor is left.
            return (self._is_making or self.is_in_place()) and not self._is_read()
        return True

    def _is_read(self) -> bool:
        """Whether somebody has it open for reading, be it any server."""
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW
        try:
            self._others.extend(map(os.open, [self._path], [flags]))
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENOENT):
                return False
            raise
        close_descriptors(self._others, [-1])
        return True

    def _found(self) -> os.stat_result | None:
        try:
            return os.lstat(self._path)
        except OSError:
            return None

    def _in_use(self) -> FileExistsError:
        return FileExistsError(
            errno.EEXIST,
            "a timer server reads it already; stop that one, or give another path",
            self._path,
        )

    def _meddled_with(self) -> PermissionError:
        return PermissionError(
            errno.EPERM,
            "another user has put something in the FIFO's place; "
            "give a path in a folder that only this user may write to",
            self._path,
        )

    def _warn(self, refused: list[tuple[object, bytes]], count: int) -> None:
        now = _clock.monotonic()
        is_fresh = now >= self._names_again_at
        if is_fresh:
            self._names_left, self._names_again_at = _NAMED_LINES, now + 1
        named = refused[: self._names_left]
        for reason, line in named:
            logger.warning("Dropped a line that is no request: %s: %.100r", reason, line)
        self._names_left -= len(named)
        self._unnamed += count - len(named)
        # Said at once, and then once a second; what comes meanwhile counts the next time.
        if is_fresh and self._unnamed:
            logger.warning("Dropped %d more lines that are no requests", self._unnamed)
            self._unnamed = 0


def _identity_of(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _is_own_fifo(status: os.stat_result) -> bool:
    return stat.S_ISFIFO(status.st_mode) and status.st_uid == os.geteuid()
