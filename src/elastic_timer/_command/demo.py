"""`elastic-timer demo`: four real workers under one server; two finish, two get stuck.

Run as a module with a worker's name it is that worker.
"""

from __future__ import annotations

import ctypes
import dataclasses
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, cast

from elastic_timer import FileTimerServer, configure, expires
from elastic_timer._evidence.expiry import describe_stacks
from elastic_timer._server.events import (
    Event,
    TimerAcquired,
    TimerEvent,
    TimerExpired,
    TimerReleased,
    WorkerSignalled,
)

if TYPE_CHECKING:
    from elastic_timer import FileTimerRequest
    from elastic_timer._evidence.expiry import Evidence

# Many times what the demo takes; a worker that is alive then was not reaped.
_PATIENCE = 20.0


def short_block() -> None:
    """A worker that is done well within its time."""
    with expires(after=10):
        time.sleep(0.3)
    time.sleep(0.1)  # Outside, it may take as long as it likes.


def three_steps() -> None:
    """A worker that holds its deadline three times."""
    for _ in range(3):
        with expires(after=10):
            time.sleep(0.2)
        time.sleep(0.1)


def overslept() -> None:
    """A worker that sleeps past its deadline."""
    with expires(after=1.0):
        time.sleep(60)


def stuck_in_c() -> None:
    """A worker in a C function that keeps the GIL: no thread or signal handler in it can run."""
    libc = ctypes.PyDLL(None)
    with expires(after=1.5):
        libc.sleep(60)


_WORKERS = {
    "short block": short_block,
    "three steps": three_steps,
    "overslept": overslept,
    "stuck in C with the GIL": stuck_in_c,
}
_STUCK = {"overslept", "stuck in C with the GIL"}


@dataclasses.dataclass
class _Worker:
    """One worker as seen from outside; all times are seconds since the epoch."""

    name: str
    process: subprocess.Popen[bytes]
    scope: str = "-"
    deadline: float | None = None
    reaped: bool = False
    ended: float | None = None

    @property
    def how_it_ended(self) -> str:
        code = self.process.returncode
        return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"

    @property
    def lateness(self) -> str:
        """Milliseconds from the deadline to the death, as the one who waited for it saw it."""
        if not self.reaped or self.ended is None or self.deadline is None:
            return "-"
        return f"{1000 * (self.ended - self.deadline):.1f} ms"


def demo() -> int:
    """Show it; 0 if exactly the two stuck workers were reaped, else 1."""
    # What the library logs of a reap is shown here line by line, with the rest.
    logging.getLogger("elastic_timer").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory(prefix="elastic-timer-") as folder:
        stage = _Stage(os.path.join(folder, "timers"))
        try:
            with stage.server:
                for name in _WORKERS:
                    stage.enter(name)
                stage.watch()
        finally:
            stage.clear()
    return stage.conclude()


class _Stage:
    """The workers and their server, and the lines that tell what happens to them."""

    def __init__(self, timer_file: str) -> None:
        self._started = time.time()
        self._timer_file = timer_file
        self._workers: dict[int, _Worker] = {}
        self._lock = threading.Lock()
        self.server = FileTimerServer(timer_file, "demo")
        kinds = (TimerAcquired, TimerReleased, TimerExpired, WorkerSignalled)
        self.server.subscribe(self._happened, *kinds)

    def enter(self, name: str) -> None:
        """Start a worker."""
        with self._lock:  # The listener may hear of the worker before we know its pid.
            process = subprocess.Popen(
                [sys.executable, "-m", __name__, name],
                env={**os.environ, "TORCHELASTIC_TIMER_FILE": self._timer_file},
            )
            worker = self._workers[process.pid] = _Worker(name, process)
        self._tell(worker, f"started as process {process.pid}")

    def _tell(self, worker: _Worker, what: str) -> None:
        with self._lock:  # Three threads do this; each line is to be whole and in its place.
            print(f"{time.time() - self._started:6.3f} s  {worker.name:24} {what}", flush=True)

    def _happened(self, event: Event) -> None:
        """Tell of an event of the server; called on the thread of its listener."""
        happened = cast("TimerEvent[FileTimerRequest]", event)  # No others were asked for.
        with self._lock:
            worker = self._workers[happened.pid]
        scope = os.path.basename(happened.timer.scope_id)
        if isinstance(event, TimerReleased):
            self._tell(worker, f"left {scope} in time")
        elif isinstance(event, TimerAcquired):
            worker.scope, worker.deadline = scope, happened.timer.expiration_time
            self._tell(worker, f"entered {scope}, {worker.deadline - event.time:.1f} s to go")
        else:
            self._tell(worker, f"server: {event.name}")
        if isinstance(event, WorkerSignalled):
            worker.reaped = True
        elif isinstance(event, TimerExpired) and event.evidence is not None:
            for line in describe_stacks(cast("Evidence", event.evidence)):
                self._tell(worker, f"  {line}")

    def watch(self) -> None:
        """Wait until every worker has ended, or should have."""
        give_up = time.monotonic() + _PATIENCE
        alive = list(self._workers.values())
        while alive and time.monotonic() < give_up:
            for worker in alive.copy():
                if worker.process.poll() is not None:
                    worker.ended = time.time()
                    self._tell(worker, f"ended: {worker.how_it_ended}")
                    alive.remove(worker)
            time.sleep(0.001)

    def clear(self) -> None:
        """Leave no worker behind."""
        for worker in self._workers.values():
            with worker.process as process:
                process.kill()

    def conclude(self) -> int:
        """Print the closing table; the exit status."""
        row = "{:26}{:14}{:12}{:20}{}".format
        print("\n" + row("worker", "scope", "deadline", "how it ended", "late"))
        went_well = True
        for worker in self._workers.values():
            due = "-" if worker.deadline is None else f"{worker.deadline - self._started:.3f} s"
            print(row(worker.name, worker.scope, due, worker.how_it_ended, worker.lateness))
            is_stuck = worker.name in _STUCK
            # One that has no end was ended by `clear`, not by the server.
            went_well &= worker.ended is not None and worker.reaped == is_stuck
            went_well &= worker.process.returncode == (-signal.SIGKILL if is_stuck else 0)
        print(f"\nThe scopes are lines of {__file__}")
        if went_well:
            print("Exactly the two stuck workers were reaped.")
            return 0
        print("Something went wrong: other workers than the two stuck ones were reaped, or fewer.")
        return 1


if __name__ == "__main__":
    configure()
    _WORKERS[sys.argv[1]]()
