"""The watchdog's thread: starting it when little is left, stopping it from within, forking."""

from __future__ import annotations

import contextlib
import os
import selectors
import textwrap
import threading
import time
from typing import Any
from unittest.mock import Mock

import pytest

from elastic_timer import FileTimerClient, FileTimerServer, LocalTimerServer, TimerClient
from elastic_timer._server.loop import Loop
from tests.faults.support import use_up_descriptors
from tests.servers import Link
from tests.support import (
    FAR,
    Fork,
    Spawn,
    assert_reaped_in_time,
    eventually,
    no_more_threads,
    open_descriptors,
    overrun,
    running,
)


def assert_serves(server: Any, client: TimerClient, fork_worker: Fork) -> None:
    """The server, which runs, reaps who overruns."""
    worker = fork_worker(overrun, client, 0.2)
    assert_reaped_in_time(worker, worker.receive())


# Starting ---------------------------------------------------------------------------------------


def test_start_without_a_thread_to_be_had(link: Link, fork_worker: Fork, fifo_path: str) -> None:
    """`start()` raises and leaves nothing for clients to write to; later it works."""
    server = link.server()
    with no_more_threads(), pytest.raises(RuntimeError, match="start new thread"):
        server.start()
    assert not os.path.exists(fifo_path)
    before = open_descriptors()
    with no_more_threads(), pytest.raises(RuntimeError, match="start new thread"):
        server.start()
    assert open_descriptors() == before
    with running(server):
        assert_serves(server, link.client, fork_worker)


def count_free_descriptors() -> int:
    taken = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(0))
    for descriptor in taken:
        os.close(descriptor)
    return len(taken)


def start_with_few_descriptors(channel: Any, server: FileTimerServer) -> None:
    """Start a server again and again, with one more descriptor to be had each time."""
    taken = use_up_descriptors()
    kept = []
    for free in range(16):
        try:
            server.start()
        except OSError:
            kept.append(free - count_free_descriptors())
            os.close(taken.pop())
        else:
            break
    for descriptor in taken:
        os.close(descriptor)
    channel.send(kept)
    channel.recv()
    server.stop()


def test_start_without_descriptors_keeps_none(fifo_path: str, fork_worker: Fork) -> None:
    """However far a `start()` comes that fails for want of one, it gives back what it had."""
    link = Link("file", fifo_path)
    server = fork_worker(start_with_few_descriptors, link.server())
    kept = server.receive()
    assert kept
    assert not any(kept)
    assert_serves(server, link.client, fork_worker)
    server.send("stop")
    assert server.wait() == 0


def test_two_threads_that_begin_to_wait_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of them has watched, the other one waits for: there is a single selector."""
    make = selectors.DefaultSelector
    calls: list[threading.Thread] = []
    is_second = threading.Event()

    def make_slowly() -> selectors.BaseSelector:
        calls.append(threading.current_thread())
        if len(calls) > 1:
            is_second.set()
        is_second.wait(0.3)
        return make()

    monkeypatch.setattr(selectors, "DefaultSelector", make_slowly)
    watchdog = Loop("test", True, Mock(), Mock(), Mock())
    reader, writer = os.pipe()
    thread = threading.Thread(target=watchdog.watch, args=(reader, "read me"))
    thread.start()
    watchdog.wait(0)
    thread.join()
    assert len(calls) == 1
    os.write(writer, b"x")
    assert watchdog.wait(20) == ["read me"]
    watchdog.stop()
    os.close(reader)
    os.close(writer)


def test_thread_that_begins_after_it_was_told_to_stop() -> None:
    """As after a `start()` that Ctrl-C has cut short: it opens nothing, and runs no round."""
    opens, runs, closes = Mock(), Mock(), Mock()
    loop = Loop("test", True, opens, runs, closes)
    loop._run.stop_requested.set()
    loop._serve(loop._run)
    assert loop._run.has_ended.is_set
    assert not opens.called
    assert not runs.called
    closes.assert_called_once_with(False)


# Stopping ---------------------------------------------------------------------------------------


def stops_within(base: type[Any]) -> type[Any]:
    """A server that stops, and tries to start, on its own thread as the first request comes."""

    class StopsWithin(base):  # type: ignore[misc]
        sent = threading.Event()
        outcome = ""
        keeps_all = False

        def register_timers(self, timer_requests: list[Any]) -> None:
            super().register_timers(timer_requests)
            if timer_requests and not self.outcome:
                self.sent.wait(20)  # The client has closed what it had open.
                descriptors = open_descriptors()
                self.stop()
                self.keeps_all = open_descriptors() == descriptors
                try:
                    self.start()
                except RuntimeError as error:
                    self.outcome = str(error)

    return StopsWithin


@pytest.mark.parametrize("kind", ["file", "queue"])
def test_stop_within_a_round(kind: str, fifo_path: str, fork_worker: Fork) -> None:
    """It lets the round end and then gives everything back; until then there is no new start."""
    with contextlib.closing(Link(kind, fifo_path)) as link:
        before = open_descriptors()
        server: Any
        if kind == "file":
            server = stops_within(FileTimerServer)(fifo_path, "run")
        else:
            server = stops_within(LocalTimerServer)(link._queue)
        server.start()
        link.client.acquire("block", time.time() + FAR)
        server.sent.set()
        eventually(lambda: server.outcome)
        assert "still in its last round" in server.outcome
        assert server.keeps_all
        # The descriptor that a client opens anew leads to the queue's own pipe.
        eventually(lambda: set(open_descriptors().values()) <= set(before.values()))
        eventually(
            lambda: not [t for t in threading.enumerate() if t.name.startswith("elastic-timer ")]
        )
        with running(server):
            assert_serves(server, link.client, fork_worker)


def test_loop_that_dies(
    fifo_path: str, fork_worker: Fork, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says so, nothing is left for clients to write to, and a new start works."""

    class Mortal(FileTimerServer):
        has_died = False

        def _watchdog_loop(self) -> None:
            if not self.has_died:
                self.has_died = True
                raise MemoryError
            super()._watchdog_loop()

    with running(Mortal(fifo_path, "run")) as server:
        eventually(lambda: not os.path.exists(fifo_path))
        eventually(lambda: "The watchdog has died" in caplog.text)
        eventually(lambda: server._loop._run.has_ended.is_set)
        server.start()
        assert_serves(server, FileTimerClient(fifo_path), fork_worker)


# Forking ----------------------------------------------------------------------------------------

SERVERS = {
    "file": """
        client = elastic_timer.FileTimerClient(sys.argv[1])
        server = elastic_timer.FileTimerServer(sys.argv[1], "run", 60)
        """,
    "queue": """
        import multiprocessing

        queue = multiprocessing.Queue()
        client = elastic_timer.LocalTimerClient(queue)
        client.release("first")  # From now on the client has a descriptor of its own.
        server = elastic_timer.LocalTimerServer(queue, 60)
        """,
    "of somebody's own": """
        import collections

        requests = collections.deque()

        class Client(elastic_timer.TimerClient):
            def acquire(self, scope, expiration_time):
                requests.append(elastic_timer.TimerRequest(os.getpid(), scope, expiration_time))

            def release(self, scope):
                self.acquire(scope, -1)

        class Queue(elastic_timer.RequestQueue):
            def size(self):
                return len(requests)

            def get(self, size, timeout):
                time.sleep(0.005)
                return [requests.popleft()] if requests else []

        class Server(elastic_timer.TimerServer):
            _timers = {}

            def register_timers(self, timer_requests):
                for request in timer_requests:
                    self._timers[request.scope_id] = request
                    if request.expiration_time < 0:
                        del self._timers[request.scope_id]

            def clear_timers(self, workers):
                pass

            def get_expired_timers(self, deadline):
                return {}

            def _reap_worker(self, worker):
                return True

        client, server = Client(), Server(Queue(), 60)
        """,
}

FORK = """
    def descriptors():
        return set(os.listdir("/proc/self/fd"))

    def serve_one():
        client.acquire("block", time.time() + 600)
        while not server._timers:
            time.sleep(0.005)
        client.release("block")
        while server._timers:
            time.sleep(0.005)

    reader, writer = os.pipe()
    before = descriptors()
    server.start()
    client.acquire("held", time.time() + 600)
    while not server._timers:
        time.sleep(0.005)
    child = os.fork()
    if not child:
        # Fewer since Python 3.14: that of multiprocessing's helper process is closed there.
        assert descriptors() <= before
        if sys.argv[2] == "stop":
            server.stop()
        os.read(reader, 1)
        server.start()
        client.release("held")
        serve_one()
        server.stop()
        sys.exit()
    client.release("held")
    serve_one()
    server.stop()
    os.write(writer, b"go on")
    assert os.waitpid(child, 0)[1] == 0
    print("served", flush=True)
    """


FORK_IN_A_REPORT = """
    import threading
    from elastic_timer import debug_info_logging

    parent = os.getpid()
    entered, told = threading.Event(), threading.Event()

    def handler(run_id, expired_timers):
        if os.getpid() == parent:
            entered.set()
            threading.Event().wait()
        told.set()

    debug_info_logging.set_stacks_timeout(0)
    debug_info_logging.add_debug_info_handler(handler)
    reader, writer = os.pipe()
    server.start()
    client.acquire("late", time.time())
    assert entered.wait(20)
    child = os.fork()
    if not child:
        os.read(reader, 1)
        server.start()
        client.acquire("late", time.time())
        sys.exit(not told.wait(20))
    server.stop()
    os.write(writer, b"go on")
    assert os.waitpid(child, 0)[1] == 0
    print("served", flush=True)
    """


def program(kind: str, body: str) -> str:
    """Source that makes a client and a server of a kind, and what it does with them."""
    parts = ["import os, sys, time, elastic_timer", SERVERS[kind], body]
    return "\n".join(map(textwrap.dedent, parts))


@pytest.mark.parametrize("first", ["stop", "start"])
@pytest.mark.parametrize("kind", SERVERS)
def test_fork_beside_a_server(spawn: Spawn, fifo_path: str, kind: str, first: str) -> None:
    """The child has none of its descriptors, can't disturb it, and may start it for itself."""
    child = spawn(program(kind, FORK), fifo_path, first)
    assert child.readline() == "served"
    assert child.wait() == 0, child.stderr_text()


@pytest.mark.parametrize("kind", ["file", "queue"])
def test_fork_while_an_expiry_is_reported(spawn: Spawn, fifo_path: str, kind: str) -> None:
    """The child's server does not wait for a handler that blocks in its parent."""
    child = spawn(program(kind, FORK_IN_A_REPORT), fifo_path)
    assert child.readline() == "served"
    assert child.wait() == 0, child.stderr_text()


def test_system_without_fork_hooks(spawn: Spawn, fifo_path: str) -> None:
    """Where nothing can be called after a fork a server runs all the same."""
    child = spawn(
        """
        import os, sys, time
        del os.register_at_fork
        import elastic_timer
        with elastic_timer.FileTimerServer(sys.argv[1], "run") as server:
            elastic_timer.FileTimerClient(sys.argv[1]).acquire("block", time.time() + 600)
            while not server._timers:
                time.sleep(0.005)
        print("served", flush=True)
        """,
        fifo_path,
    )
    assert child.readline() == "served"
    assert child.wait() == 0, child.stderr_text()
