"""The server's end of a FIFO by itself: what it reads, whose it is, and what is given back."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_timer._server.callbacks import flush_log
from elastic_timer._transport import fifo as _fifo
from elastic_timer._transport import rubbish
from elastic_timer._transport.fifo import FifoSource
from elastic_timer._transport.pipe import CAPACITY
from elastic_timer._transport.wire import Fields
from tests.instructions import interrupt
from tests.support import ForkedWorker, no_more_descriptors, open_descriptors, wire_line, write_raw

Fork = Callable[..., ForkedWorker]


@pytest.fixture
def source(fifo_path: str) -> Iterator[FifoSource[Fields]]:
    """A source that is open."""
    made = FifoSource(fifo_path, Fields)
    made.open()
    yield made
    made.close()


def scopes(requests: list[Any]) -> list[str]:
    return [fields.scope_id for fields in requests]


# Reading ----------------------------------------------------------------------------------------


def test_drain_returns_what_has_arrived(source: FifoSource[Fields], fifo_path: str) -> None:
    """All requests in their order, those of one line that comes in pieces included; never waits."""
    assert source.drain() == []
    assert not source.has_read
    line = wire_line(scope_id="b")
    write_raw(fifo_path, wire_line(scope_id="a") + line[:20])
    assert scopes(source.drain()) == ["a"]
    assert source.has_read
    write_raw(fifo_path, line[20:])
    assert scopes(source.drain()) == ["b"]
    assert source.drain() == []


def test_b3_round_reads_a_part_and_the_last_look_all(
    source: FifoSource[Fields], fifo_path: str
) -> None:
    """An ordinary round is bounded; before a signal all that was written before counts."""
    written = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            write_raw(fifo_path, wire_line(scope_id=str(written), pad="x" * 3000))
            written += 1
    first = scopes(source.drain())
    assert 0 < len(first) < written * 3 / 4
    rest = scopes(source.drain(everything=True))
    assert first + rest == [str(number) for number in range(written)]


@pytest.mark.parametrize(
    "line", [b"y\n", b"{\n", b"x" * 60 + b"\n"], ids=["short", "brace", "no-brace"]
)
def test_b3_rubbish_is_dropped_in_no_time(
    fifo_path: str,
    source: FifoSource[Fields],
    line: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pipe full of it takes some hundredths of a second, not seconds; what is behind counts."""
    fcntl.fcntl(source.fileno(), fcntl.F_SETPIPE_SZ, CAPACITY)
    # It is all of one second, however long it takes.
    monkeypatch.setattr(rubbish, "monotonic", lambda: 1.0)
    lines = (CAPACITY - 8192) // len(line)
    write_raw(fifo_path, line * lines)
    write_raw(fifo_path, wire_line())
    started = time.thread_time()
    assert scopes(source.drain(everything=True)) == ["valid"]
    assert time.thread_time() - started < 0.5
    source._rubbish._again_at = 0.0
    write_raw(fifo_path, b"last\n")
    assert source.drain() == []
    *named, more, last = dropped(caplog)
    assert len(named) in (1, 10)
    assert more == f"Dropped {lines - len(named)} more that were no requests"
    assert last == "Dropped what is no request: too short: b'last'"


def dropped(caplog: pytest.LogCaptureFixture) -> list[str]:
    assert flush_log(20)
    messages = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return messages


def test_first_lines_of_each_second_are_named(
    source: FifoSource[Fields], fifo_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Ten with what is wrong with them; the others by their number, when more comes."""
    almost = wire_line(pid="no number")
    write_raw(fifo_path, b"short\n" + almost * 11 + wire_line())
    assert scopes(source.drain()) == ["valid"]
    messages = dropped(caplog)
    assert "short" in messages[0]
    assert ["'no number' is no process id" in message for message in messages[1:]] == [True] * 9
    write_raw(fifo_path, b"short\n" * 3 + almost)
    assert source.drain() == []
    assert dropped(caplog) == []
    source._rubbish._again_at = 0.0
    write_raw(fifo_path, b"last\n")
    assert source.drain() == []
    assert dropped(caplog) == [
        "Dropped 6 more that were no requests",
        "Dropped what is no request: too short: b'last'",
    ]


def test_descriptor_that_leads_elsewhere_is_no_endless_read(source: FifoSource[Fields]) -> None:
    """A program that closes descriptors not its own leaves the server reading another file."""
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, source.fileno())
    os.close(empty)
    assert source.drain(everything=True) == []


# Whose it is ------------------------------------------------------------------------------------


def test_a3_fifo_that_anybody_reads_is_left_alone(fifo_path: str) -> None:
    """Be the reader one of ours or somebody else's, such as upstream's server."""
    os.mkfifo(fifo_path)
    inode = os.stat(fifo_path).st_ino
    reader = os.open(fifo_path, os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(FileExistsError, match="reads it already") as caught:
            FifoSource(fifo_path, Fields)
        assert caught.value.filename == fifo_path
        assert os.stat(fifo_path).st_ino == inode
    finally:
        os.close(reader)
    FifoSource(fifo_path, Fields).close()
    assert not os.path.lexists(fifo_path)


def test_a3_one_that_never_read_leaves_the_others_fifo(fifo_path: str) -> None:
    """It knows its own FIFO by a number, which the one that replaced it may have by now."""
    first = FifoSource(fifo_path, Fields)
    second = FifoSource(fifo_path, Fields)
    second.open()
    with pytest.raises(FileExistsError, match="reads it already"):
        first.open()
    first._made = list(second._made)
    first.close()
    assert second.is_in_place()
    write_raw(fifo_path, wire_line())
    assert scopes(second.drain()) == ["valid"]
    second.close()
    assert not os.path.lexists(fifo_path)


def test_a4_fifo_that_another_made_in_between(
    fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the folder can't be locked the loser is told the same as elsewhere."""
    real_mkfifo = os.mkfifo

    def too_late(path: str, mode: int) -> None:
        real_mkfifo(path, mode)
        real_mkfifo(path, mode)

    monkeypatch.setattr(os, "mkfifo", too_late)
    with pytest.raises(FileExistsError, match="reads it already"):
        FifoSource(fifo_path, Fields)


def hold_the_lock(channel: Any, folder: str) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    channel.send("locked")
    channel.recv()
    os.close(descriptor)
    channel.send("unlocked")
    channel.recv()


def test_a4_folder_is_waited_for_and_not_for_ever(
    fifo_path: str, fork_worker: Fork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may read the folder could keep it locked: that costs a moment, and nothing else."""
    holder = fork_worker(hold_the_lock, os.path.dirname(fifo_path))
    assert holder.receive() == "locked"
    monkeypatch.setattr(_fifo, "_FOLDER_PATIENCE", 0.1)
    started = time.monotonic()
    made = FifoSource(fifo_path, Fields)
    assert 0.1 <= time.monotonic() - started < 5
    assert holder.ask("unlock") == "unlocked"
    made.open()
    made.close()


def live_on(channel: Any) -> None:
    channel.send("alive")
    channel.recv()


def test_a4_child_forked_meanwhile_does_not_keep_the_folder_locked(
    fifo_path: str, fork_worker: Fork
) -> None:
    """It has a copy of what the folder was locked with, and shares the lock."""
    made = FifoSource(fifo_path, Fields)
    with made._locked_folder(1.0):
        child = fork_worker(live_on)
        assert child.receive() == "alive"
    descriptor = os.open(os.path.dirname(fifo_path), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)
    made.close()


# Another user, who may write to the folder ------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file that must not be touched."""
    file = tmp_path / "victim"
    file.write_text("precious")
    file.chmod(0o644)
    yield file
    assert file.read_text() == "precious"
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_c2_link_in_the_place_of_what_was_made(
    fifo_path: str, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rights are never set on what a link leads to."""
    real_mkfifo = os.mkfifo

    def replaced(path: str, mode: int) -> None:
        real_mkfifo(path, mode)
        os.unlink(path)
        os.symlink(victim, path)

    monkeypatch.setattr(os, "mkfifo", replaced)
    before = os.umask(0o777)
    try:
        with pytest.raises(PermissionError, match="only this user may write to"):
            FifoSource(fifo_path, Fields)
    finally:
        os.umask(before)
    assert os.path.islink(fifo_path)


def test_c2_fifo_of_another_users_is_not_read(
    fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither one that lies there when it was just made, nor one that came before it is opened."""
    made = FifoSource(fifo_path, Fields)
    with monkeypatch.context() as patched:
        # As this one is seen if it is another user's.
        patched.setattr(os, "geteuid", lambda: os.stat(fifo_path).st_uid + 1)
        with pytest.raises(PermissionError):
            made.open()
        with pytest.raises(PermissionError):
            FifoSource(fifo_path, Fields)
    made.close()
    with pytest.raises(ValueError, match="not open"):
        made.fileno()


def test_c2_fifo_that_is_not_the_one_made(fifo_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come to lie at the path between the look at it and the opening is not read."""
    made = FifoSource(fifo_path, Fields)
    make = made._make

    def make_and_replace() -> None:
        make()
        os.rename(fifo_path, fifo_path + ".old")
        os.mkfifo(fifo_path)

    monkeypatch.setattr(made, "_make", make_and_replace)
    with pytest.raises(PermissionError):
        made.open()
    made.close()
    assert os.path.exists(fifo_path)


# Mending ----------------------------------------------------------------------------------------


def test_mend_changes_the_descriptor(source: FifoSource[Fields], fifo_path: str) -> None:
    """The new FIFO is read under another number, so that it can be waited for instead."""
    old = source.fileno()
    os.unlink(fifo_path)
    assert source.is_missing()
    assert not source.is_in_place()
    new = source.mend()
    assert new == source.fileno() != old
    assert old not in open_descriptors()
    assert source.is_in_place()
    write_raw(fifo_path, wire_line())
    assert scopes(source.drain()) == ["valid"]


@pytest.mark.parametrize("put", [os.mkfifo, os.mkdir, lambda path: Path(path).touch()])
def test_mend_leaves_what_is_there(
    source: FifoSource[Fields], fifo_path: str, put: Callable[[str], None]
) -> None:
    """Whatever was put in the FIFO's place stays, and so does what is open."""
    old = source.fileno()
    os.unlink(fifo_path)
    put(fifo_path)
    with pytest.raises(FileExistsError, match="something else was put in its place"):
        source.mend()
    assert source.fileno() == old
    source.close()
    assert os.path.exists(fifo_path)


def test_mend_that_fails_leaves_nothing(
    source: FifoSource[Fields], fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without descriptors no FIFO is left that nobody reads; later it can be mended."""
    old = source.fileno()
    os.unlink(fifo_path)
    with no_more_descriptors(), pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        source.mend()
    assert not os.path.lexists(fifo_path)
    assert source.fileno() == old
    assert source.mend() != old
    write_raw(fifo_path, wire_line())
    assert scopes(source.drain()) == ["valid"]


# Giving back ------------------------------------------------------------------------------------


def test_b9_fifo_of_a_source_that_was_never_opened(fifo_path: str) -> None:
    """`close` removes it, also where no descriptor is left to see whether somebody reads it."""
    FifoSource(fifo_path, Fields).close()
    assert not os.path.lexists(fifo_path)
    made = FifoSource(fifo_path, Fields)
    with no_more_descriptors():
        made.close()
    assert not os.path.lexists(fifo_path)


def test_close_closes_though_it_can_not_remove(
    fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What raises while the FIFO is removed reaches the caller with the descriptors closed."""
    made = FifoSource(fifo_path, Fields)
    before = set(open_descriptors())
    made.open()
    with monkeypatch.context() as patched:

        def refuse(path: str) -> None:
            raise PermissionError(errno.EACCES, "no", path)

        patched.setattr(os, "unlink", refuse)
        with pytest.raises(PermissionError):
            made.close()
    assert set(open_descriptors()) == before
    made.close()
    assert not os.path.lexists(fifo_path)


def test_forget_parent_leaves_the_fifo(fifo_path: str) -> None:
    """A forked child closes its copies, and can't remove what is its parent's."""
    before = set(open_descriptors())
    parents = FifoSource(fifo_path, Fields)
    parents.open()
    parents.forget_parent()
    parents.close()
    assert set(open_descriptors()) == before
    assert os.path.exists(fifo_path)


@pytest.mark.parametrize("what", ["make", "open", "mend", "close"])
def test_a5_interrupted_anywhere_all_is_given_back(fifo_path: str, what: str) -> None:
    """Whichever instruction an interrupt comes before, `close` leaves no descriptor and no FIFO."""
    before = set(open_descriptors())
    at = 1
    was_interrupted = True
    while was_interrupted:
        # In place of the constructor, which gives nobody the object.
        made: FifoSource[Fields] = FifoSource.__new__(FifoSource)
        if what == "make":
            was_interrupted = interrupt(
                functools.partial(FifoSource.__init__, made, fifo_path, Fields),
                at,
                "fifo.py",
                "pipe.py",
            )
        else:
            FifoSource.__init__(made, fifo_path, Fields)
            if what != "open":
                made.open()
            if what == "mend":
                os.unlink(fifo_path)
            was_interrupted = interrupt(getattr(made, what), at, "fifo.py", "pipe.py")
        if hasattr(made, "_folder"):
            made.close()
        assert set(open_descriptors()) == before, at
        assert not os.path.lexists(fifo_path), at
        at += 1
    assert at > 20
