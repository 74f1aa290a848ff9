"""The server is stopped for a while, or dies and another takes its place; the workers live on."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest

from elastic_timer import FileTimerServer, TimerClient, expires
from tests.servers import Link, Serve
from tests.support import (
    ALLOWED_LATENESS,
    FAR,
    Fork,
    assert_reaped_in_time,
    eventually,
    overrun,
    wait_dead,
)


def send_pairs(channel: Any, client: TimerClient, pairs: int) -> None:
    """A worker that is in and out of a block many times, then stays until told."""
    for _ in range(pairs):
        with expires(after=FAR, scope="short", client=client):
            pass
    channel.send("sent")
    channel.recv()


def fill_the_pipe(channel: Any, client: TimerClient) -> None:
    """Send until that raises; then send how often it went well, and how long the last one took."""
    sent = 0
    while True:
        started = time.monotonic()
        try:
            client.acquire(f"timer {sent}", time.time() + FAR)
        except BrokenPipeError:
            channel.send((sent, time.monotonic() - started))
            break
        sent += 1
    channel.recv()


def test_stopped_server_catches_up(link: Link, serve: Serve, fork_worker: Fork) -> None:
    """Requests sent to a stopped server all count when it goes on; only the overrunner dies."""
    server = serve(link.server)
    server.pause()
    senders = [fork_worker(send_pairs, link.client, 50) for _ in range(4)]
    stuck = fork_worker(overrun, link.client, 0.2)
    deadline = stuck.receive()
    for sender in senders:
        assert sender.receive() == "sent"
    eventually(lambda: time.monotonic() > deadline)
    server.go_on()
    assert wait_dead(stuck) - time.monotonic() < ALLOWED_LATENESS
    assert stuck.wait() == -signal.SIGKILL
    eventually(lambda: not server.ask("len(server._timers)"))
    if link.kind == "file":
        assert server.ask("server._request_count") == 4 * 2 * 50 + 1
    for sender in senders:
        sender.send("leave")
        assert sender.wait() == 0
    server.stop()


def test_full_pipe_of_a_stopped_server(link: Link, serve: Serve, fork_worker: Fork) -> None:
    """A client waits a second and is told; what it sent before counts when the server goes on."""
    server = serve(link.server)
    server.pause()
    worker = fork_worker(fill_the_pipe, link.client)
    sent, seconds = worker.receive(timeout=60)
    assert 0.9 < seconds < 1 + ALLOWED_LATENESS
    server.go_on()
    eventually(lambda: server.ask("len(server._timers)") == sent)
    worker.send("leave")
    assert worker.wait() == 0
    eventually(lambda: not server.ask("len(server._timers)"))
    late = fork_worker(overrun, link.client, 0.2)
    assert_reaped_in_time(late, late.receive())
    server.stop()


def enter_again_when_told(channel: Any, client: TimerClient) -> None:
    """A worker of two servers: it is in a block as the first one dies, and overruns the next."""
    with expires(after=FAR, scope="first", client=client):
        channel.send("in the first block")
        channel.recv()
    channel.send("out of the first block")
    overrun(channel, client, 0.3)


def test_next_server_takes_over(link: Link, serve: Serve, fork_worker: Fork) -> None:
    """Killed and replaced on the same path, a server is missed by no worker's next block."""
    first = serve(link.server)
    worker = fork_worker(enter_again_when_told, link.client)
    assert worker.receive() == "in the first block"
    eventually(lambda: first.holds(worker.pid))
    first.kill()
    second = serve(link.server)
    assert second.ask("len(server._timers)") == 0
    worker.send("leave the first block")
    assert worker.receive() == "out of the first block"
    assert_reaped_in_time(worker, worker.receive())
    second.stop()


def test_client_bridges_the_gap_between_two_servers(
    file_link: Link, serve: Serve, fork_worker: Fork
) -> None:
    """A worker that enters a block while there is no server waits for the next one."""
    first = serve(file_link.server)
    first.kill()
    # Forked before it: what the next server needs is only to be started.
    worker = fork_worker(overrun, file_link.client, 1.5)
    second = serve(file_link.server)
    deadline = worker.receive()
    eventually(lambda: second.holds(worker.pid))
    assert_reaped_in_time(worker, deadline)
    second.stop()


@pytest.mark.parametrize("which", ["the same", "another"])
def test_timers_of_a_stopped_server_are_forgotten(
    which: str, fifo_path: str, fork_worker: Fork, file_link: Link
) -> None:
    """What was held before `stop()` kills nobody later: the release may have been lost."""
    server = FileTimerServer(fifo_path, "run", 60)
    with server:
        worker = fork_worker(overrun, file_link.client, 0.5)
        deadline = worker.receive()
        eventually(lambda: server._timers.holds(worker.pid))
    with server if which == "the same" else FileTimerServer(fifo_path, "run", 60):
        sentinel = fork_worker(overrun, file_link.client, deadline - time.monotonic() + 0.3)
        assert_reaped_in_time(sentinel, sentinel.receive())
        assert worker.process.is_alive()


class Mortal(FileTimerServer):
    """A server whose loop is somebody's own, and ends with an error when it is told to."""

    is_told_to_die = False

    def _watchdog_loop(self) -> None:
        while not self._stop_signaled:
            self._loop.wait(FAR)
            if self.is_told_to_die:
                raise RuntimeError("told to die")


def test_watchdog_that_dies_is_not_silent(fifo_path: str, caplog: pytest.LogCaptureFixture) -> None:
    """The log says so, clients are told within about a second, and the server can start anew."""
    client = Link("file", fifo_path).client
    with Mortal(fifo_path, "run") as server:
        client.acquire("block", time.time() + FAR)
        server.is_told_to_die = True
        server._loop.wake()
        eventually(lambda: not os.path.exists(fifo_path))
        # Another thread writes it.
        eventually(lambda: "The watchdog has died" in caplog.text)
        started = time.monotonic()
        with pytest.raises(BrokenPipeError):
            client.acquire("block", time.time() + FAR)
        assert time.monotonic() - started < 1 + ALLOWED_LATENESS
        server.is_told_to_die = False
        server.start()
        client.acquire("block", time.time() + FAR)
