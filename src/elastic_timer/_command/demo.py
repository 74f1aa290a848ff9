"""`elastic-timer demo`: a job of eight ranks; one hangs, is found and reaped, and the job recovers.

Run as a module it is one of the ranks: which one, its environment says, as under torchrun.
"""

from __future__ import annotations

import contextlib
import ctypes
import glob
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from typing import TYPE_CHECKING, cast

from elastic_timer import FileTimerServer, configure, expires
from elastic_timer._evidence.facts import descendants_of
from elastic_timer._evidence.picture import describe, who_hangs
from elastic_timer._server.events import Event, JobHangs, TimerReleased, WorkerSignalled

if TYPE_CHECKING:
    from elastic_timer._evidence.picture import Picture

_RANKS = 8
_STEPS = 5
_STUCK_RANK = 3
_STUCK_STEP = 3

# Many times what the demo takes.
_PATIENCE = 20.0

# All processes of the job have this variable; its value is the folder of this demo.
_MARK = "ELASTIC_TIMER_DEMO"


# A rank --------------------------------------------------------------------------------------


def train() -> None:
    """Load a batch and add up what all ranks have, step by step, each with a deadline."""
    configure()
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    ring = _Ring(f"{os.environ[_MARK]}/attempt-{attempt}", rank)
    # In the place of what loads the data: it would live on if the rank alone were killed.
    with subprocess.Popen(["sleep", "60"]) as loader:
        try:
            for step in range(1, _STEPS + 1):
                with expires(after=1.5):
                    batch = load_batch(rank, step, attempt)
                with expires(after=3):
                    total = all_reduce(ring, batch)
                assert total == sum(range(_RANKS)) + _RANKS * step
        finally:
            loader.kill()


def load_batch(rank: int, step: int, attempt: int) -> int:
    """One rank's numbers; once they do not come."""
    if (rank, step, attempt) == (_STUCK_RANK, _STUCK_STEP, 0):
        # In C code that keeps the GIL: no thread or signal handler of the rank can run.
        ctypes.PyDLL(None).sleep(60)  # pragma: no cover  # Who is in there is killed.
    time.sleep(0.1)
    return rank + step


def all_reduce(ring: _Ring, number: int) -> int:
    """The sum over all ranks: once around the ring it is added up, the second time handed on."""
    if ring.rank == 0:
        ring.send(number)
        total = ring.receive()
        ring.send(total)
        return ring.receive()
    ring.send(ring.receive() + number)
    total = ring.receive()
    ring.send(total)
    return total


class _Ring:
    """Each rank's way to the next one."""

    def __init__(self, prefix: str, rank: int) -> None:
        self.rank = rank
        paths = [f"{prefix}-{n}" for n in range(_RANKS)]
        for path in paths:
            with contextlib.suppress(FileExistsError):
                os.mkfifo(path)
        # To write as well: otherwise opening waits for the other end.
        self._in = os.open(paths[rank], os.O_RDWR)
        self._out = os.open(paths[(rank + 1) % _RANKS], os.O_RDWR)

    def send(self, number: int) -> None:
        os.write(self._out, bytes([number]))

    def receive(self) -> int:
        return os.read(self._in, 1)[0]


# The job, and what is told of it -------------------------------------------------------------


def demo() -> int:
    """Show it; 0 if the stuck rank was named and it alone reaped, and the job went on, else 1."""
    # What the library logs is shown here line by line, with the rest.
    logging.getLogger("elastic_timer").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="elastic-timer-") as folder:
        job = _Job(folder)
        with job.server:
            try:
                job.run()
            finally:
                job.clear()  # Before the server, which they would complain of the loss of.
        return job.conclude()


class _Job:
    """The ranks, their server, and a supervisor that does what torchrun does when one dies."""

    def __init__(self, folder: str) -> None:
        self._started = time.monotonic()
        self._folder = folder
        self._timer_file = os.path.join(folder, "timers")
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._blocks_left = 0
        self._is_hanging = False
        self._suspects: list[int] = []
        self._reaped: list[int | None] = []
        self._dead: list[str] = []
        self._is_done = False
        self._telling = threading.Lock()
        self._was_told = threading.Event()
        self.server = FileTimerServer(self._timer_file, "demo", kill_tree=True)
        self.server.subscribe(self._happened, TimerReleased, JobHangs, WorkerSignalled)

    def run(self) -> None:
        """Run the job until all ranks are done; where one dies, start all of them once more."""
        for attempt in range(2):
            self._tell(f"attempt {attempt + 1}: {_RANKS} ranks start, with 1.5 s for each batch")
            self._start(attempt)
            dead = self._wait()
            self._dead.append(dead)
            if not dead:
                self._is_done = True
                self._tell(f"all ranks are done, after {_STEPS} steps", "32")
                return
            self._tell(f"the supervisor finds {dead}, and stops the other ranks")
            self.clear()

    def conclude(self) -> int:
        """Say how it went; the exit status."""
        claims = {
            f"The rank that hung, {_STUCK_RANK}, was named.": self._suspects == [_STUCK_RANK],
            "It was reaped, and no other.": self._reaped == [_STUCK_RANK]
            and self._dead[0] == f"rank {_STUCK_RANK} dead (SIGKILL)",
            "The job was started again, and finished.": self._is_done,
            "No process is left of it.": not self._left(),
        }
        print()
        for claim, is_true in claims.items():
            print(_coloured(f"{'yes' if is_true else 'NO '}  {claim}", "32" if is_true else "31"))
        return 0 if all(claims.values()) else 1

    def clear(self) -> None:
        """Leave no rank behind, and nothing that one which lives has started."""
        for rank in self._ranks:
            rank.send_signal(signal.SIGSTOP)  # It is to start nothing more.
            children = descendants_of(rank.pid, {}, _RANKS) if rank.poll() is None else []
            for pid in children:
                os.kill(pid, signal.SIGKILL)
            rank.kill()
            rank.wait()

    def _start(self, attempt: int) -> None:
        job = {
            "TORCHELASTIC_TIMER_FILE": self._timer_file,
            "TORCHELASTIC_RUN_ID": "demo",
            "TORCHELASTIC_RESTART_COUNT": str(attempt),
            "WORLD_SIZE": str(_RANKS),
            _MARK: self._folder,
        }
        self._ranks, self._blocks_left, self._is_hanging = [], 0, False
        # They inherit it: a terminal's Ctrl-C would have each of them print a traceback.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        for rank in map(str, range(_RANKS)):
            place = {"RANK": rank, "LOCAL_RANK": rank}
            command = [sys.executable, "-m", __name__]
            process = subprocess.Popen(command, env={**os.environ, **job, **place})
            self._ranks.append(process)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _wait(self) -> str:
        """Wait until a rank dies, and say which and how; nothing where all end well."""
        give_up = time.monotonic() + _PATIENCE
        while time.monotonic() < give_up:
            codes = [rank.poll() for rank in self._ranks]
            for rank, code in enumerate(codes):
                if code:
                    # It may be seen before the listener tells of the reap; it is told afterwards.
                    self._was_told.wait(1)
                    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                    return f"rank {rank} dead ({how})"
            if not any(code is None for code in codes):
                return ""
            time.sleep(0.002)
        return "that it takes too long"

    def _left(self) -> int:
        """How many processes bear the mark of this job, asked of the system itself."""
        environments = []
        for path in glob.glob("/proc/[0-9]*/environ"):
            with contextlib.suppress(OSError), open(path, "rb") as file:
                environments.append(file.read().split(b"\0"))
        return sum(f"{_MARK}={self._folder}".encode() in each for each in environments)

    def _happened(self, event: Event) -> None:
        """Tell of an event of the server; called on the thread of its listener."""
        if isinstance(event, TimerReleased):
            # Of the first rank, whose every second one is that of an all-reduce. A rank that is
            # stopped leaves its block as well.
            is_told = event.rank == 0 and not self._is_hanging
            self._blocks_left += is_told
            if is_told and self._blocks_left % 2 == 0:
                self._tell(f"step {self._blocks_left // 2} is done")
        elif isinstance(event, JobHangs):
            self._is_hanging = True
            answer = who_hangs([cast("Picture", event.picture)])
            self._suspects += [member["rank"] for member in answer["suspects"]]
            # Not its whole stack, which the log has.
            answer_alone = describe(answer).partition("\nrank ")[0]
            for line in answer_alone.splitlines():
                self._tell(f"  {line}", "1;31" if line.startswith("suspect") else "33")
        else:
            assert isinstance(event, WorkerSignalled)
            self._reaped.append(event.rank)
            late = f"{1000 * event.seconds_late:.0f} ms after its deadline"
            self._tell(f"the server reaps rank {event.rank} and its child, {late}", "1;31")
            self._was_told.set()

    def _tell(self, what: str, colour: str = "0") -> None:
        moment = f"{time.monotonic() - self._started:6.2f} s  "
        with self._telling:  # Two threads do this; each line is to be whole.
            print(_coloured(moment, "2") + _coloured(what, colour), flush=True)


def _coloured(text: str, colour: str) -> str:
    is_wanted = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    if colour == "0" or not is_wanted or os.environ.get("NO_COLOR"):
        return text
    return f"\x1b[{colour}m{text}\x1b[0m"


if __name__ == "__main__":
    train()
