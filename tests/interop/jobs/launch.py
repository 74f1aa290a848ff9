"""torchrun with this library's server in the agent; its liveness is recorded.

Usage: launch.py RECORD [TORCHRUN'S OPTIONS] SCRIPT [ARG ...]
"""

from __future__ import annotations

import json
import sys
import threading
import time

import torch.distributed.elastic.timer
from torch.distributed.elastic.agent.server import health_check_server, local_elastic_agent
from torch.distributed.run import main

import elastic_timer

# The one line that docs/torchrun.md tells to write.
torch.distributed.elastic.timer.FileTimerServer = elastic_timer.FileTimerServer


class Recorder(health_check_server.HealthCheckServer):
    """Asks the agent for its last progress 20 times a second and notes the answers."""

    def start(self) -> None:
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._record, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _record(self) -> None:
        while not self._stopping.wait(0.05):
            # Asked before the clock is read, so that no answer can lie ahead of it.
            answer = {"alive": self._alive_callback(), "time": time.time()}
            with open(RECORD, "a") as stream:
                stream.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    RECORD = sys.argv.pop(1)
    # Torch's own one does nothing: this is the place it offers for one that does.
    local_elastic_agent.create_healthcheck_server = Recorder
    main()
