"""Callbacks on a thread of their own, and the log that goes the same way."""

from __future__ import annotations

import logging
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

    callbacks.run(block, patience=0)
    for number in range(1, 4):
        callbacks.run(lambda number=number: ran.append(number))  # type: ignore[misc]
    callbacks.run(all_done.set)
    assert ran == []
    unblock.set()
    assert all_done.wait(20)
    assert ran == [0, 1, 2, 3]


def test_without_a_thread_to_be_had(caplog: pytest.LogCaptureFixture) -> None:
    """Where none can be started the callback runs in the caller's; those after it as usual."""
    callbacks = Callbacks()
    threads: list[threading.Thread] = []

    def note() -> None:
        threads.append(threading.current_thread())

    with no_more_threads():
        callbacks.run(note)
    callbacks.run(note)
    assert threads[0] is threading.current_thread()
    assert threads[1].name == "elastic-timer callbacks"
    assert not caplog.records


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
    handler.meanwhile = bool
    contained_logger(NAME).warning("shown")
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
    finally:
        logging.setLogRecordFactory(usual)
    assert handler.texts == ["number 1"]


def test_log_that_blocks_keeps_some(handler: Handler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records wait for it without their writers, up to a number; the others are lost."""
    monkeypatch.setattr(_callbacks, "_MOST_RECORDS_KEPT", 3)
    monkeypatch.setattr(_callbacks, "_records", Callbacks())
    unblock = threading.Event()
    handler.meanwhile = lambda: unblock.wait(20)
    for number in range(9):
        contained_logger(NAME).warning("number %d", number)
    assert handler.texts == []
    unblock.set()
    eventually(lambda: len(handler.texts) == 2)
    eventually(lambda: not _callbacks._records.unfinished())
    # The third tells, as a record of its own, that the log blocked.
    assert handler.texts == ["number 0", "number 1"]
