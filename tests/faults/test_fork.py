"""The server's process forks, also in the middle of a round, and its children live on."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from typing import Any

from elastic_timer import FileTimerServer, TimerClient, expires
from tests.servers import Link, Serve, Server
from tests.support import (
    FAR,
    Fork,
    assert_reaped_in_time,
    eventually,
    overrun,
)

CHILDREN = 50


def live_in_a_fork(server: Server) -> None:
    """What a fork of the server's process has to be able to do; raises where it is not."""
    # A lock that a thread of the parent held would be held for good.
    signal.alarm(20)
    assert threading.enumerate() == [threading.current_thread()]
    with expires(after=FAR, scope="in a fork", client=server.link.client):
        server.register_timers([])
        server.clear_timers({os.getpid()})
        server.get_expired_timers(time.time())
    server.stop()  # The parent's is none of its business.
    if server.link.kind == "file":
        with FileTimerServer(f"{server.link.path}-{os.getpid()}", "fork", 60):
            pass


def fork_and_live(server: Server) -> int:
    """Fork and wait for the child; its exit status, 0 where all went well there."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        live_in_a_fork(server)
        status = 0
    except BaseException:
        logging.exception("A fork could not live on")
    finally:
        os._exit(status)


def linked(link: Link, server: Server) -> Server:
    """The server, with all that its forks need."""
    server.link = link
    server.statuses = []
    return server


def send_all_the_time(channel: Any, client: TimerClient) -> None:
    """A worker that keeps the server in its rounds."""
    channel.send("sending")
    while not channel.poll():
        with expires(after=FAR, scope="short", client=client):
            pass
    channel.send("done")


def test_forks_at_any_moment(link: Link, serve: Serve, fork_worker: Fork) -> None:
    """Children of a busy server live on their own, and the server keeps its deadlines."""
    server = serve(lambda: linked(link, link.server()))
    sender = fork_worker(send_all_the_time, link.client)
    assert sender.receive() == "sending"
    patient = fork_worker(overrun, link.client, FAR)
    patient.receive()
    stuck = fork_worker(overrun, link.client, 0.3)
    deadline = stuck.receive()
    statuses = server.ask(
        f"[fork_and_live(server) for _ in range({CHILDREN})]", fork_and_live=fork_and_live
    )
    assert statuses == [0] * CHILDREN
    assert_reaped_in_time(stuck, deadline)
    assert sender.ask("stop") == "done"
    eventually(lambda: server.ask("list(server._timers)") == [(patient.pid, "overrun")])
    server.stop()


class ForksInRounds(FileTimerServer):
    """Forks on the watchdog's own thread, at each hook that a round calls, and in its callbacks."""

    statuses: list[int]

    def __init__(self, path: str) -> None:
        super().__init__(path, "run", 60, log_event=self.fork_in_callback)

    def fork_in_callback(self, name: str, request: object) -> None:
        if request is not None:
            self.statuses.append(fork_and_live(self))

    def register_timers(self, timer_requests: list[Any]) -> None:
        super().register_timers(timer_requests)
        if timer_requests and os.getpid() == self.pid:
            self.statuses.append(fork_and_live(self))

    def _reap_worker(self, worker_pid: int, signal: int) -> bool:
        self.statuses.append(fork_and_live(self))
        return super()._reap_worker(worker_pid, signal)

    def start(self) -> None:
        self.pid = os.getpid()
        super().start()


def test_forks_within_a_round(file_link: Link, serve: Serve, fork_worker: Fork) -> None:
    """A hook or callback that forks breaks neither the child nor the round."""
    server = serve(lambda: linked(file_link, ForksInRounds(file_link.path)))
    worker = fork_worker(overrun, file_link.client, 0.5)
    assert_reaped_in_time(worker, worker.receive())
    eventually(lambda: not server.ask("len(server._timers)"))
    statuses = server.ask("server.statuses")
    assert len(statuses) >= 4  # Registered, expired, reaped, killed; and the forks' own requests.
    assert not any(statuses)
    server.stop()


class PausesInARound(FileTimerServer):
    """Stays in the middle of a round, where its locks are held, until told to go on."""

    def __init__(self, path: str) -> None:
        super().__init__(path, "run", 60)
        self.entered = threading.Event()
        self.resume = threading.Event()

    def is_process_running(self, pid: int) -> bool:  # type: ignore[override]
        if threading.current_thread() is not threading.main_thread():
            self.entered.set()
            self.resume.wait(20)
        return super().is_process_running(pid)


def test_forks_while_a_round_holds_the_locks(
    file_link: Link, serve: Serve, fork_worker: Fork
) -> None:
    """What another thread had locked at the moment of the fork is free in the child."""
    server = serve(lambda: linked(file_link, PausesInARound(file_link.path)))
    gone = fork_worker(send_all_the_time, file_link.client)
    assert gone.receive() == "sending"
    gone.process.kill()
    gone.wait()
    worker = fork_worker(overrun, file_link.client, 1)
    deadline = worker.receive()
    assert server.ask("server.entered.wait(20)")
    assert server.ask("fork_and_live(server)", fork_and_live=fork_and_live) == 0
    server.ask("server.resume.set()")
    assert_reaped_in_time(worker, deadline)
    server.stop()
