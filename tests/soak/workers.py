"""What the workers of the storm do: one function for each way a process can treat its deadline.

Each runs in a fork of its own. What is told with `tell` is the ground truth: it is told before
the server can know, and outlives the worker.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from elastic_timer import FileTimerClient, TimerClient, expires
from tests.support import FAR, wire_line, write_raw

KILL_AFTER = 0.5
"""What the server is given as `kill_after`."""

_NEVER = 4194304 + 5
"""A pid that Linux gives to nobody."""

_CLOCKS_DIFFER = 0.01
"""By how many seconds the two clocks may drift apart while a worker is in its block."""

_RECORD = struct.Struct("icd")


class Record(NamedTuple):
    """One thing that a worker told.

    b"D" is its deadline, b"R" when its release was done, b"C" its birth, where the parent is not
    the storm itself, b"L" how late one was reaped whom the storm could not see, and b"J" which rank
    of the job that it has launched is the one that hangs.
    """

    pid: int
    what: bytes
    value: float


def records_in(data: bytes) -> list[Record]:
    """Cut what was read from the pipe into records, which were written whole."""
    return [Record(*fields) for fields in _RECORD.iter_unpack(data)]


class Stage:
    """What a worker needs: its clients, its own dice, and a pipe to tell the truth into.

    Args:
        client: Of the server that the worker is watched by.
        elsewhere: Of another server.
        path: Where the first one listens.
        server_pid: Its process.
        truth_fd: The pipe.

    Attributes:
        name: The worker's. Another one may be given its pid.
    """

    def __init__(
        self,
        client: TimerClient,
        elsewhere: TimerClient,
        path: str,
        server_pid: int,
        truth_fd: int,
    ) -> None:
        self.client = client
        self.elsewhere = elsewhere
        self.path = path
        self.server_pid = server_pid
        self._truth_fd = truth_fd
        self.name = ""
        self.dice = random.Random()

    def tell(self, what: bytes, value: float, pid: int | None = None) -> None:
        """Put something on record, of this process by default; times are monotonic."""
        os.write(self._truth_fd, _RECORD.pack(pid or os.getpid(), what, value))

    def overrun(
        self, hang: Callable[[], object], client: TimerClient | None = None, grace: float = 0
    ) -> None:
        """Hang in a block; the deadline, and what is granted beyond it, is told before."""
        after = self.dice.uniform(0.2, 4)
        self.tell(b"D", time.monotonic() + after + grace)
        with expires(after=after, client=client or self.client):
            hang()


def sleep_on() -> None:
    """Hang as most do."""
    time.sleep(FAR)


# Those that keep their deadlines ---------------------------------------------------------------


def finish(stage: Stage) -> None:
    """In and out of blocks in good time."""
    for _ in range(stage.dice.randrange(1, 8)):
        with expires(after=FAR, client=stage.client):
            time.sleep(stage.dice.uniform(0, 0.3))


def nest(stage: Stage) -> None:
    """Timers within timers, left in good time."""
    with expires(after=FAR, client=stage.client), expires(after=FAR / 2, client=stage.client):
        for _ in range(3):
            with expires(after=FAR / 3, client=stage.client):
                time.sleep(stage.dice.uniform(0, 0.3))


def prolong(stage: Stage) -> None:
    """One scope acquired again and again, for longer than the first deadline."""
    for _ in range(12):
        stage.client.acquire("prolonged", time.time() + 3)
        time.sleep(0.3)
    stage.client.release("prolonged")


def flood(stage: Stage) -> None:
    """As many requests as the pipe takes."""
    for _ in range(stage.dice.randrange(200, 1500)):
        with expires(after=FAR, client=stage.client):
            pass


def hoard(stage: Stage) -> None:
    """Hold so many timers that who asks for the server's status has to read for a while."""
    for number in range(stage.dice.randrange(500, 1500)):
        stage.client.acquire(f"{number} of many", time.time() + FAR)
    time.sleep(stage.dice.uniform(1, 3))


def last(stage: Stage) -> None:
    """In a block for long."""
    with expires(after=FAR, client=stage.client):
        time.sleep(stage.dice.uniform(2, 6))


def leave(stage: Stage) -> None:
    """Exit with the timer still running."""
    stage.client.acquire("never released", time.time() + stage.dice.uniform(0.5, 3))
    time.sleep(stage.dice.uniform(0, 0.3))


def wait_for_a_signal(stage: Stage) -> None:
    """In a block, until the storm stops and continues it, or kills it."""
    with expires(after=FAR, client=stage.client):
        sleep_on()


def be_stopped_a_while(stage: Stage) -> None:
    """In a block for a while, of which the storm makes a longer one."""
    with expires(after=FAR, client=stage.client):
        time.sleep(1)


def only_report(stage: Stage) -> None:
    """Overrun with a client that asks for no signal."""
    with expires(after=0.2, client=FileTimerClient(stage.path, stage.dice.choice([0, -1]))):
        time.sleep(1)


def write_rubbish(stage: Stage) -> None:
    """Write what no client would; not one byte of it may have anybody signalled.

    Left out are pids -1 and 1, which would take the host along if the server were wrong.
    """
    expired = {"expiration_time": time.time() - 1}
    parent = wire_line(pid=os.getppid(), **expired)
    for _ in range(stage.dice.randrange(5, 50)):
        write_raw(
            stage.path,
            stage.dice.choice(
                [
                    stage.dice.randbytes(stage.dice.randrange(1, 4096)).replace(b"{", b""),
                    parent[: stage.dice.randrange(1, len(parent) - 1)],
                    parent[: stage.dice.randrange(1, len(parent) - 1)] + b"\n",
                    b"\n" * stage.dice.randrange(1, 50),
                    b"[" * 4000 + b"\n",
                    wire_line(pid=0, **expired),
                    wire_line(pid=stage.server_pid, **expired),
                    wire_line(pid=-stage.server_pid, **expired),
                    wire_line(pid=_NEVER, **expired),
                    wire_line(pid=True, **expired),
                    wire_line(pid=os.getppid(), expiration_time="soon"),
                    wire_line(pid=float(os.getppid()), **expired),
                    wire_line(pid=os.getppid(), signal=[9], **expired),
                ]
            ),
        )
        time.sleep(stage.dice.uniform(0, 0.02))


# Those that overrun ----------------------------------------------------------------------------


def oversleep(stage: Stage) -> None:
    """Hang in a sleep."""
    stage.overrun(sleep_on)


def hang_in_c(stage: Stage) -> None:
    """Hang in C code with the GIL held."""
    stage.overrun(lambda: ctypes.PyDLL(None).sleep(int(FAR)))


def spin(stage: Stage) -> None:
    """Never come out of a loop that takes a whole core, at a low priority."""
    # Not the lowest: on a busy machine that gets no time to die in.
    os.nice(10)

    def loop() -> None:
        while True:
            pass

    stage.overrun(loop)


def hang_stopped(stage: Stage) -> None:
    """Hang where no signal but SIGKILL and SIGCONT is heeded."""
    stage.overrun(lambda: os.kill(os.getpid(), signal.SIGSTOP))


def hang_within(stage: Stage) -> None:
    """The inner of two blocks is overrun."""
    with expires(after=FAR, client=stage.client):
        stage.overrun(sleep_on)


def hang_around(stage: Stage) -> None:
    """The outer of two blocks is overrun, after an inner one was left in time."""

    def hang() -> None:
        for _ in range(3):
            with expires(after=FAR, client=stage.client):
                time.sleep(0.01)
        sleep_on()

    stage.overrun(hang)


def hang_in_a_thread(stage: Stage) -> None:
    """One of two threads in the same block overruns, the other leaves it in time."""

    def step(hang: bool) -> None:
        if hang:
            stage.overrun(sleep_on)
        else:
            with expires(after=FAR, client=stage.client):
                time.sleep(0.05)

    threads = [threading.Thread(target=step, args=(hang,)) for hang in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def hang_with_a_timer_elsewhere(stage: Stage) -> None:
    """Overrun at one of two servers, with time enough at the other."""
    with expires(after=FAR, client=stage.elsewhere):
        stage.overrun(sleep_on)


def ignore_the_signal(stage: Stage) -> None:
    """Overrun and outlive SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    stage.overrun(sleep_on, FileTimerClient(stage.path, signal.SIGTERM), KILL_AFTER)


def overrun_politely(stage: Stage) -> None:
    """Overrun with a client that asks for SIGTERM."""
    stage.overrun(sleep_on, FileTimerClient(stage.path, signal.SIGTERM))


# Those that fork -------------------------------------------------------------------------------


def leave_an_orphan(stage: Stage) -> None:
    """Overrun, and leave a child that has done nothing wrong."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(writer)
        stage.tell(b"C", 0)
        with expires(after=FAR, client=stage.client):
            os.read(reader, 1)  # Ends with the parent, who alone has the other end.
        finish(stage)
        return
    os.close(reader)
    stage.overrun(sleep_on)


def lose_a_child(stage: Stage, begin: Callable[[], object] = os.getpid) -> None:
    """Have a child that overruns, see it killed, and go on; the child calls `begin` first."""
    reader, writer = os.pipe()
    with expires(after=FAR, client=stage.client):
        child = os.fork()
        if not child:
            begin()
            after = stage.dice.uniform(0.2, 1)
            os.write(writer, struct.pack("d", time.monotonic() + after))
            with expires(after=after, client=stage.client):
                sleep_on()
        _, status = os.waitpid(child, 0)
        died = time.monotonic()
    (deadline,) = struct.unpack("d", os.read(reader, 8))
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    assert died >= deadline
    stage.tell(b"L", died - deadline, child)


# The photo finish ------------------------------------------------------------------------------


def leave_at_the_last_moment(stage: Stage) -> None:
    """Release some milliseconds before or after the deadline; before it, it has to count."""
    after = stage.dice.uniform(0.2, 1)
    deadline = time.monotonic() + after
    stage.tell(b"D", deadline)
    stage.client.acquire("photo finish", time.time() + after)
    time.sleep(max(0.0, deadline + stage.dice.uniform(-0.02, 0.01) - time.monotonic()))
    stage.client.release("photo finish")
    stage.tell(b"R", time.monotonic())


# Those that use the handle of their block -------------------------------------------------------


def _tell_deadline(stage: Stage, block: expires, earliest: float, latest: float) -> None:
    """Put the deadline on record that a block tells, which has to be within these (monotonic)."""
    before, epoch, after = time.monotonic(), time.time(), time.monotonic()
    left = block.when() - epoch
    assert earliest - _CLOCKS_DIFFER <= after + left
    assert before + left <= latest + _CLOCKS_DIFFER
    # Not by the code under test alone: nobody may die before this.
    stage.tell(b"D", max(earliest, min(before + left, latest)))


def tick_in_time(stage: Stage) -> None:
    """Tick for longer than the first deadline."""
    with expires(after=3, client=stage.client) as block:
        for _ in range(16):
            time.sleep(stage.dice.uniform(0.1, 0.4))
            block.tick()


def stop_ticking(stage: Stage) -> None:
    """Tick for a while, and then no more."""
    after = stage.dice.uniform(0.5, 1.5)
    stage.tell(b"D", time.monotonic() + after)
    with expires(after=after, client=stage.client) as block:
        for _ in range(stage.dice.randrange(1, 20)):
            time.sleep(stage.dice.uniform(0, 0.1))
            called = time.monotonic()
            block.tick()
            # A tick is not sent within a tenth of the time.
            _tell_deadline(stage, block, called + 0.9 * after, time.monotonic() + after)
        sleep_on()


def put_off(stage: Stage) -> None:
    """Have more time than the block began with."""
    with expires(after=2, client=stage.client) as block:
        block.reschedule(FAR)
        time.sleep(2.5)


def draw_near(stage: Stage) -> None:
    """Have less time than the block began with, and overrun that."""
    after = stage.dice.uniform(0.2, 1)
    with expires(after=FAR, client=stage.client) as block:
        time.sleep(stage.dice.uniform(0, 0.3))
        stage.tell(b"D", time.monotonic() + after)
        block.reschedule(after)
        sleep_on()


def pause(stage: Stage) -> None:
    """Pause for longer than the time, and leave in good time then."""
    with expires(after=2, client=stage.client) as block:
        for seconds in (2.5, 0.2):
            with block.paused():
                time.sleep(seconds)


def hang_after_a_pause(stage: Stage) -> None:
    """Pause, and overrun what was left of the time."""
    after = stage.dice.uniform(0.5, 1.5)
    entering = time.monotonic()
    stage.tell(b"D", entering + after)
    with expires(after=after, client=stage.client) as block:
        entered = time.monotonic()
        pausing = time.monotonic()
        with block.paused():
            paused = time.monotonic()
            stage.tell(b"D", paused + FAR)
            time.sleep(stage.dice.uniform(0.1, 1))
            # It may die from the end of the pause on, which nobody can see from outside.
            resuming = time.monotonic()
            stage.tell(b"D", resuming + after - (paused - entering))
        left = after - (paused - entering), after - (pausing - entered)
        _tell_deadline(stage, block, resuming + left[0], time.monotonic() + left[1])
        sleep_on()


# Those that can do without a server, which comes and goes -----------------------------------------


def go_on(stage: Stage) -> None:
    """In and out of blocks, which takes no time worth mentioning, server or not."""
    taken = []
    for _ in range(stage.dice.randrange(10, 40)):
        begun = time.monotonic()
        with expires(after=FAR, client=stage.client):
            taken.append(time.monotonic() - begun)
            time.sleep(stage.dice.uniform(0, 0.2))
    # Of most of them: a busy machine may hold up some.
    assert sorted(taken)[len(taken) // 2] < 0.1, taken


def overrun_again_and_again(stage: Stage) -> None:
    """Overrun until a server is there that sees it."""
    give_up = time.monotonic() + 40
    while time.monotonic() < give_up:
        after = stage.dice.uniform(0.2, 0.5)
        stage.tell(b"D", time.monotonic() + after)
        with expires(after=after, client=stage.client):
            time.sleep(after + 1)


# Those that have no timer at all ---------------------------------------------------------------


def stand_by(stage: Stage) -> None:
    """Do nothing, and be signalled by nobody, until the storm is over."""
    while not is_over(FAR):
        pass


def is_over(seconds: float) -> bool:
    """Whether the storm ends within some seconds; any other signal is one too many."""

    def complain(number: int, _: object) -> None:
        print(f"bystander {os.getpid()} had signal {number}", file=sys.stderr)
        os._exit(71)

    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, signal.SIGUSR2}:
        signal.signal(number, complain)
    return signal.sigtimedwait({signal.SIGUSR2}, seconds) is not None
