"""`elastic-timer run`: what it makes of a COMMAND that is not quite right, and what it logs."""

from __future__ import annotations

import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from elastic_timer._command.main import main
from tests.support import CLI, REPOSITORY, Child, eventually, fill_pipe

# --- what it says of itself


def test_usage(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All options, in the order of the list below it; short lines; as the reference has it."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main(["run", "--help"])
    assert exit_.value.code == 0
    usage, _, options = capsys.readouterr().out.partition("\n\n")
    listed = re.findall(r"^  (?:-h, )?(--[a-z-]+(?: [A-Z]+)?)", options, re.M)
    assert ["--help", *re.findall(r"\[(--[a-z-]+(?: [A-Z]+)?)\]", usage)] == listed
    assert usage.endswith(" -- COMMAND [ARG ...]")
    assert max(map(len, usage.splitlines())) <= 80
    page = (REPOSITORY / "docs/reference/command.md").read_text()
    (shown,) = re.findall(r"```text\n(elastic-timer run .*?)```", page, re.S)
    assert shown.split() == usage.replace(" [-h]", "").split()[1:]
    described = re.findall(r"^`(--[^`]+)`$", page, re.M)[: len(listed) - 1]
    assert described == listed[1:]


def test_collective(run: Callable[..., Child], tmp_path: Path) -> None:
    """Where the named function is all that tells two ranks apart, the log says so."""
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, subprocess, sys, time, elastic_timer

            def meet(): time.sleep(60)
            def load(): time.sleep(60)

            def step(do):
                with elastic_timer.expires(after=0.5, scope="step"):
                    do()

            if "RANK" in os.environ:
                elastic_timer.configure()
                step(meet if os.environ["RANK"] == "0" else load)
            command = [sys.executable, __file__]
            job = {**os.environ, "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": __file__}
            ranks = [subprocess.Popen(command, env={**job, "RANK": rank}) for rank in "01"]
            print([rank.wait() for rank in ranks])
            """
        )
    )
    child = run("--collective", "other", "--collective", "meet", "--", sys.executable, str(script))
    assert child.wait() == 0
    suspects = [line for line in child.stderr_text().splitlines() if "suspect" in line]
    reason = "the only one that does not wait in a collective"
    assert [re.sub(r"\(.*?\)", "()", line) for line in suspects] == [
        f"suspect: rank 1 (), {reason}"
    ]


# --- a COMMAND without an interpreter's name


def executable(path: Path, content: bytes) -> str:
    """A file that may be executed."""
    path.write_bytes(content)
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("is_found_on_path", [False, True])
def test_s2_script_without_a_shebang(
    run: Callable[..., Child],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    is_found_on_path: bool,
) -> None:
    """A script that does not name its interpreter is run by sh, with its arguments."""
    script = executable(tmp_path / "script", b'echo "$# $1"; kill -USR1 $$\n')
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    child = run("--", "script" if is_found_on_path else script, "a b", "c")
    assert child.readline() == "2 a b"
    assert child.wait() == 128 + signal.SIGUSR1


def test_s2_program_of_another_machine(run: Callable[..., Child], tmp_path: Path) -> None:
    """What can't be executed and is no text is not handed to sh: 126, and the reason."""
    program = executable(tmp_path / "program", b"\x7fELF\x02\x01\x01" + bytes(100))
    child = run("--", program)
    assert child.wait() == 126
    assert f"cannot run {program}: " in child.stderr_text()


def test_s2_without_a_shell(run: Callable[..., Child], tmp_path: Path) -> None:
    """Without sh a script can't be run, and says so; other commands can."""
    source = f"from elastic_timer._command import run; run._SHELL = '/no/shell'\n{CLI}"
    script = executable(tmp_path / "script", b"exit 0\n")
    child = run("--", script, source=source)
    assert child.wait() == 127
    assert f"cannot run {script}: " in child.stderr_text()
    child = run("--", "sh", "-c", "echo ready; exec sleep 60", source=source)
    assert child.readline() == "ready"
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM


def test_signals_where_cat_is_missing(run: Callable[..., Child]) -> None:
    """Without what tells of signals to the group they are all forwarded."""
    child = run(
        "--",
        sys.executable,
        "-c",
        "import time; print('ready', flush=True); time.sleep(60)",
        source=f"import os; os.environ['PATH'] = '/none'\n{CLI}",
    )
    assert child.readline() == "ready"
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM


# --- a COMMAND without -- before it


@pytest.mark.parametrize("arguments", [["torchrun", "x.py"], ["--run-id", "a b", "python", "-u"]])
def test_s6_command_without_dashes(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """`run torchrun x.py` is refused with what was left out."""
    with pytest.raises(SystemExit) as exit_:
        main(["run", *arguments])
    assert exit_.value.code == 2
    assert "; write -- before COMMAND\n" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["demo", "fast"], ["run", "sh", "--", "true"]])
def test_s6_not_where_that_would_not_help(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """What stands before -- by mistake, and what the demo does not know, gets no such advice."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    told = capsys.readouterr().err
    assert "unrecognized arguments" in told
    assert "write --" not in told


# --- the log


def test_s8_time(run: Callable[..., Child]) -> None:
    """Each record has its time, and its traceback where there is one."""
    source = f"""
        import logging, time
        from elastic_timer._command import run as command

        def tell(*_):
            before = time.time()
            logger = logging.getLogger("elastic_timer")
            logger.warning("%s of them", "all")
            try:
                raise ValueError("\\udcff")
            except ValueError:
                logger.exception("why")
            print(before, time.time())
            return 0

        command.run = tell
        {CLI}
        """
    child = run("--", "true", source=source)
    before, after = map(float, child.readline().split())
    assert child.wait() == 0
    plain, error, *traceback = child.stderr_text().splitlines()
    for line, rest in ((plain, ": all of them"), (error, ": why")):
        moment = line.removeprefix("elastic-timer ").removesuffix(rest)
        assert re.fullmatch(r"\d\d:\d\d:\d\d\.\d{3}", moment), line
        possible = {time.strftime("%H:%M:%S", time.localtime(t)) for t in (before, after)}
        assert moment[:8] in possible
    assert traceback[0].startswith("Traceback")
    assert traceback[-1] == "ValueError: \\udcff"


def test_s8_rank(run: Callable[..., Child]) -> None:
    """A line on a worker that was started with a rank says which, and says it once."""
    worker = """
        import subprocess, time, elastic_timer
        elastic_timer.configure()
        with elastic_timer.expires(after=0.5, scope="too long"), subprocess.Popen(["sleep", "60"]):
            time.sleep(60)
        """
    command = ("env", "RANK=3", sys.executable, "-c", textwrap.dedent(worker))
    child = run("--kill-tree", "--before-kill", "exit 5", "--", *command)
    assert child.wait() == 128 + signal.SIGKILL
    lines = [line for line in child.stderr_text().splitlines() if "worker" in line]
    told = [re.sub(r"^.*?: ", "", line) for line in lines]
    told = [re.sub(r"worker \d+ \(rank 3\)", "WORKER", line) for line in told]
    # What it had started is killed at once after it; that it was reaped is told by a listener.
    hook, killed, reaped, past = sorted(told)
    assert killed.startswith("Killed what WORKER had started: ")
    assert past.startswith("WORKER of run ")
    assert hook == "--before-kill: ended with exit status 5 for WORKER"
    assert reaped.startswith("Reaped WORKER with signal 9, ")
    assert [line.count("rank 3") for line in lines] == [1, 1, 1, 1]


@pytest.fixture
def full_pipe() -> Iterator[int]:
    """The writing end of a pipe into which nothing more goes, and that nobody reads."""
    read, write = os.pipe()
    fill_pipe(write)
    os.set_blocking(write, True)
    yield write
    os.close(write)
    os.close(read)


@pytest.mark.long
def test_b1_log_that_nobody_reads(
    run: Callable[..., Child], full_pipe: int, tmp_path: Path
) -> None:
    """With a stderr that blocks signals are forwarded, a reap is made, and `run` ends."""
    script = """
        import os, subprocess, sys, time, elastic_timer
        worker = subprocess.Popen([sys.executable, "-c",
            "import time, elastic_timer as e; e.configure()\\n"
            "with e.expires(after=0.1): time.sleep(60)"], stderr=subprocess.DEVNULL)
        print(worker.wait(), flush=True)
        time.sleep(60)
        """
    # Stacks are not what this is about, and take their time where there is no ptrace.
    source = f"from elastic_timer.debug_info_logging import set_stacks_timeout as s; s(0)\n{CLI}"
    command = ("--", sys.executable, "-c", textwrap.dedent(script))
    child = run(*command, source=source, stderr=full_pipe)
    assert child.readline() == str(-signal.SIGKILL)
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == 128 + signal.SIGTERM
    child = run("--", "/no/such/command", stderr=full_pipe)
    assert child.wait() == 127
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/wchan").exists(), reason="this system does not tell")
def test_b1_usage_error_that_nobody_reads(
    run: Callable[..., Child], full_pipe: int, tmp_path: Path
) -> None:
    """What is wrong with the usage may block on stderr; the signals are answered even then."""
    child = run("--events", str(tmp_path / "missing/events"), "--", "true", stderr=full_pipe)
    eventually(lambda: _wait_channel_is_pipe(child.pid))
    os.kill(child.pid, signal.SIGTERM)
    assert child.wait() == -signal.SIGTERM


def _wait_channel_is_pipe(pid: int) -> bool:
    return "pipe" in Path(f"/proc/{pid}/wchan").read_text()
