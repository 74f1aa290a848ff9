"""`elastic-timer status`: what the servers of this host hold, and whether they are alive."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from elastic_timer import _clock
from elastic_timer._command import ENDED_BY_SIGNAL
from elastic_timer._command.status_table import Style, table
from elastic_timer._evidence.facts import one_line
from elastic_timer._server.process import stat_of
from elastic_timer._transport.status_socket import Question, find, socket_of

# How many seconds a server may take to answer. One that takes stacks does nothing else meanwhile.
_PATIENCE = 5.0

# How many seconds the stacks of all workers may take together.
_STACKS_PATIENCE = 20.0

# What a timer server tells at least; anything may listen on a socket.
_FIELDS = {"run_id", "pid", "uptime", "last_round_age", "timers"}

# How each of its timers begins, and how its answer ends.
_TIMER = '{"pid":'
_END = "]}\n"

_NONE = "no timer server of this user runs on this host"

_CLEAR_LINE = "\x1b[K"
_CLEAR_REST = "\x1b[J"
_HOME = "\x1b[H"
# Another screen, so that what is on this one is there again afterwards, and no cursor on it.
_ENTER = "\x1b[?1049h\x1b[?25l"
_LEAVE = "\x1b[?25h\x1b[?1049l"


@dataclasses.dataclass(frozen=True)
class StatusOptions:
    """What was asked for on the command line.

    Attributes:
        timer_file: The server's FIFO; None for that of the environment, or all servers.
        watch: The pause between two looks, in seconds; None for one look.
        json: Whether to print JSON, one object a line.
        stacks: Whether to take the stacks of the workers.
        check: Whether to say only whether the servers are alive.
        max_age: How many seconds ago the last round may be, at most, of one that is.
    """

    timer_file: str | None = None
    watch: float | None = None
    json: bool = False
    stacks: bool = False
    check: bool = False
    max_age: float = 10.0


@dataclasses.dataclass(frozen=True)
class _Server:
    """What was learnt of a server: what it told of itself, or why that is nothing.

    All of its answer is `told`, with the state of each timer's process.
    """

    path: str
    about: dict[str, Any] | None
    told: str = ""
    problem: str = ""
    is_gone: bool = False


def status(options: StatusOptions) -> int:
    """Show it; the exit status: 0 where all servers have answered, and there is one."""
    if options.check:
        return _check(options)
    if options.watch is not None:
        return _watch(options, options.watch)
    servers = _ask(options, _PATIENCE)
    _print(_lines(options, servers, _style()))
    _complain(options, servers)
    return 0 if servers and all(server.about for server in servers) else 1


def _check(options: StatusOptions) -> int:
    servers = _ask(options, options.max_age)
    is_well = bool(servers)
    if not servers:
        print(_NONE)
    for server in servers:
        if server.about is None:
            is_well = False
            print(f"{server.path}: {server.problem}")
            continue
        age = server.about["last_round_age"]
        is_late = age > options.max_age
        is_well = is_well and not is_late
        print(
            f"{server.path}: {'the watchdog makes no rounds' if is_late else 'ok'}, "
            f"the last round {age:.1f} s ago"
        )
    return 0 if is_well else 1


def _watch(options: StatusOptions, pause: float) -> int:
    lines: list[str] = []
    with _screen(options) as is_screen, contextlib.suppress(KeyboardInterrupt):
        while True:
            began = time.monotonic()
            style = _style()
            lines = _lines(options, _ask(options, _PATIENCE), style) or [_NONE]
            if is_screen:
                _draw(lines)
            else:
                _print(lines if options.json else [*lines, ""])
            time.sleep(max(0.0, began + pause - time.monotonic()))
    if is_screen:
        _print(lines)
    return 0


@contextlib.contextmanager
def _screen(options: StatusOptions) -> Iterator[bool]:
    """Have a screen to draw on, where stdout is a terminal that can; whether it is."""
    is_screen = not options.json and _is_terminal() and not _is_dumb()

    def end(number: int, frame: object) -> None:
        sys.exit(ENDED_BY_SIGNAL + number)

    def pause(number: int, frame: object) -> None:
        # Not by the stream, in the midst of whose write this may be.
        os.write(sys.stdout.fileno(), _LEAVE.encode())
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # Comes back when somebody has it go on.
        signal.signal(number, pause)
        os.write(sys.stdout.fileno(), _ENTER.encode())

    if is_screen:
        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGTSTP, pause)
        sys.stdout.write(_ENTER)
    try:
        yield is_screen
    finally:
        if is_screen:
            signal.signal(signal.SIGTSTP, signal.SIG_DFL)
            sys.stdout.write(_LEAVE)
            sys.stdout.flush()


def _draw(lines: list[str]) -> None:
    height = _size().lines
    if len(lines) > height:
        lines = [*lines[: height - 1], f"... and {len(lines) - height + 1} lines more"]
    sys.stdout.write(_HOME + "\n".join(line + _CLEAR_LINE for line in lines) + _CLEAR_REST)
    sys.stdout.flush()


def _print(lines: list[str]) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()


def _is_terminal() -> bool:
    return sys.stdout.isatty()


def _is_dumb() -> bool:
    """Whether the terminal takes nothing but text, as that of a shell in an editor."""
    return os.environ.get("TERM") == "dumb"


def _size() -> os.terminal_size:
    from shutil import get_terminal_size  # Not for what is no terminal: it takes every compression.

    return get_terminal_size()


def _style() -> Style:
    if not _is_terminal():
        return Style()
    is_coloured = not os.environ.get("NO_COLOR") and not _is_dumb()
    return Style(_size().columns, is_coloured)


# What is learnt -----------------------------------------------------------------------------------


def _ask(options: StatusOptions, patience: float) -> list[_Server]:
    """Ask the server that was named, or all there are, at the same time."""
    named = options.timer_file or os.environ.get("TORCHELASTIC_TIMER_FILE")
    paths = [os.path.abspath(named)] if named else find()
    found: dict[str, _Server] = {}

    def ask(path: str) -> None:
        found[path] = _server(path, patience)

    # Side by side: one that does not answer takes no time from the others, and a server hangs up
    # on whoever does not read. As daemons, so that Ctrl-C need not wait for it either.
    threads = [threading.Thread(target=ask, args=(path,), daemon=True) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    servers = [found[path] for path in paths]
    # One that was found and has ended since is none that anybody has asked for.
    return [server for server in servers if named or not server.is_gone]


def _server(path: str, patience: float) -> _Server:
    pid = None
    try:
        with Question(path, patience) as question:
            pid = question.pid
            told = question.read()
        return _Server(path, *_understood(told))
    except FileNotFoundError:
        problem = f"there is no {socket_of(path)}: no server runs, or one without status"
        return _Server(path, None, problem=problem, is_gone=True)
    except ConnectionRefusedError:
        return _Server(path, None, problem="its server has ended", is_gone=True)
    except TimeoutError:
        whose = "the server"
        if pid is not None:  # Else the queue of those who ask is full.
            whose += f", process {pid} (state {_state_of(pid)}),"
        return _Server(path, None, problem=f"{whose} has not answered for {patience:g} s")
    except (ConnectionResetError, ValueError):
        return _Server(path, None, problem="what listens there gives no answer")
    except OSError as error:
        return _Server(path, None, problem=error.strerror or repr(error))


def _understood(told: str) -> tuple[dict[str, Any], str]:
    """What a server tells of itself, and all that it tells, with the state of each timer's process.

    The timers are not decoded. To do that, and to encode them again, takes longer than it took the
    server to tell of them.

    Raises:
        ValueError: It is no answer of a server, or not all of one.
    """
    # Within a text there is no such thing: quotation marks in one have a backslash before them.
    head, *timers = told.split(_TIMER)
    about = json.loads(head + "]}" if timers else head)
    if not isinstance(about, dict) or not about.keys() >= _FIELDS or not told.endswith(_END):
        raise ValueError("somebody else's, or cut off")
    known: dict[str, str] = {}
    for number, timer in enumerate(timers):
        pid, _, rest = timer.partition(",")
        if pid not in known:
            known[pid] = f'{pid},"state":{json.dumps(_state_of(int(pid)))},'
        timers[number] = known[pid] + rest
    return about, _TIMER.join([head, *timers]).rstrip()


def _state_of(pid: int) -> str | None:
    """The letter of a process's state; None where that can't be known, as of a group."""
    stat = stat_of(pid) if pid > 0 else None
    return stat[0] if stat else None


# What is shown ------------------------------------------------------------------------------------


def _lines(options: StatusOptions, servers: list[_Server], style: Style) -> list[str]:
    """What to print of the servers, one after the other."""
    lines: list[str] = []
    for server in servers:
        if server.about is None:
            if not options.json:
                lines.append(one_line(f"{server.path}: {server.problem}"))
            continue
        if options.json and not options.stacks:
            lines.append(server.told)
            continue
        answer = json.loads(server.told)
        stacks = _stacks(answer) if options.stacks else []
        if options.json:
            answer["stacks"] = [
                {"pid": worker["pid"], "rank": worker["rank"], **worker["taken"]}
                for worker in stacks
            ]
            lines.append(json.dumps(answer))
            continue
        if lines:
            lines.append("")
        lines += table(answer, style)
        for worker in stacks:
            lines += ["", *_described(worker, style)]
    return lines


def _described(worker: dict[str, Any], style: Style) -> list[str]:
    from elastic_timer._evidence.expiry import describe_stacks

    rank = "" if worker["rank"] is None else f"rank {worker['rank']}, "
    title = style.paint(f"{rank}pid {worker['pid']}", "bold")
    return [title, *(style.cut(f"  {line}") for line in describe_stacks(worker["taken"]))]


def _stacks(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """What the workers do right now, in the order of their ranks."""
    from elastic_timer._evidence.stacks import take_stacks  # Not for every look.

    workers = {timer["pid"]: timer for timer in answer["timers"] if timer["pid"] > 0}
    states = {pid: timer["state"] for pid, timer in workers.items()}
    taken = take_stacks(states, _clock.monotonic() + _STACKS_PATIENCE)
    by_rank = sorted(workers.values(), key=lambda worker: (worker["rank"] or 0, worker["pid"]))
    return [
        {"pid": worker["pid"], "rank": worker["rank"], "taken": taken[worker["pid"]]}
        for worker in by_rank
    ]


def _complain(options: StatusOptions, servers: list[_Server]) -> None:
    """Say on stderr what the output has no place for."""
    if not servers:
        print(_NONE, file=sys.stderr)
    for server in servers:
        if server.about is None and options.json:
            print(f"{server.path}: {server.problem}", file=sys.stderr)
