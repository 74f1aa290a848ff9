"""Who asks servers how they are: in good faith ten times a second, or to do harm."""

from __future__ import annotations

import contextlib
import json
import socket
import time

from elastic_timer._transport.status_socket import Question, socket_of
from tests.soak.workers import Stage, is_over

_PATIENCE = 10.0
"""How many seconds an answer may take: as long as one may be overdue before it counts as missed."""


def ask_all_the_time(stage: Stage) -> None:
    """Ask ten times a second, until the storm is over; each answer has to be whole.

    What is in it may be anybody's, the server's own pid for instance, of those who write rubbish.
    """
    while not is_over(0.1):
        with Question(stage.path, _PATIENCE) as question:
            answer = json.loads(question.read())
        assert answer["pid"] == stage.server_pid
        assert answer["last_round_age"] < _PATIENCE
        assert all(timer["scope"] is not None for timer in answer["timers"])


def ask_and_hang(stage: Stage) -> None:
    """Connect many times, and never read."""
    with contextlib.ExitStack() as stack:
        for _ in range(stage.dice.randrange(1, 30)):
            _connect(stage, stack)
        time.sleep(stage.dice.uniform(0.5, 3))


def ask_in_rubbish(stage: Stage) -> None:
    """Connect, write what is no question, and hang up in some way or other."""
    for _ in range(stage.dice.randrange(5, 50)):
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            connection = _connect(stage, stack)
            connection.send(stage.dice.randbytes(stage.dice.randrange(1, 1 << 16)))
            if stage.dice.random() < 0.5:
                connection.shutdown(stage.dice.choice([socket.SHUT_RD, socket.SHUT_WR]))
                time.sleep(stage.dice.uniform(0, 0.1))


def _connect(stage: Stage, stack: contextlib.ExitStack) -> socket.socket:
    connection = stack.enter_context(socket.socket(socket.AF_UNIX))
    connection.setblocking(False)
    with contextlib.suppress(OSError):  # Those that hang have filled the queue.
        connection.connect(socket_of(stage.path))
    return connection
