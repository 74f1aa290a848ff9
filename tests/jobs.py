"""Jobs of several processes, whose processes tell who they are."""

from __future__ import annotations

from tests.support import Child

# Each process of a tree says who it is; its environment in /proc is that which it was forked with.
PRELUDE = """
import os, signal, sys, time

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def stay(*steps):
    for step in steps:
        step()
    say(os.getpid())
    while True:
        signal.pause()

def start(*steps):
    pid = os.fork()
    if not pid:
        stay(*steps)
    return pid

def leave_an_orphan():
    between = os.fork()
    if not between:
        if os.fork():
            os._exit(0)
        stay()
    os.waitpid(between, 0)

def ignore_sigterm():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
"""


def pids(child: Child, count: int) -> list[int]:
    """The next so many pids that are told."""
    return [int(child.readline()) for _ in range(count)]


def told_twice(told: list[int]) -> int:
    """The process that its parent has told of, too."""
    (pid,) = {pid for pid in told if told.count(pid) == 2}
    return pid
