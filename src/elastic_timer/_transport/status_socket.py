"""A Unix socket that answers whoever connects with one JSON object, and the way to ask there.

The server's end is served on the watchdog's thread, a piece at a time: nothing that is done at once
takes longer than about a millisecond, nobody is waited for, and what clients send is never read.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol

from elastic_timer import _clock
from elastic_timer._server.callbacks import contained_logger

logger = contained_logger(__name__)

_SUFFIX = ".sock"

# The name of the last field of an answer, the items of which are put in one by one.
_ITEMS = "timers"

# How many bytes a path may have as the address of a socket, on Linux.
_LONGEST_ADDRESS = 107

# The process, the user and the group at the other end, see unix(7).
_CREDENTIALS = struct.Struct("3i")

# What a listening socket has for its flags in /proc/net/unix.
_LISTENING = b"00010000"

# One piece of work takes about so many seconds, or as long as so many items.
_STEP = 0.0005
_ITEMS_AT_ONCE = 50

# About how many bytes of an answer are sent at once.
_PIECE = 1 << 18

# How many clients there may be at a time. The others wait in the system's queue, without taking
# away descriptors by which workers are held.
_MOST_CLIENTS = 64
_BACKLOG = 128

# How many seconds a client may take to read its answer, and how many answers are kept for those who
# are about it.
_PATIENCE = 2.0
_MOST_ANSWERS = 4

# After an answer none is made for so many times as long as that one took: those who ask meanwhile
# share the next, and however many ask, the thread has most of its time for its workers.
_REST = 2.0

# The pause after no descriptor was left for a client, in seconds.
_DEAF = 0.5

# How often to look whether the socket is still in its folder, in seconds.
_LOOK = 0.5

# What `serve` returns for a round to be made.
_ROUND = "a round"

Answer = tuple[Mapping[str, object], Iterator[Mapping[str, object]]]
"""What is told: the fields of an object but for the last one, and the items of that."""


class Watcher(Protocol):
    """Waits for descriptors."""

    def watch(self, fd: int, what: object, for_room: bool = False) -> None:
        """Have `what` reported when there is something to read, or room to write."""

    def unwatch(self, fd: int) -> None:
        """Undo that."""


class StatusSocket:
    """The server's end.

    Args:
        path: The file beside which it is made: this name with ".sock" behind it.
        watcher: Tells when there is something to do.
        tell: Begins an answer. The items are taken one after the other, and later.
    """

    def __init__(self, path: str, watcher: Watcher, tell: Callable[[], Answer]) -> None:
        # Absolute, or a later chdir() would make us remove a file somewhere else.
        self._path = socket_of(os.path.abspath(path))
        self._watcher = watcher
        self._tell = tell
        self._folder: int | None = None
        self._listener: socket.socket | None = None
        self._made: os.stat_result | None = None
        self._is_watched = False
        self._next_look = 0.0
        self._forget_clients()

    def _forget_clients(self) -> None:
        self._deaf_until = 0.0
        # Those who wait for the next answer; for the one that is being made; who are being sent it.
        self._waiting: list[_Client] = []
        self._sharing: list[_Client] = []
        self._reading: list[_Client] = []
        self._unfinished: _Unfinished | None = None
        self._answers = 0
        self._rest_until = 0.0
        self._has_asked = False

    def open(self) -> None:
        """Listen. Where that is not possible the log says why."""
        self.close()
        try:
            self._listen()
        except OSError as error:
            self.close()
            logger.warning(
                "`elastic-timer status` can't ask this server, as there is no %s: %s",
                self._path,
                error.strerror,
            )

    def pause(self) -> float:
        """How many seconds may pass until `serve` has something to do by itself."""
        if self._unfinished is not None:
            return 0.0
        return self._rest_until - _clock.monotonic() if self._waiting else float("inf")

    def serve(self, ready: list[object], has_room: bool) -> list[object]:
        """Do a piece of what is to be done, of a millisecond at most.

        Args:
            ready: What the watcher has reported.
            has_room: Whether there is time for it now.

        Returns:
            What of it is others' business, and something more where a round is wanted: no answer is
            told that is older than the question.
        """
        others = [what for what in ready if not isinstance(what, (_Client, StatusSocket))]
        if self._listener is None or not has_room:
            return others
        end = _clock.monotonic() + _STEP
        try:
            if self._had_to_begin_anew():
                return others
            if self in ready:
                self._accept(end)
            for client in ready:
                if isinstance(client, _Client) and _clock.monotonic() < end:
                    self._send(client)
            self._drop_the_slow()
            if self._unfinished is not None:
                self._go_on(end)
            elif self._waiting and _clock.monotonic() >= self._rest_until:
                self._has_asked = not self._has_asked
                if self._has_asked:
                    return [*others, _ROUND]
                self._sharing, self._waiting = self._waiting, []
                self._unfinished = _Unfinished(*self._tell())
            self._watch_listener()
        # Whatever it is, the workers' deadlines are kept.
        except Exception:
            logger.exception("Error telling the status; whoever has asked gets no answer")
            self._drop_clients()
        return others

    def close(self) -> None:
        """Close everything, and remove the socket if it is still the one made here."""
        if self._made is not None and self._is_in_place(self._made):
            os.unlink(self._path)
        self.forget_parent()

    def forget_parent(self) -> None:
        """Close, in a forked child, what belongs to the parent, and leave its socket in place."""
        self._made = None
        self._drop_clients()
        if self._listener is not None:
            self._watcher.unwatch(self._listener.fileno())
            self._listener.close()
            self._listener = None
            self._is_watched = False
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def _listen(self) -> None:
        if not hasattr(socket, "SO_PEERCRED"):
            raise OSError(errno.ENOTSUP, "this system does not tell who connects to a socket")
        self._listener = listener = socket.socket(socket.AF_UNIX)
        listener.setblocking(False)
        address = self._path
        if len(os.fsencode(address)) > _LONGEST_ADDRESS:
            # The folder by a short name, and by one that others can follow, too.
            folder, name = os.path.split(self._path)
            self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY)
            address = f"/proc/{os.getpid()}/fd/{self._folder}/{name}"
            if len(os.fsencode(address)) > _LONGEST_ADDRESS:
                raise OSError(errno.ENAMETOOLONG, "the name is too long for a socket")
        self._make_way(address)
        # Before it is there: nobody else may connect to it for a moment.
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(address)
        self._made = os.lstat(self._path)
        listener.listen(_BACKLOG)
        self._watch_listener()

    def _make_way(self, address: str) -> None:
        """Remove what a server has left that was killed, and nothing else."""
        try:
            found = os.lstat(self._path)
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise FileExistsError(errno.EEXIST, "something else lies there")
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)
            try:
                probe.connect(address)
            except ConnectionRefusedError:
                os.unlink(self._path)
                return
            except BlockingIOError:
                pass
        raise FileExistsError(errno.EEXIST, "another server listens there")

    def _had_to_begin_anew(self) -> bool:
        """Listen anew where the socket was removed from its folder, as cleaners of those do."""
        now = _clock.monotonic()
        if now < self._next_look:
            return False
        self._next_look = now + _LOOK
        if os.path.lexists(self._path):
            return False
        self.open()
        return True

    def _is_in_place(self, made: os.stat_result) -> bool:
        try:
            return os.path.samestat(os.lstat(self._path), made)
        except OSError:
            return False

    def _accept(self, end: float) -> None:
        assert self._listener is not None
        while _clock.monotonic() < end and self._count() < _MOST_CLIENTS:
            try:
                connection, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError:
                self._deaf_until = _clock.monotonic() + _DEAF
                return
            if _peer_of(connection)[1] in (os.geteuid(), 0):
                connection.setblocking(False)
                self._waiting.append(_Client(connection))
            else:
                connection.close()

    def _watch_listener(self) -> None:
        """Listen for clients as long as there is room for one."""
        assert self._listener is not None
        wanted = self._count() < _MOST_CLIENTS and _clock.monotonic() >= self._deaf_until
        if wanted and not self._is_watched:
            self._watcher.watch(self._listener.fileno(), self)
        elif self._is_watched and not wanted:
            self._watcher.unwatch(self._listener.fileno())
        self._is_watched = wanted

    def _count(self) -> int:
        return len(self._waiting) + len(self._sharing) + len(self._reading)

    def _go_on(self, end: float) -> None:
        """Make a piece of the answer; hand it out when it is complete."""
        unfinished = self._unfinished
        assert unfinished is not None
        if not unfinished.go_on(end):
            return
        self._unfinished = None
        self._answers += 1
        now = _clock.monotonic()
        self._rest_until = now + _REST * unfinished.took
        clients, self._sharing = self._sharing, []
        for client in clients:
            client.begin(self._answers, unfinished.pieces, now + _PATIENCE)
            self._watcher.watch(client.fileno, client, for_room=True)
        self._reading += clients

    def _send(self, client: _Client) -> None:
        try:
            if not client.send():
                return
        except OSError:  # It is gone.
            pass
        self._drop(client)

    def _drop_the_slow(self) -> None:
        now = _clock.monotonic()
        for client in self._reading.copy():
            if now > client.until or client.answer <= self._answers - _MOST_ANSWERS:
                self._drop(client)

    def _drop(self, client: _Client) -> None:
        self._reading.remove(client)
        self._watcher.unwatch(client.fileno)
        client.close()

    def _drop_clients(self) -> None:
        for client in self._reading.copy():
            self._drop(client)
        for client in [*self._waiting, *self._sharing]:
            client.close()
        self._forget_clients()


class _Client:
    """One who has asked."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.fileno = connection.fileno()
        self._pieces: list[bytes] = []
        self._next = 0
        self._rest = b""
        self.answer = 0
        self.until = 0.0

    def begin(self, answer: int, pieces: list[bytes], until: float) -> None:
        """Give it an answer: the number and the pieces of that, and until when it may read it."""
        self.answer, self._pieces, self.until = answer, pieces, until

    def send(self) -> bool:
        """Send what there is room for at once; whether that was the end."""
        if not self._rest:
            self._rest = self._pieces[self._next]
            self._next += 1
        # A program may have SIGPIPE at its default, by which it would end here.
        with contextlib.suppress(BlockingIOError):
            sent = self._connection.send(self._rest, socket.MSG_NOSIGNAL)
            self._rest = self._rest[sent:]
        return not self._rest and self._next == len(self._pieces)

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


class _Unfinished:
    """An answer that is being made, and what it is made of."""

    def __init__(self, fields: Mapping[str, object], items: Iterator[Mapping[str, object]]) -> None:
        self._items = items
        self._encode = json.JSONEncoder(separators=(",", ":")).encode
        self._piece = bytearray(self._encode(fields)[:-1].encode() + f',"{_ITEMS}":['.encode())
        self._has_items = False
        self.pieces: list[bytes] = []
        # The time that went into it, in seconds.
        self.took = 0.0

    def go_on(self, end: float) -> bool:
        """Make a piece of it, until `end` at most; whether that was the last."""
        began = _clock.monotonic()
        is_complete = False
        while not is_complete:
            # Not more in one call into C, as long as which lasts no other thread can run.
            items = list(itertools.islice(self._items, _ITEMS_AT_ONCE))
            is_complete = len(items) < _ITEMS_AT_ONCE
            if items:
                self._piece += b"," * self._has_items + self._encode(items)[1:-1].encode()
                self._has_items = True
            if _clock.monotonic() >= end:
                break
        if is_complete:
            self._piece += b"]}\n"
        if is_complete or len(self._piece) >= _PIECE:
            self.pieces.append(bytes(self._piece))
            self._piece.clear()
        self.took += _clock.monotonic() - began
        return is_complete


def _peer_of(connection: socket.socket) -> tuple[int, int]:
    """The process at the other end, and its user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _ = _CREDENTIALS.unpack(credentials)
    return pid, user


# The way to ask -----------------------------------------------------------------------------------


def socket_of(path: str) -> str:
    """Where a server that has a file listens, if it does."""
    return path + _SUFFIX


class Question:
    """Asks a server how things stand.

    Args:
        path: The server's file.
        patience: How many seconds it may take until the answer is there.

    Raises:
        ConnectionRefusedError: The server that made the socket has ended without removing it.
        FileNotFoundError: There is no socket.
        PermissionError: The server is another user's.
        TimeoutError: Others have filled the queue of those who ask.
        OSError: It can't be asked for another reason.
    """

    def __init__(self, path: str, patience: float) -> None:
        self._give_up_at = _clock.monotonic() + patience
        self._connection = socket.socket(socket.AF_UNIX)
        # A blocking one waits for room in the queue, others do not.
        seconds = struct.pack("ll", int(patience), int(patience % 1 * 1e6))
        self._connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        found = None
        try:
            # By a descriptor: a path may be too long for an address, and what is there could be
            # another file by the time that it was looked at.
            found = os.open(socket_of(path), os.O_PATH | os.O_NOFOLLOW)
            if not stat.S_ISSOCK(os.fstat(found).st_mode):
                raise OSError(errno.ENOTSOCK, os.strerror(errno.ENOTSOCK))
            self._connection.connect(f"/proc/self/fd/{found}")
            self.pid, user = _peer_of(self._connection)
            if os.geteuid() not in (0, user) and user != 0:
                raise PermissionError(errno.EPERM, "it is another user's")
        except BaseException as error:
            self.close()
            if isinstance(error, BlockingIOError):
                raise _no_answer() from error
            raise
        finally:
            if found is not None:
                os.close(found)

    def __enter__(self) -> Question:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def read(self) -> str:
        """What the server answers, which is JSON if it is one.

        Raises:
            TimeoutError: It has not answered in time.
            ValueError: What it answers is no text.
            OSError: It has hung up.
        """
        told = bytearray()
        while True:
            left = self._give_up_at - _clock.monotonic()
            if left <= 0:
                raise _no_answer()
            self._connection.settimeout(left)
            piece = self._connection.recv(1 << 18)
            if not piece:
                return told.decode()
            told += piece

    def close(self) -> None:
        """Hang up."""
        self._connection.close()


def _no_answer() -> TimeoutError:
    return TimeoutError(errno.ETIMEDOUT, "no answer in time")


def find() -> list[str]:
    """The files of the servers of this user that listen, in this network namespace.

    A server has a FIFO, and a socket beside it that has the FIFO's name and ".sock" behind it.
    """
    found = []
    with contextlib.suppress(OSError), open("/proc/net/unix", "rb") as sockets:
        for line in sockets:
            fields = line.rstrip(b"\n").split(None, 7)
            if len(fields) == 8 and fields[3] == _LISTENING:
                address = os.fsdecode(fields[7])
                # Of a long path it is not the path itself, but leads there.
                folder, name = os.path.split(address)
                path = os.path.join(os.path.realpath(folder), name).removesuffix(_SUFFIX)
                if name.endswith(_SUFFIX) and _is_ours(path):
                    found.append(path)
    return sorted(set(found))


def _is_ours(path: str) -> bool:
    """Whether a FIFO and a socket of this user are there."""
    try:
        fifo, listener = os.lstat(path), os.lstat(socket_of(path))
    except OSError:
        return False
    return (
        stat.S_ISFIFO(fifo.st_mode)
        and stat.S_ISSOCK(listener.st_mode)
        and fifo.st_uid == listener.st_uid == os.geteuid()
    )
