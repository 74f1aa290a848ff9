"""A seeded storm of real workers around one server, with a record of the truth outside of it.

    python -m tests.soak.storm --soak-seconds 600 --seed 1 [--link queue]

prints one line of figures, and what went wrong if anything did, which makes the exit status 1.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import logging
import math
import multiprocessing
import os
import random
import selectors
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from elastic_timer import FileTimerRequest, FileTimerServer, LocalTimerServer
from elastic_timer.debug_info_logging import set_stacks_timeout
from tests.servers import Link
from tests.soak import workers
from tests.soak.workers import Record, Stage, records_in
from tests.support import ForkedWorker, child_pids, eventually

ALIVE = 60
"""How many workers are kept alive."""

FEWEST_ALIVE = 40
"""How many there must be at any moment between the first and the last one's start."""

BYSTANDERS = 3

MISSED_AFTER = 10.0
"""How many seconds after its deadline a worker that is still alive counts as missed."""

MEMORY_SLACK = 8 << 20
"""By how many bytes the server may have grown: once its buffers are as large as they get."""

_PR_SET_CHILD_SUBREAPER = 36

_Behaviour = Callable[[Stage], None]

# What becomes of a worker: the exit code that it has to have, in the order of the file above.
ENDS: dict[_Behaviour, int] = {
    workers.finish: 0,
    workers.nest: 0,
    workers.prolong: 0,
    workers.flood: 0,
    workers.leave: 0,
    workers.wait_for_a_signal: -signal.SIGUSR1,
    workers.be_stopped_a_while: 0,
    workers.only_report: 0,
    workers.write_rubbish: 0,
    workers.oversleep: -signal.SIGKILL,
    workers.hang_in_c: -signal.SIGKILL,
    workers.spin: -signal.SIGKILL,
    workers.hang_stopped: -signal.SIGKILL,
    workers.hang_within: -signal.SIGKILL,
    workers.hang_around: -signal.SIGKILL,
    workers.hang_in_a_thread: -signal.SIGKILL,
    workers.ignore_the_signal: -signal.SIGKILL,
    workers.overrun_politely: -signal.SIGTERM,
    workers.leave_an_orphan: -signal.SIGKILL,
    workers.lose_a_child: 0,
    workers.leave_at_the_last_moment: 0,
}

# What a queue can't do: other signals than SIGKILL, and rubbish, for which it has no line ends.
FIFO_ONLY = {
    workers.only_report,
    workers.write_rubbish,
    workers.ignore_the_signal,
    workers.overrun_politely,
}


class Worker:
    """A process of the storm as seen from outside; times are monotonic."""

    def __init__(self, pid: int, behaviour: _Behaviour) -> None:
        self.pid = pid
        self.behaviour = behaviour
        self.pidfd = os.pidfd_open(pid)
        self.deadline = math.inf
        self.released = math.inf


class ObservedServer:
    """The server, in a process and a session of its own, and what /proc tells of it."""

    def __init__(self, link: Link, stacks: float) -> None:
        self._errors = Path(f"{link.path}.errors")
        self._process = ForkedWorker(_serve, link, stacks, self._errors)
        self.pid = self._process.pid
        assert self._process.receive() == "started"

    def ask(self, what: str) -> Any:
        """Either "timers", how many there are, or "killed", the pids it says it killed."""
        return self._process.ask(what)

    def footprint(self) -> dict[str, object]:
        """What has to be after the storm as it was before."""
        return {
            "timers": self.ask("timers"),
            "processes held": self.ask("held"),
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": len(os.listdir(f"/proc/{self.pid}/task")),
            "children": child_pids(self.pid),
        }

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def errors(self) -> str:
        """What was logged at the level of an error."""
        return self._errors.read_text()

    def stop(self) -> int:
        """Stop it; the exit code."""
        self._process.send("stop")
        code = self._process.wait()
        self._process.close()
        return code


def _serve(channel: Any, link: Link, stacks: float, errors: Path) -> None:
    os.setsid()  # So that rubbish which names the server's own group can name no other.
    logging.basicConfig(filename=errors, level=logging.ERROR)
    set_stacks_timeout(stacks)
    killed: list[int] = []

    def log_event(name: str, request: FileTimerRequest | None) -> None:
        if name == "kill worker process" and request is not None:
            killed.append(request.worker_pid)

    server: FileTimerServer | LocalTimerServer
    if link.kind == "file":
        server = link.server(log_event=log_event, kill_after=workers.KILL_AFTER)
    else:
        server = link.server()
    with server:
        channel.send("started")
        answers: dict[str, Callable[[], object]] = {
            "timers": lambda: len(server._timers),
            "held": lambda: len(server._workers._workers),
            "killed": lambda: killed,
        }
        while (question := channel.recv()) != "stop":
            channel.send(answers[question]())


class Storm:
    """Starts workers, does to them what outsiders do, and judges how each of them ended."""

    def __init__(self, link: Link, seed: int, stacks: float = 0) -> None:
        self._dice = random.Random(seed)
        self._truth_fd, truth_writer = os.pipe()
        os.set_blocking(self._truth_fd, False)
        self._server = ObservedServer(link, stacks)
        self._stage = Stage(link.client, link.path, self._server.pid, truth_writer)
        self._kinds = [kind for kind in ENDS if link.kind == "file" or kind not in FIFO_ONLY]
        self._alive: dict[int, Worker] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._truth_fd, selectors.EVENT_READ)
        self._plans: list[tuple[float, int, signal.Signals]] = []
        self._reaped: collections.Counter[int] = collections.Counter()
        # Left too late, and were gone before the signal came: the server may count them as its own.
        self._narrow_escapes: collections.Counter[int] = collections.Counter()
        self._lateness: list[float] = []
        self._link = link
        self.problems: list[str] = []
        self.started = 0
        self.overran = 0
        self.wrong = 0
        self.fewest_alive = ALIVE
        self.growth = 0

    def rage(self, seconds: float) -> None:
        """Let it rage for so long; whatever is not as it has to be is in `problems` then."""
        end = time.monotonic() + seconds
        bystanders = [self._start(workers.stand_by) for _ in range(BYSTANDERS)]
        self._greet()
        before = self._server.footprint()
        # The first moments are when caches and buffers get their size.
        self._run(time.monotonic() + min(seconds / 4, 30))
        memory = self._server.memory()
        self._run(end)
        self._finish(bystanders)
        self._compare(before, memory)

    def _greet(self) -> None:
        """Have the server open all that it opens once, and hold those whom it holds for good."""
        if self._link.kind == "file":
            for pid in (0, self._server.pid):
                self._link.put(pid, "refused", time.time() - 1)
        worker = self._start(workers.finish)
        while worker.pid in self._alive:
            self._watch(0.05)
        eventually(lambda: self._server.ask("timers") == 0)

    def close(self) -> None:
        """Leave nothing behind, however it ended."""
        for worker in list(self._alive.values()):
            os.kill(worker.pid, signal.SIGKILL)
            self._bury(worker)
        self._selector.close()
        if self._server.stop() != 0:
            self.problems.append("the server's process did not end well")

    def summary(self) -> str:
        """The line of figures."""
        late = sorted(1000 * seconds for seconds in self._lateness) or [math.nan]
        p50, p99 = (late[min(len(late) - 1, round(part * len(late)))] for part in (0.5, 0.99))
        return (
            f"soak over a {self._link.kind}: workers {self.started}, overrun {self.overran}, "
            f"reaped {sum(self._reaped.values())}, wrong {self.wrong}, "
            f"lateness p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {late[-1]:.1f} ms; "
            f"never fewer than {self.fewest_alive} alive, server grew by {self.growth >> 10} KiB"
        )

    def _run(self, until: float) -> None:
        while time.monotonic() < until:
            while len(self._alive) < ALIVE + BYSTANDERS:
                self._plan(self._start(self._dice.choice(self._kinds)))
            self._watch(0.05)
            self.fewest_alive = min(self.fewest_alive, len(self._alive) - BYSTANDERS)

    def _start(self, behaviour: _Behaviour) -> Worker:
        seed = self._dice.random()
        pid = os.fork()
        if not pid:
            _be(behaviour, self._stage, seed)
        self.started += behaviour is not workers.stand_by
        return self._add(pid, behaviour)

    def _add(self, pid: int, behaviour: _Behaviour) -> Worker:
        worker = self._alive[pid] = Worker(pid, behaviour)
        self._selector.register(worker.pidfd, selectors.EVENT_READ, worker)
        return worker

    def _plan(self, worker: Worker) -> None:
        """Decide what is going to be done to a worker from outside."""
        now = time.monotonic()
        if worker.behaviour is workers.wait_for_a_signal:
            self._plans.append((now + self._dice.uniform(0.1, 2), worker.pid, signal.SIGUSR1))
        elif worker.behaviour is workers.be_stopped_a_while:
            stop = now + self._dice.uniform(0, 1)
            self._plans.append((stop, worker.pid, signal.SIGSTOP))
            self._plans.append((stop + self._dice.uniform(0, 1), worker.pid, signal.SIGCONT))

    def _watch(self, timeout: float) -> None:
        """Do what is due, and see who has ended."""
        now = time.monotonic()
        for plan in [plan for plan in self._plans if plan[0] <= now]:
            self._plans.remove(plan)
            if plan[1] in self._alive:
                os.kill(plan[1], plan[2])
        ready = self._selector.select(timeout)
        now = time.monotonic()
        self._listen()
        for key, _ in ready:
            if key.data is not None and key.data.pid in self._alive:
                self._judge(key.data, now)
        for worker in list(self._alive.values()):
            if now > worker.deadline + MISSED_AFTER:
                self._complain(worker, "is still alive", wrong=False)
                os.kill(worker.pid, signal.SIGKILL)
                self._bury(worker)

    def _listen(self) -> None:
        """Read what the workers told; it is all there by the time one is seen to have ended."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                data += os.read(self._truth_fd, 1 << 16)
        for record in records_in(data):
            self._note(record)

    def _note(self, record: Record) -> None:
        if record.what == b"C":
            self._add(record.pid, workers.finish)
        elif record.what == b"L":
            self.overran += 1
            self._reaped[record.pid] += 1
            self._lateness.append(record.value)
        elif record.what == b"R":
            self._alive[record.pid].released = record.value
        else:
            self._alive[record.pid].deadline = record.value

    def _judge(self, worker: Worker, died: float) -> None:
        """Hold the way a worker ended against the one it had to."""
        code = self._bury(worker)
        expected = ENDS.get(worker.behaviour, 0)
        if worker.behaviour is workers.leave_at_the_last_moment:
            in_time = worker.released < worker.deadline
            if code == -signal.SIGKILL and not in_time:
                expected = code
            self._narrow_escapes[worker.pid] += code == 0 and not in_time
        if code != expected:
            self._complain(worker, f"ended with {code}, not with {expected}")
        elif worker.deadline < math.inf and code < 0:
            self.overran += 1
            self._reaped[worker.pid] += 1
            self._lateness.append(died - worker.deadline)
            if died < worker.deadline:
                self._complain(worker, f"died {worker.deadline - died:.3f} s before its deadline")

    def _bury(self, worker: Worker) -> int:
        del self._alive[worker.pid]
        self._selector.unregister(worker.pidfd)
        os.close(worker.pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])

    def _complain(self, worker: Worker, what: str, wrong: bool = True) -> None:
        self.wrong += wrong
        self.overran += not wrong
        self.problems.append(f"{worker.behaviour.__name__} {worker.pid} {what}")

    def _finish(self, bystanders: list[Worker]) -> None:
        give_up = time.monotonic() + 60
        while len(self._alive) > BYSTANDERS and time.monotonic() < give_up:
            self._watch(0.05)
        for worker in bystanders:
            if worker.pid in self._alive:
                os.kill(worker.pid, signal.SIGUSR2)
        while self._alive and time.monotonic() < give_up:
            self._watch(0.05)
        for worker in self._alive.values():
            self._complain(worker, "did not end")

    def _compare(self, before: dict[str, object], memory: int) -> None:
        if self.fewest_alive < FEWEST_ALIVE:
            self.problems.append(f"only {self.fewest_alive} workers were alive at some time")
        with contextlib.suppress(AssertionError):
            eventually(lambda: self._server.footprint() == before, 5)
        after = self._server.footprint()
        if after != before:
            self.problems.append(f"the server has {after}, and had {before}")
        self.growth = self._server.memory() - memory
        if self.growth > MEMORY_SLACK:
            self.problems.append(f"the server grew by {self.growth} bytes")
        if self._server.errors():
            self.problems.append(f"the server logged errors:\n{self._server.errors()}")
        if self._link.kind == "file":
            killed = collections.Counter(self._server.ask("killed"))
            killed -= self._narrow_escapes & (killed - self._reaped)
            if killed != self._reaped:
                self.problems.append(
                    f"the server did not tell of {self._reaped - killed} and told of "
                    f"{killed - self._reaped}"
                )


def _be(behaviour: _Behaviour, stage: Stage, seed: float) -> None:
    """Be a worker, and exit."""
    status = 70
    try:
        stage.dice.seed(seed)
        behaviour(stage)
        status = 0
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(status)


@contextlib.contextmanager
def storm(kind: str, seed: int, stacks: float = 0) -> Iterator[Storm]:
    """A storm over a link of this kind, which leaves nothing behind."""
    # Whom its parent left is ours to bury.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with tempfile.TemporaryDirectory() as folder:
        raging = Storm(Link(kind, os.path.join(folder, "timers")), seed, stacks)
        try:
            yield raging
        finally:
            raging.close()


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak-seconds", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--link", choices=["file", "queue"], default="file")
    parser.add_argument("--stacks", type=float, default=0, help="seconds for stacks, each round")
    options = parser.parse_args()
    with storm(options.link, options.seed, options.stacks) as raging:
        raging.rage(options.soak_seconds)
    print(raging.summary())
    for problem in raging.problems:
        print(problem)
    return 1 if raging.problems else 0


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    sys.exit(main())
