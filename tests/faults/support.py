"""What the tests of faults share: using up a limit, and many deaths at once."""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import time
from collections.abc import Iterable


def use_up_descriptors(limit: int = 64) -> list[int]:
    """Leave this process no descriptor; closing some of those returned gives it some back."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
    taken: list[int] = []
    with contextlib.suppress(OSError):
        while True:
            taken.append(os.dup(0))
    return taken


def deaths(pids: Iterable[int], timeout: float) -> dict[int, float]:
    """Wait until all these processes have ended; `time.monotonic()` of each one's end."""
    found: dict[int, float] = {}
    give_up = time.monotonic() + timeout
    with selectors.DefaultSelector() as selector:
        for pid in pids:
            selector.register(os.pidfd_open(pid), selectors.EVENT_READ, pid)
        try:
            while selector.get_map():
                ready = selector.select(give_up - time.monotonic())
                assert ready, f"still running: {[key.data for key in selector.get_map().values()]}"
                for key, _ in ready:
                    found[key.data] = time.monotonic()
                    selector.unregister(key.fd)
                    os.close(key.fd)
        finally:
            for key in selector.get_map().values():
                os.close(key.fd)
    return found
