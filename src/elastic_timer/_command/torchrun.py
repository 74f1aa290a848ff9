"""Whether COMMAND starts torchrun in a way in which a job does not survive a reap; pure."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from os.path import basename
from typing import NoReturn

NOT_SHARED = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
"""With this variable at 1, each attempt has a store of its own with the dynamic rendezvous."""

# What runs the rest of its arguments as they are, behind these words, if no option follows.
_WRAPPERS: dict[str, list[str]] = {"nohup": [], "setsid": [], "uv": ["run"], "poetry": ["run"]}
_PYTHON = re.compile(r"python(\d+(\.\d+)?t?)?")
_PYTHON_FLAG = re.compile(r"-[bBdEIOPqsSuvx]+")
_MODULES = ("torch.distributed.run", "torch.distributed.launch")

# Few of these matter. The others have to be known to tell where the script's own arguments begin.
_WITH_VALUE = (
    *("nnodes", "nproc-per-node", "rdzv-backend", "rdzv-endpoint", "rdzv-id", "rdzv-conf"),
    *("max-restarts", "monitor-interval", "start-method", "event-log-handler", "role", "log-dir"),
    *("redirects", "tee", "local-ranks-filter", "duplicate-stdout-filters"),
    *("duplicate-stderr-filters", "node-rank", "master-addr", "master-port", "local-addr"),
    *("logs-specs", "numa-binding", "signals-to-handle", "shutdown-timeout"),
)
_FLAGS = ("standalone", "module", "no-python", "run-path", "virtual-local-rank", "use-env")
_SHORT = {"redirects": "-r", "tee": "-t", "module": "-m"}

# The rendezvous that heed the variable.
_DYNAMIC = ("c10d", "etcd-v2")


def warnings(command: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """What is to be said of COMMAND; nothing where it is not clear what that does.

    Args:
        command: COMMAND and its arguments.
        environment: What it is started with; torchrun takes defaults of its options from there.
    """
    found = _find_torchrun(list(command), dict(environment))
    if found is None:
        return []
    arguments, environment = found
    try:
        options = parser(environment).parse_args(arguments)
        return list(_complaints(options, environment))
    except ValueError:  # Torchrun itself complains, or it is one that knows more options.
        return []


def _find_torchrun(
    command: list[str], environment: dict[str, str]
) -> tuple[list[str], dict[str, str]] | None:
    """The arguments and the environment of torchrun; None where this is not torchrun."""
    while command:
        program = basename(command.pop(0))
        if program == "torchrun":
            return command, environment
        if _PYTHON.fullmatch(program):
            while command and _PYTHON_FLAG.fullmatch(command[0]):
                command.pop(0)
            if command[:1] == ["-m"] and command[1:2] and command[1] in _MODULES:
                return command[2:], environment
            is_script = command[:1] and basename(command[0]) == "torchrun"
            return (command[1:], environment) if is_script else None
        if program == "env":
            while command and re.match(r"\w+=", command[0]):
                name, _, value = command.pop(0).partition("=")
                environment[name] = value
        elif program in _WRAPPERS and command[: len(_WRAPPERS[program])] == _WRAPPERS[program]:
            del command[: len(_WRAPPERS[program])]
        else:
            return None
    return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parser(environment: Mapping[str, str]) -> argparse.ArgumentParser:
    """A parser of torchrun's options, the values as they are; it raises ValueError."""
    result = _Parser(add_help=False)
    for name in (*_WITH_VALUE, *_FLAGS):
        dest = name.replace("-", "_")
        names = dict.fromkeys([f"--{name}", f"--{dest}", _SHORT.get(name, f"--{name}")])
        default = environment.get(f"PET_{dest.upper()}")
        if name in _FLAGS:
            result.add_argument(*names, action="store_true", default=bool(int(default or 0)))
        else:
            result.add_argument(*names, default=default)
    result.add_argument("training_script")
    result.add_argument("training_script_args", nargs=argparse.REMAINDER)
    return result


def _complaints(options: argparse.Namespace, environment: Mapping[str, str]) -> Iterator[str]:
    if int(options.max_restarts or 0) == 0:
        yield (
            "torchrun has no restart to spare and gives up at the first worker that is reaped: "
            "give it some with --max-restarts"
        )
    most_nodes = int((options.nnodes or "1").split(":")[-1])
    backend = options.rdzv_backend or "static"
    is_default = backend == "static" and not options.rdzv_endpoint and options.master_port is None
    if options.standalone or (is_default and most_nodes == 1):
        backend = "c10d"
    if backend == "static" and most_nodes > 1:
        yield (
            "torchrun's static rendezvous does not bring several nodes together again after a "
            "reap: use --rdzv-backend c10d --rdzv-id ID --rdzv-endpoint HOST:PORT instead of "
            "--master-addr, --master-port and --node-rank"
        )
    elif backend == "static":
        yield (
            "torchrun's static rendezvous keeps its store, in which the restarted ranks look for "
            "the dead ones: leave --master-port and --rdzv-endpoint out, or add --standalone"
        )
    elif backend in _DYNAMIC and environment.get(NOT_SHARED, "1") != "1":
        yield (
            f"{NOT_SHARED} is {environment[NOT_SHARED]!r}: the restarted ranks look for the dead "
            "ones in the store that they share with torchrun; unset the variable, or set it to 1"
        )
