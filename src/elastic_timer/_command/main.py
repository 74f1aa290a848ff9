"""The command `elastic-timer`: a demonstration, and a timer server around any other command."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from typing import TypeVar

from elastic_timer import __version__
from elastic_timer._command import ENDED_BY_SIGNAL

_Asked = TypeVar("_Asked")

_STDOUT = 1
_STDERR = 2

# As docs/reference/command.md has it: argparse knows nothing of COMMAND, nor of an order.
_RUN_USAGE = """\
elastic-timer run [-h] [--timer-file PATH] [--max-interval SECONDS]
                         [--run-id ID] [--dry-run] [--summary] [--events FILE]
                         [--kill-tree] [--native] [--collective NAME]
                         [--before-kill COMMAND]
                         [--before-kill-timeout SECONDS]
                         -- COMMAND [ARG ...]"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; None means those of this process.

    Returns:
        The exit status. Wrong usage raises SystemExit(2) instead.
    """
    _open_streams()
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Split here, for what argparse makes of `--` differs between Python versions.
    end = given.index("--") if "--" in given else len(given)
    options, unknown = _parser().parse_known_args(given[:end])
    options.command = given[end + 1 :]
    if unknown:
        is_command = given[0] == "run" and "--" not in given
        hint = "; write -- before COMMAND" if is_command else ""
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    logging.basicConfig(
        format="elastic-timer %(asctime)s.%(msecs)03d: %(message)s",
        datefmt="%H:%M:%S",
        handlers=[_StderrHandler()],
    )
    try:
        status: int = options.action(options)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return ENDED_BY_SIGNAL + signal.SIGINT
    except BrokenPipeError:
        # Whoever read has seen enough. Python would complain of it once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _open_streams() -> None:
    """Have 0, 1 and 2 open, though not in COMMAND, and a stdout that takes any text.

    The number of one that is closed would be given to the next file that is opened, and the log be
    written there: into the events, for instance.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    os.close(fd)
    sys.stdout = sys.stdout or os.fdopen(_STDOUT, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(_STDERR, "w", closefd=False)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # What is no text in the terminal's encoding is no reason to show nothing.
        sys.stdout.reconfigure(errors="backslashreplace")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-timer",
        description="Deadlines for worker processes: a block that overruns has its process killed.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    actions = parser.add_subparsers(metavar="{demo,report,run,status}", required=True)

    demo = actions.add_parser(
        "demo", help="see a rank that hangs found and reaped, and its job go on"
    )
    demo.set_defaults(action=_demo, parser=demo)

    runs = actions.add_parser(
        "run",
        help="run a command with a timer server beside it",
        usage=_RUN_USAGE,
        description="Starts a timer server and then COMMAND, with TORCHELASTIC_TIMER_FILE set: "
        "every Python process below it can call elastic_timer.configure() and use expires(). "
        "Signals are handed on to COMMAND; the exit status is COMMAND's own.",
    )
    runs.add_argument(
        "--timer-file",
        metavar="PATH",
        type=os.path.abspath,  # COMMAND may have changed its folder by the time it opens it.
        help="where to make the FIFO (default: in a private temporary folder)",
    )
    runs.add_argument(
        "--max-interval",
        metavar="SECONDS",
        type=_positive_seconds,
        default=10.0,
        help="longest pause between two rounds of the server (default: %(default)g)",
    )
    runs.add_argument(
        "--run-id",
        metavar="ID",
        default=f"run-{os.getpid()}",
        help="name of this run in logs and events (default: run-PID)",
    )
    runs.add_argument(
        "--dry-run",
        action="store_true",
        help="report who overruns a deadline, and signal nobody",
    )
    runs.add_argument(
        "--summary",
        action="store_true",
        help="print at the end what each block took, and which deadline fits it",
    )
    runs.add_argument(
        "--events", metavar="FILE", help="append one JSON object per event, one a line"
    )
    runs.add_argument(
        "--kill-tree",
        action="store_true",
        help="kill with a worker what it has started, and at the end what COMMAND has left behind",
    )
    runs.add_argument(
        "--native",
        action="store_true",
        help="have C frames in the stacks too, which takes longer",
    )
    _add_collective(runs)
    runs.add_argument(
        "--before-kill",
        metavar="COMMAND",
        help="run by the shell for each worker about to be killed, the evidence on its stdin",
    )
    runs.add_argument(
        "--before-kill-timeout",
        metavar="SECONDS",
        type=_positive_seconds,
        default=10.0,
        help="how long that may take (default: %(default)g)",
    )
    runs.set_defaults(action=_run, parser=runs)

    reports = actions.add_parser(
        "report",
        help="say who hung a job, from the events of all its hosts",
        description="Reads what `elastic-timer run --events` has written on all hosts of a job, "
        "and says for each hang which ranks were where, which of them is the suspect, and of which "
        "no file tells. The exit status is 0, with a hang or without, and 1 where a file could not "
        "be read.",
    )
    reports.add_argument("events", metavar="EVENTS", nargs="+", help="files, in any order")
    reports.add_argument(
        "--folded", metavar="FILE", help="write the stacks in the format of flame graph viewers"
    )
    reports.add_argument("--json", action="store_true", help="print all that is known as JSON")
    _add_collective(reports)
    reports.set_defaults(action=_report, parser=reports)

    _add_status(actions)
    return parser


def _add_collective(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--collective",
        metavar="NAME",
        dest="collectives",
        action="append",
        default=[],
        help="a function in which ranks wait for each other, besides those of torch.distributed: "
        "its name, or FILE:FUNCTION; may be given several times",
    )


def _add_status(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    shows = actions.add_parser(
        "status",
        help="show who is in which block, and how long it has",
        description="Shows the timers of a server that runs, the one with the least time left "
        "first: of the server at PATH; without PATH of that in TORCHELASTIC_TIMER_FILE; without "
        "that of every server of this user on this host.",
    )
    shows.add_argument("--timer-file", metavar="PATH", help="the server's FIFO")
    shows.add_argument(
        "--watch",
        metavar="SECONDS",
        nargs="?",
        type=_positive_seconds,
        const=1.0,
        help="show it again every so many seconds (default: %(const)g) until Ctrl-C",
    )
    shows.add_argument("--json", action="store_true", help="print one JSON object per server")
    shows.add_argument(
        "--stacks", action="store_true", help="show what the workers are doing, by py-spy"
    )
    shows.add_argument(
        "--check",
        action="store_true",
        help="say only whether the watchdog is alive: exit status 0, else 1",
    )
    shows.add_argument(
        "--max-age",
        metavar="SECONDS",
        type=_positive_seconds,
        default=10.0,
        help="how long a watchdog that is alive may be silent for --check (default: %(default)g)",
    )
    shows.set_defaults(action=_status, parser=shows)


def _positive_seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")


def _demo(options: argparse.Namespace) -> int:
    from elastic_timer._command.demo import demo

    if options.command:
        options.parser.error("the demo takes no COMMAND")
    return demo()


def _status(options: argparse.Namespace) -> int:
    from elastic_timer._command.status import StatusOptions, status

    if options.command:
        options.parser.error("status takes no COMMAND")
    if options.check and (options.json or options.stacks or options.watch is not None):
        options.parser.error("--check says one thing, once: leave out --json, --stacks, --watch")
    return status(_asked(StatusOptions, options))


def _report(options: argparse.Namespace) -> int:
    from elastic_timer._command.report import report

    parser: argparse.ArgumentParser = options.parser
    if options.command:
        parser.error("a report takes no COMMAND")
    try:
        return report(
            options.events,
            folded=options.folded,
            as_json=options.json,
            collectives=options.collectives,
        )
    except BrokenPipeError:
        raise
    except OSError as error:
        parser.error(str(error))


def _run(options: argparse.Namespace) -> int:
    from elastic_timer._command.run import Options, run

    parser: argparse.ArgumentParser = options.parser
    if options.command[:1] in ([], [""]):
        parser.error("what is to be run? Write it behind --")
    if not hasattr(os, "posix_spawnp"):
        parser.error("this needs FIFOs and signals, which this platform does not have")
    try:
        return run(_asked(Options, options))
    except (OSError, NotImplementedError) as error:
        parser.error(str(error))


def _asked(kind: Callable[..., _Asked], options: argparse.Namespace) -> _Asked:
    """The dataclass of what was asked for, whose fields bear the names of the parser's options."""
    return kind(**{name: getattr(options, name) for name in signature(kind).parameters})


class _StderrHandler(logging.Handler):
    """Writes records to stderr, each with its time.

    It has neither a lock nor a buffer: where stderr is a pipe that nobody reads, a thread that
    writes a record stays there, and the process has to end without it.
    """

    def handle(self, record: logging.LogRecord) -> bool:
        line = self.format(record) + "\n"
        with contextlib.suppress(OSError):
            os.write(_STDERR, line.encode(errors="backslashreplace"))
        return True
