"""What docs/howto/who-hangs.md shows is what the command makes of that job's events."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from elastic_timer._command.main import main
from tests.support import REPOSITORY

EVENTS = Path(__file__).parent / "recorded_hang"
"""Those of the job of the page."""

PAGE = (REPOSITORY / "docs/howto/who-hangs.md").read_text()
IMAGES = REPOSITORY / "docs/images"


def test_reports(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that the page has the output of."""
    monkeypatch.chdir(EVENTS)
    shown = re.findall(r"^\$ elastic-timer (report .*)\n((?:(?!```).*\n)+)", PAGE, re.M)
    assert [command for command, _ in shown] == [
        "report node-a.jsonl node-b.jsonl",
        "report node-a.jsonl",
    ]
    for command, output in shown:
        assert main(command.split()) == 0
        assert capsys.readouterr().out == output, command


def test_flame_graph(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is drawn from what `--folded` writes."""
    monkeypatch.chdir(EVENTS)
    main(["report", "--folded", str(tmp_path / "folded"), "node-a.jsonl", "node-b.jsonl"])
    path = IMAGES / "flame_graph.py"
    spec = importlib.util.spec_from_file_location("flame_graph", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    drawn = module.draw((tmp_path / "folded").read_text())
    assert drawn == (IMAGES / "who-hangs.svg").read_text()
