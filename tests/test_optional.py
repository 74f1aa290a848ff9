"""Timers that a job can do without: required=False, and what the environment says of all timers."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import elastic_timer
from elastic_timer import (
    FileTimerClient,
    FileTimerServer,
    LocalTimerClient,
    TimerClient,
    api,
    configure,
    expires,
)
from elastic_timer._worker import environment, optional
from tests.servers import Link, Serve
from tests.support import FAR, Child, Fork, eventually, fill_pipe, running, wire_line

DISABLE, SCALE = "ELASTIC_TIMER_DISABLE", "ELASTIC_TIMER_SCALE"


@pytest.fixture(autouse=True)
def _unwarned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let this process warn once more, and have no client at the end."""
    monkeypatch.setattr(optional, "_warnings_left", [True])
    for name in ("TORCHELASTIC_TIMER_FILE", DISABLE, SCALE):
        monkeypatch.delenv(name, raising=False)
    yield
    for name in (DISABLE, SCALE):
        monkeypatch.delenv(name, raising=False)
    configure(None)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time by which servers are looked for, to be set on."""
    time_of_day = [1000.0]
    monkeypatch.setattr(optional, "monotonic", lambda: time_of_day[0])
    return time_of_day


@pytest.fixture
def optional_client(fifo_path: str) -> FileTimerClient:
    """A client whose server need not be there."""
    return FileTimerClient(fifo_path, required=False)


def seconds(blocks: Callable[[], object]) -> float:
    """How long that takes."""
    started = time.monotonic()
    blocks()
    return time.monotonic() - started


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


def in_every_way(client: TimerClient | None) -> None:
    """Blocks of all kinds, each with all that its handle offers."""

    def use(timer: expires) -> None:
        timer.tick()
        timer.reschedule(60)
        with timer.paused():
            pass

    @expires(60, client=client)
    def decorated() -> None:
        use(elastic_timer.current())

    @expires(60, client=client)
    async def decorated_async() -> None:
        use(elastic_timer.current())

    async def asynchronous() -> None:
        async with expires(60, client=client) as timer:
            use(timer)
        await decorated_async()

    def all_kinds() -> None:
        for _ in range(20):
            with expires(60, client=client) as timer:
                use(timer)
            decorated()
        asyncio.run(asynchronous())

    thread = threading.Thread(target=all_kinds)
    thread.start()
    all_kinds()
    thread.join()


# No server ----------------------------------------------------------------------------------------


def test_no_variable(caplog: pytest.LogCaptureFixture) -> None:
    """Without the variable every block runs, and one warning says that it is not watched."""
    configure(required=False)
    configure(required=False)
    in_every_way(None)
    assert len(warnings(caplog)) == 1
    assert "TORCHELASTIC_TIMER_FILE" in warnings(caplog)[0]


def test_no_client(caplog: pytest.LogCaptureFixture) -> None:
    """`configure(None, required=False)`: blocks run unwatched, as was asked for."""
    configure(None, required=False)
    in_every_way(None)
    assert warnings(caplog) == []


def test_no_server(
    fifo_path: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server that the variable names is not there: the same, and nobody waits for it."""
    monkeypatch.setenv("TORCHELASTIC_TIMER_FILE", fifo_path)
    configure(required=False)
    assert seconds(lambda: in_every_way(None)) < 0.9
    assert len(warnings(caplog)) == 1
    assert fifo_path in warnings(caplog)[0]


def test_no_server_of_a_client(
    optional_client: FileTimerClient, fifo_path: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A client by itself, and one that is given to `configure` as well."""
    assert seconds(lambda: in_every_way(optional_client)) < 0.9
    for client in (optional_client, FileTimerClient(fifo_path)):
        configure(client, required=False)
        assert seconds(lambda: in_every_way(None)) < 0.9
    assert len(warnings(caplog)) == 1


def test_required_is_the_default(fifo_path: str) -> None:
    """Whoever does not say otherwise gets the error."""
    with pytest.raises(BrokenPipeError), expires(60, client=FileTimerClient(fifo_path)):
        pytest.fail("entered")
    with pytest.raises(RuntimeError, match=r"configure\(required=False\)"):
        configure()


def test_mistakes_are_errors(reader: int, optional_client: FileTimerClient) -> None:
    """What the caller did wrong is told, whether there is a server or not."""
    with pytest.raises(RuntimeError, match="shorter scope"):
        optional_client.acquire("x" * 5000, 1.0)
    with pytest.raises(ValueError, match="finite"):
        optional_client.acquire("s", math.nan)
    with pytest.raises(TypeError):
        optional_client.acquire(5, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="timer_client must be"):
        configure("path", required=False)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="positional"):
        configure(optional_client, False)  # type: ignore[call-arg]


def test_queue_that_nobody_reads(caplog: pytest.LogCaptureFixture) -> None:
    """A client over a full queue fails at once, and then the blocks run unwatched."""
    queue: Any = multiprocessing.get_context("fork").Queue(1)
    queue._sem.acquire()
    configure(LocalTimerClient(queue), required=False)
    assert seconds(lambda: in_every_way(None)) < 0.9
    assert len(warnings(caplog)) == 1
    configure(None)
    queue._sem.release()
    fill_pipe(queue._writer.fileno())
    client = LocalTimerClient(queue)
    configure(client, required=False)
    assert seconds(lambda: in_every_way(None)) < 0.9
    queue.close()
    queue._writer.close()


def test_async_block_of_a_full_queue_waits_without_blocking_the_loop() -> None:
    """S7 over a queue: other tasks run while a block waits for room."""
    queue: Any = multiprocessing.get_context("fork").Queue(1)
    queue._sem.acquire()
    client = LocalTimerClient(queue)

    async def main() -> None:
        asyncio.get_running_loop().call_later(0.1, queue._sem.release)
        async with expires(60, "s", client):
            pass  # The release takes the place that the reader gives back.

    def read() -> None:
        assert queue.get(timeout=20).expiration_time > 0

    thread = threading.Thread(target=read)
    thread.start()
    asyncio.run(main())
    thread.join()
    assert queue.get(timeout=20).expiration_time < 0
    queue.close()
    queue._writer.close()


# A server that comes and goes ---------------------------------------------------------------------


def test_server_is_looked_for_every_five_seconds(
    fifo_path: str, optional_client: FileTimerClient, now: list[float], caplog: Any
) -> None:
    """Not before, and then blocks are watched again."""
    caplog.set_level(logging.INFO)
    with expires(60, "s", optional_client):
        pass
    with running(FileTimerServer(fifo_path, "run", 0.05)) as server:
        now[0] += 4.9
        with expires(60, "s", optional_client):
            pass
        now[0] += 0.2
        with expires(60, "found", optional_client):
            eventually(lambda: list(server._timers) == [(os.getpid(), "found")])
        eventually(lambda: not server._timers)
        assert server._request_count == 2
    [record] = [record for record in caplog.records if "reached again" in record.message]
    assert record.name.startswith("elastic_timer.")


def test_block_entered_without_a_server_is_watched_from_its_next_tick_on(
    fifo_path: str, optional_client: FileTimerClient, now: list[float]
) -> None:
    """What the handle asks for is a request like any other."""
    with (
        expires(60, "s", optional_client) as timer,
        running(FileTimerServer(fifo_path, "run")) as server,
    ):
        now[0] += 6
        timer.reschedule(60)
        eventually(lambda: list(server._timers) == [(os.getpid(), "s")])
        timer.__exit__(None, None, None)
        eventually(lambda: not server._timers)


def test_release_that_a_stopped_server_does_not_take(
    file_link: Link, serve: Serve, optional_client: FileTimerClient, now: list[float]
) -> None:
    """It is tried again before 5 s are over, before anything else: the timer is still held."""
    server = serve(file_link.server)
    block = expires(FAR, "owed", optional_client)
    again = expires(FAR, "again", optional_client)
    for each in (block, again):
        each.__enter__()
    eventually(lambda: server.ask("len(server._timers)") == 2)
    server.pause()
    descriptor = os.open(file_link.path, os.O_WRONLY)
    rubbish = wire_line(scope_id="x", expiration_time=-1, signal=0)
    os.set_blocking(descriptor, False)
    try:
        while True:
            os.write(descriptor, rubbish)
    except BlockingIOError:
        fill_pipe(descriptor)
    os.close(descriptor)
    again.reschedule(2 * FAR)  # What the server knows is too early now.
    block.__exit__(None, None, None)
    with expires(FAR, "unwatched", optional_client):
        pass
    now[0] += 0.2
    with expires(FAR, "unwatched", optional_client):
        pass  # In vain.
    server.go_on()
    eventually(lambda: _sent(optional_client, now))
    eventually(lambda: server.ask("len(server._timers)") == 0)
    again.__exit__(None, None, None)
    server.stop()


def _sent(client: FileTimerClient, now: list[float]) -> bool:
    now[0] += 0.2
    client.release("other")
    return client._lookout is not None and not client._lookout._owed


def test_killed_server_is_owed_nothing(
    file_link: Link, serve: Serve, optional_client: FileTimerClient, now: list[float]
) -> None:
    """Its timers died with it: what was held is neither released later nor kept."""
    server = serve(file_link.server)
    with expires(FAR, "s", optional_client), expires(FAR, "t", optional_client):
        eventually(lambda: server.ask("len(server._timers)") == 2)
        server.kill()
    lookout = optional_client._lookout
    assert lookout is not None
    assert (lookout._armed, lookout._owed) == (set(), set())
    second = serve(file_link.server)
    now[0] += 6
    with expires(FAR, "s", optional_client):
        eventually(lambda: second.ask("server._request_count") == 1)
    second.stop()


WORKER = """
import os, sys, time, logging
import elastic_timer
logging.basicConfig(format="%(levelname)s %(message)s")
elastic_timer.configure(required=False)
longest = 0
def blocks(number):
    global longest
    for _ in range(number):
        started = time.monotonic()
        with elastic_timer.expires(after=60) as timer:
            timer.tick()
        longest = max(longest, time.monotonic() - started)
blocks(100)
print("running", flush=True)
with elastic_timer.expires(after=60):
    sys.stdin.readline()
blocks(1000)
pid = os.fork()
blocks(1000)
if pid == 0:
    os._exit(longest >= 1)
assert os.waitpid(pid, 0)[1] == 0
print(longest < 1, flush=True)
"""


def test_server_killed_in_the_middle(file_link: Link, serve: Serve, spawn: Any) -> None:
    """`kill -9`: the job ends with 0, no block took a second, and its log has one warning."""
    server = serve(file_link.server)
    worker: Child = spawn(WORKER, env={"TORCHELASTIC_TIMER_FILE": file_link.path})
    assert worker.readline() == "running"
    eventually(lambda: server.holds(worker.pid))
    server.kill()
    worker.send_line("go on")
    assert worker.readline() == "True"
    assert worker.wait() == 0
    log = worker.stderr_text()
    assert log.count("WARNING") == 1, log
    assert "Traceback" not in log


def test_run_killed_in_the_middle(run: Callable[..., Child], tmp_path: Any) -> None:
    """The same for `elastic-timer run`, which takes the server along."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    started = run("--", "python3", str(script), stdin=-1)
    assert started.readline() == "running"
    os.kill(started.pid, signal.SIGKILL)
    started.process.wait()
    started.send_line("go on")
    assert started.readline() == "True"
    eventually(lambda: started.stderr_text().count("WARNING") == 1)


def test_unwatched_block_costs_no_more_than_a_watched_one(
    fifo_path: str, tmp_path: Any, reader: int
) -> None:
    """The cheapest of many of each, so that the machine's load does not count."""
    unwatched = FileTimerClient(str(tmp_path / "nobody"), required=False)

    def cost(client: TimerClient) -> float:
        def block() -> None:
            with expires(60, "s", client):
                pass

        block()
        return min(seconds(block) for _ in range(300))

    try:
        watched = cost(FileTimerClient(fifo_path))
    finally:
        os.read(reader, 1 << 20)
    assert cost(unwatched) <= watched


def warn_in_a_fork(channel: Any) -> None:
    optional.warn_once("again")
    channel.send(len(optional._warnings_left))


def test_forked_child_of_a_warned_parent_is_silent(fork_worker: Fork, caplog: Any) -> None:
    """Else each of many loaders would say the same; a child of an unwarned one speaks."""
    optional.warn_once("first")
    assert fork_worker(warn_in_a_fork).receive() == 0
    assert len(warnings(caplog)) == 1


class Flaky(TimerClient):
    """Raises what it is told to."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, str]] = []
        self.errors: list[BaseException | None] = []

    def _send(self, kind: str, scope: str) -> None:
        error = self.errors.pop(0) if self.errors else None
        if error is not None:
            raise error
        self.sent.append((kind, scope))

    def acquire(self, scope_id: str, expiration_time: float) -> None:
        self._send("acquire", scope_id)

    def release(self, scope_id: str) -> None:
        self._send("release", scope_id)


def test_interrupts_pass_through(now: list[float]) -> None:
    """Ctrl-C within a request is no lost server; what may have been sent is released."""
    client = Flaky()
    configure(client, required=False)
    client.errors = [KeyboardInterrupt()]
    with pytest.raises(KeyboardInterrupt), expires(60, "s"):
        pytest.fail("entered")
    assert client.sent == [("release", "s")]


def test_debts_are_paid_first_and_all(now: list[float]) -> None:
    """What a server may hold is released before it is asked for more, and as long as it takes."""
    client = Flaky()
    lookout = optional.made_optional(client)
    for scope in "abc":
        lookout.acquire(scope, 1.0)
    client.errors = [EOFError(), EOFError()]
    lookout.release("a")
    lookout.release("b")
    lookout.acquire("d", 1.0)  # Not tried.
    now[0] += 0.2
    client.errors = [EOFError()]
    lookout.acquire("d", 1.0)  # The debts come first, in vain.
    assert client.sent == [("acquire", scope) for scope in "abc"]
    lookout.acquire("c", 1.0)  # Held: it can't wait.
    assert sorted(client.sent[3:5]) == [("release", "a"), ("release", "b")]
    assert client.sent[5:] == [("acquire", "c")]
    lookout.release("c")
    now[0] += 6
    lookout.release("unknown")
    assert client.sent[6:] == [("release", "c"), ("release", "unknown")]


def test_debts_are_tried_again_soon(now: list[float]) -> None:
    """However often in vain: a timer that is held too long would have a worker reaped."""
    client = Flaky()
    lookout = optional.made_optional(client)
    lookout.acquire("owed", 1.0)
    client.errors = [EOFError(), EOFError()]
    lookout.release("owed")
    for _ in range(2):
        now[0] += 0.2
        lookout.acquire("new", 1.0)
    assert client.sent[1:] == [("release", "owed"), ("acquire", "new")]


def test_nothing_is_released_twice(now: list[float]) -> None:
    """Nor what was acquired anew: that would not be watched."""
    client = Flaky()
    lookout = optional.made_optional(client)
    lookout.acquire("a", 1.0)
    client.errors = [EOFError()]
    lookout.release("a")
    now[0] += 0.2
    lookout.release("a")
    lookout.acquire("a", 1.0)
    client.errors = [EOFError()]
    lookout.release("a")
    now[0] += 0.2
    lookout.acquire("a", 2.0)
    lookout.release("a")
    assert [kind for kind, _ in client.sent] == ["acquire", "release"] + ["acquire"] * 2 + [
        "release"
    ]


def test_what_was_released_does_not_have_a_server_looked_for(now: list[float]) -> None:
    """Nothing is held of it any more, whether it was released at once or later."""
    client = Flaky()
    lookout = optional.made_optional(client)
    for scope in "ab":
        lookout.acquire(scope, 1.0)
    lookout.release("a")
    client.errors = [EOFError()]
    lookout.release("b")
    now[0] += 0.2
    client.errors = [None, EOFError()]
    lookout.acquire("c", 1.0)  # The debt is paid; then the server is lost.
    del client.sent[:]
    for scope in "abc":
        lookout.acquire(scope, 1.0)
        lookout.release(scope)
    assert client.sent == []


def test_server_that_has_gone_is_owed_nothing(now: list[float]) -> None:
    """What was owed before, too."""
    client = Flaky()
    lookout = optional.made_optional(client)
    for scope in "ab":
        lookout.acquire(scope, 1.0)
    gone = BrokenPipeError()
    gone.__cause__ = OSError(errno.ENXIO, "nobody reads")
    client.errors = [EOFError(), gone]
    lookout.release("a")
    lookout.release("b")
    now[0] += 6
    lookout.acquire("c", 1.0)
    assert client.sent[2:] == [("acquire", "c")]


def test_subclass_is_called_once(reader: int, fifo_path: str) -> None:
    """What it changes about a request is not changed twice."""

    class Prefixing(FileTimerClient):
        def acquire(self, scope_id: str, expiration_time: float) -> None:
            super().acquire(f"job:{scope_id}", expiration_time)

        def release(self, scope_id: str) -> None:
            super().release(f"job:{scope_id}")

    with expires(60, "s", Prefixing(fifo_path, required=False)):
        pass
    lines = os.read(reader, 1 << 16).splitlines()
    assert [json.loads(line)["scope_id"] for line in lines] == ["job:s"] * 2


# The environment ----------------------------------------------------------------------------------


def test_disable(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """No timers in this process: no variable is needed, and no client is asked, whichever it is."""
    monkeypatch.setenv(DISABLE, "1")
    configure()
    in_every_way(None)
    client = Flaky()
    configure(client)
    in_every_way(client)
    assert client.sent == []
    assert all(DISABLE in text for text in warnings(caplog))
    monkeypatch.setenv(DISABLE, "0")
    configure(client)
    in_every_way(None)
    assert client.sent


def test_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every `after` is multiplied, that of a decorator once, those of the handle too."""

    @expires(10, "f")
    def function() -> float:
        return elastic_timer.current().when() - time.time()

    for scale in (1, 3):
        configure(Flaky())
        assert function() == pytest.approx(10 * scale, abs=2)
        monkeypatch.setenv(SCALE, "3")
    with expires(10) as timer:
        assert timer.when() - time.time() == pytest.approx(30, abs=2)
        timer.reschedule(20)
        assert timer.when() - time.time() == pytest.approx(60, abs=2)


@pytest.mark.parametrize(
    ("name", "value"),
    [(SCALE, "much"), (SCALE, "0"), (SCALE, "-1"), (SCALE, "inf"), (DISABLE, "y")],
)
def test_value_of_no_use(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """`configure` refuses it, and so does a block where `configure` is not called."""
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name} must be"):
        configure(Flaky())
    scale, instead = environment.read_or_refuse()
    assert (scale, instead is None) == (1.0, False)
    monkeypatch.setattr(api, "_instead", instead)
    with pytest.raises(ValueError, match=f"{name} must be"), expires(60, client=Flaky()):
        pytest.fail("entered")


CHILD = """
import multiprocessing, sys, time
import elastic_timer

class Client(elastic_timer.TimerClient):
    def acquire(self, scope_id, expiration_time):
        print(round(expiration_time - time.time()), flush=True)
    def release(self, scope_id):
        pass

def block():
    with elastic_timer.expires(after=10, client=Client()):
        pass

if __name__ == "__main__":
    block()
    for method in ("fork", "spawn"):
        process = multiprocessing.get_context(method).Process(target=block)
        process.start()
        process.join()
        assert process.exitcode == 0
"""


def test_children_inherit_the_scale(spawn: Any, tmp_path: Any) -> None:
    """Forked or spawned, without a `configure`."""
    script = tmp_path / "script.py"
    script.write_text(CHILD)
    child = spawn(
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], {}, '__main__')",
        str(script),
        env={SCALE: "2.5"},
    )
    assert [child.readline() for _ in range(3)] == ["25"] * 3
    assert child.wait() == 0


def test_worker_that_ticks_on_a_slow_machine(
    server: FileTimerServer, client: FileTimerClient, monkeypatch: pytest.MonkeyPatch, spawn: Any
) -> None:
    """With a scale, a worker whose steps take longer than `after` lives; without, it would not."""
    worker = spawn(
        """
        import sys, time
        from elastic_timer import FileTimerClient, expires
        with expires(after=0.1, client=FileTimerClient(sys.argv[1])) as timer:
            for _ in range(3):
                time.sleep(0.3)
                timer.tick()
        """,
        server._file_path,
        env={SCALE: "200"},
    )
    assert worker.wait() == 0
