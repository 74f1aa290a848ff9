"""Every public name, used as its users use it. Never run: mypy and pyright check it.

Lines that have to be refused end in a `type: ignore` of that error: where the error is gone, mypy
complains of the comment.
"""

from __future__ import annotations

import datetime
import multiprocessing
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import elastic_timer
from elastic_timer import (
    FileTimerClient,
    FileTimerRequest,
    FileTimerServer,
    LocalTimerClient,
    LocalTimerServer,
    MultiprocessingRequestQueue,
    RequestQueue,
    TimerClient,
    TimerRequest,
    TimerServer,
    configure,
    current,
    expires,
)
from elastic_timer.debug_info_logging import (
    add_collective,
    add_debug_info_handler,
    collectives,
    log_debug_info_for_expired_timers,
    native_stacks,
    remove_debug_info_handler,
    set_native_stacks,
    set_stacks_timeout,
    stacks_timeout,
)

if TYPE_CHECKING:
    from typing_extensions import assert_type


class Client(TimerClient):
    """A client of one's own."""

    def acquire(self, scope_id: str, expiration_time: float) -> None: ...

    def release(self, scope_id: str) -> None: ...


class Queue(RequestQueue):
    """A queue of one's own."""

    def size(self) -> int:
        return 1

    def get(self, size: int, timeout: float) -> list[TimerRequest]:
        return [TimerRequest(worker_id="a thread", scope_id="scope", expiration_time=-1)]


class Server(TimerServer):
    """A server of one's own, whose workers have names."""

    def register_timers(self, timer_requests: list[TimerRequest]) -> None: ...

    def clear_timers(self, worker_ids: set[str]) -> None: ...

    def get_expired_timers(self, deadline: float) -> dict[str, list[TimerRequest]]:
        return {}

    def _reap_worker(self, worker_id: str) -> bool:
        return True


class StrictFileServer(FileTimerServer):
    """A file server that looks twice before it signals."""

    def _reap_worker(self, worker_pid: int, signal: int) -> bool:
        return worker_pid > 1 and super()._reap_worker(worker_pid, signal)


TimerClient()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
RequestQueue()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]
TimerServer(Queue(), 1)  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]

# --- configure

configure(Client())
configure(None)
configure()
configure(required=False)
configure(Client(), required=False)
configure(Client(), False)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
configure("/tmp/timers")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

# --- expires around blocks

with expires(after=60):
    pass
with expires(1.5, "scope", Client()) as timer:
    assert_type(timer, expires)
    assert_type(timer.when(), float)
    assert_type(timer.reschedule(after=60), None)
    timer.reschedule(datetime.timedelta(minutes=1))
    assert_type(timer.tick(), None)
    with timer.paused() as nothing:
        assert_type(nothing, None)
    assert_type(current(), expires)
with expires(after=60, scope=None, client=None):
    pass
expires()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
expires(after="60")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def falls_through() -> int:
    """A block never swallows an exception, so what is behind this one can't be reached."""
    with expires(after=60):
        return 1


async def block() -> None:
    """In a coroutine."""
    async with expires(after=60) as timer:
        assert_type(timer, expires)
    with expires(after=60):
        pass


# --- expires as a decorator keeps the signature


@expires(after=60)
def step(batch: int, *, scale: float = 1.0) -> str:
    """Decorated."""
    return str(batch * scale)


assert_type(step(1, scale=2.0), str)
step("1")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


@expires(after=60, scope="evaluate")
async def evaluate(batch: int) -> float:
    """Decorated."""
    return float(batch)


async def evaluates() -> None:
    """The decorated coroutine function is one still."""
    assert_type(await evaluate(1), float)


class Trainer:
    """With a method that has a deadline."""

    @expires(after=60)
    def train(self, epochs: int) -> bool:
        """Decorated."""
        return epochs > 0


assert_type(Trainer().train(1), bool)

# --- requests

request = TimerRequest(4711, "scope", 1.0)
assert_type(request.worker_id, Any)
assert_type(request.scope_id, str)
assert_type(request.expiration_time, float)
assert_type(request == TimerRequest(4711, "scope", 1.0), bool)
file_request = FileTimerRequest(4711, "scope", 1.0, signal=9)
assert_type(file_request.worker_pid, int)
assert_type(file_request.signal, int)
assert_type(file_request.version, int)
assert_type(file_request.to_json(), str)
requests: list[TimerRequest] = [request, file_request]

# --- over a FIFO

file_client: TimerClient = FileTimerClient("/tmp/timers")
FileTimerClient("/tmp/timers", signal=signal.SIGTERM)
FileTimerClient(file_path="/tmp/timers", signal=0)
FileTimerClient("/tmp/timers", required=False)
assert_type(file_client.acquire("scope", 1.0), None)
assert_type(file_client.release("scope"), None)


def log_event(name: str, request: FileTimerRequest | None) -> None:
    """Is told of events."""
    if request is not None:
        assert_type(request.worker_pid, int)


with FileTimerServer("/tmp/timers", "run") as file_server:
    assert_type(file_server, FileTimerServer)
with StrictFileServer("/tmp/timers", run_id="run", max_interval=0.5, daemon=False) as strict:
    assert_type(strict, StrictFileServer)
file_server = FileTimerServer("/tmp/timers", "run", 10, True, log_event)
FileTimerServer("/tmp/timers", "run", log_event=lambda name, request: print(name, request))
FileTimerServer("/tmp/timers", "run", reap_self=True, kill_after=10)
FileTimerServer("/tmp/timers", "run", status=True)
FileTimerServer("/tmp/timers", "run", kill_after=None)
assert_type(file_server.start(), None)
assert_type(file_server.stop(), None)
assert_type(file_server.run_once(), None)
assert_type(file_server.get_last_progress_time(), int)
assert_type(FileTimerServer.is_process_running(4711), bool)
file_server.register_timers([file_request])
file_server.register_timers([request])  # type: ignore[list-item]  # pyright: ignore[reportArgumentType]
file_server.clear_timers({4711})
assert_type(file_server.get_expired_timers(1.0), dict[int, list[FileTimerRequest]])

# --- over a queue

context = multiprocessing.get_context("spawn")
queue = context.Queue()
local_client: TimerClient = LocalTimerClient(queue)
LocalTimerClient(context.SimpleQueue())
with LocalTimerServer(queue) as local_server:
    assert_type(local_server, LocalTimerServer)
server: TimerServer = LocalTimerServer(mp_queue=queue, max_interval=60, daemon=True)
assert_type(server.start(), None)
assert_type(server.stop(), None)
server.register_timers(requests)
local_server.clear_timers({4711})
local_server.get_expired_timers(1.0)
request_queue = MultiprocessingRequestQueue(queue)
assert_type(request_queue.size(), int)
assert_type(request_queue.get(1, 0.5), list[TimerRequest])
assert_type(request_queue.open(), int | None)
assert_type(request_queue.drain(everything=True), list[TimerRequest])
assert_type(request_queue.has_descriptor(), bool)
request_queue.forget_parent()
request_queue.close()

# --- servers of one's own

with Server(Queue(), max_interval=1) as own:
    assert_type(own, Server)
server = Server(request_queue, 1.0, daemon=False)

# --- evidence


def handler(run_id: str, expired_timers: dict[int, list[str]]) -> None:
    """Is told of expired timers."""


add_debug_info_handler(handler)
add_debug_info_handler(print)
remove_debug_info_handler(handler)
add_debug_info_handler(log_event)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
log_debug_info_for_expired_timers("run", {4711: [file_request.to_json()]})
set_stacks_timeout(0.5)
assert_type(stacks_timeout(), float)
add_collective("synchronize")
assert_type(collectives(), tuple[str, ...])
set_native_stacks(True)
assert_type(native_stacks(), bool)

# --- the package

assert_type(elastic_timer.__version__, str)
kill: type[TimerClient] = elastic_timer.local_timer.LocalTimerClient
elastic_timer.expire(60)  # type: ignore[attr-defined]  # pyright: ignore
decorate: Callable[[Callable[[], int]], Callable[[], int]] = expires(after=60)
