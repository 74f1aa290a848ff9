"""Small wrong changes to a module's source, one at a time."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

_COMPARISONS: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_ARITHMETIC: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Add,
    ast.Pow: ast.Mult,
    ast.Div: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Add,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
_NEVER_RUN = ("annotation", "returns", "decorator_list", "bases")


class Mutant(NamedTuple):
    """A module with one change."""

    line: int
    change: str
    """The statement's first line before and after; names the mutant in `equivalent.py`."""

    tree: ast.Module
    """As it is until the next mutant is asked for: copies of a large module take long."""


def mutants_of(source: str, names: Collection[str] = ()) -> Iterator[Mutant]:
    """All mutants of a module.

    Left as they are: annotations and docstrings, which do nothing, the texts of errors and log
    records, whose wording nobody is promised, and what is for type checkers alone.

    Args:
        source: The module's.
        names: The classes and functions of the module to change; none means all of it.
    """
    tree = ast.parse(source)
    for root in tree.body:
        if not names or getattr(root, "name", None) in names:
            yield from _mutants_below(tree, root, root)


def _mutants_below(tree: ast.Module, node: ast.AST, statement: ast.stmt) -> Iterator[Mutant]:
    if _does_nothing(node):
        return
    statement = node if isinstance(node, ast.stmt) else statement
    for kind, fields in _changes(node):
        untouched = node.__class__, node.__dict__
        before = _first_line(statement)
        node.__class__, node.__dict__ = kind, {**node.__dict__, **fields}
        change = f"{before}  ->  {_first_line(statement)}"
        yield Mutant(statement.lineno, change, tree)
        node.__class__, node.__dict__ = untouched
    if not isinstance(node, ast.Raise):
        for name, value in ast.iter_fields(node):
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST) and name not in _NEVER_RUN:
                    yield from _mutants_below(tree, part, statement)


def _first_line(statement: ast.stmt) -> str:
    return ast.unparse(statement).partition("\n")[0]


def _does_nothing(node: ast.AST) -> bool:
    match node:
        case ast.Expr(ast.Constant()):
            return True
        case ast.If(ast.Name("TYPE_CHECKING")):
            return True
        case ast.Call(ast.Name("cast" | "TypeVar")):
            return True
        case ast.Call(ast.Attribute(ast.Name("logger") | ast.Attribute(attr="logger"))):
            return True
    return False


def _changes(node: ast.AST) -> Iterator[tuple[type[ast.AST], dict[str, Any]]]:
    """What can be made of a node: a kind of node, and the fields that differ."""
    kind = type(node)
    match node:
        case ast.Compare(_, operators):
            for index, operator in enumerate(operators):
                other = _COMPARISONS[type(operator)]()
                yield kind, {"ops": [*operators[:index], other, *operators[index + 1 :]]}
        case ast.BoolOp(operator):
            yield kind, {"op": ast.Or() if isinstance(operator, ast.And) else ast.And()}
        case ast.BinOp(_, operator) | ast.AugAssign(_, operator):
            yield kind, {"op": _ARITHMETIC[type(operator)]()}
        case ast.UnaryOp(ast.Not(), operand):
            yield kind, {"operand": ast.UnaryOp(ast.Not(), operand)}
        case ast.UnaryOp(ast.USub()):
            yield kind, {"op": ast.UAdd()}
        case ast.Constant(bool() as value):
            yield kind, {"value": not value}
        case ast.Constant(int() | float() as value):
            yield kind, {"value": value + 1}
        case ast.Constant(str() as value):
            yield kind, {"value": value + "X"}
        case ast.Constant(bytes() as value):
            yield kind, {"value": value + b"X"}
        case ast.Call(_, [_, *_] as arguments):
            for index in range(len(arguments)):
                yield kind, {"args": arguments[:index] + arguments[index + 1 :]}
        case ast.If(test) | ast.IfExp(test) if not isinstance(test, ast.Compare | ast.UnaryOp):
            yield kind, {"test": ast.UnaryOp(ast.Not(), test)}
        case ast.While():
            yield kind, {"test": ast.Constant(False)}
        case ast.Return(value) if value is not None and ast.unparse(value) != "None":
            yield kind, {"value": ast.Constant(None)}
        case ast.Break():
            yield ast.Continue, {}
        case ast.Continue():
            yield ast.Break, {}
        case ast.Assign([ast.Attribute()]) | ast.Raise() | ast.Delete():
            yield ast.Pass, {}
        case ast.Expr(call) if not _does_nothing(call):
            yield ast.Pass, {}
