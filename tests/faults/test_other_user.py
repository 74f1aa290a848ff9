"""Workers in another user's name than the server's."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from elastic_timer import TimerClient, expires
from tests.servers import Link, ServerProcess
from tests.support import (
    ALLOWED_LATENESS,
    FAR,
    NOBODY,
    Fork,
    assert_reaped_in_time,
    become_nobody,
    eventually,
    is_alive,
    overrun,
    wait_dead,
)

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="this system lets only root change the user of a process"
)


@pytest.fixture(params=["file", "queue"])
def nobodys_link(request: pytest.FixtureRequest) -> Iterator[Link]:
    """A link with its FIFO in a folder that the other user can reach, and owns."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        with contextlib.closing(Link(request.param, os.path.join(folder, "timers"))) as link:
            yield link


def overrun_and_change_user(channel: Any, client: TimerClient) -> None:
    """A worker of root's that overruns, and becomes nobody's when told."""
    with expires(after=0.2, scope="overrun", client=client):
        channel.send("entered")
        channel.recv()
        become_nobody()
        channel.send(time.monotonic())
        time.sleep(FAR)


def overrun_as_nobody(channel: Any, client: TimerClient, after: float) -> None:
    """A worker that was root's and overruns as nobody."""
    become_nobody()
    overrun(channel, client, after)


def test_worker_that_may_not_be_signalled_yet(
    nobodys_link: Link,
    serve: Callable[..., ServerProcess],
    fork_worker: Fork,
) -> None:
    """EPERM is logged and the reap tried again, until the worker may be signalled."""
    server = serve(nobodys_link.server, become_nobody)
    if nobodys_link.kind == "file":
        # Root's clients write to no FIFO of another user (C3), and nobody's to one of root alone.
        os.chown(nobodys_link.path, 0, 0)
        os.chmod(nobodys_link.path, 0o666)
    worker = fork_worker(overrun_and_change_user, nobodys_link.client)
    assert worker.receive() == "entered"
    eventually(lambda: server.log().count("Operation not permitted") >= 3)
    assert is_alive(worker)
    # The others' deadlines are kept meanwhile.
    other = fork_worker(overrun_as_nobody, nobodys_link.client, 0.2)
    assert_reaped_in_time(other, other.receive())
    allowed = worker.ask("change")
    assert wait_dead(worker) - allowed < 1 + ALLOWED_LATENESS  # Tried every second.
    assert worker.wait() == -signal.SIGKILL
    eventually(lambda: server.log().count("Reaped worker") == 2)


def test_worker_that_gave_up_its_rights(
    nobodys_link: Link,
    serve: Callable[..., ServerProcess],
    fork_worker: Fork,
) -> None:
    """Root's server reaps a worker that became another user before its first block."""
    server = serve(nobodys_link.server)
    if nobodys_link.kind == "file":
        os.chown(nobodys_link.path, NOBODY, NOBODY)  # It was made for root alone.
    worker = fork_worker(overrun_as_nobody, nobodys_link.client, 0.3)
    assert_reaped_in_time(worker, worker.receive())
    server.stop()
