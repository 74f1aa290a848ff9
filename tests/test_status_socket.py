"""The socket beside a server's FIFO: what it answers, to whom, and what it never does."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest

from elastic_timer import FileTimerClient, FileTimerServer
from elastic_timer._transport import status_socket
from elastic_timer._transport.status_socket import Question, StatusSocket, find
from tests.servers import Serve
from tests.support import (
    FAR,
    NOBODY,
    Child,
    Fork,
    assert_reaped_in_time,
    become_nobody,
    eventually,
    no_more_descriptors,
    open_descriptors,
    overrun,
    running,
    wait_to_be_killed,
    wire_line,
)

pytestmark = pytest.mark.skipif(
    not hasattr(socket, "SO_PEERCRED"), reason="this system does not tell who connects"
)

SCHEMA = json.loads((resources.files("elastic_timer") / "status.schema.json").read_text())
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)


def told(path: str, patience: float = 10) -> dict[str, Any]:
    """What a server answers."""
    with Question(path, patience) as question:
        answer: dict[str, Any] = json.loads(question.read())
    return answer


def answers(path: str) -> bool:
    """Whether there is a socket, at which somebody listens already."""
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError):
        return bool(told(path))
    return False


def ask(path: str, patience: float = 10) -> dict[str, Any]:
    """What a server answers, which its schema allows."""
    answer = told(path, patience)
    VALIDATOR.validate(answer)
    return answer


def connect(path: str) -> socket.socket:
    """A connection, by nothing but the system's calls."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(f"{path}.sock")
    return client


def read_all(client: socket.socket) -> bytes:
    """What comes until the other end hangs up."""
    told = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(1 << 16):
            told += piece
    return told


@pytest.fixture
def server(fifo_path: str) -> Iterator[FileTimerServer]:
    """A server that can be asked."""
    with running(FileTimerServer(fifo_path, "run", status=True)) as started:
        yield started


def hold(path: str, pid: int, scopes: list[str]) -> None:
    """Have a server hold timers of a worker."""
    with open(path, "wb", buffering=0) as fifo:
        for scope in scopes:
            fifo.write(wire_line(pid=pid, scope_id=scope))


def hold_many(path: str) -> None:
    """Have it hold so many that a client is not sent them all at once."""
    hold(path, os.getpid(), [f"{'long' * 60} {number}" for number in range(3000)])
    eventually(lambda: told(path)["timer_count"] == 3000)


# What it answers ----------------------------------------------------------------------------------


def test_snapshot(
    server: FileTimerServer, fifo_path: str, fork_worker: Fork, client: FileTimerClient
) -> None:
    """It has the server itself, and of each timer whose it is and how long it has."""
    before = time.time()
    empty = ask(fifo_path)
    assert (empty["timers"], empty["worker_count"], empty["reaped_count"]) == ([], 0, 0)
    worker = fork_worker(overrun, client, 60)
    worker.receive()
    answer = ask(fifo_path)
    assert answer["run_id"] == "run"
    assert (answer["pid"], answer["host"]) == (os.getpid(), os.uname().nodename)
    assert (answer["timer_file"], answer["max_interval"]) == (fifo_path, 10)
    assert before - 60 < answer["started"] <= before
    assert before < answer["time"] < time.time()
    assert 0 <= answer["last_round_age"] <= answer["uptime"] < 60
    assert answer["rounds"] > empty["rounds"]
    assert (answer["worker_count"], answer["timer_count"]) == (1, 1)
    [timer] = answer["timers"]
    assert (timer["pid"], timer["scope"], timer["pass"]) == (worker.pid, "overrun", 1)
    assert (timer["rank"], timer["local_rank"]) == (None, None)
    assert 55 < timer["after"] <= 60
    assert timer["after"] - 5 < timer["left"] <= timer["after"]
    assert before <= timer["acquired"] <= answer["time"] + 0.001
    late = fork_worker(overrun, client, 0.1)
    assert_reaped_in_time(late, late.receive())
    eventually(lambda: ask(fifo_path)["reaped_count"] == 1)
    eventually(lambda: ask(fifo_path)["worker_count"] == 1)


def test_passes_and_ranks(
    server: FileTimerServer, fifo_path: str, spawn: Callable[..., Child]
) -> None:
    """A worker's rank and how often it has entered the block come with its timer."""
    source = """
        import os, sys
        from elastic_timer import FileTimerClient, expires
        client = FileTimerClient(sys.argv[1])
        for _ in range(3):
            block = expires(60, "step", client)
            block.__enter__()
            if _ < 2:
                block.__exit__(None, None, None)
        print("in", flush=True)
        sys.stdin.readline()
        """
    worker = spawn(source, fifo_path, env={"RANK": "5", "LOCAL_RANK": "1"})
    worker.readline()
    [timer] = ask(fifo_path)["timers"]
    assert (timer["rank"], timer["local_rank"], timer["pass"]) == (5, 1, 3)


def test_timer_that_was_acquired_anew(
    server: FileTimerServer, fifo_path: str, client: FileTimerClient
) -> None:
    """It has the time that was asked for last, and it is the same pass."""
    for after in (60, 600):
        client.acquire("step", time.time() + after)
        [timer] = ask(fifo_path)["timers"]
        assert after - 5 < timer["left"] <= timer["after"] <= after
        assert timer["pass"] == 1


def test_deadline_that_never_comes(
    server: FileTimerServer, fifo_path: str, client: FileTimerClient
) -> None:
    """It may be as far away as a number can be."""
    client.acquire("for good", sys.float_info.max)
    [timer] = ask(fifo_path)["timers"]
    assert timer["left"] == timer["after"] == sys.float_info.max


def test_hostile_scopes(server: FileTimerServer, fifo_path: str) -> None:
    """Whatever a scope is, the answer is one JSON object."""
    scopes = ['","timers":[{"pid":1}]', "\n\0\x1b[2J", "\ud800", "é" * 50, "x" * 400]
    hold(fifo_path, os.getpid(), scopes)
    assert sorted(timer["scope"] for timer in ask(fifo_path)["timers"]) == sorted(scopes)


def test_group_without_a_rank(server: FileTimerServer, fifo_path: str) -> None:
    """The timer of a process group is among them."""
    hold(fifo_path, -os.getpgrp(), ["of a group"])
    [timer] = ask(fifo_path)["timers"]
    assert (timer["pid"], timer["rank"]) == (-os.getpgrp(), None)


def test_many_timers(server: FileTimerServer, fifo_path: str) -> None:
    """Of many timers none is missing, to whomever asks at the same time, and as often."""
    scopes = [f"train.py#{number}" for number in range(3000)]
    hold(fifo_path, os.getpid(), scopes)
    with contextlib.ExitStack() as stack:
        questions = [stack.enter_context(Question(fifo_path, 10)) for _ in range(20)]
        # At the same time, too: who lets the answer lie for seconds gets no more of it.
        with ThreadPoolExecutor(len(questions)) as pool:
            told_to_each = list(pool.map(Question.read, questions))
    for answer in told_to_each:
        assert [timer["scope"] for timer in json.loads(answer)["timers"]] == scopes


def test_server_without_status(fifo_path: str) -> None:
    """Without being asked for there is no socket."""
    with running(FileTimerServer(fifo_path, "run")):
        assert not os.path.exists(f"{fifo_path}.sock")
        with pytest.raises(FileNotFoundError):
            Question(fifo_path, 1)


def test_no_answer_is_older_than_its_question(
    server: FileTimerServer, fifo_path: str, client: FileTimerClient
) -> None:
    """What was sent before the question is in the answer, though many ask."""
    with contextlib.ExitStack() as stack:
        for number in range(50):
            client.acquire(f"scope {number}", time.time() + FAR)
            stack.enter_context(Question(fifo_path, 10))
            assert ask(fifo_path)["timer_count"] == number + 1


# Whom it answers ----------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user of a process")
def test_another_user_is_refused(
    fifo_path: str, fork_worker: Fork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither may they connect, nor are they answered where they can."""
    monkeypatch.chdir(tmp_path)  # Others may not even look into the folders above.
    with running(FileTimerServer(fifo_path, "run", status=True)) as server:
        os.chmod(tmp_path, 0o755)
        assert stat.S_IMODE(os.lstat(f"{fifo_path}.sock").st_mode) == 0o600
        stranger = fork_worker(ask_as_nobody, os.path.basename(fifo_path))
        assert stranger.receive() == "PermissionError"
        os.chmod(f"{fifo_path}.sock", 0o666)
        assert stranger.ask("again") == b""
        assert ask(fifo_path)["run_id"] == "run"
        assert server._loop._selector is not None


def ask_as_nobody(channel: Any, path: str) -> None:
    """A stranger that asks, and asks again when told."""
    become_nobody()
    while True:
        try:
            with connect(path) as client:
                channel.send(read_all(client))
        except OSError as error:
            channel.send(type(error).__name__)
        channel.recv()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change the user of a process")
def test_root_is_answered(serve: Serve) -> None:
    """Root may ask any server."""
    with tempfile.TemporaryDirectory() as folder:
        os.chown(folder, NOBODY, NOBODY)
        path = os.path.join(folder, "timers")
        serve(lambda: FileTimerServer(path, "nobody's", status=True), become_nobody)
        assert os.lstat(f"{path}.sock").st_uid == NOBODY
        assert ask(path)["run_id"] == "nobody's"
        # "Every server of this user" has none of another's.
        assert path not in find()


def test_server_of_another_user_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a socket of another user's tells is not read; root's is."""
    path = str(tmp_path / "theirs")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.sock")
        listener.listen()
        monkeypatch.setattr(os, "geteuid", lambda: NOBODY)
        monkeypatch.setattr(status_socket, "_peer_of", lambda _: (1, NOBODY + 1))
        with pytest.raises(PermissionError, match="another user's"):
            Question(path, 1)
        monkeypatch.setattr(status_socket, "_peer_of", lambda _: (1, 0))
        Question(path, 1).close()


# Clients that misbehave ---------------------------------------------------------------------------


@pytest.mark.long
def test_hanging_clients(
    server: FileTimerServer, fifo_path: str, fork_worker: Fork, client: FileTimerClient
) -> None:
    """A hundred that never read, and a hundred that send rubbish, take nothing from others."""
    hold_many(fifo_path)
    worker = fork_worker(overrun, client, 1)
    deadline = worker.receive()
    before = len(open_descriptors())
    with contextlib.ExitStack() as stack:
        for _ in range(100):
            connection = stack.enter_context(socket.socket(socket.AF_UNIX))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                connection.connect(f"{fifo_path}.sock")
        rubbish = stack.enter_context(connect(fifo_path))
        rubbish.sendall(b"GET / HTTP/1.1\r\n\r\n" * 500)
        assert_reaped_in_time(worker, deadline)
        assert ask(fifo_path, 20)["timer_count"] == 3000
    # Those that hung on are dropped, though they are still there.
    eventually(lambda: len(open_descriptors()) <= before)
    assert ask(fifo_path)["timer_count"] == 3000


def test_client_that_does_not_read_is_dropped(server: FileTimerServer, fifo_path: str) -> None:
    """After two seconds it is hung up on, in the middle of what is too much to be kept for it."""
    hold_many(fifo_path)
    with connect(fifo_path) as lazy:
        asked = time.monotonic()
        aside: Any = server._aside
        eventually(lambda: aside._reading)
        eventually(lambda: not aside._reading)
        assert 2 <= time.monotonic() - asked < 10
        with pytest.raises(json.JSONDecodeError):
            json.loads(read_all(lazy))


def test_answers_that_are_kept_are_few(
    server: FileTimerServer, fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever does not read holds no more than four answers in memory, however many ask."""
    monkeypatch.setattr(status_socket, "_PATIENCE", FAR)
    hold_many(fifo_path)
    aside: Any = server._aside
    with contextlib.ExitStack() as stack:
        for number in range(8):
            stack.enter_context(connect(fifo_path))
            eventually(functools.partial(has_answered, aside, number))
        eventually(lambda: len({client.answer for client in aside._reading}) <= 4)
        assert aside._answers == 8


def has_answered(aside: Any, times: int) -> bool:
    return bool(aside._answers > times)


def test_client_that_is_gone(server: FileTimerServer, fifo_path: str) -> None:
    """One that does not wait for its answer costs nobody theirs."""
    for _ in range(20):
        connect(fifo_path).close()
    assert ask(fifo_path)["run_id"] == "run"
    aside: Any = server._aside
    eventually(lambda: aside._count() == 0)


def test_more_clients_than_are_served_at_a_time(
    server: FileTimerServer, fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others wait, and are answered."""
    monkeypatch.setattr(status_socket, "_MOST_CLIENTS", 2)
    with contextlib.ExitStack() as stack:
        questions = [stack.enter_context(Question(fifo_path, 10)) for _ in range(9)]
        assert {json.loads(question.read())["run_id"] for question in questions} == {"run"}


def test_no_descriptor_for_a_client(server: FileTimerServer, fifo_path: str) -> None:
    """It is answered when there is one, and meanwhile the watchdog does not spin."""
    with connect(fifo_path) as client:
        read_all(client)
    waiting = socket.socket(socket.AF_UNIX)
    with contextlib.closing(waiting):
        waiting.settimeout(10)
        aside: Any = server._aside
        with no_more_descriptors():
            waiting.connect(f"{fifo_path}.sock")
            eventually(lambda: aside._deaf_until > time.monotonic())
            assert not aside._is_watched or eventually(lambda: not aside._is_watched)
        assert json.loads(read_all(waiting))["run_id"] == "run"


def test_error_in_the_middle(
    server: FileTimerServer,
    fifo_path: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It is logged, whoever has asked gets nothing, and the next one everything."""
    aside: Any = server._aside
    with monkeypatch.context() as patch:
        patch.setattr(aside, "_tell", lambda: 1 / 0)
        with connect(fifo_path) as client:
            assert read_all(client) == b""
    eventually(lambda: "Error telling the status" in caplog.text)
    assert ask(fifo_path)["run_id"] == "run"


# Its place ----------------------------------------------------------------------------------------


def test_nothing_is_left_after_a_stop(fifo_path: str) -> None:
    """Neither the socket nor a descriptor; and it is there again after the next start."""
    server = FileTimerServer(fifo_path, "run", status=True)
    assert not os.path.exists(f"{fifo_path}.sock")
    for _ in range(2):
        before = open_descriptors()
        with running(server), connect(fifo_path) as client:
            assert read_all(client)
        assert open_descriptors() == before
        assert os.listdir(os.path.dirname(fifo_path)) == []


def test_stop_hangs_up(server: FileTimerServer, fifo_path: str) -> None:
    """Those who are being answered notice the end."""
    hold_many(fifo_path)
    aside: Any = server._aside
    with connect(fifo_path) as client:
        eventually(lambda: aside._reading)
        server.stop()
        read_all(client)


def test_socket_of_a_killed_server_is_replaced(fifo_path: str, serve: Serve) -> None:
    """What a killed server has left is replaced by the next."""
    first = serve(lambda: FileTimerServer(fifo_path, "first", status=True))
    first.kill()
    assert os.path.exists(f"{fifo_path}.sock")
    with pytest.raises(ConnectionRefusedError):
        Question(fifo_path, 1)
    with running(FileTimerServer(fifo_path, "second", status=True)):
        assert ask(fifo_path)["run_id"] == "second"
    assert not os.path.exists(f"{fifo_path}.sock")


@pytest.mark.parametrize("kind", ["listening", "full", "file", "link"])
def test_what_lies_there_is_left_alone(
    fifo_path: str, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """A socket somebody listens on, and what is none, stays; the server runs without."""
    path = f"{fifo_path}.sock"
    with contextlib.ExitStack() as stack:
        if kind in ("listening", "full"):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(path)
            listener.listen(0)
            if kind == "full":
                stack.enter_context(connect(fifo_path))
        elif kind == "file":
            Path(path).write_text("mine")
        else:
            os.symlink("elsewhere", path)
        found = os.lstat(path)
        with running(FileTimerServer(fifo_path, "run", status=True)):
            eventually(lambda: "can't ask this server" in caplog.text)
            assert path in caplog.text
        assert os.path.samestat(os.lstat(path), found)


def test_socket_of_another_is_not_removed(server: FileTimerServer, fifo_path: str) -> None:
    """What has taken its place is left there at the end."""
    path = Path(f"{fifo_path}.sock")
    path.unlink()
    path.write_text("mine")
    server.stop()
    assert path.read_text() == "mine"
    path.unlink()


def test_socket_that_was_removed(server: FileTimerServer, fifo_path: str) -> None:
    """It is made anew, and the server stops without it as well."""
    for _ in range(2):
        os.unlink(f"{fifo_path}.sock")
        eventually(lambda: answers(fifo_path))
        assert ask(fifo_path)["run_id"] == "run"
    os.unlink(f"{fifo_path}.sock")
    server.stop()
    assert os.listdir(os.path.dirname(fifo_path)) == []


def test_folder_that_was_removed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The log says that nobody can ask any more; those who were about it are hung up on."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = str(folder / "timers")
    with running(FileTimerServer(path, "run", status=True)) as server:
        hold_many(path)
        aside: Any = server._aside
        with connect(path) as client:
            eventually(lambda: aside._reading)
            shutil.rmtree(folder)
            eventually(lambda: "can't ask this server" in caplog.text)
            read_all(client)
    assert "Error telling the status" not in caplog.text


def test_long_path(tmp_path: Path, fork_worker: Fork) -> None:
    """A path that is too long for a socket is no obstacle, and is found."""
    folder = tmp_path / ("long" * 40)
    folder.mkdir()
    path = str(folder / "timers")
    before = open_descriptors()
    with running(FileTimerServer(path, "long", status=True)):
        assert stat.S_ISSOCK(os.lstat(f"{path}.sock").st_mode)
        assert ask(path)["run_id"] == "long"
        assert path in find()
    assert open_descriptors() == before
    assert os.listdir(folder) == []


def test_long_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A name that is too long is said to be, and the server runs without."""
    path = str(tmp_path / ("long" * 40))
    with running(FileTimerServer(path, "long", status=True)):
        eventually(lambda: "the name is too long for a socket" in caplog.text)


def test_system_without_credentials(
    fifo_path: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nobody could be told from anybody, nobody is answered."""
    monkeypatch.delattr(socket, "SO_PEERCRED")
    with running(FileTimerServer(fifo_path, "run", status=True)):
        eventually(lambda: "does not tell who connects" in caplog.text)


# Forks --------------------------------------------------------------------------------------------


def test_forked_child_has_nothing_of_it(
    server: FileTimerServer, fifo_path: str, fork_worker: Fork
) -> None:
    """It keeps neither the listener nor a client, and removes nothing when it ends."""
    hold_many(fifo_path)
    aside: Any = server._aside
    with connect(fifo_path) as client:
        eventually(lambda: aside._reading)
        child = fork_worker(tell_sockets, client.fileno())
        # Its own end of the client's, the channel to the test: nothing that the server had.
        assert child.receive() == 0
        assert json.loads(read_all(client))["timer_count"] == 3000
        child.send("end")
        assert child.wait() == 0
    assert ask(fifo_path)["run_id"] == "run"
    server.stop()
    with pytest.raises(FileNotFoundError):
        Question(fifo_path, 1)


def tell_sockets(channel: Any, kept: int) -> None:
    """A child that tells how many sockets of the server it has, by their addresses."""
    found = 0
    for number, target in open_descriptors().items():
        if target.startswith("socket:") and number not in (kept, channel.fileno()):
            with socket.socket(fileno=os.dup(number)) as copy:
                found += bool(copy.family == socket.AF_UNIX and copy.getsockname())
    channel.send(found)
    channel.recv()


def test_program_that_is_executed_has_nothing_of_it(
    server: FileTimerServer, fifo_path: str, spawn: Callable[..., Child]
) -> None:
    """No descriptor of it is inherited."""
    aside: Any = server._aside
    assert not os.get_inheritable(aside._listener.fileno())
    hold_many(fifo_path)
    with connect(fifo_path):
        eventually(lambda: aside._reading)
        assert not any(os.get_inheritable(client.fileno) for client in aside._reading)


# The one who asks ---------------------------------------------------------------------------------


def test_question_to_what_is_no_socket(fifo_path: str) -> None:
    """It is told at once."""
    Path(f"{fifo_path}.sock").write_text("no socket")
    with pytest.raises(OSError) as raised:  # noqa: PT011 - its number is looked at
        Question(fifo_path, 1)
    assert raised.value.errno == errno.ENOTSOCK


def test_question_waits_no_longer_than_asked(fifo_path: str) -> None:
    """Neither for its turn nor for an answer, nor for the rest of one."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{fifo_path}.sock")
        listener.listen(0)
        began = time.monotonic()
        with Question(fifo_path, 0.3) as question:
            for _ in range(2):
                with pytest.raises(TimeoutError):
                    json.loads(question.read())
        # There is room for one in the queue, or for two.
        with contextlib.ExitStack() as stack:

            def fill_the_queue() -> None:
                for _ in range(3):
                    stack.enter_context(Question(fifo_path, 0.3))

            with pytest.raises(TimeoutError):
                fill_the_queue()
        assert 0.6 <= time.monotonic() - began < 5


def test_answer_that_never_ends(fifo_path: str) -> None:
    """Nobody waits for its end."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{fifo_path}.sock")
        listener.listen()
        with Question(fifo_path, 0.3) as question:
            connection, _ = listener.accept()
            has_ended = threading.Event()

            def send() -> None:
                with connection, contextlib.suppress(OSError):
                    while not has_ended.is_set():
                        connection.sendall(b" ")
                        time.sleep(0.01)

            sender = threading.Thread(target=send)
            sender.start()
            try:
                with pytest.raises(TimeoutError):
                    json.loads(question.read())
            finally:
                has_ended.set()
                sender.join()


def test_servers_are_found(tmp_path: Path, serve: Serve) -> None:
    """Those of this user that listen, and neither what they have left nor anybody else's."""
    paths = sorted(str(tmp_path / name) for name in ("one", "other one"))
    servers = [serve(lambda path=path: FileTimerServer(path, "run", status=True)) for path in paths]
    with socket.socket(socket.AF_UNIX) as unrelated, socket.socket(socket.AF_UNIX) as alone:
        for listener, name in ((unrelated, "docker.sock"), (alone, "alone.sock")):
            listener.bind(str(tmp_path / name))
            listener.listen()
        (tmp_path / "docker").touch()
        assert [path for path in find() if path.startswith(str(tmp_path))] == paths
        servers[0].kill()
        assert [path for path in find() if path.startswith(str(tmp_path))] == paths[1:]
        servers[1].stop()
        assert [path for path in find() if path.startswith(str(tmp_path))] == []


def test_worker_of_a_server_with_status(fork_worker: Fork, fifo_path: str) -> None:
    """A worker that exits is gone from the next answer."""
    with running(FileTimerServer(fifo_path, "run", status=True)):
        worker = fork_worker(wait_to_be_killed)
        hold(fifo_path, worker.pid, ["held"])
        eventually(lambda: ask(fifo_path)["timer_count"] == 1)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        assert ask(fifo_path)["timer_count"] == 0


# The watchdog's time ------------------------------------------------------------------------------


class Nowhere:
    """Watches nothing: the test says what is ready."""

    def watch(self, fd: int, what: object, for_room: bool = False) -> None: ...

    def unwatch(self, fd: int) -> None: ...


@pytest.fixture
def slow_socket(
    fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[StatusSocket, list[int]]]:
    """A socket on a machine on which each look at the clock takes 0.2 ms, and what it has told."""
    told: list[int] = []
    now = 0.0

    def monotonic() -> float:
        nonlocal now
        now += 0.0002
        return now

    def items() -> Iterator[dict[str, object]]:
        for number in range(1000):
            told.append(number)
            yield {"number": number}

    monkeypatch.setattr(status_socket, "_clock", SimpleNamespace(monotonic=monotonic))
    made = StatusSocket(fifo_path, Nowhere(), lambda: ({"run_id": "slow"}, items()))
    made.open()
    yield made, told
    made.close()


def test_one_piece_is_small(slow_socket: tuple[StatusSocket, list[int]], fifo_path: str) -> None:
    """An answer is made a piece at a time, after a round, and sent when it is complete."""
    aside, told = slow_socket
    with connect(fifo_path) as client:
        assert aside.pause() == float("inf")
        assert aside.serve([aside, "others"], True) != ["others"], "a round is wanted"
        assert aside.pause() <= 0
        aside.serve([], True)  # The round was made.
        sizes = []
        while len(told) < 1000:
            before = len(told)
            assert aside.pause() == 0
            assert aside.serve(["others"], True) == ["others"]
            sizes.append(len(told) - before)
        assert max(sizes) <= 150
        aside.serve([], True)
        [reading] = aside._reading
        aside.serve([reading], True)
        answer = json.loads(read_all(client))
        assert [each["number"] for each in answer["timers"]] == list(range(1000))


def test_nothing_is_done_near_a_deadline(
    slow_socket: tuple[StatusSocket, list[int]], fifo_path: str
) -> None:
    """Nobody is let in, nothing made and nothing sent."""
    aside, told = slow_socket
    with connect(fifo_path):
        assert aside.serve([aside, "others"], False) == ["others"]
        assert aside._count() == 0
        aside.serve([aside], True)
        aside.serve([], True)
        aside.serve([], True)
        before = len(told)
        assert before > 0
        aside.serve([], False)
        assert len(told) == before


def test_listener_is_not_looked_at_while_there_is_no_room(
    slow_socket: tuple[StatusSocket, list[int]], fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would keep the watchdog awake, which has no use for one more client."""
    monkeypatch.setattr(status_socket, "_MOST_CLIENTS", 1)
    aside, told = slow_socket
    with connect(fifo_path), connect(fifo_path):
        aside.serve([aside], True)
        assert (aside._count(), aside._is_watched) == (1, True)
        aside.serve([], True)
        assert (aside._count(), aside._is_watched) == (1, False)
        while len(told) < 1000 or aside._unfinished:
            aside.serve([], True)
        aside.serve([*aside._reading], True)
        assert (aside._count(), aside._is_watched) == (0, True)


def test_there_is_a_rest_between_answers(
    slow_socket: tuple[StatusSocket, list[int]], fifo_path: str
) -> None:
    """However many ask, the thread has two thirds of its time for its workers."""
    aside, _ = slow_socket
    with connect(fifo_path), connect(fifo_path):
        aside.serve([aside], True)
        while aside._waiting or aside._unfinished:
            aside.serve([], True)
        with connect(fifo_path):
            aside.serve([aside], True)
            assert aside.pause() > 0.005


def test_no_piece_is_begun_right_before_a_deadline(
    server: FileTimerServer, fifo_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While something is due within 3 ms the server has no room for it; then it has."""
    aside: Any = server._aside
    rooms: list[bool] = []
    serve = aside.serve

    def note(ready: list[object], has_room: bool) -> list[object]:
        rooms.append(has_room)
        served: list[object] = serve(ready, has_room)
        return served

    monkeypatch.setattr(aside, "serve", note)
    with monkeypatch.context() as patch:
        patch.setattr(server, "_next_due", lambda: time.monotonic() + 0.0025)
        server._loop.wake()
        eventually(lambda: len(rooms) > 5)
        rooms.clear()
        with connect(fifo_path):
            eventually(lambda: len(rooms) > 20)
        assert not any(rooms)
    assert ask(fifo_path)["run_id"] == "run"
    assert any(rooms)
