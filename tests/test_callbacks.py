"""Callbacks on a thread of their own, and the log that goes the same way."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_timer._server import callbacks as _callbacks
from elastic_timer._server.callbacks import Callbacks, contained_logger
from tests.support import eventually, no_more_threads

# Callbacks ---------------------------------------------------------------------------------------


def test_one_that_blocks_keeps_the_order() -> None:
    """Those behind it are not waited for, and run one after the other once it returns."""
    callbacks = Callbacks()
    ran: list[int] = []
    unblock, all_done = threading.Event(), threading.Event()

    def block() -> None:
        unblock.wait(20)
        ran.append(0)

    assert callbacks.submit(block)
    for number in range(1, 4):
        callbacks.submit(lambda number=number: ran.append(number))  # type: ignore[misc]
    callbacks.submit(all_done.set)
    assert ran == []
    assert not callbacks.flush(0)
    unblock.set()
    assert all_done.wait(20)
    assert callbacks.flush(20)
    assert ran == [0, 1, 2, 3]


def test_without_a_thread_to_be_had(caplog: pytest.LogCaptureFixture) -> None:
    """Where none can be started the callback is kept, and runs with the next, in their order."""
    callbacks = Callbacks()
    ran: list[str] = []
    with no_more_threads():
        assert not callbacks.submit(lambda: ran.append("kept"))
        assert not callbacks.flush(0)
    assert ran == []
    assert callbacks.submit(lambda: ran.append(threading.current_thread().name))
    assert callbacks.flush(20)
    assert ran == ["kept", "elastic-timer callbacks"]
    assert not caplog.records


def test_behind_one_that_blocks_not_all_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to a number; the others are lost, rather than fill the memory."""
    monkeypatch.setattr(_callbacks, "_MOST_KEPT", 3)
    callbacks = Callbacks()
    started, unblock = threading.Event(), threading.Event()
    ran: list[int] = []
    callbacks.submit(started.set)
    callbacks.submit(lambda: unblock.wait(20))
    assert started.wait(20)
    eventually(lambda: not callbacks._pending)
    for number in range(9):
        callbacks.submit(lambda number=number: ran.append(number))  # type: ignore[misc]
    unblock.set()
    assert callbacks.flush(20)
    assert ran == [0, 1, 2]


# The log -----------------------------------------------------------------------------------------

NAME = "elastic_timer.test"


class Handler(logging.Handler):
    """Keeps the texts that it is given; `meanwhile` is called for each before."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.meanwhile: Callable[[], object] = bool

    def handle(self, record: logging.LogRecord) -> bool:
        self.meanwhile()
        self.texts.append(record.getMessage())
        return True


@pytest.fixture
def handler(monkeypatch: pytest.MonkeyPatch) -> Iterator[Handler]:
    """The only handler of the logger of that name."""
    made, named = Handler(), logging.getLogger(NAME)
    monkeypatch.setattr(named, "propagate", False)
    named.addHandler(made)
    yield made
    named.removeHandler(made)


@pytest.mark.parametrize("is_shown", [True, False])
def test_log_that_raises(
    handler: Handler,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    is_shown: bool,
) -> None:
    """It costs the record, and is shown on stderr as logging's own errors are, or is not."""
    monkeypatch.setattr(logging, "raiseExceptions", is_shown)

    def fail() -> None:
        raise SystemExit("a handler's own")

    handler.meanwhile = fail
    contained_logger(NAME).warning("lost")
    assert _callbacks.flush_log(20)
    handler.meanwhile = bool
    contained_logger(NAME).warning("shown")
    assert _callbacks.flush_log(20)
    assert handler.texts == ["shown"]
    assert capsys.readouterr().err.count("SystemExit: a handler's own") == is_shown


def test_records_that_cannot_be_made_as_asked(handler: Handler) -> None:
    """A record factory that raises is done without."""

    def refuse(*args: Any, **kwargs: Any) -> logging.LogRecord:
        raise RuntimeError("a factory's own")

    usual = logging.getLogRecordFactory()
    logging.setLogRecordFactory(refuse)
    try:
        contained_logger(NAME).warning("number %d", 1)
        assert _callbacks.flush_log(20)
    finally:
        logging.setLogRecordFactory(usual)
    assert handler.texts == ["number 1"]


def test_log_that_blocks_holds_nobody_up(handler: Handler) -> None:
    """Records wait for it without their writers, and come in their order."""
    unblock = threading.Event()
    handler.meanwhile = lambda: unblock.wait(20)
    for number in range(3):
        contained_logger(NAME).warning("number %d", number)
    assert handler.texts == []
    assert not _callbacks.flush_log(0)
    unblock.set()
    assert _callbacks.flush_log(20)
    assert handler.texts == ["number 0", "number 1", "number 2"]


def test_giving_up_on_a_log_that_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handler whose lock is taken is not waited for at exit, nor is the stream it writes to."""
    blocked = logging.StreamHandler(sys.stderr)
    other = logging.StreamHandler(sys.stdout)
    locked, unlock = threading.Event(), threading.Event()

    def hold() -> None:
        blocked.acquire()
        locked.set()
        unlock.wait(20)
        blocked.release()

    thread = threading.Thread(target=hold)
    thread.start()
    assert locked.wait(20)
    monkeypatch.setattr(sys, "stderr", blocked.stream)
    monkeypatch.setattr(logging, "_handlerList", list(logging._handlerList))  # type: ignore[attr-defined]
    _callbacks.give_up_on_the_log()
    left = [reference() for reference in logging._handlerList]  # type: ignore[attr-defined]
    assert sys.stderr is None
    unlock.set()
    thread.join()
    assert blocked not in left
    assert other in left
