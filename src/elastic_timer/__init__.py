"""Deadlines that are kept, for worker processes that can hang.

In the worker::

    elastic_timer.configure(elastic_timer.FileTimerClient(path))
    with elastic_timer.expires(after=60):
        step()

In another process of the host::

    with elastic_timer.FileTimerServer(path, run_id="my-run"):
        run_and_restart_workers()
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from elastic_timer import file_based_local_timer
from elastic_timer.api import (
    RequestQueue,
    TimerClient,
    TimerRequest,
    TimerServer,
    configure,
    current,
    expires,
)
from elastic_timer.file_based_local_timer import FileTimerClient, FileTimerRequest

if TYPE_CHECKING:
    from elastic_timer import local_timer as local_timer
    from elastic_timer.file_based_local_timer import FileTimerServer
    from elastic_timer.local_timer import (
        LocalTimerClient,
        LocalTimerServer,
        MultiprocessingRequestQueue,
    )

__all__ = [
    "FileTimerClient",
    "FileTimerRequest",
    "FileTimerServer",
    "LocalTimerClient",
    "LocalTimerServer",
    "MultiprocessingRequestQueue",
    "RequestQueue",
    "TimerClient",
    "TimerRequest",
    "TimerServer",
    "configure",
    "current",
    "expires",
]

__version__ = "0.2.0"


# Type checkers must not see it, or they would take any misspelt name for one that is there.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        # Servers and the queue variant come when they are asked for: they make the import twice as
        # long, and a worker of the file variant needs none of it.
        if name == "FileTimerServer":
            return file_based_local_timer.FileTimerServer
        if name != "local_timer" and name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib import import_module

        module = import_module("elastic_timer.local_timer")
        return module if name == "local_timer" else getattr(module, name)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
