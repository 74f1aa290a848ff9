"""What `run` makes of torchrun's options, held against the torchrun that is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from elastic_timer._command import torchrun

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")
from torch.distributed import launch, run
from torch.distributed.elastic.rendezvous import dynamic_rendezvous


def test_every_option_is_known() -> None:
    """Each of torchrun's is known to take a value or none: so the script's own are told apart."""
    ours = torchrun.parser({})._option_string_actions
    theirs = run.get_args_parser()._option_string_actions
    assert set(theirs) - set(ours) == {"-h", "--help"}
    assert set(ours) - set(theirs) == {"--use-env", "--use_env"}  # torch.distributed.launch's
    for option, action in ours.items():
        if option in theirs:
            assert (action.dest, action.nargs) == (theirs[option].dest, theirs[option].nargs)
    assert launch.parse_args(["--use-env", "train.py"]).use_env is True


@pytest.mark.parametrize(
    "environment", [{}, {"PET_NNODES": "2", "PET_MAX_RESTARTS": "1"}, {"PET_STANDALONE": "1"}]
)
@pytest.mark.parametrize(
    "options",
    [
        "--max-restarts 3 --max-rest 2",
        "--max-restarts 3",
        "--max-restarts 3 --standalone",
        "--max-restarts 3 --nnodes 1:1 --master-addr a",
        "--max-restarts 3 --nnodes 1:2",
        "--max-restarts 3 --master-port 1",
        "--max-restarts 3 --rdzv-endpoint a:1",
        "--max-restarts 3 --rdzv-endpoint a:1 --rdzv_backend c10d --nnodes=2",
        "--max-restarts 3 --rdzv-endpoint a:1 --rdzv-backend etcd --nnodes=2",
        "--nproc-per-node 2",
    ],
)
def test_same_verdict(
    options: str, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is warned of the restarts and of the rendezvous that torchrun itself comes to."""
    started = []

    def elastic_launch(config: Any, entrypoint: str) -> Callable[..., None]:
        started.append(config)
        return lambda *args: None

    monkeypatch.setattr(run, "elastic_launch", elastic_launch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    arguments = [*options.split(), "train.py", "--standalone"]
    run.main(arguments)
    [config] = started
    said = torchrun.warnings(["torchrun", *arguments], environment)
    assert any("--max-restarts" in text for text in said) == (config.max_restarts == 0)
    assert any("static" in text for text in said) == (config.rdzv_backend == "static")
    assert any("several nodes" in text for text in said) == (
        config.rdzv_backend == "static" and config.max_nodes > 1
    )


def test_variable() -> None:
    """The store of a dynamic rendezvous is shared unless the variable is 1, as is warned of."""
    handler = object.__new__(dynamic_rendezvous.DynamicRendezvousHandler)
    with pytest.MonkeyPatch.context() as patch:
        for value in ("0", "1", "yes", "", "true"):
            patch.setenv(torchrun.NOT_SHARED, value)
            command = ["torchrun", "--max-restarts", "3", "train.py"]
            said = torchrun.warnings(command, {torchrun.NOT_SHARED: value})
            assert bool(said) == handler.use_agent_store
