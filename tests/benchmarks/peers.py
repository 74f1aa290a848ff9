"""Who is measured: elastic-timer, torch's timers, NVRx's rank monitor, faulthandler, the floor."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from multiprocessing.connection import Connection
from typing import Any

from tests.benchmarks.harness import OURS, serve

TORCH = "torch"
NVRX = "NVRx"
FAULTHANDLER = "faulthandler"
FLOOR = "floor"


@dataclass(frozen=True)
class Library:
    """A library with the timers' interface: ours and torch's differ in their import alone."""

    name: str
    module: str

    def load(self) -> Any:
        """Import and return the module."""
        return importlib.import_module(self.module)


ELASTIC_TIMER = Library(OURS, "elastic_timer")
UPSTREAM = Library(TORCH, "torch.distributed.elastic.timer")

NVRX_MODULE = "nvidia_resiliency_ext.fault_tolerance"
_PEERS = {
    TORCH: (UPSTREAM.module, "torch"),
    NVRX: (NVRX_MODULE, "nvidia-resiliency-ext"),
}


def find() -> tuple[dict[str, str], dict[str, str]]:
    """The versions of the peers that can be imported, and why the others can't be."""
    versions, skipped = {}, {}
    for name, (module, distribution) in _PEERS.items():
        # In a process of its own: this one stays light, children are forked from it.
        attempt = subprocess.run(
            [sys.executable, "-c", f"import {module}"], capture_output=True, text=True
        )
        if attempt.returncode == 0:
            versions[name] = metadata.version(distribution)
        else:
            skipped[name] = attempt.stderr.strip().splitlines()[-1]
    return versions, skipped


def file_server(
    connection: Connection,
    library: Library,
    path: str,
    max_interval: float,
    measures: bool = False,
) -> None:
    """Host: a FIFO server; answers with the requests received and the timers held.

    With `measures`, which only ours can, it measures blocks, as under `run --summary`.
    """
    silence()
    server = library.load().FileTimerServer(path, "benchmark", max_interval)
    if measures:
        events = importlib.import_module("elastic_timer._server.events")
        server.subscribe(lambda _: None, events.BlocksMeasured)
    server.start()
    connection.send("ready")
    serve(connection, lambda _: (server._request_count, len(server._timers)))


def queue_server(connection: Connection, library: Library, queue: Any, max_interval: float) -> None:
    """Host: a queue server; answers as `file_server` does."""
    silence()
    received = 0

    class CountingServer(library.load().LocalTimerServer):  # type: ignore[misc]
        def register_timers(self, timer_requests: list[Any]) -> None:
            nonlocal received
            received += len(timer_requests)
            super().register_timers(timer_requests)

    server = CountingServer(queue, max_interval)
    server.start()
    connection.send("ready")
    serve(connection, lambda _: (received, len(server._timers)))


def silence() -> None:
    """In a host: send what the libraries log to nowhere, at what logging costs."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)


def bare_blocks(path: str) -> Callable[[int], None]:
    """The floor: what sends a block's two lines by nothing but the system calls it takes."""
    request = {"version": 1, "pid": os.getpid(), "scope_id": "train.py#42"}
    acquire, release = (
        json.dumps(request | {"expiration_time": expiration_time, "signal": signal}).encode()
        + b"\n"
        for expiration_time, signal in ((time.time() + 3600, 9), (-1, 0))
    )
    flags = os.O_WRONLY | os.O_NONBLOCK

    def run(blocks: int) -> None:
        for _ in range(blocks):
            descriptor = os.open(path, flags)
            os.write(descriptor, acquire)
            os.close(descriptor)
            descriptor = os.open(path, flags)
            os.write(descriptor, release)
            os.close(descriptor)

    return run


def start_rank_monitor(path: str, timeout: float, check_interval: float) -> Any:
    """Start NVRx's monitor of one rank, with the section "stuck"; returns its process."""
    ft = importlib.import_module(NVRX_MODULE)
    config = ft.FaultToleranceConfig(
        workload_check_interval=check_interval,
        rank_section_timeouts={"stuck": timeout},
        enable_nic_monitor=False,
    )
    # Its socket for the launcher lies in the folder for temporary files, and stays there.
    tempfile.tempdir = os.path.dirname(path)
    # Forked: a spawned monitor takes over a second to start.
    context = multiprocessing.get_context("fork")
    return ft.RankMonitorServer.run_in_subprocess(config, path, mp_ctx=context)


def connect_to_rank_monitor(path: str) -> Any:
    """NVRx's client of that monitor."""
    os.environ.update(FT_RANK_MONITOR_IPC_SOCKET=path, RANK="0")
    client = importlib.import_module(NVRX_MODULE).RankMonitorClient()
    client.init_workload_monitoring()
    return client


def rank_monitor(connection: Connection, path: str) -> None:
    """Host: NVRx's monitor for one rank."""
    silence()
    process = start_rank_monitor(path, timeout=3600, check_interval=5)
    connection.send("ready")
    serve(connection, lambda _: None)
    process.kill()
