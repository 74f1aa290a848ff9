"""`elastic-timer run`: COMMAND with a timer server beside it."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Sequence, Set

from elastic_timer import FileTimerServer
from elastic_timer._command import ENDED_BY_SIGNAL, torchrun
from elastic_timer._command.before_kill import BeforeKill
from elastic_timer._command.block_table import block_table
from elastic_timer._command.event_file import EventFile
from elastic_timer._command.leftovers import Leftovers
from elastic_timer._command.systemd import Notifier, remove_variables
from elastic_timer._server.callbacks import PATIENCE, contained_logger, flush_log
from elastic_timer._server.events import BlocksMeasured, Event, WatchdogRound
from elastic_timer._server.process import stat_of, status_field
from elastic_timer.debug_info_logging import add_collective, set_native_stacks

# A stderr that nobody reads must not keep signals from COMMAND.
logger = contained_logger(__name__)

NOT_EXECUTABLE = 126
NOT_FOUND = 127

# What is handed on to COMMAND.
_FORWARDED = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")

_SHELL = "/bin/sh"

# So much longer than the command of --before-kill its end may take, in seconds.
_BEFORE_KILL_END = 0.5

# How long after a signal came the group's may still come, in seconds: timeout signals its child by
# pid first. What was sent to us alone is forwarded so much later.
_GROUP_FOLLOWS = 0.05
# How long the end of a process may take, in seconds, before it is waited for no longer.
_LONGEST_END = 1.0
# Of the flags in proc(5)'s stat, as the kernel's sched.h has it.
_PF_EXITING = 0x4
# How long after the group's another one of its kind counts as the same, in seconds.
_GROUP_REMEMBERED = 0.25


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for on the command line.

    Attributes:
        command: What to run, and its arguments.
        run_id: The name of the run.
        timer_file: Where to make the FIFO; None for a private temporary folder.
        max_interval: The longest pause between two rounds of the server, in seconds.
        events: The file or FIFO to append events to; None for no events.
        kill_tree: Whether what a worker has started is killed with it, and what COMMAND has left
            behind at its end.
        native: Whether stacks are to have C frames too.
        collectives: Functions that wait for other ranks, besides those of `torch.distributed`.
        before_kill: A command to be run for each worker about to be signalled; None for none.
        before_kill_timeout: How many seconds it may take.
        summary: Whether to print at the end what the blocks took.
        dry_run: Whether nobody is signalled, and those who would be are only reported.
    """

    command: list[str]
    run_id: str
    timer_file: str | None = None
    max_interval: float = 10.0
    events: str | None = None
    kill_tree: bool = False
    native: bool = False
    collectives: Sequence[str] = ()
    before_kill: str | None = None
    before_kill_timeout: float = 10.0
    summary: bool = False
    dry_run: bool = False


def run(options: Options) -> int:
    """Run COMMAND to its end, handing on the signals that this process gets.

    Args:
        options: What was asked for.

    Returns:
        The status to exit with: COMMAND's own, or as a shell has it where it has none.

    Raises:
        NotImplementedError: There is no /proc for `kill_tree`; COMMAND was not started.
        OSError: The FIFO or the events' file can't be made; COMMAND was not started.
    """
    # Before anything exists that has to be removed again, and before any thread, which would
    # inherit the old mask: from here on no signal but SIGKILL ends this process.
    signals, mask_before = _block_signals()
    notifier = Notifier(os.environ)
    with contextlib.ExitStack() as cleanup:
        try:
            timer_file = options.timer_file
            if timer_file is None:
                folder = cleanup.enter_context(tempfile.TemporaryDirectory(prefix="elastic-timer-"))
                timer_file = os.path.join(folder, "timers")
            server = FileTimerServer(
                timer_file,
                options.run_id,
                notifier.interval(options.max_interval),
                kill_tree=options.kill_tree,
                dry_run=options.dry_run,
                status=True,
            )
            if notifier.is_wanted:
                server.subscribe(notifier.made_round, WatchdogRound)
            if options.events is not None:
                server.subscribe(EventFile(options.events, options.run_id).append)
            if options.before_kill is not None:
                timeout = options.before_kill_timeout
                hook = BeforeKill(options.before_kill, timeout)
                cleanup.callback(hook.close)
                server.before_signal(hook, timeout + _BEFORE_KILL_END)
            set_native_stacks(options.native)
            for name in options.collectives:
                add_collective(name)
            if options.summary:
                summary = Summary()
                server.subscribe(summary.note, BlocksMeasured)
                cleanup.callback(summary.log)
            cleanup.enter_context(server)
        except (OSError, NotImplementedError):
            cleanup.close()
            # To say what is wrong may take long: on a stderr that nobody reads, for good.
            signal.pthread_sigmask(signal.SIG_SETMASK, mask_before)
            raise
        # Before COMMAND can leave anything behind.
        leftovers = Leftovers(signals, options.kill_tree and not options.dry_run)
        try:
            pid = _start(options.command, timer_file, mask_before)
        except OSError as error:
            logger.error("cannot run %s: %s", options.command[0], error.strerror)
            return NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE
        # Not before COMMAND is there: what it has not had has to be forwarded.
        notifier.ready()
        cleanup.callback(notifier.stopping)
        with contextlib.closing(_GroupWitness()) as witness:
            status = _supervise(pid, signals, witness, leftovers)
    # Without the server: what outlives COMMAND is not held to its deadlines.
    leftovers.see_to()
    return status


class Summary:
    """Logs, when all is over, what the blocks took."""

    def __init__(self) -> None:
        self._last: BlocksMeasured | None = None

    def note(self, event: Event) -> None:
        """Listen to the server."""
        assert isinstance(event, BlocksMeasured)
        self._last = event

    def log(self) -> None:
        """Log the table, waiting a second at most for a log that blocks."""
        if self._last is None:
            text = "no blocks were entered"
        else:
            text = f"what the blocks took\n{block_table([dataclasses.asdict(self._last)])}"
        logger.warning("%s", text)
        flush_log(PATIENCE)


def _block_signals() -> tuple[set[int], Set[int]]:
    """Keep SIGCHLD and the signals to forward pending for `_next_signal`.

    Returns:
        Those signals, and the mask before.
    """
    # Ignored, as it may be from our parent on, COMMAND's exit status would be thrown away.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    forwarded = {int(signal.Signals[name]) for name in _FORWARDED}
    # nohup ignores SIGHUP, for us and for COMMAND.
    ignored = {number for number in forwarded if signal.getsignal(number) is signal.SIG_IGN}
    signals = {int(signal.SIGCHLD)} | forwarded - ignored
    return signals, signal.pthread_sigmask(signal.SIG_BLOCK, signals)


def _start(command: list[str], timer_file: str, mask: Set[int]) -> int:
    """Start COMMAND and return its pid; an OSError says why it could not be."""
    environment = {**os.environ, "TORCHELASTIC_TIMER_FILE": timer_file}
    remove_variables(environment)
    # With it torchrun would start a server of its own, and replace our FIFO.
    environment.pop("TORCHELASTIC_ENABLE_FILE_TIMER", None)
    # Otherwise torchrun 2.13 hands the store of the reaped attempt on to the next one, whose ranks
    # then look for each other at the addresses of the dead.
    environment.setdefault(torchrun.NOT_SHARED, "1")
    for warning in torchrun.warnings(command, environment):
        logger.warning("%s", warning)
    # Python ignores these in its own process; a program that it starts expects their default.
    ignored = [signal.SIGPIPE, signal.SIGXFSZ]

    def spawn(arguments: list[str]) -> int:
        name = arguments[0]
        return os.posix_spawnp(name, arguments, environment, setsigmask=mask, setsigdef=ignored)

    try:
        return spawn(command)
    except OSError as error:
        # A script that does not name its interpreter is the shell's, wherever programs are started.
        script = shutil.which(command[0])
        if error.errno != errno.ENOEXEC or script is None or _is_binary(script):
            raise
        return spawn([_SHELL, script, *command[1:]])


def _is_binary(path: str) -> bool:
    """Whether a file is no script, but for instance a program of another machine."""
    with open(path, "rb") as file:
        return b"\0" in file.read(80)


def _supervise(pid: int, signals: set[int], witness: _GroupWitness, leftovers: Leftovers) -> int:
    """Forward signals to COMMAND until it ends; the status to exit with."""
    while True:
        number, sender = _next_signal(signals)
        leftovers.note_user(pid)
        # Asked whatever came: a flood of other signals must not hide its end.
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            exit_code = os.waitstatus_to_exitcode(status)
            return exit_code if exit_code >= 0 else ENDED_BY_SIGNAL - exit_code
        if number == signal.SIGCHLD:
            witness.look()
            leftovers.bury({pid, witness.pid})
        elif sender != pid and not (os.getpgid(pid) == os.getpgrp() and witness.saw(number)):
            # Not waited for yet, the pid is COMMAND's even when COMMAND has just ended.
            try:
                os.kill(pid, number)
            except OSError as error:
                logger.warning("cannot forward %s: %s", signal.Signals(number).name, error)


def _next_signal(signals: set[int]) -> tuple[int, int | None]:
    """Wait for one of these signals; its number and, where the system tells, its sender."""
    if not hasattr(signal, "sigwaitinfo"):
        return signal.sigwait(signals), None
    info = signal.sigwaitinfo(signals)
    return info.si_signo, info.si_pid


def _is_pending(pid: int, number: int) -> bool:
    """Whether a process was sent a signal that it has not taken, as far as the system tells."""
    mask = status_field(pid, "ShdPnd")
    return mask is not None and bool(int(mask, 16) >> (number - 1) & 1)


class _GroupWitness:
    """Tells whether a signal went to the whole process group, and so to COMMAND as well.

    The system does not say to whom a signal was sent. So there is another process in the group
    that does nothing but die of it; then it has a successor.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}
        self.pid: int | None = None
        # It ends when the other end is closed, which it is when this process ends in any way.
        self._stdin, self._keep_alive = os.pipe()
        self._start()

    def _start(self) -> None:
        null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_WRONLY, 0) for fd in (1, 2)]
        with contextlib.suppress(OSError):  # Without one all signals are forwarded.
            self.pid = os.posix_spawn(
                _SHELL,
                # SIGQUIT is to leave no core. Its name must not match where `pkill` looks for us.
                ["sh", "-c", "ulimit -c 0; exec cat"],
                os.environ,
                file_actions=[(os.POSIX_SPAWN_DUP2, self._stdin, 0), *null],
                setsigmask=[],
            )

    def look(self) -> None:
        """Note what the witness has died of, if it has."""
        if self.pid is None:
            return
        ended, status = os.waitpid(self.pid, os.WNOHANG)
        if ended:
            self.pid = None
            if os.WIFSIGNALED(status):  # Otherwise it can't be run here; nor can another.
                self._start()
                # Not before: this takes long on a busy machine, and ours is taken after it.
                self._seen[os.WTERMSIG(status)] = time.monotonic()

    def saw(self, number: int) -> bool:
        """Whether this signal, which has just been taken, went to the whole group."""
        taken = time.monotonic()
        while True:
            self.look()
            if number in self._seen and taken - self._seen[number] < _GROUP_REMEMBERED:
                return True
            # On a busy machine it takes the witness a while to die.
            if self.pid is not None and _is_pending(self.pid, number):
                return True
            waited = time.monotonic() - taken
            if waited > _GROUP_FOLLOWS and (waited > _LONGEST_END or not self._is_ending()):
                return False
            time.sleep(0.002)

    def _is_ending(self) -> bool:
        """Whether the witness is about to have died of something."""
        stat = None if self.pid is None else stat_of(self.pid)
        return bool(stat and int(stat[6]) & _PF_EXITING)

    def close(self) -> None:
        """End the witness and wait for its end."""
        os.close(self._keep_alive)
        os.close(self._stdin)
        if self.pid is not None:
            with contextlib.suppress(OSError):
                os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
