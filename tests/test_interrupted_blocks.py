"""A1, A10, C4: what interrupts at random moments leave behind: no timer, no descriptor."""

from __future__ import annotations

import json
import os
import selectors
import sys
from collections.abc import Callable

import pytest

from elastic_timer._transport.pipe import enlarge
from tests.support import UNMEASURED, Child

# Interrupts its own blocks at moments that have nothing to do with what it does. A line for the
# scope "mark" tells the reader of the FIFO that an interrupt was handled.
WORKER = """
import fcntl, os, random, signal, sys, termios, time
from elastic_timer import FileTimerClient, expires

path, kind, blocks, storm = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "storm"
client = FileTimerClient(path)
left, right = (1 << 200_000) - 1, 1 << 100_000
entered = interrupts = 0
budget = 0  # A second one may come while the first is dealt with, and no third.

def interrupt(*_):
    global budget
    if budget:
        budget -= 1
        raise KeyboardInterrupt

def plain():
    with expires(600, "block", client):
        left | right

async def asynchronous():
    async with expires(600, "block", client):
        left | right

@expires(600, "block", client)
def decorated():
    return left | right

@expires(600, "block", client)
async def decorated_async():
    return left | right

def handle():
    with expires(600, "block", client) as timer:
        timer.reschedule(300)
        with timer.paused():
            left | right
        timer.reschedule(300)

def drive(coroutine):
    try:
        coroutine.send(None)
    except StopIteration:
        pass

run = {
    "with": plain,
    "async-with": lambda: drive(asynchronous()),
    "decorator": decorated,
    "async-decorator": lambda: drive(decorated_async()),
    "handle": handle,
}[kind]

fifo = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
room = fcntl.fcntl(fifo, fcntl.F_GETPIPE_SZ) // 2

def unread():
    return int.from_bytes(fcntl.ioctl(fifo, termios.FIONREAD, bytes(4)), sys.byteorder)

def attempt():
    global budget, entered, interrupts
    # What finds a pipe full is sent with the next request only.
    while unread() > room:
        time.sleep(0.001)
    try:
        budget = 2 if storm else 1
        if not storm:
            signal.setitimer(signal.ITIMER_REAL, random.uniform(0.00003, 0.0002))
        while entered < blocks:
            entered += 1
            run()
        budget = 0
    except KeyboardInterrupt as error:
        budget = 0
        # As an interactive shell keeps it, with all frames.
        sys.last_traceback = error.__traceback__
        interrupts += 1
        client.release("mark")
    budget = 0

run()  # What is made once is made now.
before = len(os.listdir("/proc/self/fd"))
signal.signal(signal.SIGALRM, interrupt)
if storm:
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.000_077)

def attempt_all():
    global budget
    while entered < blocks:
        try:
            attempt()
        except KeyboardInterrupt:
            budget = 0

while True:
    try:
        attempt_all()
        budget = 0
        break
    except KeyboardInterrupt:
        budget = 0
signal.setitimer(signal.ITIMER_REAL, 0)
run()
client.release("mark")
print(interrupts, len(os.listdir("/proc/self/fd")) - before, flush=True)
"""

KINDS = ["with", "async-with", "decorator", "async-decorator", "handle"]


def interrupted_blocks(
    spawn: Callable[..., Child], fifo_path: str, kind: str, blocks: int, when: str
) -> tuple[int, int, int]:
    """How many interrupts there were, and timers and descriptors that were left behind.

    "single" interrupts come one at a time, and after each no timer may be armed. In a "storm" one
    may come while another is dealt with: no timer may be armed when the next block is entered.
    """
    os.mkfifo(fifo_path)
    # Kept open for writing: it is not to end between two requests.
    reader = os.open(fifo_path, os.O_RDWR | os.O_NONBLOCK)
    enlarge(reader)  # As servers do.
    child = spawn(WORKER, fifo_path, kind, str(blocks), when, env=UNMEASURED)
    assert child.process.stdout is not None
    armed: set[str] = set()
    stray = marks = 0
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(reader, selectors.EVENT_READ)
        selector.register(child.process.stdout, selectors.EVENT_READ)
        # The child's last word comes when all its requests are in the FIFO.
        while reader in (ready := [key.fd for key, _ in selector.select(30)]):
            *lines, rest = (rest + os.read(reader, 1 << 16)).split(b"\n")
            for request in map(json.loads, lines):
                if request["scope_id"] == "mark":
                    marks += 1
                    if when == "single":
                        stray += bool(armed)
                        armed.clear()
                elif request["expiration_time"] >= 0:
                    # What a handle sends can't be told from a block that is entered.
                    stray += bool(armed) and kind != "handle"
                    armed.add(request["scope_id"])
                else:
                    armed.discard(request["scope_id"])
    os.close(reader)
    stray += bool(armed)
    assert ready, child.stderr_text()
    interrupts, descriptors = map(int, child.readline().split())
    assert child.wait() == 0, child.stderr_text()
    assert marks >= interrupts
    if sys.version_info < (3, 11) and when == "storm":
        # A second interrupt may come at the entry of `finally` there.
        descriptors = 0
    return interrupts, stray, descriptors


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("when", ["single", "storm"])
def test_a1_c4_interrupts_leave_nothing_behind(
    spawn: Callable[..., Child], fifo_path: str, kind: str, when: str
) -> None:
    """Once an interrupt was handled, no timer is armed, though its traceback is kept."""
    interrupts, stray, descriptors = interrupted_blocks(spawn, fifo_path, kind, 3000, when)
    assert interrupts > 100
    assert (stray, descriptors) == (0, 0)
