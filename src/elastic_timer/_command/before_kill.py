"""What `run --before-kill` does: a command of the user's for each worker about to be signalled."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import threading
import time
from typing import TYPE_CHECKING

from elastic_timer._server.callbacks import contained_logger
from elastic_timer._server.events import TimerExpired, named

if TYPE_CHECKING:
    from elastic_timer import FileTimerRequest

logger = contained_logger(__name__)

# How often it is looked whether the command has ended, in seconds.
_LOOK = 0.005


class BeforeKill:
    """Runs a command before a worker is signalled, and waits for its end.

    It has the worker in ELASTIC_TIMER_PID, ELASTIC_TIMER_RANK (empty without one) and
    ELASTIC_TIMER_SCOPE, and the evidence as JSON on its standard input. What it prints goes to
    standard error. It is in a process group of its own, which is killed when the command has ended,
    or the time is over.

    Args:
        command: A command line for the shell.
        timeout: How many seconds it may take.
    """

    def __init__(self, command: str, timeout: float) -> None:
        self._command = command
        self._timeout = timeout
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._is_closed = False

    def __call__(self, expiry: TimerExpired[FileTimerRequest]) -> None:
        """Run it for the worker of this record."""
        end = time.monotonic() + self._timeout
        with self._lock:
            if self._is_closed:
                return
            pid = self._start(expiry)
            self._running.add(pid)
        while not (has_ended := _has_ended(pid)) and time.monotonic() < end:
            time.sleep(_LOOK)
        with self._lock:
            self._running.discard(pid)
        # Not waited for yet, the number is the command's and its children's even when it has ended.
        os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        worker = named(expiry.pid, expiry.rank)
        if not has_ended:
            logger.warning("--before-kill: not done with worker %s in time, killed", worker)
        elif code:
            how = f"exit status {code}" if code > 0 else f"signal {-code}"
            logger.warning("--before-kill: ended with %s for worker %s", how, worker)

    def close(self) -> None:
        """Kill what still runs, and run nothing more."""
        with self._lock:
            self._is_closed = True
            for pid in self._running:
                os.killpg(pid, signal.SIGKILL)

    def _start(self, expiry: TimerExpired[FileTimerRequest]) -> int:
        """Start the command in a session of its own; its pid."""
        environment = {
            **os.environ,
            "ELASTIC_TIMER_PID": str(expiry.pid),
            "ELASTIC_TIMER_RANK": "" if expiry.rank is None else str(expiry.rank),
            "ELASTIC_TIMER_SCOPE": expiry.timer.scope_id,
        }
        # A file: one that does not read it holds up nobody.
        with tempfile.TemporaryFile() as stdin:
            stdin.write(json.dumps(expiry.evidence).encode())
            stdin.seek(0)
            return os.posix_spawn(
                "/bin/sh",
                ["sh", "-c", self._command],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, stdin.fileno(), 0),
                    (os.POSIX_SPAWN_DUP2, 2, 1),
                ],
                setsid=True,
                # Blocked here, where they are waited for, they would be so there.
                setsigmask=[],
                setsigdef=[signal.SIGPIPE, signal.SIGXFSZ],
            )


def _has_ended(pid: int) -> bool:
    look = os.WEXITED | os.WNOHANG | os.WNOWAIT
    return os.waitid(os.P_PID, pid, look) is not None
