"""The kinds of workers, how each of them has to end, and which servers may watch it."""

from __future__ import annotations

import signal
from collections.abc import Callable

from tests.soak import askers, ranks, trees, workers
from tests.soak.workers import Stage

Behaviour = Callable[[Stage], None]

PLAIN = "plain"
"""The server that signals nobody but workers."""

TREES = "trees"
"""The one that has `kill_tree`."""

MORTAL = "mortal"
"""The one that is killed and replaced all the time. Its clients do without it meanwhile."""

# What becomes of a worker: the exit code that it has to have, in the order of the files.
ENDS: dict[Behaviour, int] = {
    workers.finish: 0,
    workers.nest: 0,
    workers.prolong: 0,
    workers.flood: 0,
    workers.hoard: 0,
    workers.last: 0,
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
    workers.hang_with_a_timer_elsewhere: -signal.SIGKILL,
    workers.ignore_the_signal: -signal.SIGKILL,
    workers.overrun_politely: -signal.SIGTERM,
    workers.leave_an_orphan: -signal.SIGKILL,
    workers.lose_a_child: 0,
    workers.leave_at_the_last_moment: 0,
    workers.tick_in_time: 0,
    workers.stop_ticking: -signal.SIGKILL,
    workers.put_off: 0,
    workers.draw_near: -signal.SIGKILL,
    workers.pause: 0,
    workers.hang_after_a_pause: -signal.SIGKILL,
    workers.go_on: 0,
    workers.overrun_again_and_again: -signal.SIGKILL,
    trees.take_a_tree_along: -signal.SIGKILL,
    trees.take_a_tree_along_politely: -signal.SIGTERM,
    trees.take_a_tree_along_unwillingly: -signal.SIGKILL,
    trees.keep_a_tree: 0,
    trees.lose_a_branch: 0,
    ranks.launch_ranks: 0,
    askers.ask_and_hang: 0,
    askers.ask_in_rubbish: 0,
}

# What a queue can't do: other signals than SIGKILL, rubbish, for which it has no line ends, ranks,
# as its workers are forks and not programs of their own, a server that is replaced, and status.
FIFO_ONLY = {
    workers.only_report,
    workers.write_rubbish,
    workers.ignore_the_signal,
    workers.overrun_politely,
    workers.go_on,
    workers.overrun_again_and_again,
    trees.take_a_tree_along_politely,
    trees.take_a_tree_along_unwillingly,
    ranks.launch_ranks,
    askers.ask_and_hang,
    askers.ask_in_rubbish,
}

# Where those may be that may not be with both servers that last.
_PLACES: dict[Behaviour, tuple[str, ...]] = {
    workers.leave_an_orphan: (PLAIN,),
    workers.go_on: (MORTAL,),
    workers.overrun_again_and_again: (MORTAL,),
    trees.take_a_tree_along: (TREES,),
    trees.take_a_tree_along_politely: (TREES,),
    trees.take_a_tree_along_unwillingly: (TREES,),
    trees.lose_a_branch: (TREES,),
}

# Those that no loss of a server harms, nor their deadlines.
_ANYWHERE = (
    workers.finish,
    workers.nest,
    workers.prolong,
    workers.last,
    workers.leave,
    workers.be_stopped_a_while,
    workers.tick_in_time,
    workers.put_off,
    workers.pause,
)


def kinds_over(link: str) -> list[Behaviour]:
    """Those that make sense over a kind of link."""
    return [kind for kind in ENDS if link == "file" or kind not in FIFO_ONLY]


def places_of(kind: Behaviour, link: str) -> tuple[str, ...]:
    """Which servers may watch a worker."""
    everywhere = kind in _ANYWHERE and link == "file"
    return _PLACES.get(kind, (PLAIN, TREES, MORTAL) if everywhere else (PLAIN, TREES))
