"""A model of what a program may do with blocks and handles, against a table that keeps deadlines.

The client writes into a real FIFO, whose reader keeps the table. After every step the table has to
say what the model does: never armed when it should not be, never unarmed when it should be.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from elastic_timer import FileTimerClient, current, expires
from elastic_timer._worker import holds
from elastic_timer._worker.handles import NEVER

SCOPES = st.sampled_from("abc")
# On a busy machine nothing takes a tenth of that, after which a tick is sent.
SECONDS = st.sampled_from([1e4, 1e5, 1e6])
ALLOWED = 5.0
"""By how many seconds a deadline may differ: the model and the client look at different times."""


class Expected:
    """A block that is entered, and what should be true of it."""

    def __init__(self, block: expires, scope: str, after: float) -> None:
        self.block = block
        self.scope = scope
        self.full = after
        self.left = after
        self.pauses: list[contextlib.ExitStack] = []


class Blocks(RuleBasedStateMachine):
    """Blocks are entered and left in any order, as generators and tasks do."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "timers"
        self.reader = -1
        self.table: dict[str, float] = {}
        self.blocks: list[Expected] = []
        # Of each scope what should be: the block that spoke last, None for nobody.
        self.armed: dict[str, Expected] = {}
        self.is_away = False

    @initialize(required=st.booleans())
    def begin(self, required: bool) -> None:
        """Make the FIFO and its client, of either kind."""
        self.serve()
        self.required = required
        self.client = FileTimerClient(str(self.path), required=required)

    def serve(self) -> None:
        """Make the FIFO anew; a table begins empty, as that of a new server does."""
        self.path.unlink(missing_ok=True)
        os.mkfifo(self.path, 0o600)
        self.reader = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK)

    def teardown(self) -> None:
        """Leave all blocks, whereupon nothing is armed."""
        for expected in reversed(self.blocks):
            self.leave_one(expected)
        if not self.is_away:
            self.read()
            os.close(self.reader)
        assert self.table == {}
        assert holds.handles == {}
        assert holds.get_innermost() is None or holds.outer_hold() is None
        self.folder.cleanup()

    def read(self) -> None:
        """Take what has come into the table."""
        with contextlib.suppress(BlockingIOError):
            for line in os.read(self.reader, 1 << 16).splitlines():
                request = json.loads(line)
                if request["expiration_time"] < 0:
                    self.table.pop(request["scope_id"], None)
                else:
                    self.table[request["scope_id"]] = request["expiration_time"]

    @rule(scope=SCOPES, after=SECONDS)
    def enter(self, scope: str, after: float) -> None:
        """Enter a block, whether its scope is held or not."""
        block = expires(after, scope, self.client)
        assert block.__enter__() is block
        expected = Expected(block, scope, after)
        self.blocks.append(expected)
        self.speak(expected)

    def leave_one(self, expected: Expected) -> None:
        expected.block.__exit__(None, None, None)
        self.armed.pop(expected.scope, None)
        for stack in expected.pauses:
            stack.close()

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        """Leave any block, not the innermost alone; its pauses may still go on."""
        expected = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        self.leave_one(expected)
        for call in (expected.block.when, expected.block.tick, expected.block.paused):
            with pytest.raises(RuntimeError):
                call()

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def drop(self, data: st.DataObject) -> None:
        """Lose a block without leaving it, as an interrupt does; it is released then and there."""
        expected = self.blocks.pop(data.draw(st.integers(0, len(self.blocks) - 1)))
        for stack in expected.pauses:
            stack.close()
        self.armed.pop(expected.scope, None)
        del expected.block

    @precondition(lambda self: self.blocks)
    @rule(data=st.data(), after=SECONDS)
    def reschedule(self, data: st.DataObject, after: float) -> None:
        """Ask for another time."""
        expected = data.draw(st.sampled_from(self.blocks))
        expected.block.reschedule(after)
        expected.full = expected.left = after
        self.speak(expected)

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def tick(self, data: st.DataObject) -> None:
        """Tell of progress when more than a tenth of the time is over, or less."""
        expected = data.draw(st.sampled_from(self.blocks))
        part = data.draw(st.sampled_from([0.0, 0.05, 0.5, 0.9]))
        self.pass_time(expected, part)
        expected.block.tick()
        if expected.pauses or expected.left <= 0.9 * expected.full:
            expected.left = expected.full
            self.speak(expected)

    def pass_time(self, expected: Expected, part: float) -> None:
        """Have a part of a block's time be over, if it runs."""
        if not expected.pauses:
            seconds = part * expected.left
            hold = expected.block._hold
            assert hold is not None
            hold.quiet_until -= seconds
            hold.expiration_time -= seconds
            expected.left -= seconds
            if self.armed.get(expected.scope) is expected:
                self.read()
                self.table[expected.scope] -= seconds

    def speak(self, expected: Expected) -> None:
        """Note that a block's request was the last for its scope; one that is paused sends none."""
        if not expected.pauses and not self.is_away:
            self.armed[expected.scope] = expected

    @precondition(lambda self: self.blocks)
    @rule(data=st.data())
    def pause(self, data: st.DataObject) -> None:
        """Begin a pause, within others or not."""
        expected = data.draw(st.sampled_from(self.blocks))
        stack = contextlib.ExitStack()
        stack.enter_context(expected.block.paused())
        self.speak(expected)
        expected.pauses.append(stack)

    @precondition(lambda self: any(each.pauses for each in self.blocks))
    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        """End any pause."""
        paused = [each for each in self.blocks if each.pauses]
        expected = data.draw(st.sampled_from(paused))
        index = data.draw(st.integers(0, len(expected.pauses) - 1))
        expected.pauses.pop(index).close()
        self.speak(expected)

    @precondition(lambda self: not self.required and not self.is_away)
    @rule(leaves_fifo=st.booleans())
    def server_goes(self, leaves_fifo: bool) -> None:
        """Without a server nothing is armed, and nobody is told of it."""
        self.read()
        os.close(self.reader)
        if not leaves_fifo:
            self.path.unlink()
        self.table.clear()
        self.armed.clear()
        self.is_away = True

    @precondition(lambda self: self.is_away)
    @rule()
    def server_comes_back(self) -> None:
        """And is looked for again, when 5 s are over."""
        self.serve()
        self.is_away = False
        assert self.client._lookout is not None
        self.client._lookout._look_at = -math.inf

    @precondition(lambda self: not self.required and not self.is_away)
    @rule()
    def replace_the_server(self) -> None:
        """Another server takes over, which knows of nobody; each block that speaks is its again."""
        self.read()
        os.close(self.reader)
        self.serve()
        self.table.clear()
        self.armed.clear()

    @invariant()
    def table_is_what_it_should_be(self) -> None:
        """Scope by scope: armed or not, and for how long."""
        if self.is_away:
            return
        self.read()
        assert set(self.table) == set(self.armed)
        now = time.time()
        for scope, expected in self.armed.items():
            if expected.pauses:
                assert self.table[scope] == NEVER
            else:
                assert abs(self.table[scope] - now - expected.left) < ALLOWED

    @invariant()
    def innermost_is_the_one_entered_last(self) -> None:
        """Of the blocks that are not left."""
        if self.blocks:
            assert current() is self.blocks[-1].block
        else:
            with pytest.raises(RuntimeError):
                current()


TestBlocks = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")(
    Blocks.TestCase
)
TestBlocks.settings = settings(
    max_examples=100,
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
