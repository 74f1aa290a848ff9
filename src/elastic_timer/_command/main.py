"""The command `elastic-timer`: a demonstration, and a timer server around any other command."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence

from elastic_timer import FileTimerRequest, FileTimerServer, __version__
from elastic_timer._evidence.latest import latest

logger = logging.getLogger(__name__)

_USAGE_ERROR = 2
_NOT_EXECUTABLE = 126
_NOT_FOUND = 127
_ENDED_BY_SIGNAL = 128

# What `run` hands on to COMMAND.
_FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
# Python ignores these in its own process; a program that it starts expects the system's default.
_IGNORED_BY_PYTHON = ("SIGPIPE", "SIGXFSZ")
# Linux's si_code for a signal that the kernel sent by itself, as a terminal's Ctrl-C does.
_SI_KERNEL = 0x80


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; None means those of this process.

    Returns:
        The exit status. Wrong usage raises SystemExit(2) instead.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    # Split here, for what argparse makes of `--` differs between Python versions.
    end = given.index("--") if "--" in given else len(given)
    options, unknown = _parser().parse_known_args(given[:end])
    options.command = given[end + 1 :]
    if unknown:
        options.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    logging.basicConfig(format="elastic-timer: %(message)s", level=logging.WARNING)
    status: int = options.action(options)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="elastic-timer",
        description="Deadlines for worker processes: a block that overruns has its process killed.",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    actions = parser.add_subparsers(metavar="{demo,run}", required=True)

    demo = actions.add_parser("demo", help="see two stuck workers reaped, in a few seconds")
    demo.set_defaults(action=_demo, parser=demo)

    run = actions.add_parser(
        "run",
        help="run a command with a timer server beside it",
        usage="elastic-timer run [--timer-file PATH] [--max-interval SECONDS] [--run-id ID] "
        "[--events FILE] -- COMMAND [ARG ...]",
        description="Starts a timer server and then COMMAND, with TORCHELASTIC_TIMER_FILE set: "
        "every Python process below it can call elastic_timer.configure() and use expires(). "
        "Signals are handed on to COMMAND; the exit status is COMMAND's own.",
    )
    run.add_argument(
        "--timer-file",
        metavar="PATH",
        type=os.path.abspath,  # COMMAND may have changed its folder by the time it opens it.
        help="where to make the FIFO (default: in a private temporary folder)",
    )
    run.add_argument(
        "--max-interval",
        metavar="SECONDS",
        type=_positive_seconds,
        default=10.0,
        help="longest pause between two rounds of the server (default: %(default)g)",
    )
    run.add_argument(
        "--run-id",
        metavar="ID",
        default=f"run-{os.getpid()}",
        help="name of this run in logs and events (default: run-PID)",
    )
    run.add_argument(
        "--events", metavar="FILE", help="append one JSON object per event, one a line"
    )
    run.set_defaults(action=_run, parser=run)
    return parser


def _positive_seconds(text: str) -> float:
    seconds = float(text)
    if not (math.isfinite(seconds) and seconds > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return seconds


def _demo(options: argparse.Namespace) -> int:
    from elastic_timer._command.demo import demo

    if options.command:
        options.parser.error("the demo takes no COMMAND")
    try:
        return demo()
    except KeyboardInterrupt:
        return _ENDED_BY_SIGNAL + signal.SIGINT


def _run(options: argparse.Namespace) -> int:
    parser: argparse.ArgumentParser = options.parser
    if not options.command:
        parser.error("what is to be run? Write it behind --")
    if not hasattr(os, "posix_spawnp"):
        parser.error("this needs FIFOs and signals, which this platform does not have")
    # Before anything exists that has to be removed again, and before any thread, which would
    # inherit the old mask: from here on no signal but SIGKILL ends this process.
    signals, mask_before = _block_signals()
    with contextlib.ExitStack() as cleanup:
        try:
            timer_file: str | None = options.timer_file
            if timer_file is None:
                folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="elastic-timer-"))
                timer_file = os.path.join(folder, "timers")
            log_event = None
            if options.events is not None:
                events = cleanup.enter_context(_EventFile(options.events, options.run_id))
                log_event = events.write
            server = FileTimerServer(
                timer_file, options.run_id, options.max_interval, log_event=log_event
            )
            cleanup.enter_context(server)
        except OSError as error:
            parser.error(str(error))
        try:
            pid = _start(options.command, timer_file, mask_before)
        except OSError as error:
            logger.error("cannot run %s: %s", options.command[0], error.strerror)
            return _NOT_FOUND if isinstance(error, FileNotFoundError) else _NOT_EXECUTABLE
        return _supervise(pid, signals)


def _block_signals() -> tuple[set[signal.Signals], set[int]]:
    """Keep SIGCHLD and the signals to forward pending for `_next_signal`.

    Returns:
        Those signals, and the mask before.
    """
    # Ignored, as it may be from our parent on, COMMAND's exit status would be thrown away.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signals = {signal.SIGCHLD}
    for name in _FORWARDED:
        number = signal.Signals[name]
        # nohup ignores SIGHUP, for us and for COMMAND.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signals.add(number)
    return signals, signal.pthread_sigmask(signal.SIG_BLOCK, signals)


def _start(command: list[str], timer_file: str, mask: set[int]) -> int:
    """Start COMMAND and return its pid; an OSError says why it could not be."""
    environment = {**os.environ, "TORCHELASTIC_TIMER_FILE": timer_file}
    # With it torchrun would start a server of its own, and replace our FIFO.
    environment.pop("TORCHELASTIC_ENABLE_FILE_TIMER", None)
    ignored = [getattr(signal, name) for name in _IGNORED_BY_PYTHON if hasattr(signal, name)]
    return os.posix_spawnp(command[0], command, environment, setsigmask=mask, setsigdef=ignored)


def _supervise(pid: int, signals: set[signal.Signals]) -> int:
    """Forward signals to COMMAND until it ends; the status to exit with."""
    while True:
        number, code, sender = _next_signal(signals)
        if number == signal.SIGCHLD:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                exit_code = os.waitstatus_to_exitcode(status)
                return exit_code if exit_code >= 0 else _ENDED_BY_SIGNAL - exit_code
        elif sender != pid and not (code == _SI_KERNEL and _terminal_sent_to(pid, number)):
            # Not waited for yet, the pid is COMMAND's even when COMMAND has just ended.
            try:
                os.kill(pid, number)
            except OSError as error:
                logger.warning("cannot forward %s: %s", signal.Signals(number).name, error)


def _next_signal(signals: set[signal.Signals]) -> tuple[int, int | None, int | None]:
    """Wait for one of these signals; its number and, where the system tells, code and sender."""
    if not hasattr(signal, "sigwaitinfo"):
        return signal.sigwait(signals), None, None
    info = signal.sigwaitinfo(signals)
    return info.si_signo, info.si_code, info.si_pid


def _terminal_sent_to(pid: int, number: int) -> bool:
    """Whether COMMAND, too, had this signal of the terminal, as all of the foreground group has."""
    if number == signal.SIGHUP and os.getsid(0) == os.getpid():
        return False  # A terminal that goes away tells the leader of its session alone.
    return os.getpgid(pid) == os.getpgrp()


class _EventFile:
    """What `--events` writes: one JSON object a line, each appended in one write."""

    def __init__(self, path: str, run_id: str) -> None:
        self._run_id = run_id
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def __enter__(self) -> _EventFile:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def write(self, name: str, request: FileTimerRequest | None) -> None:
        """Append one event of the server."""
        os.write(self._fd, json.dumps(self._record(name, request)).encode() + b"\n")

    def _record(self, name: str, request: FileTimerRequest | None) -> dict[str, object]:
        record: dict[str, object] = {
            "time": time.time(),
            "event": name,
            "run_id": self._run_id,
            "pid": None if request is None else request.worker_pid,
            "scope": None if request is None else request.scope_id,
            "expiration_time": None if request is None else request.expiration_time,
            "signal": None if request is None else request.signal,
        }
        if name == "timer expired" and request is not None:
            record["evidence"] = latest(self._run_id, request.worker_pid)
        return record
