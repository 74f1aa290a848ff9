"""Clients at full speed: does any request fail, is any lost, and what does the server take?"""

from __future__ import annotations

import os
import struct
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tests.benchmarks import peers
from tests.benchmarks.harness import (
    OURS,
    SPAWN,
    Host,
    Results,
    Work,
    alternate,
    fork,
    hosted,
    progress,
    serve,
    wait_until,
)
from tests.benchmarks.peers import ELASTIC_TIMER, UPSTREAM, Library

FAILED = Work("burst: requests failed", "%", "clients")
LOST = Work("burst: requests lost", "", "clients")
RATE = Work("burst: requests served", "1/s", "clients")
SHARE = Work("burst: the server's share of one core", "%", "clients")
CLIENTS = (2, 8, 16)

PLAIN = f"{OURS}, file"
MEASURING = f"{OURS}, file, blocks measured"

# torch's server counts what it has read once a max_interval, and is waited for.
_MAX_INTERVAL = 1
_ROUNDS = 3
_SECONDS = 0.7
_REPORT = struct.Struct("qq")


@dataclass
class Contestant:
    """A server and a process that forks clients for it."""

    name: str
    server: Host
    clients: Host


def measure(results: Results) -> None:
    """Let 2, 8 and 16 clients send as fast as they can, some rounds of each contestant."""
    progress("burst: servers start")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        contestants = []
        for name, library in (
            (PLAIN, ELASTIC_TIMER),
            (MEASURING, ELASTIC_TIMER),
            (f"{UPSTREAM.name}, file", UPSTREAM),
        ):
            if library.name not in results.skipped:
                path = f"{folder}/{name}"
                measures = name == MEASURING
                server = stack.enter_context(
                    hosted(peers.file_server, library, path, _MAX_INTERVAL, measures)
                )
                clients = stack.enter_context(hosted(_clients, library, path))
                contestants.append(Contestant(name, server, clients))
        # Not torch's queue: its clients would pile up requests in their own memory, which
        # take minutes to be served.
        queue = SPAWN.Queue()
        server = stack.enter_context(
            hosted(peers.queue_server, ELASTIC_TIMER, queue, _MAX_INTERVAL)
        )
        clients = stack.enter_context(hosted(_clients, ELASTIC_TIMER, queue))
        contestants.append(Contestant(f"{ELASTIC_TIMER.name}, queue", server, clients))

        for each in contestants:
            each.server.answer()
            each.clients.answer()
        turns = [(each, count) for count in CLIENTS for each in contestants]
        for each, count in alternate(turns, _ROUNDS, "burst"):
            _burst(results, each, count)


def _burst(results: Results, contestant: Contestant, clients: int) -> None:
    server = contestant.server
    received_before, cpu_before = server.ask()[0], server.cpu_seconds()
    start = time.monotonic()
    sent, failed = contestant.clients.ask(clients)

    wait_until(lambda: bool(server.ask()[0] - received_before >= sent), 5)
    seconds, cpu = time.monotonic() - start, server.cpu_seconds() - cpu_before
    served = server.ask()[0] - received_before

    def add(work: Work, sample: float) -> None:
        results.add(work, contestant.name, sample, clients)

    add(FAILED, 100 * failed / (sent + failed))
    # torch may deliver a request after all whose sending has failed.
    add(LOST, max(0, sent - served))
    add(RATE, served / seconds)
    add(SHARE, 100 * cpu / seconds)


def _clients(connection: Connection, library: Library, target: Any) -> None:
    """Host: on a number, forks that many clients; answers with requests sent and failed."""
    peers.silence()
    module = library.load()

    def client(writer: int) -> None:
        make = module.FileTimerClient if isinstance(target, str) else module.LocalTimerClient
        timers = make(target)
        sent = failed = 0
        end = time.monotonic() + _SECONDS
        while time.monotonic() < end:
            try:
                if (sent + failed) % 2 == 0:
                    timers.acquire("step", time.time() + 60)
                else:
                    timers.release("step")
                sent += 1
            except OSError:
                failed += 1
        os.write(writer, _REPORT.pack(sent, failed))

    def burst(count: int) -> tuple[int, int]:
        reader, writer = os.pipe()
        pids = [fork(lambda: client(writer)) for _ in range(count)]
        os.close(writer)
        for pid in pids:
            os.waitpid(pid, 0)
        reports = [_REPORT.unpack(os.read(reader, _REPORT.size)) for _ in pids]
        os.close(reader)
        return sum(sent for sent, _ in reports), sum(failed for _, failed in reports)

    connection.send("ready")
    serve(connection, burst)
