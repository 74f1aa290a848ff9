"""A seeded storm of real workers around some servers, with a record of the truth outside of them.

    python -m tests.soak.storm --soak-seconds 600 --seed 1 [--link queue]

prints one line of figures, and what went wrong if anything did, which makes the exit status 1.

There are two servers all the time, one of them with `kill_tree`, and over FIFOs a third one that is
killed and replaced all the time. The truth is what workers have put on record of their deadlines,
and what `waitpid` and `/proc` tell of them.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import ctypes
import itertools
import logging
import math
import multiprocessing
import os
import random
import selectors
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator

from elastic_timer import FileTimerClient
from tests.servers import Link
from tests.soak import askers, trees, workers
from tests.soak.kinds import ENDS, MORTAL, PLAIN, TREES, Behaviour, kinds_over, places_of
from tests.soak.observed import Answer, ObservedServer
from tests.soak.workers import Record, Stage, records_in
from tests.support import child_pids, eventually

ALIVE = 60
"""How many workers are kept alive."""

FEWEST_ALIVE = 30
"""How many there must be on average after the first quarter, however busy the machine is."""

BUSY = 50
"""With fewer the machine is too busy for more starts, and those are started that last."""

BYSTANDERS = 3

MISSED_AFTER = 10.0
"""How many seconds after its deadline a worker that is still alive counts as missed."""

LEFT_AFTER = 5.0
"""How many seconds after a worker's end what it has started counts as left behind."""

MEMORY_SLACK = 8 << 20
"""By how many bytes a server may have grown: once its buffers are as large as they get."""

_PR_SET_CHILD_SUBREAPER = 36


class Worker:
    """A process of the storm as seen from outside; times are monotonic."""

    def __init__(self, pid: int, behaviour: Behaviour, place: str, name: str) -> None:
        self.pid = pid
        self.name = name
        self.behaviour = behaviour
        self.place = place
        self.pidfd = os.pidfd_open(pid)
        self.deadline = math.inf
        self.released = math.inf


class Place:
    """A server that lasts, and what its workers need."""

    def __init__(self, link: Link, elsewhere: Link, kill_tree: bool, stacks: float) -> None:
        self.link = link
        self.elsewhere = elsewhere.client
        self.server = ObservedServer(link, kill_tree, stacks)
        self.before: dict[str, object] = {}
        self.memory = 0

    def stage(self, truth_fd: int) -> Stage:
        """That of a worker."""
        return Stage(self.link.client, self.elsewhere, self.link.path, self.server.pid, truth_fd)


class MortalPlace:
    """A server that is killed all the time, and replaced at the same path."""

    def __init__(self, link: Link, dice: random.Random) -> None:
        self._link = link
        self._dice = dice
        self._client = FileTimerClient(link.path, required=False)
        self._server: ObservedServer | None = None
        self._due = -math.inf
        self.killed = 0
        self.problems: list[str] = []

    def stage(self, truth_fd: int) -> Stage:
        """That of a worker."""
        return Stage(self._client, self._client, self._link.path, 0, truth_fd)

    def go_on(self, now: float) -> None:
        """Kill the server, or start another one, if it is time for that."""
        if now < self._due:
            return
        if self._server is None:
            self._server = ObservedServer(self._link, kill_tree=False, stacks=0)
            self._due = now + self._dice.uniform(2, 6)
        else:
            code = self._server.kill()
            if code != -signal.SIGKILL:
                self.problems.append(f"server {self._server.pid} ended by itself with {code}")
            self._server = None
            self.killed += 1
            self._due = now + self._dice.uniform(0, 1)

    def pids(self) -> set[int]:
        """The server's process."""
        return set() if self._server is None else {self._server.pid}

    def end(self) -> None:
        """Have the last server stop."""
        if self._server is None:
            self.go_on(math.inf)
        assert self._server is not None
        self._server.wait_until_started()
        code = self._server.stop()
        errors = self._server.errors()
        if code or errors:
            self.problems.append(f"the last of the mortal servers ended with {code}: {errors}")


class Storm:
    """Starts workers, does to them what outsiders do, and judges how each of them ended."""

    def __init__(self, kind: str, folder: str, seed: int, stacks: float = 0) -> None:
        self._dice = random.Random(seed)
        self._truth_fd, self._truth_writer = os.pipe()
        os.set_blocking(self._truth_fd, False)
        self._kind = kind
        plain, tree, mortal = (
            Link(kind, os.path.join(folder, name)) for name in (PLAIN, TREES, MORTAL)
        )
        # What the names of its workers begin with.
        self._name = f"soak-{os.getpid()}-"
        self._numbers = itertools.count()
        self._places = {
            PLAIN: Place(plain, tree, kill_tree=False, stacks=stacks),
            TREES: Place(tree, plain, kill_tree=True, stacks=stacks),
        }
        self._mortal = MortalPlace(mortal, self._dice) if kind == "file" else None
        # The kinds that come next: each of them comes up as often, in a short storm as well.
        self._bag: list[Behaviour] = []
        self._alive: dict[int, Worker] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._truth_fd, selectors.EVENT_READ)
        self._plans: list[tuple[float, int, signal.Signals]] = []
        self._bystanders: list[Worker] = []
        self._reaped: collections.Counter[int] = collections.Counter()
        self._reaped_by_mortals = 0
        # Left too late, and were gone before the signal came: the server may count them as its own.
        self._narrow_escapes: collections.Counter[int] = collections.Counter()
        self._lateness: list[float] = []
        # When those ended whose descendants have to end, too.
        self._ended: dict[str, float] = {}
        # Of each job the rank that hangs.
        self._stuck: dict[str | None, int] = {}
        self._next_look = 0.0
        self.problems: list[str] = []
        self.started = 0
        self.overran = 0
        self.wrong = 0
        self.left_behind = 0
        # How many workers were alive, at each look.
        self._counts: list[int] = []
        self.growth = 0

    def rage(self, seconds: float) -> None:
        """Let it rage for so long; whatever is not as it has to be is in `problems` then."""
        end = time.monotonic() + seconds
        for _ in range(BYSTANDERS):
            self._bystanders.append(self._start(workers.stand_by, PLAIN))
        self._greet()
        for place in self._places.values():
            place.before = place.server.footprint()
        if self._kind == "file":
            for name in self._places:
                self._bystanders.append(self._start(askers.ask_all_the_time, name))
        # The first moments are when caches and buffers get their size.
        self._run(time.monotonic() + min(seconds / 4, 30))
        for place in self._places.values():
            place.memory = place.server.memory()
        self._counts.clear()
        self._run(end)
        self._finish()
        self._compare()

    def _greet(self) -> None:
        """Have the servers open all that they open once, and hold whom they hold for good."""
        for name, place in self._places.items():
            server = place.server
            server.wait_until_started()
            if self._kind == "file":
                for pid in (0, server.pid):
                    place.link.put(pid, "refused", time.time() - 1)
            worker = self._start(workers.finish, name)
            while worker.pid in self._alive:
                self._watch(0.05)
            eventually(server.is_empty)

    def close(self) -> None:
        """Leave nothing behind, however it ended."""
        for worker in list(self._alive.values()):
            os.kill(worker.pid, signal.SIGKILL)
            self._bury(worker)
        for pid in trees.marked(self._name):
            self._kill_what_is_left(pid)
        self._selector.close()
        for place in self._places.values():
            if place.server.stop() != 0:
                self.problems.append("a server's process did not end well")
        if self._mortal:
            self._mortal.end()
            self.problems += self._mortal.problems

    def summary(self) -> str:
        """The line of figures."""
        late = sorted(1000 * seconds for seconds in self._lateness) or [math.nan]
        p50, p99 = (late[min(len(late) - 1, round(part * len(late)))] for part in (0.5, 0.99))
        replaced = f", {self._mortal.killed} servers killed" if self._mortal else ""
        alive = self._counts or [0]
        return (
            f"soak over a {self._kind}: workers {self.started}, overrun {self.overran}, "
            f"reaped {self._reaped_by_mortals + sum(self._reaped.values())}, wrong {self.wrong}, "
            f"left behind {self.left_behind}, "
            f"lateness p50 {p50:.1f} ms, p99 {p99:.1f} ms, max {late[-1]:.1f} ms; "
            f"{statistics.mean(alive):.0f} alive on average and never fewer than {min(alive)}, "
            f"{len(self._stuck)} jobs hung{replaced}, "
            f"servers grew by {self.growth >> 10} KiB at most"
        )

    def _run(self, until: float) -> None:
        while time.monotonic() < until:
            # One at a time: on a busy machine many forks take long, and deaths would be seen late.
            if is_short := self._count() < ALIVE:
                kind = self._choose()
                self._plan(self._start(kind, self._dice.choice(places_of(kind, self._kind))))
            self._watch(0 if is_short else 0.05)
            self._counts.append(self._count())

    def _choose(self) -> Behaviour:
        if self.started >= ALIVE and self._count() < BUSY:
            return workers.last
        if not self._bag:
            self._bag = kinds_over(self._kind)
            self._dice.shuffle(self._bag)
        return self._bag.pop()

    def _count(self) -> int:
        return len(self._alive) - len(self._bystanders)

    def _start(self, behaviour: Behaviour, name: str) -> Worker:
        seed = self._dice.random()
        place = self._mortal if name == MORTAL and self._mortal else self._places[name]
        stage = place.stage(self._truth_writer)
        stage.name = f"{self._name}{next(self._numbers)}-{behaviour.__name__}"
        pid = os.fork()
        if not pid:
            _be(behaviour, stage, seed)
        self.started += behaviour not in (workers.stand_by, askers.ask_all_the_time)
        return self._add(pid, behaviour, name, stage.name)

    def _add(self, pid: int, behaviour: Behaviour, place: str, name: str) -> Worker:
        worker = self._alive[pid] = Worker(pid, behaviour, place, name)
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
        if self._mortal:
            self._mortal.go_on(now)
        if now >= self._next_look:
            self._look_for_the_left(now)
            self._next_look = now + 1
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
            self._add(record.pid, workers.finish, PLAIN, "an orphan")
        elif record.what == b"L":
            self.overran += 1
            self._reaped[record.pid] += 1
            self._lateness.append(record.value)
        elif record.what == b"J":
            self._stuck[self._alive[record.pid].name] = int(record.value)
        elif record.pid not in self._alive:
            pass  # One that was missed, and killed for that while it told this.
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
            if worker.place == MORTAL:
                self._reaped_by_mortals += 1
            else:
                self._reaped[worker.pid] += 1
            self._lateness.append(died - worker.deadline)
            if died < worker.deadline:
                self._complain(worker, f"died {worker.deadline - died:.3f} s before its deadline")

    def _bury(self, worker: Worker) -> int:
        del self._alive[worker.pid]
        self._ended[worker.name] = time.monotonic()
        self._selector.unregister(worker.pidfd)
        os.close(worker.pidfd)
        return os.waitstatus_to_exitcode(os.waitpid(worker.pid, 0)[1])

    def _look_for_the_left(self, now: float) -> None:
        """Bury what workers had started, and see what of it should have ended and did not."""
        # Orphans come to us, and those that are workers have told so before they are seen here.
        strangers = child_pids()
        self._listen()
        for pid in strangers - self._alive.keys() - self._servers():
            os.waitpid(pid, os.WNOHANG)
        for pid, whose in trees.marked(self._name).items():
            if now > self._ended.get(whose, math.inf) + LEFT_AFTER:
                self.left_behind += 1
                self.problems.append(f"{trees.describe(pid)} is left behind of {whose}")
                self._kill_what_is_left(pid)

    def _servers(self) -> set[int]:
        servers = [place.server for place in self._places.values()]
        return {server.pid for server in servers} | (self._mortal.pids() if self._mortal else set())

    def _kill_what_is_left(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def _complain(self, worker: Worker, what: str, wrong: bool = True) -> None:
        self.wrong += wrong
        self.overran += not wrong
        self.problems.append(
            f"{worker.behaviour.__name__} {worker.name} ({worker.pid}, {worker.place}) {what}"
        )

    def _finish(self) -> None:
        give_up = time.monotonic() + 60
        while len(self._alive) > len(self._bystanders) and time.monotonic() < give_up:
            self._watch(0.05)
        for worker in self._bystanders:
            if worker.pid in self._alive:
                os.kill(worker.pid, signal.SIGUSR2)
        while (self._alive or trees.marked(self._name)) and time.monotonic() < give_up:
            self._watch(0.05)
        for worker in self._alive.values():
            self._complain(worker, "did not end")
        for pid in trees.marked(self._name):
            self.left_behind += 1
            self.problems.append(f"{trees.describe(pid)} is left behind")

    def _compare(self) -> None:
        if not self._counts or statistics.mean(self._counts) < FEWEST_ALIVE:
            self.problems.append(f"fewer than {FEWEST_ALIVE} workers were alive on average")
        for name, place in self._places.items():
            self._compare_server(name, place)
        if self._kind == "file":
            servers = [place.server for place in self._places.values()]
            killed = collections.Counter(pid for each in servers for pid in each.ask("killed"))
            killed -= self._narrow_escapes & (killed - self._reaped)
            if killed != self._reaped:
                self.problems.append(
                    f"the servers did not tell of {self._reaped - killed} and told of "
                    f"{killed - self._reaped}"
                )
            self._compare_answers([answer for each in servers for answer in each.ask("hangs")])

    def _compare_server(self, name: str, place: Place) -> None:
        server = place.server
        with contextlib.suppress(AssertionError):
            eventually(lambda: server.footprint() == place.before, 5)
        after = server.footprint()
        if after != place.before:
            self.problems.append(f"the server {name} has {after}, and had {place.before}")
        growth = server.memory() - place.memory
        self.growth = max(self.growth, growth)
        if growth > MEMORY_SLACK:
            self.problems.append(f"the server {name} grew by {growth} bytes")
        if server.errors():
            self.problems.append(f"the server {name} logged errors:\n{server.errors()}")

    def _compare_answers(self, answers: list[Answer]) -> None:
        """Hold whom the servers suspected against those who hung."""
        told = {answer.run_id: answer for answer in reversed(answers)}
        for run_id, stuck in self._stuck.items():
            answer = told.pop(run_id, None)
            if answer is None or answer.missing or answer.suspected != [stuck]:
                self.problems.append(f"of job {run_id}, in which {stuck} hung: {answer}")
        if told:
            self.problems.append(f"no such jobs hung: {told}")


def _be(behaviour: Behaviour, stage: Stage, seed: float) -> None:
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
    """A storm over links of this kind, which leaves nothing behind."""
    # Whom its parent left is ours to bury.
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Workers warn that they go on without a server.
    logging.basicConfig(level=logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        raging = Storm(kind, folder, seed, stacks)
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
