"""What is held for a block that was entered, and released in whatever way the block is left."""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from elastic_timer._transport.pipe import UNREACHABLE_AFTER

if TYPE_CHECKING:
    from contextvars import ContextVar

    from elastic_timer._worker.handles import Handle
    from elastic_timer.api import TimerClient, expires

else:
    # C alone: the other is one more file for every worker to find and read.
    from _contextvars import ContextVar

logger = logging.getLogger("elastic_timer.api")  # Its blocks are what is told of.

# How often a release is tried that further interrupts cut short.
_SETTLING_TRIES = 10

# How often `async with` tries to reach a server.
_ASYNC_TRIES = 10


class Hold(weakref.ref):  # type: ignore[type-arg]  # What it refers to is of no interest.
    """A timer that is released when an object dies, unless it was before.

    The object is what a `with` statement keeps on the stack of its frame, and nothing else refers
    to. It dies when the block is left in whatever way: an interrupt may come at the very entry of
    `__exit__`, and a traceback that is kept keeps the frames and the `expires` alive.
    """

    __slots__ = (
        "client",
        "entered",
        "expiration_time",
        "full",
        "outer",
        "quiet_until",
        "scope",
    )
    # A reference would be equal to all others to the same object.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    client: TimerClient
    scope: str | None  # None: there is nothing to release.
    full: float | None  # The seconds asked for last. None: nothing is to be asked for any more.
    entered: float  # When that was, by the monotonic clock; so is the next.
    quiet_until: float  # Before it no tick is sent.
    expiration_time: float  # As it was sent last, in epoch seconds.
    outer: Hold | None  # The block around this one.

    def settle(self) -> None:
        """Release the timer now, or owe that where it would take a wait."""
        self.full = None
        # With a debugger, an interrupt may come when there is a hold and nothing that it is for.
        self.scope = getattr(self, "scope", None)
        for _ in range(_SETTLING_TRIES):
            if self.scope is None:
                break
            try:
                if handles:
                    end_handle(self)
                _at_once(self.client, self.client.release, self.scope)
            except Exception as error:
                logger.debug("Timer %s could not be released: %s", self.scope, error)
                break
            except BaseException:
                continue  # A second interrupt; the first is on its way to the caller.
            self.scope = None
        if self.scope is not None:
            self.owe()
        self.client = _NOBODY
        with contextlib.suppress(ValueError):
            owed.remove(self)

    def owe(self) -> None:
        """Have the release sent before the next request of the client."""
        debt = Hold(Hold)
        debt.client, debt.scope = self.client, self.scope
        owed.append(debt)
        self.scope = None

    def block(self) -> expires:
        """The block that this was made for; it is there as long as that was not left."""
        guarded: Any = self()
        return cast("expires", guarded.args[0] if isinstance(guarded, _Token) else guarded)


# The client of a hold that is over: to refer to it would keep its queue open.
_NOBODY = cast("TimerClient", None)

owed: list[Hold] = []
Hold.on_death_1 = property(owed.append)  # type: ignore[attr-defined]
Hold.on_death_2 = property(Hold.settle)  # type: ignore[attr-defined]
# Called when the object of a hold dies. The first attribute is looked up by C code alone: a second
# interrupt, which may come at the entry of settle(), loses no release.
on_death = operator.attrgetter("on_death_1", "on_death_2")

# The block entered last in this thread or task; it may have been left.
_innermost: ContextVar[Hold | None] = ContextVar("elastic_timer", default=None)
get_innermost = _innermost.get
set_innermost = _innermost.set

# Of the blocks that have used theirs, until they are left.
handles: dict[Hold, Handle] = {}


def outer_hold() -> Hold | None:
    """The hold of the block that this thread or task is in."""
    hold = get_innermost()
    while hold is not None and hold.full is None:
        hold = hold.outer
    if hold is not None:
        # Of generators that enter and leave by turns, none is to keep all those before it.
        while hold.outer is not None and hold.outer.full is None:
            hold.outer = hold.outer.outer
    return hold


def end_handle(hold: Hold) -> None:
    """Wait for a request of the handle on its way in another thread: none may come behind this."""
    handle = handles.get(hold)
    if handle is not None:
        with handle.lock:
            handles.pop(hold, None)


def release(hold: Hold) -> None:
    """Release what a hold is for, after what its client owes."""
    if owed:
        send_owed(hold.client)
    hold.client.release(cast("str", hold.scope))


def send_owed(client: TimerClient) -> None:
    """Send the releases that failed before."""
    for hold in tuple(owed):
        if hold.scope is not None and hold.client == client:
            try:
                client.release(hold.scope)
            except (RuntimeError, TypeError, ValueError) as error:
                logger.debug("Timer %s can't be released: %s", hold.scope, error)
            hold.scope = None
        if hold.scope is None:
            with contextlib.suppress(ValueError):
                owed.remove(hold)


def _at_once(client: TimerClient, request: Callable[..., object], *args: object) -> None:
    """Send a request; where the client could wait for its server, it fails instead."""
    getattr(client, "_at_once", _call)(request, *args)


def _call(request: Callable[..., object], *args: object) -> None:
    request(*args)


async def patiently(client: object, request: Callable[[], object]) -> None:
    """Send a request; waits for the client's server go without blocking the event loop."""
    asyncio = sys.modules.get("asyncio")
    at_once: Callable[[Callable[[], object]], None] | None = getattr(client, "_at_once", None)
    if at_once is None or asyncio is None or asyncio._get_running_loop() is None:
        request()
        return
    for _ in range(_ASYNC_TRIES):
        try:
            at_once(request)
            return
        except BrokenPipeError:
            await asyncio.sleep(UNREACHABLE_AFTER / _ASYNC_TRIES)
    at_once(request)


_Token = functools.partial


class Exit(property):
    """An exit that the `with` statement gets anew for each block, to be watched by a reference.

    Looked up on the class, as ExitStack does, it is a plain callable.

    Args:
        leave: What leaves a block.
        watch: Called with the block and with what the statement keeps of it on its stack.
    """

    def __init__(
        self, leave: Callable[..., object], watch: Callable[[Any, object], None] | None = None
    ) -> None:
        self._leave = leave

        def get(block: expires) -> Callable[..., object]:
            token = _Token(leave, block)
            if block._hold is None or block._hold.scope is None:
                hold = Hold(token, on_death)
                hold.scope = hold.full = None
                block._hold = hold
            return token

        def get_watched(block: Any) -> Callable[..., object]:
            token = _Token(leave, block)
            cast("Callable[[Any, object], None]", watch)(block, token)
            return token

        super().__init__(get_watched if watch else get)

    def __call__(self, *args: object) -> object:
        return self._leave(*args)
