"""The how-tos for frameworks: their programs run, with the frameworks, and print what they show."""

from __future__ import annotations

import json
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_docs import BLOCKS, run, test_page_runs

__all__ = ["run"]
assert_page_runs = test_page_runs
del test_page_runs  # Here it is not to be collected with the pages of others.

PAGES = [page for page, blocks in BLOCKS.items() if any(block.needs for block in blocks)]


@pytest.fixture
def _ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ray with a folder of its own, which has to have a short path, and its own secret."""
    folder = tempfile.mkdtemp(dir="/tmp")
    monkeypatch.setenv("RAY_TMPDIR", folder)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    yield
    shutil.rmtree(folder)


@pytest.mark.usefixtures("_ray")
@pytest.mark.parametrize("page", PAGES)
def test_page(page: str, run: Callable[..., str], tmp_path: Path) -> None:
    """Every program of the page is run, and it prints what the page says."""
    for block in BLOCKS[page]:
        if block.needs:
            pytest.importorskip(block.needs, reason="needs pip install 'elastic-timer[interop]'")
    assert [block for block in BLOCKS[page] if block.needs and block.prints]
    assert_page_runs(run, tmp_path, page)
    if page == "howto/ray.md":
        assert_each_node_reaped_its_own(tmp_path / "work")


def assert_each_node_reaped_its_own(folder: Path) -> None:
    """Of the two tasks that hung at a time, each was reaped by the server of its own node."""
    hung = []
    for file in ("head.jsonl", "node.jsonl"):
        events = map(json.loads, (folder / file).read_text().splitlines())
        reaped = {line["scope"] for line in events if line["event"] == "kill worker process"}
        hung.append(reaped & {"square 2", "square 3"})
    assert sorted(map(len, hung)) == [1, 1]
    assert len(hung[0] | hung[1]) == 2
