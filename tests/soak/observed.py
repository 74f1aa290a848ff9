"""A server of the storm, in a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

from elastic_timer import FileTimerRequest, FileTimerServer, LocalTimerServer
from elastic_timer._evidence.picture import Picture, who_hangs
from elastic_timer._server.events import Event, JobHangs
from elastic_timer.debug_info_logging import set_stacks_timeout
from tests.servers import Link
from tests.soak.workers import KILL_AFTER
from tests.support import ForkedWorker, child_pids


class Answer(NamedTuple):
    """What a server has told of a job that hangs."""

    run_id: str | None
    ranks: list[int]
    missing: list[int]
    suspected: list[int]
    reasons: list[str]


class ObservedServer:
    """The server, in a process and a session of its own, and what /proc tells of it.

    Args:
        link: Where it listens.
        kill_tree: Whether it takes along what its workers have started.
        stacks: How many seconds the stacks of those that expire may take.
    """

    def __init__(self, link: Link, kill_tree: bool, stacks: float) -> None:
        self._errors = Path(f"{link.path}.errors")
        self._process = ForkedWorker(_serve, link, kill_tree, stacks, self._errors)
        self.pid = self._process.pid

    def wait_until_started(self) -> None:
        """Wait until it takes requests; to be called once, before it is asked for anything."""
        assert self._process.receive() == "started"

    def ask(self, what: str) -> Any:
        """One of the answers of `_serve`, such as "timers": how many there are."""
        return self._process.ask(what)

    def is_empty(self) -> bool:
        """Whether it holds no timer."""
        return bool(self.ask("timers") == 0)

    def footprint(self) -> dict[str, object]:
        """What has to be after the storm as it was before."""
        return {
            "timers": self.ask("timers"),
            "processes held": self.ask("held"),
            "descriptors": len(os.listdir(f"/proc/{self.pid}/fd")),
            "threads": len(os.listdir(f"/proc/{self.pid}/task")),
            "children": child_pids(self.pid),
        }

    def memory(self) -> int:
        """Resident bytes."""
        pages = Path(f"/proc/{self.pid}/statm").read_text().split()[1]
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    def errors(self) -> str:
        """What was logged at the level of an error."""
        return self._errors.read_text()

    def stop(self) -> int:
        """Stop it; the exit code."""
        self._process.send("stop")
        code = self._process.wait()
        self._process.close()
        return code

    def kill(self) -> int:
        """Kill it without a warning; the exit code, which is another one if it had ended."""
        os.kill(self.pid, signal.SIGKILL)
        code = self._process.wait()
        self._process.close()
        return code


def _serve(channel: Any, link: Link, kill_tree: bool, stacks: float, errors: Path) -> None:
    os.setsid()  # So that rubbish which names the server's own group can name no other.
    logging.basicConfig(filename=errors, level=logging.ERROR, force=True)
    set_stacks_timeout(stacks)
    killed: list[int] = []
    hangs: list[Answer] = []

    def log_event(name: str, request: FileTimerRequest | None) -> None:
        if name == "kill worker process" and request is not None:
            killed.append(request.worker_pid)

    def note_hang(event: Event) -> None:
        assert isinstance(event, JobHangs)
        answer = who_hangs([cast("Picture", event.picture)])
        told = answer["job"]["run_id"], answer["ranks"], answer["missing"]
        hangs.append(Answer(*told, answer["suspected"], answer["reasons"]))

    server: FileTimerServer | LocalTimerServer
    if link.kind == "file":
        server = link.server(
            log_event=log_event, kill_after=KILL_AFTER, kill_tree=kill_tree, status=True
        )
    else:
        server = link.server(kill_tree=kill_tree)
    server.subscribe(note_hang, JobHangs)
    with server:
        channel.send("started")
        answers: dict[str, Callable[[], object]] = {
            "timers": lambda: len(server._timers),
            "held": lambda: len(server._workers._workers),
            "killed": lambda: killed,
            "hangs": lambda: hangs,
        }
        while (question := channel.recv()) != "stop":
            channel.send(answers[question]())
