"""tests/typing/api.py, which type checkers read and nobody runs, leaves no public name out."""

from __future__ import annotations

import ast

import pytest

from tests.support import REPOSITORY
from tests.test_public_surface import DOCUMENTED

TREE = ast.parse((REPOSITORY / "tests/typing/api.py").read_text())
NAMES = {node.id for node in ast.walk(TREE) if isinstance(node, ast.Name)}
ATTRIBUTES = {node.attr for node in ast.walk(TREE) if isinstance(node, ast.Attribute)}
OVERRIDDEN = {node.name for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef)}
KEYWORDS = {node.arg for node in ast.walk(TREE) if isinstance(node, ast.keyword)}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_typing_of_every_name_is_checked(name: str) -> None:
    """Each public class, function and method is used there, or overridden."""
    last = name.rpartition(".")[2]
    assert last in NAMES | ATTRIBUTES | OVERRIDDEN | {"__call__"}


def test_typing_of_what_is_new_is_checked() -> None:
    """So is each keyword that torch's timers do not have, and each way to use `expires`."""
    assert {"reap_self", "kill_after", "required"} <= KEYWORDS
    decorated = {
        type(node)
        for node in ast.walk(TREE)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.decorator_list
    }
    assert decorated == {ast.FunctionDef, ast.AsyncFunctionDef}
    assert any(isinstance(node, ast.AsyncWith) for node in ast.walk(TREE))
    bases = {
        base.id
        for node in ast.walk(TREE)
        if isinstance(node, ast.ClassDef)
        for base in node.bases
        if isinstance(base, ast.Name)
    }
    assert bases >= {"TimerClient", "RequestQueue", "TimerServer"}
