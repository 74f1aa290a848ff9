"""A log that takes no more, or that raises: the watch goes on, whatever becomes of the records."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_timer._server.callbacks import _MOST_KEPT, PATIENCE, contained_logger
from elastic_timer.debug_info_logging import stacks_timeout
from tests.servers import Link, ServerProcess
from tests.support import (
    ALLOWED_LATENESS,
    Fork,
    eventually,
    overrun,
    running,
    wait_dead,
)


def log_to_a_full_pipe() -> None:
    """Let every record wait for somebody to read, as with `2>&1 | less`."""
    _reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    handler = logging.StreamHandler(os.fdopen(writer, "w"))
    logging.getLogger().addHandler(handler)


def test_log_that_nobody_reads(
    link: Link, serve: Callable[..., ServerProcess], fork_worker: Fork
) -> None:
    """It costs the first reap the time for stacks and some seconds, and later ones nothing."""
    server = serve(link.server, log_to_a_full_pipe)
    bound = stacks_timeout() + 2 * PATIENCE
    for after, allowed in ((0.2, bound), (0.2, 0.0), (0.5, 0.0)):
        worker = fork_worker(overrun, link.client, after)
        deadline = worker.receive()
        assert deadline <= wait_dead(worker) < deadline + allowed + ALLOWED_LATENESS
    server.kill()


class Broken(logging.Handler):
    """Raises what handlers, filters and record factories of careless people raise."""

    def emit(self, record: logging.LogRecord) -> None:
        raise RuntimeError("emit")


def break_the_filter() -> None:
    def refuse(record: logging.LogRecord) -> bool:
        raise RuntimeError("filter")

    for handler in logging.getLogger().handlers:
        handler.addFilter(refuse)


def break_the_factory() -> None:
    def refuse(*args: Any, **kwargs: Any) -> logging.LogRecord:
        raise RuntimeError("factory")

    logging.setLogRecordFactory(refuse)


@pytest.mark.parametrize(
    "break_it",
    [lambda: logging.getLogger().addHandler(Broken()), break_the_filter, break_the_factory],
    ids=["handler", "filter", "factory"],
)
def test_log_that_raises(
    link: Link,
    serve: Callable[..., ServerProcess],
    fork_worker: Fork,
    break_it: Callable[[], None],
) -> None:
    """Each worker is reaped in time, and also one that comes after a warning about rubbish."""
    server = serve(link.server, break_it)
    for after in (0.2, 0.3):
        worker = fork_worker(overrun, link.client, after)
        deadline = worker.receive()
        assert deadline <= wait_dead(worker) < deadline + ALLOWED_LATENESS
        link.put(2**40, "no process id", time.time() + 1)
    server.stop()


class Blocked(logging.Handler):
    """Keeps what it is given, one after the other, once it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()
        self.has_one = threading.Event()
        self.texts: list[str] = []
        self.places: set[tuple[str, str]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.has_one.set()
        assert self.let_go.wait(60)
        self.texts.append(record.getMessage())
        self.places.add((record.filename, record.funcName or ""))


@pytest.fixture
def blocked() -> Iterator[Blocked]:
    """A handler that blocks, of the root logger."""
    handler = Blocked()
    logging.getLogger().addHandler(handler)
    yield handler
    handler.let_go.set()
    logging.getLogger().removeHandler(handler)


def test_records_come_when_the_log_takes_them(file_link: Link, blocked: Blocked) -> None:
    """In their order, from where they were logged; a limited number is kept, not more."""
    logger = contained_logger("elastic_timer.test")
    with running(file_link.server()):
        logger.warning("number 0")
        assert blocked.has_one.wait(20)
        started = time.monotonic()
        for number in range(1, _MOST_KEPT + 100):
            logger.warning("number %d", number)
        assert time.monotonic() - started < ALLOWED_LATENESS
        assert blocked.texts == []
        blocked.let_go.set()
        eventually(lambda: f"number {_MOST_KEPT}" in blocked.texts)
        # The one that blocked, and those that were kept behind it.
        assert blocked.texts == [f"number {number}" for number in range(_MOST_KEPT + 1)]
        assert (__file__.rpartition("/")[2], "test_records_come_when_the_log_takes_them") in (
            blocked.places
        )

        # From then on there is room again.
        logger.warning("the last")
        eventually(lambda: blocked.texts[-1] == "the last")


def test_level_of_the_named_logger_counts(blocked: Blocked) -> None:
    """What its level leaves out is not logged, and costs no wait."""
    named = logging.getLogger("elastic_timer.test")
    named.setLevel(logging.ERROR)
    try:
        contained_logger("elastic_timer.test").warning("left out")
        blocked.let_go.set()
        contained_logger("elastic_timer.test").error("shown")
        eventually(lambda: blocked.texts)
    finally:
        named.setLevel(logging.NOTSET)
    assert blocked.texts == ["shown"]


def log_in_the_child(channel: Any) -> None:
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger().handlers[:] = [handler]
    contained_logger("elastic_timer.test").warning("from the child")
    eventually(lambda: texts)
    channel.send(texts)


def test_fork_while_the_log_blocks(file_link: Link, fork_worker: Fork, blocked: Blocked) -> None:
    """The child logs what is its own, and only that."""
    with running(file_link.server()):
        contained_logger("elastic_timer.test").warning("from the parent")
        assert fork_worker(log_in_the_child).receive() == ["from the child"]
        blocked.let_go.set()
    eventually(lambda: blocked.texts)
