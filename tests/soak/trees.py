"""Workers that have started other processes, which end with them, and only with them.

Who is left is told by a mark in the environment that these processes were started with.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

from elastic_timer import FileTimerClient, expires
from tests.soak.workers import KILL_AFTER, Stage, lose_a_child, sleep_on
from tests.support import FAR

MARK = "ELASTIC_TIMER_SOAK"
"""The variable; its value is the worker's name, which begins with the storm's."""

_SLEEP = f"sleep {FAR:.0f}"

# What a worker starts: the command for a shell, and whether it is in a session of its own.
_PROGRAMS = [
    (f"exec {_SLEEP}", False),
    (f"exec {_SLEEP}", True),
    (f"{_SLEEP} & {_SLEEP} & wait", False),
    (f"trap '' TERM HUP; {_SLEEP}; true", False),
    # An orphan, which is found by its session.
    (f"({_SLEEP} &); {_SLEEP}; true", True),
    ("kill -STOP $$", False),
]


def marked(storm: str) -> dict[int, str]:
    """The descendants of a storm's workers that run, and whose each is."""
    found = {}
    beginning = f"{MARK}={storm}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # They come and go while this looks.
            environment = b"\0" + (process / "environ").read_bytes()
            _, mark, worker = environment.partition(b"\0" + beginning)
            if mark:
                found[int(process.name)] = storm + worker.partition(b"\0")[0].decode()
    return found


def describe(pid: int) -> str:
    """What a process is, for who has to find out why it is there."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return f"{pid} (gone)"
    state, parent, group, session = stat.rpartition(")")[2].split()[:4]
    return f"{pid} ({command}; {state}, parent {parent}, group {group}, session {session})"


def _plant(stage: Stage) -> list[subprocess.Popen[bytes]]:
    chosen = [stage.dice.choice(_PROGRAMS) for _ in range(stage.dice.randrange(1, 5))]
    return [
        subprocess.Popen(
            ["sh", "-c", command], env={**os.environ, MARK: stage.name}, start_new_session=session
        )
        for command, session in chosen
    ]


def take_a_tree_along(stage: Stage) -> None:
    """Overrun with descendants, some of them started at the last moment."""
    _plant(stage)
    after = stage.dice.uniform(0.2, 1)
    stage.tell(b"D", time.monotonic() + after)
    with expires(after=after, client=stage.client):
        time.sleep(stage.dice.uniform(0, after))
        _plant(stage)
        sleep_on()


def take_a_tree_along_politely(stage: Stage) -> None:
    """Overrun with descendants, and be asked to end."""
    _plant(stage)
    stage.overrun(sleep_on, FileTimerClient(stage.path, signal.SIGTERM))


def take_a_tree_along_unwillingly(stage: Stage) -> None:
    """Overrun with descendants, and outlive SIGTERM."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    _plant(stage)
    stage.overrun(sleep_on, FileTimerClient(stage.path, signal.SIGTERM), KILL_AFTER)


def keep_a_tree(stage: Stage) -> None:
    """Leave the block in time, and see that what it has started lives."""
    with expires(after=FAR, client=stage.client):
        children = [subprocess.Popen(_SLEEP.split()) for _ in range(stage.dice.randrange(1, 4))]
        time.sleep(stage.dice.uniform(0, 1))
    _end(children)


def lose_a_branch(stage: Stage) -> None:
    """Have a child that overruns and takes its tree along, beside children that live on."""
    children = [subprocess.Popen(_SLEEP.split()) for _ in range(2)]
    try:
        lose_a_child(stage, lambda: _plant(stage))
    finally:
        _end(children)


def _end(children: list[subprocess.Popen[bytes]]) -> None:
    """End processes that nobody else may have ended."""
    try:
        assert [child.poll() for child in children] == [None] * len(children)
    finally:
        for child in children:
            child.kill()
            child.wait()
