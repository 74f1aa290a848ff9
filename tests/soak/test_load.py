"""Many clients at once, as fast as they can: every request counts, and no client sees an error."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest

from elastic_timer import FileTimerServer, LocalTimerServer, TimerClient, expires
from tests.servers import Link
from tests.support import FAR, Fork, eventually, running

CLIENTS = 16
PAIRS = 5000


def send_pairs(channel: Any, client: TimerClient) -> None:
    """A worker that is in and out of blocks as fast as it can, and then tells and stays."""
    channel.recv()
    try:
        for _ in range(PAIRS):
            with expires(after=FAR, client=client):
                pass
    except Exception as error:
        channel.send(repr(error))
    channel.send("done")
    channel.recv()


class Counting(LocalTimerServer):
    """A queue server that counts, as the file server does."""

    _request_count = 0

    def register_timers(self, timer_requests: list[Any]) -> None:
        super().register_timers(timer_requests)
        self._request_count += len(timer_requests)


@pytest.mark.parametrize("max_interval", [0.1, 10])
@pytest.mark.parametrize("kind", ["file", "queue"])
def test_load(kind: str, max_interval: float, fifo_path: str, fork_worker: Fork) -> None:
    """16 clients send 5000 pairs each: no error, no request lost, no timer left."""
    with contextlib.closing(Link(kind, fifo_path)) as link:
        server: FileTimerServer | Counting = (
            link.server(max_interval) if kind == "file" else Counting(link._queue, max_interval)
        )
        clients = [fork_worker(send_pairs, link.client) for _ in range(CLIENTS)]
        with running(server):
            for client in clients:
                client.send("go")
            for client in clients:
                assert client.receive(timeout=90) == "done"
            eventually(lambda: server._request_count == CLIENTS * 2 * PAIRS)
            eventually(lambda: not server._timers)
            for client in clients:
                client.send("leave")
                assert client.wait() == 0
