"""What COMMAND leaves behind: adopted, waited for, named at the end, and ended where that is asked.

Linux gives a process whose parent has ended to the nearest ancestor that asked for such, or else to
process 1. What another one in between has adopted does not come here.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Container, Set

from elastic_timer._evidence.facts import read_facts
from elastic_timer._server.callbacks import PATIENCE, contained_logger, flush_log
from elastic_timer._server.process import user_of
from elastic_timer._server.tree import UNKILLABLE_AFTER, ProcessTable, Tree, at_once, still_there

logger = contained_logger(__name__)

_PR_SET_CHILD_SUBREAPER = 36
# Of all children those that this thread has started, and the adopted ones, which are always the
# main thread's. For what the server's threads start they wait themselves.
_OF_THIS_THREAD = 0x20000000  # __WNOTHREAD
_ENDED = 0 if not hasattr(os, "waitid") else os.WEXITED | os.WNOHANG | os.WNOWAIT | _OF_THIS_THREAD

# How long what ends by itself with COMMAND, as helpers of multiprocessing do, is given for that.
_ENDS_BY_ITSELF = 0.5
# From SIGTERM to SIGKILL.
_PATIENCE = 5.0
# The longest time between two looks. Of most ends a signal tells.
_LOOK_AGAIN = 0.25
_MOST_NAMED = 500


class Leftovers:
    """The processes that this one adopts from now on. All calls are to be the main thread's.

    Args:
        signals: What this process waits for, SIGCHLD included; they are blocked.
        kill: Whether what is left at the end is ended.
    """

    def __init__(self, signals: Set[int], kill: bool) -> None:
        self._signals = signals
        self._kill = kill
        self._adopts = _adopt_orphans()
        self._users = {os.getuid()}

    def note_user(self, pid: int) -> None:
        """Take the user of COMMAND for one whose processes may be ended."""
        user = user_of(pid)
        if user is not None:
            self._users.add(user)

    def bury(self, own: Container[int | None] = ()) -> None:
        """Wait for adopted processes that have ended.

        Args:
            own: The children that were not adopted.
        """
        if not self._adopts:
            return
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitid(os.P_ALL, 0, _ENDED)) is not None:
                if ended.si_pid in own:
                    break  # Its SIGCHLD is still to come, and with it this is called again.
                os.waitpid(ended.si_pid, 0)

    def see_to(self) -> None:
        """Name what COMMAND, which has ended, has left behind, and end it where that is asked.

        All children of this thread are adopted ones by now. Another signal cuts the time short that
        they have to end.
        """
        if not self._adopts:
            return
        with contextlib.closing(Tree(self._users)) as tree:
            self._end(tree)
        # The server, at whose stop the log catches up, has been stopped before.
        flush_log(PATIENCE)

    def _end(self, tree: Tree) -> None:
        left = self._wait(tree, _ENDS_BY_ITSELF)
        if left:
            advice = (
                ", and it is ended now" if self._kill else " (it would be ended with --kill-tree)"
            )
            logger.warning("COMMAND has left behind%s:%s", advice, _described(left))
        if not self._kill or not tree.pids():
            return
        tree.send(signal.SIGTERM)
        tree.send(signal.SIGCONT)  # One that is stopped takes no other signal.
        self._wait(tree, _PATIENCE)
        if tree.pids():
            left = self._wait(tree, UNKILLABLE_AFTER, kill=True)
        if tree.pids():
            logger.error("COMMAND has left behind, and it is still there:%s", _described(left))

    def _wait(self, tree: Tree, seconds: float, kill: bool = False) -> dict[int, str]:
        """Wait until nothing is left that may be ended.

        Args:
            tree: What was found before; holds what is left afterwards.
            seconds: How long at most. A signal ends it as well.
            kill: Kill what is found.

        Returns:
            The states of the processes that are left, those of other users too.
        """
        end = time.monotonic() + seconds
        while True:
            self.bury()
            self._find(tree, stop=kill)
            if kill:
                tree.send(signal.SIGKILL)
            tree.forget_ended()
            left = {**still_there(tree.starts()), **still_there(tree.others)}
            remaining = end - time.monotonic()
            if not tree.pids() or remaining <= 0:
                return left
            told = signal.sigtimedwait(self._signals, min(remaining, _LOOK_AGAIN))
            if told is not None and told.si_signo != signal.SIGCHLD:
                return left

    def _find(self, tree: Tree, stop: bool) -> None:
        # A new one each time: who has adopted a process is told by its present parent.
        table = ProcessTable()
        for known in at_once(table.refresh()).values():
            if known.parent == os.getpid() and _is_adopted(known.pid):
                tree.hold(known)
        at_once(tree.find(table, stop=stop))


def _adopt_orphans() -> bool:
    """Have the orphans of COMMAND become children of this process; whether they do."""
    try:
        prctl = ctypes.CDLL(None, use_errno=True).prctl
        is_set: bool = prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    except (AttributeError, OSError):
        is_set = False
    return is_set or os.getpid() == 1


def _is_adopted(child: int) -> bool:
    """Whether a child is not that of another thread."""
    try:
        os.waitid(os.P_PID, child, _ENDED)
    except ChildProcessError:
        return False
    return True


def _described(left: dict[int, str]) -> str:
    lines = []
    for pid, state in list(left.items())[:_MOST_NAMED]:
        facts = read_facts(pid)
        size = (facts["resident_bytes"] or 0) / 2**20
        lines.append(f"\n  {pid} ({facts['command'] or '?'}, state {state}, {size:.1f} MiB)")
    if len(left) > _MOST_NAMED:
        lines.append(f"\n  and {len(left) - _MOST_NAMED} more")
    return "".join(lines)
