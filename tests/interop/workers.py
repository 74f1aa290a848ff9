"""What the children of the mixed pairs run. Imports torch only where that is the library."""

from __future__ import annotations

import importlib
from multiprocessing.connection import Connection
from typing import Any

# Reads "acquire SCOPE TIME" and "release SCOPE" and says "done" after each.
FILE_WORKER = """
import importlib, sys
client = importlib.import_module(sys.argv[1]).FileTimerClient(sys.argv[2])
print("ready", flush=True)
for line in sys.stdin:
    method, scope, *times = line.split()
    getattr(client, method)(scope, *map(float, times))
    print("done", flush=True)
"""

# Says what timers it holds for every line it reads.
FILE_SERVER = """
import importlib, json, sys
server = importlib.import_module(sys.argv[1]).FileTimerServer(sys.argv[2], "run", max_interval=0.1)
server.start()
print("ready", flush=True)
for line in sys.stdin:
    print(json.dumps(sorted(server._timers)), flush=True)
server.stop()
"""


def queue_worker(library: str, queue: Any, orders: Connection) -> None:
    """Make calls of the library's queue client as they are ordered, and say when each is done."""
    client = importlib.import_module(library).LocalTimerClient(queue)
    while True:
        method, *args = orders.recv()
        getattr(client, method)(*args)
        orders.send("done")
