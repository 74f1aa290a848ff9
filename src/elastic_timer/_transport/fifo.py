"""The server's end of a FIFO: made, read and removed, and nobody else's file touched."""

from __future__ import annotations

import contextlib
import errno
import os
import stat

from elastic_timer._transport.pipe import CAPACITY, enlarge

_READ_SIZE = 1 << 16


def read_available(fd: int) -> bytes:
    """All that was written to a non-blocking pipe before the call.

    At most what a pipe holds is read: writers that never pause could else keep the caller here.
    """
    data = bytearray()
    with contextlib.suppress(BlockingIOError):
        while len(data) < CAPACITY and (chunk := os.read(fd, _READ_SIZE)):
            data += chunk
    return bytes(data)


class Fifo:
    """A FIFO made at a path, readable and writable for its owner alone.

    Args:
        path: Where to make it. A FIFO that is there is replaced, nothing else is.

    Raises:
        FileExistsError: Something lies there that is no FIFO.
        FileNotFoundError: The folder does not exist.
        NotImplementedError: The platform has no FIFOs.
    """

    def __init__(self, path: str) -> None:
        if not hasattr(os, "mkfifo"):
            raise NotImplementedError(
                "this platform has no FIFOs; run the workers and their server on a POSIX system"
            )
        # Absolute, or a later chdir() would make us remove a file somewhere else.
        self._path = os.path.abspath(path)
        self._reader: int | None = None
        self._writer: int | None = None
        self._identity: tuple[int, int] | None = None
        self.make()

    def make(self) -> None:
        """Make it anew, unless it is there."""
        if self.is_in_place():
            return
        try:
            if not stat.S_ISFIFO(os.lstat(self._path).st_mode):
                raise FileExistsError(
                    errno.EEXIST, "not a FIFO, so it is left alone; give another path", self._path
                )
            os.unlink(self._path)
        except FileNotFoundError:
            pass
        try:
            os.mkfifo(self._path, 0o600)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                errno.ENOENT, "the folder for the FIFO does not exist; make it first", self._path
            ) from error
        os.chmod(self._path, 0o600)  # The umask may have taken the owner's rights.
        status = os.lstat(self._path)
        self._identity = status.st_dev, status.st_ino

    def open(self) -> int:
        """Open it for reading; returns the descriptor, non-blocking.

        A writer is kept open too: without one a FIFO reads as ended as soon as a client has closed
        it, and waiting for it would return at once for ever. What was open before is closed, unless
        opening fails.
        """
        reader = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            writer = os.open(self._path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            os.close(reader)
            raise
        self.close()
        self._reader, self._writer = reader, writer
        enlarge(reader)
        return reader

    def fileno(self) -> int:
        """The descriptor to read from.

        Raises:
            ValueError: The FIFO is not open.
        """
        if self._reader is None:
            raise ValueError(f"{self._path} is not open for reading")
        return self._reader

    def close(self) -> None:
        """Close it: from now on clients are told that nobody reads."""
        for fd in (self._reader, self._writer):
            if fd is not None:
                os.close(fd)
        self._reader = self._writer = None

    def is_in_place(self) -> bool:
        """Whether the path still leads to the FIFO made here."""
        return self._identity is not None and self._found() == self._identity

    def is_missing(self) -> bool:
        """Whether nothing at all is at the path."""
        return self._found() is None

    def remove(self) -> None:
        """Remove it from its folder, if it is still the one made here."""
        if self.is_in_place():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        self._identity = None

    def forget_parent(self) -> None:
        """Close, in a forked child, what belongs to the parent, and leave its FIFO where it is."""
        self.close()
        self._identity = None

    def _found(self) -> tuple[int, int] | None:
        try:
            status = os.lstat(self._path)
        except OSError:
            return None
        return status.st_dev, status.st_ino
