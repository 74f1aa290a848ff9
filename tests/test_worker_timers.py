"""The timers of real processes against a plain dictionary, while the wall clock is set at will."""

from __future__ import annotations

import os
import signal
import subprocess
from unittest.mock import Mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from elastic_timer import TimerRequest, _clock
from elastic_timer._server.loop import Loop
from elastic_timer._server.process import is_running
from elastic_timer._server.workers import Workers
from tests.support import FAR, open_descriptors

pytestmark = pytest.mark.long

SCOPES = st.sampled_from(["a", "b"])
# Whole and half seconds are exact in floating point: both sides compute the very same numbers.
AFTERS = st.integers(-4, 20).map(float)
PAUSES = st.integers(0, 8).map(float)
STEPS = st.sampled_from([0.0, 0.5, -0.5, 5.0, -5.0, 3600.0, -3600.0, 86400.0, -86400.0])
# Those that exit are waited for at the end only, so that nobody else is given their pids meanwhile.
# Where there is no /proc, one that was not waited for can't be told from one that runs.
LEAVES_ZOMBIES = os.path.exists("/proc/self/stat")
NOBODY = 2**31 - 1


class Clock:
    """Stands in for both clocks; the wall clock can be set, the other only goes on."""

    def __init__(self) -> None:
        self.epoch = 1.75e9
        self.now = 1000.0


class AgainstADictionary(RuleBasedStateMachine):
    """Does everything to timers and to a dictionary: both must always tell the same.

    A worker is its pid. One of them is a process group, which has a minus sign and never exits.
    """

    workers = Bundle("workers")
    has_pidfds = hasattr(os, "pidfd_open") and hasattr(signal, "pidfd_send_signal")

    def __init__(self) -> None:
        super().__init__()
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        # Each timer's deadline, the number of its request, and the request.
        self.model: dict[tuple[int, str], tuple[float, int, TimerRequest]] = {}
        self.serial = 0
        self.gone = {NOBODY}
        self.settled: set[int] = set()
        self.held: set[int] = set()
        self.killed: set[int] = set()
        self.unwatched: set[int] = set()
        self.clock = Clock()
        self.patches = pytest.MonkeyPatch()
        self.patches.setattr(_clock, "epoch", lambda: self.clock.epoch)
        self.patches.setattr(_clock, "monotonic", lambda: self.clock.now)
        if not self.has_pidfds:
            self.patches.delattr(os, "pidfd_open", raising=False)
        self.descriptors_before = len(open_descriptors())
        self.loop = Loop("model", True, Mock(), Mock(), Mock())
        self.loop.wait(0)
        self.descriptors_of_loop = len(open_descriptors()) - self.descriptors_before
        self.timers: Workers[TimerRequest] = Workers(self.loop)
        self.timers.open()

    def teardown(self) -> None:
        try:
            self.timers.close()
            self.timers.open()
            assert not self.timers.table
            self.timers.close()
            self.loop.stop()
            assert len(open_descriptors()) == self.descriptors_before
        finally:
            self.patches.undo()
            for process in self.processes.values():
                process.kill()
                process.wait()

    @initialize(target=workers)
    def start_some(self) -> object:
        return multiple(self._start(), self._start(), -self._start(), NOBODY)

    @precondition(lambda self: len(self.processes) < len(self.gone) + 2)
    @rule(target=workers)
    def start(self) -> int:
        return self._start()

    @rule(worker=workers, is_noticed=st.booleans())
    def exit(self, worker: int, is_noticed: bool) -> None:
        pid = abs(worker)
        if pid not in self.gone:
            self.processes[pid].kill()
            if LEAVES_ZOMBIES:
                os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
            else:
                self.processes[pid].wait()
            self.gone.add(pid)
        if is_noticed:
            self.notice([])

    @rule(also=st.lists(workers, max_size=2))
    def notice(self, also: list[int]) -> None:
        """The descriptors tell of those that are gone; more are named, gone or not."""
        told = [pid for pid in self.loop.wait(0) if isinstance(pid, int)]
        assert sorted(told) == sorted((self.held & self.gone) - self.unwatched)
        gone = self.timers.drop_exited([*told, *also], is_running)
        # From now on these are asked every time: their descriptors have had their say.
        self.unwatched |= {*told, *also} & self.held
        assert {worker.pid for worker in gone} == self.unwatched & self.gone
        for worker, _, _, scopes in gone:
            assert sorted(scopes) == sorted(scope for pid, scope in self.model if pid == worker)
            self._drop_timers(worker)
            self._forget(worker)
        assert self.loop.wait(0) == []

    @rule(
        batch=st.lists(st.tuples(workers, SCOPES, AFTERS | st.none()), min_size=1, max_size=5),
        step=STEPS,
    )
    def register(self, batch: list[tuple[int, str, float | None]], step: float) -> None:
        """Requests in one batch; the clock was set, and nobody has looked at it since."""
        self.clock.epoch += step
        requests, counted = [], []
        for worker, scope, after in batch:
            expiration_time = -1.0 if after is None else self.clock.epoch + after
            requests.append(TimerRequest(worker, scope, expiration_time))
            if after is None:
                self.model.pop((worker, scope), None)
                self._forget_idle_group(worker)
                counted.append(requests[-1])
            elif self._counts(worker):
                counted.append(requests[-1])
                self.serial += 1
                self.model[worker, scope] = self.clock.now + after, self.serial, requests[-1]
        assert self.timers.register(requests, is_running, self.clock.now) == counted

    @rule(worker=workers, scope=SCOPES, after=AFTERS, step=STEPS)
    def acquire(self, worker: int, scope: str, after: float, step: float) -> None:
        self.register([(worker, scope, after)], step)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), after=AFTERS | st.none(), step=STEPS)
    def acquire_anew_or_release(
        self, data: st.DataObject, after: float | None, step: float
    ) -> None:
        worker, scope = data.draw(st.sampled_from(list(self.model)))
        self.register([(worker, scope, after)], step)

    @rule(worker=workers, is_killed=st.booleans(), is_cleared=st.booleans())
    def reap(self, worker: int, is_killed: bool, is_cleared: bool) -> None:
        if is_killed:
            self.timers.presume_dead(worker)
            self.killed |= {worker} & self.held
            assert not self.timers.was_killed(worker)
        if is_cleared:
            self.timers.clear([worker])
            self._drop_timers(worker)
            self._forget_idle_group(worker)

    @rule(seconds=PAUSES, step=STEPS)
    def time_passes(self, seconds: float, step: float) -> None:
        self.clock.now += seconds
        self.clock.epoch += seconds + step
        if seconds:
            # Those that were said to be killed, and live, are heard again.
            self.killed.clear()

    @invariant()
    def is_the_same_mapping(self) -> None:
        table = self.timers.table
        assert len(table) == len(self.model)
        assert dict(table) == {key: request for key, (_, _, request) in self.model.items()}

    @invariant()
    def expires_the_same(self) -> None:
        timers = sorted(self.model.values(), key=lambda timer: timer[:2])
        for ahead in (0.0, 5.0):
            expected: dict[int, list[TimerRequest]] = {}
            for deadline, _, request in timers:
                if deadline <= self.clock.now + ahead:
                    expected.setdefault(request.worker_id, []).append(request)
            found = self.timers.expired(self.clock.epoch + ahead)
            assert list(found.items()) == list(expected.items())

    @rule()
    def look(self) -> None:
        """What is due by now was looked at, however the clock was set meanwhile."""
        with self.timers.clock.present() as now:
            self.clock.epoch += 3600
            self.timers.settle(now)
            self.clock.epoch -= 3600
        self.settled |= {n for at, n, _ in self.model.values() if at <= self.clock.now}

    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Timers are dropped one by one, but not what came in their place."""
        requests = [request for _, _, request in self.model.values()]
        if not requests:
            return
        for request in data.draw(st.lists(st.sampled_from(requests), max_size=3, unique_by=id)):
            self.timers.drop([request])
            del self.model[request.worker_id, request.scope_id]
            self.timers.drop([request, TimerRequest(request.worker_id, "none", 0.0)])
            self._forget_idle_group(request.worker_id)

    @invariant()
    def is_due_at_the_same_time(self) -> None:
        due = [at for at, number, _ in self.model.values() if number not in self.settled]
        assert self.timers.next_deadline() == min(due, default=None)

    @invariant()
    def tells_how_late_a_timer_is(self) -> None:
        for deadline, _, request in self.model.values():
            assert self.timers.seconds_late(request) == self.clock.now - deadline
            moved = self.clock.epoch + deadline - self.clock.now
            assert abs(self.timers.expiration_now(request) - moved) < 0.01

    @invariant()
    def holds_the_same_processes(self) -> None:
        for pid in self.processes:
            for worker in (pid, -pid):
                assert self.timers.is_held(worker) == (worker in self.held)
                assert self.timers.is_gone(worker, is_running) == (worker in self.held & self.gone)
        assert self.timers.has_unwatched() == bool(self.unwatched)

    @invariant()
    def has_a_descriptor_for_each_process(self) -> None:
        pidfds = sum(worker > 0 for worker in self.held) if self.has_pidfds else 0
        spare = 1
        watched = self.descriptors_before + self.descriptors_of_loop
        assert len(open_descriptors()) == watched + spare + pidfds

    def _start(self) -> int:
        process = subprocess.Popen(["sleep", str(FAR)], start_new_session=True)
        self.processes[process.pid] = process
        return process.pid

    def _counts(self, worker: int) -> bool:
        """Whether a timer of the worker is taken; from then on the worker is held."""
        if worker not in self.held:
            if worker in self.gone:
                return False
            self.held.add(worker)
            if worker > 0 and not self.has_pidfds:
                self.unwatched.add(worker)
        return worker not in self.killed

    def _drop_timers(self, worker: int) -> None:
        for key in [key for key in self.model if key[0] == worker]:
            del self.model[key]

    def _forget(self, worker: int) -> None:
        for workers in (self.held, self.killed, self.unwatched):
            workers.discard(worker)

    def _forget_idle_group(self, worker: int) -> None:
        if worker < 0 and not any(key[0] == worker for key in self.model):
            self._forget(worker)


class AgainstADictionaryWithoutPidfds(AgainstADictionary):
    """The same where the system has no descriptors for processes: they have to be asked."""

    has_pidfds = False


for machine in (AgainstADictionary, AgainstADictionaryWithoutPidfds):
    machine.TestCase.settings = settings(max_examples=50, stateful_step_count=40)

TestAgainstADictionary = AgainstADictionary.TestCase
TestAgainstADictionary.__doc__ = (
    "Whatever workers and clocks do, the timers tell what a dictionary tells."
)
TestAgainstADictionaryWithoutPidfds = AgainstADictionaryWithoutPidfds.TestCase
TestAgainstADictionaryWithoutPidfds.__doc__ = "They tell it too where no descriptor holds a worker."
