"""The FIFO is deleted or replaced under a running server."""

from __future__ import annotations

import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from elastic_timer import TimerClient
from elastic_timer._transport.pipe import CAPACITY
from elastic_timer._transport.wire import acquire_line
from tests.faults.support import use_up_descriptors
from tests.servers import Link, Serve, ServerProcess
from tests.support import FAR, Fork, assert_reaped_in_time, eventually, overrun, process_state

MORE_THAN_A_ROUND = CAPACITY * 3 // 4


def records(server: ServerProcess, level: str) -> list[str]:
    """What the server logged at a level."""
    return [line for line in server.log().splitlines() if line.startswith(level + " ")]


@pytest.fixture
def server(file_link: Link, serve: Serve) -> ServerProcess:
    """A server that, left alone, would look up only once a minute."""
    return serve(file_link.server)


def test_deleted_fifo_is_made_again(
    server: ServerProcess, file_link: Link, fork_worker: Fork
) -> None:
    """Held timers are kept, and clients that come meanwhile find the new one within a second."""
    held = fork_worker(overrun, file_link.client, 3)
    deadline = held.receive()
    eventually(lambda: server.holds(held.pid))
    for time_of_many in range(1, 4):
        os.unlink(file_link.path)
        worker = fork_worker(overrun, file_link.client, 1)
        assert_reaped_in_time(worker, worker.receive())
        warnings = [line for line in records(server, "WARNING") if "was removed" in line]
        assert len(warnings) == time_of_many
    assert_reaped_in_time(held, deadline)
    assert stat.S_IMODE(os.lstat(file_link.path).st_mode) == 0o600
    server.stop()
    assert not os.path.exists(file_link.path)


def test_requests_written_before_the_deletion_count(
    server: ServerProcess, file_link: Link, fork_worker: Fork
) -> None:
    """What a stopped server had not read as its FIFO was deleted is not lost."""
    server.pause()
    worker = fork_worker(overrun, file_link.client, 0.5)
    deadline = worker.receive()
    os.unlink(file_link.path)
    server.go_on()
    assert_reaped_in_time(worker, deadline)


def put_a_file(path: str) -> None:
    """Put a regular file somewhere."""
    Path(path).write_text("precious")


@pytest.mark.parametrize("put", [put_a_file, os.mkfifo, os.mkdir])
def test_replaced_fifo_is_an_error(
    server: ServerProcess, file_link: Link, fork_worker: Fork, put: Callable[[str], None]
) -> None:
    """It is logged once, held timers are kept, and what replaced the FIFO is left alone."""
    held = fork_worker(overrun, file_link.client, 2)
    deadline = held.receive()
    eventually(lambda: server.holds(held.pid))
    os.unlink(file_link.path)
    put(file_link.path)
    (error,) = eventually(lambda: records(server, "ERROR"))
    assert file_link.path in error
    assert "new server is needed" in error
    assert_reaped_in_time(held, deadline)
    assert records(server, "ERROR") == [error]
    with pytest.raises(BrokenPipeError):
        file_link.client.acquire("s", time.time() + FAR)
    server.stop()
    assert os.path.exists(file_link.path)
    if put is put_a_file:
        assert Path(file_link.path).read_text() == "precious"


def test_server_recovers_when_the_path_is_free_again(
    server: ServerProcess, file_link: Link, fork_worker: Fork
) -> None:
    """With what replaced its FIFO gone, the server makes it anew and serves on."""
    os.unlink(file_link.path)
    put_a_file(file_link.path)
    eventually(lambda: records(server, "ERROR"))
    os.unlink(file_link.path)
    worker = fork_worker(overrun, file_link.client, 1.5)
    assert_reaped_in_time(worker, worker.receive())
    server.stop()


def test_deleted_folder(tmp_path: Path, serve: Serve, fork_worker: Fork) -> None:
    """Without its folder the FIFO can't be made: one error, until the folder is back."""
    folder = tmp_path / "folder"
    folder.mkdir()
    link = Link("file", str(folder / "timers"))
    server = serve(link.server)
    shutil.rmtree(folder)
    eventually(lambda: records(server, "ERROR"))
    looked = server.ask("server._next_fifo_check")
    eventually(lambda: server.ask("server._next_fifo_check") > looked + 1)
    folder.mkdir()
    worker = fork_worker(overrun, link.client, 1.5)
    assert_reaped_in_time(worker, worker.receive())
    assert len(records(server, "ERROR")) == 1
    server.stop()


def test_deleted_while_no_descriptor_is_left(
    server: ServerProcess, file_link: Link, fork_worker: Fork
) -> None:
    """One error at most; held timers are kept, and clients served as soon as there are some."""
    held = fork_worker(overrun, file_link.client, 2)
    deadline = held.receive()
    eventually(lambda: server.holds(held.pid))
    server.ask("setattr(server, 'taken', use_up())", use_up=use_up_descriptors)
    os.unlink(file_link.path)
    assert_reaped_in_time(held, deadline)
    assert len(records(server, "ERROR")) <= 1
    server.ask("[close(descriptor) for descriptor in server.taken]", close=os.close)
    worker = fork_worker(overrun, file_link.client, 1.5)
    assert_reaped_in_time(worker, worker.receive())
    server.stop()


def leave(channel: Any, client: TimerClient, after: float) -> None:
    """Enter a block, and leave it when told to; the body of a worker."""
    client.acquire("s", time.time() + after)
    channel.send("entered")
    channel.recv()
    client.release("s")
    channel.send("left")
    channel.recv()


def waits_for_room(pid: int, path: str) -> bool:
    """Whether a process sleeps with a FIFO open."""
    opened = f"/proc/{pid}/fd"
    return process_state(pid) == "S" and any(
        os.path.realpath(f"{opened}/{name}") == path for name in os.listdir(opened)
    )


@pytest.mark.parametrize("is_full", [False, True])
def test_all_that_was_written_before_the_deletion_counts(
    server: ServerProcess, file_link: Link, fork_worker: Fork, is_full: bool
) -> None:
    """Be it more than a round reads, or did it wait for room: a release saves its worker."""
    worker = fork_worker(leave, file_link.client, 3.0)
    assert worker.receive() == "entered"
    eventually(lambda: server.holds(worker.pid))
    looks_again_at = server.ask("server._next_fifo_check")
    server.pause()
    with open(os.open(file_link.path, os.O_WRONLY | os.O_NONBLOCK), "wb", buffering=0) as pipe:
        line = acquire_line("s", time.time() + FAR, 0)
        written = 0
        while (is_full or written < MORE_THAN_A_ROUND) and pipe.write(line):
            written += len(line)
    eventually(lambda: time.monotonic() > looks_again_at)
    worker.send("leave")
    if is_full:
        eventually(lambda: waits_for_room(worker.pid, file_link.path))
    else:
        assert worker.receive() == "left"
    os.unlink(file_link.path)
    server.go_on()
    eventually(lambda: not server.holds(worker.pid))
    assert server.ask("server._progress.reaped") == 0
    assert "made it anew" in eventually(lambda: records(server, "WARNING"))[0]
