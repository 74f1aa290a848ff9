"""Every name of the installed torch's timer package exists here and takes the same parameters.

What is compared is read off the installed torch, so that a newer one is held against as well.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import NamedTuple

import pytest

import elastic_timer

pytest.importorskip("torch", reason="needs torch: pip install 'elastic-timer[interop]'")
upstream = importlib.import_module("torch.distributed.elastic.timer")

EMPTY = inspect.Parameter.empty
# The only parameter that may be left out here and not upstream: configure() without a client.
DEFAULT_ADDED = {("configure", "timer_client")}


class Pair(NamedTuple):
    """Something of upstream's and its counterpart's place here."""

    name: str
    theirs: object
    owner: object


def upstream_modules() -> list[ModuleType]:
    """The modules of upstream's package."""
    return [
        importlib.import_module(f"{upstream.__name__}.{module.name}")
        for module in pkgutil.iter_modules(upstream.__path__)
    ]


def our_module(theirs: ModuleType) -> ModuleType:
    """The module that stands in for one of upstream's."""
    return importlib.import_module(theirs.__name__.replace(upstream.__name__, "elastic_timer"))


def definitions() -> Iterator[Pair]:
    """Every class and function that upstream's modules define themselves."""
    for module in upstream_modules():
        for name, thing in vars(module).items():
            is_definition = isinstance(thing, (type, FunctionType))
            if is_definition and thing.__module__ == module.__name__:
                yield Pair(name, thing, our_module(module))


def members() -> Iterator[Pair]:
    """Every method and property that a class of upstream's defines itself."""
    for name, theirs, module in definitions():
        if isinstance(theirs, type):
            for attribute, member in vars(theirs).items():
                if isinstance(member, (FunctionType, staticmethod, classmethod, property)):
                    yield Pair(f"{name}.{attribute}", member, getattr(module, name, None))


DEFINITIONS = list(definitions())
MEMBERS = list(members())
CLASSES = [pair for pair in DEFINITIONS if isinstance(pair.theirs, type)]


def each(pairs: list[Pair]) -> pytest.MarkDecorator:
    """Run a test once for each pair, named after upstream's part of it."""
    return pytest.mark.parametrize("pair", pairs, ids=[pair.name for pair in pairs])


def assert_accepts_the_same(name: str, ours: object, theirs: object) -> None:
    """Hold our parameters to upstream's, with extras only behind them and with defaults."""
    our_parameters = list(signature(ours).parameters.values())
    their_parameters = list(signature(theirs).parameters.values())
    for our, their in zip(our_parameters, their_parameters, strict=False):
        assert (our.name, our.kind) == (their.name, their.kind)
        if (name, their.name) not in DEFAULT_ADDED:
            assert our.default == their.default, f"another default for {our.name}"
    assert len(our_parameters) >= len(their_parameters), "parameters are missing"
    for extra in our_parameters[len(their_parameters) :]:
        variadic = extra.kind in (extra.VAR_POSITIONAL, extra.VAR_KEYWORD)
        assert variadic or extra.default is not EMPTY, f"{extra.name} must have a default"


def signature(thing: object) -> inspect.Signature:
    """The signature of a function, class, method or property."""
    if isinstance(thing, (staticmethod, classmethod)):
        thing = thing.__func__
    if isinstance(thing, property):
        thing = thing.fget
    assert callable(thing)
    found = inspect.signature(thing)
    decorated = [
        cell.cell_contents
        for cell in getattr(thing, "__closure__", None) or ()
        if isinstance(cell.cell_contents, FunctionType)
    ]
    if list(found.parameters) == ["args", "kwargs"] and decorated:
        # A decorator without functools.wraps: what counts is the function below it.
        return signature(decorated[0])
    return found


def test_the_comparison_sees_what_upstream_defines() -> None:
    """The walk through upstream's package finds modules, classes and methods, private ones too."""
    assert len(upstream_modules()) >= 4
    names = {pair.name for pair in DEFINITIONS + MEMBERS}
    assert {"expires", "_retry", "FileTimerServer._get_requests", "TimerServer.start"} <= names


@each(DEFINITIONS)
def test_definition(pair: Pair) -> None:
    """A class or function of upstream's exists here and is called in the same way."""
    ours = getattr(pair.owner, pair.name)
    assert_accepts_the_same(pair.name, ours, pair.theirs)


@each(MEMBERS)
def test_member(pair: Pair) -> None:
    """A method or property of upstream's exists here, is of the same sort and called alike."""
    attribute = pair.name.partition(".")[2]
    ours = inspect.getattr_static(pair.owner, attribute)
    for sort in (staticmethod, classmethod, property):
        assert isinstance(ours, sort) == isinstance(pair.theirs, sort)
    assert_accepts_the_same(pair.name, ours, pair.theirs)


@each(CLASSES)
def test_class_hierarchy(pair: Pair) -> None:
    """A class here derives from the counterparts of upstream's bases, abstract where they are."""
    ours, theirs = getattr(pair.owner, pair.name), pair.theirs
    assert isinstance(theirs, type)
    for base in CLASSES:
        if base.theirs in theirs.__mro__:
            assert issubclass(ours, getattr(base.owner, base.name))
    abstract = "__abstractmethods__"
    assert getattr(ours, abstract, set()) == getattr(theirs, abstract, set())
    assert (ours.__hash__ is None) == (theirs.__hash__ is None)
    assert bool(ours.__dictoffset__) == bool(theirs.__dictoffset__), "one of them has no slots"


@pytest.mark.parametrize("module", upstream_modules(), ids=lambda module: module.__name__)
def test_all(module: ModuleType) -> None:
    """What upstream's module lists in `__all__`, ours lists as well."""
    ours = our_module(module)
    assert set(module.__all__) <= set(ours.__all__)
    assert all(hasattr(ours, name) for name in ours.__all__)


def test_package_names() -> None:
    """What upstream's package re-exports, ours re-exports: the same object as in its module."""
    for name, thing in vars(upstream).items():
        if isinstance(thing, (type, FunctionType)):
            module = our_module(importlib.import_module(thing.__module__))
            assert getattr(elastic_timer, name) is getattr(module, name)
            assert name in elastic_timer.__all__
