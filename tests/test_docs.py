"""The documentation is true: its programs run, its links resolve, its table of modules is right.

README.md has a test module of its own. The blocks of a page are run in their order, in one folder:

- `python` blocks are programs, run below a timer server. One that begins with a comment such as
  `# worker.py` is a file of that name instead, for the blocks behind it.
- `sh` blocks are commands. They are run where a `text` block right behind shows their output.
- A `text` block right behind a program is what it prints; behind a command, with its stderr.
- `<!-- needs: MODULE -->` in the line before one says what has to be installed. Such a page is run
  by `tests/interop/test_frameworks.py`.
- `<!-- not run: REASON -->` in the line before a Python block says that it is not run, and why.
- `<!-- setup: CODE -->` there has lines that are to be run before it.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import pytest

import elastic_timer
from elastic_timer.api import _Unset
from tests.support import REPOSITORY, Spawn

DOCS = REPOSITORY / "docs"
PAGES = {
    path.relative_to(DOCS).as_posix(): path.read_text()
    for path in sorted(DOCS.rglob("*.md"))
    if not path.relative_to(DOCS).parts[0].startswith("_")
}

PACKAGE = Path(elastic_timer.__file__).parent

PATIENCE = 100
"""How long a program of the documentation may take, in seconds; most take three, Ray's twenty."""

COMMANDS = {
    "python": "",
    "elastic-timer": "-m elastic_timer",
    "celery": "-m celery",
    "ray": "-m ray.scripts.scripts",
}
"""The programs of this Python's environment that commands of the documentation call."""

_BLOCK = re.compile(
    r"(?:^<!-- (?P<remark>needs|not run|setup):\s*(?P<detail>.*?)\s*-->\n)?"
    r"^```(?P<language>\w+)\n(?P<text>.*?)^```\n",
    re.MULTILINE | re.DOTALL,
)


class Block(NamedTuple):
    """A program, a file or a command of a page, and what the page says it prints."""

    place: str
    language: str
    text: str
    prints: str | None
    why_not_run: str | None
    needs: str | None
    setup: str

    @property
    def file_name(self) -> str | None:
        """Its name, if it is a file for the blocks behind it."""
        match = re.match(r"# ([\w.]+)\n", self.text)
        return match and match[1]

    @property
    def is_run(self) -> bool:
        """Whether the tests are to run it."""
        if self.needs and not importlib.util.find_spec(self.needs):
            return False
        if self.language == "sh":
            return self.prints is not None
        return self.why_not_run is None


def blocks_of(page: str) -> Iterator[Block]:
    """The Python and shell blocks of a page."""
    text = PAGES[page]
    for match in _BLOCK.finditer(text):
        if match["language"] not in ("python", "sh"):
            continue
        behind = re.compile(r"\n```text\n(.*?)^```\n", re.M | re.S).match(text, match.end())
        detail = {match["remark"]: match["detail"]}
        yield Block(
            place=f"docs/{page}:{text.count(chr(10), 0, match.start('text'))}",
            language=match["language"],
            text=match["text"],
            prints=behind and behind[1],
            why_not_run=detail.get("not run"),
            needs=detail.get("needs"),
            setup=detail.get("setup") or "",
        )


BLOCKS = {page: list(blocks_of(page)) for page in PAGES}


@pytest.fixture
def run(spawn: Spawn, tmp_path: Path) -> Callable[..., str]:
    """`run(command, ..., **popen_kwargs)`: what a command prints; it has to exit with 0.

    It runs in the folder `work`, with the `COMMANDS` of these tests' own environment.
    """
    for name in ("bin", "tmp", "work"):
        (tmp_path / name).mkdir(exist_ok=True)
    for name, module in COMMANDS.items():
        script = tmp_path / "bin" / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {module} "$@"\n')
        script.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}",
        # Beside torch a link to a folder with a short path, as sockets need it.
        "TMPDIR": str((tmp_path / "tmp").resolve()),
    }

    def call(*command: str, **popen_kwargs: Any) -> str:
        child = spawn(
            "import os, sys; os.execvp(sys.argv[1], sys.argv[1:])",
            *command,
            env=environment,
            cwd=tmp_path / "work",
            **popen_kwargs,
        )
        output, _ = child.process.communicate(timeout=PATIENCE)
        assert child.process.returncode == 0, output + child.stderr_text()
        return output

    return call


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")
@pytest.mark.parametrize(
    "page",
    [
        page
        for page, blocks in BLOCKS.items()
        if any(block.is_run for block in blocks) and not any(block.needs for block in blocks)
    ],
)
def test_page_runs(run: Callable[..., str], tmp_path: Path, page: str) -> None:
    """Pasted in their order, a page's programs work, print what it shows, and leave nothing."""
    for number, block in enumerate(BLOCKS[page]):
        if not block.is_run:
            continue
        if block.language == "python":
            file = tmp_path / "work" / (block.file_name or f"program_{number}.py")
            file.write_text(f"{block.setup}\n{block.text}" if block.setup else block.text)
            if block.file_name:
                continue
            output = run("elastic-timer", "run", "--", "python", file.name)
        else:
            output = run("sh", "-c", block.text, stderr=subprocess.STDOUT)
        if block.prints is not None:
            assert comparable(output) == comparable(block.prints, output), block.place
    # A process of multiprocessing that is killed leaves its own temporary folder.
    left = [path for path in (tmp_path / "tmp").iterdir() if not path.name.startswith("pymp-")]
    assert left == []


def comparable(shown: str, real: str = "") -> str:
    """Output without what differs from run to run, or from one system to another."""
    shown = re.sub(r"(/[\w.+-]+)+/", "", shown)
    shown = re.sub(r"command: \S+ ", "command: python ", shown)
    shown = re.sub(r"\b(worker |killed |run-)\d+", r"\1N", shown)
    shown = re.sub(r"\b\d+\.\d+ s\b", "N s", shown)
    shown = re.sub(r"^elastic-timer [\d:.]+: ", "elastic-timer NOW: ", shown, flags=re.M)
    shown = re.sub(r"^  state .*$", "  state", shown, flags=re.M)
    if "no stacks: " in (real or shown):  # Not every system lets py-spy read them.
        shown = re.sub(r"^  (no stacks: .*\n|thread .*\n(    .*\n)+)", "", shown, flags=re.M)
    return shown


def test_what_is_not_run_says_why() -> None:
    """Most programs are run, each of the others has its reason, and all output shown is checked."""
    programs = [block for page in BLOCKS.values() for block in page if block.language == "python"]
    left_out = [block for block in programs if not block.is_run and not block.needs]
    assert not [block.place for block in left_out if not block.why_not_run]
    assert len(left_out) <= len(programs) // 4, [block.place for block in left_out]
    for page, blocks in BLOCKS.items():
        if page.startswith(("tutorial", "howto/")):
            shown = [
                block for block in blocks if block.prints is not None and not block.why_not_run
            ]
            assert PAGES[page].count("```text\n") == len(shown), page


LINKING = {
    **{f"docs/{page}": text for page, text in PAGES.items()},
    **{
        path.relative_to(REPOSITORY).as_posix(): path.read_text()
        for path in (REPOSITORY / ".github").rglob("*.md")
    },
}


@pytest.mark.parametrize("page", LINKING)
def test_links_lead_somewhere(page: str) -> None:
    """Every relative link names a file that is there and, where it has one, a heading in it."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", LINKING[page], flags=re.M | re.S)
    for label, link in re.findall(r"\[([^\]]*)\]\(([^)\s]+)\)", text):
        assert label, f"{link} needs a text, for where Markdown is shown without Sphinx"
        path, _, heading = link.partition("#")
        if urlsplit(path).scheme:
            continue
        target = (REPOSITORY / page).parent / path if path else REPOSITORY / page
        assert target.exists(), link
        assert not heading or heading in headings(target.read_text()), link


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_shown_as_such(page: str) -> None:
    """Each has its line below the head: a row behind a blank line is a line of bars and text."""
    text = re.sub(r"^```.*?^```$", "", PAGES[page], flags=re.M | re.S)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert re.search(r"\A.*\n\|[-|: ]+\|\n", table), table


def api_table(module: ModuleType) -> str:
    """The public names of a module: how each is called, and the first line on it."""
    rows = ["| | |", "|---|---|"]
    for name in documented(module):
        public = getattr(module, name)
        rows.append(api_row(name, public))
        classes = public.__mro__[:-1] if isinstance(public, type) else ()
        # Those of the servers' base too, which has no page.
        for member in dict.fromkeys(member for each in classes for member in vars(each)):
            method = getattr(public, member)
            if callable(method) and not member.startswith("_"):
                rows.append(api_row(f"{name}.{member}", method))
    return "\n".join(rows)


def documented(module: ModuleType) -> list[str]:
    """The names that the page of a module describes, those last that it has from another one."""

    def place(name: str) -> tuple[bool, int]:
        public = getattr(module, name)
        return public.__module__ != module.__name__, inspect.getsourcelines(public)[1]

    return sorted(module.__all__, key=place)


def api_row(name: str, public: Callable[..., object]) -> str:
    """A row of it; without annotations, which would make it too wide."""
    signature = inspect.signature(public)
    parameters = [
        parameter.replace(annotation=parameter.empty, default=shown_default(parameter.default))
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    bare = signature.replace(parameters=parameters, return_annotation=signature.empty)
    summary = (inspect.getdoc(public) or "").split("\n\n")[0].replace("\n", " ")
    return f"| `{name}{bare}` | {summary} |".replace("Ellipsis", "...")


def shown_default(default: object) -> object:
    """A default by what can be written; of an object that stands for none, three dots."""
    if isinstance(default, signal.Signals):
        return default.value
    return ... if isinstance(default, _Unset) else default


@pytest.mark.parametrize("page", ["api", "file", "queue", "debug_info"])
def test_reference_can_be_read_unbuilt(page: str) -> None:
    """Before what Sphinx takes from the docstrings stands a table of it."""
    text = PAGES[f"reference/{page}.md"]
    (name,) = re.findall(r"automodule:: (\S+)", text)
    assert api_table(importlib.import_module(name)) in text


def headings(text: str) -> list[str]:
    """The headings of a page as links name them."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)
    found = re.findall(r"^#+ (.*)$", text, re.M)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found]


def test_first_page_is_the_readme() -> None:
    """The first page includes the part of README.md between two marks that are there once."""
    marks = re.findall(r'^:(?:start-after|end-before): "(.+)"$', PAGES["index.md"], re.M)
    readme = (REPOSITORY / "README.md").read_text()
    assert "{include} ../README.md" in PAGES["index.md"]
    assert [readme.count(mark) for mark in marks] == [1, 1]
    introduction = readme[readme.index(marks[0]) : readme.index(marks[1])]
    assert "docs/images/demo.svg" in introduction


@pytest.mark.long
@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("sphinx", "myst_parser", "furo"))),
    reason="needs sphinx, myst-parser and furo: the dependency group docs",
)
def test_builds_without_a_warning(spawn: Spawn, tmp_path: Path) -> None:
    """Sphinx has nothing to complain of, and what it made links to nothing that is not there."""
    built = tmp_path / "html"
    child = spawn(
        "import runpy; runpy.run_module('sphinx', run_name='__main__')",
        *("-W", "--keep-going", "-q", "-d", str(tmp_path / "doctrees"), str(DOCS), str(built)),
        stderr=subprocess.STDOUT,
    )
    output, _ = child.process.communicate(timeout=PATIENCE)
    assert child.process.returncode == 0, output
    pages = {path: LinksOf(path.read_text()) for path in built.rglob("*.html")}
    assert len(pages) > len(PAGES)
    broken = [
        f"{page.relative_to(built)}: {link}"
        for page, links in pages.items()
        for link in links.internal
        if not leads_somewhere(page, link, pages)
    ]
    assert not broken


class LinksOf(HTMLParser):
    """The links within one site, and the anchors, of a page of HTML."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.internal: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of a tag's links and anchor."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value and not urlsplit(value).scheme:
                self.internal.append(value)


def leads_somewhere(page: Path, link: str, pages: dict[Path, LinksOf]) -> bool:
    """Whether a link of a page leads to a file and an anchor that are there."""
    parts = urlsplit(link)
    target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
    if target not in pages:
        return target.exists()
    return not parts.fragment or unquote(parts.fragment) in pages[target].anchors


MODULES = {
    path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def test_table_of_modules() -> None:
    """architecture.md lists every module, and what it imports at run time of the others."""
    rows = re.findall(r"^\| `([\w.]+)` \| .+? \| (.*?) *\|$", PAGES["architecture.md"], re.M)
    told = {module: set(re.findall(r"`([\w.]+)`", imports)) for module, imports in rows}
    # A folder's own module says what the folder is for, and nothing else.
    folders = {name for name in MODULES if name.endswith(".__init__")}
    assert not [name for name in folders if set(imports_of(MODULES[name].read_text()))]
    files = {name: path for name, path in MODULES.items() if name not in folders}
    assert told == {name: set(imports_of(path.read_text())) for name, path in files.items()}


@pytest.mark.parametrize(
    ("statement", "found"),
    [
        ("import elastic_timer._server.loop", {"_server.loop"}),
        ("import os, elastic_timer.api as api", {"api"}),
        ("import elastic_timer", {"__init__"}),
        ("from elastic_timer import api, expires", {"api", "__init__"}),
        ("from elastic_timer._server import loop", {"_server.loop"}),
        ("from elastic_timer._server.loop import Loop", {"_server.loop"}),
        ("def f():\n    import elastic_timer._clock", {"_clock"}),
        ("import_module('elastic_timer.local_timer')", {"local_timer"}),
        ("if TYPE_CHECKING:\n    import elastic_timer.api", set()),
        ("import json, elastic_timers", set()),
    ],
)
def test_every_form_of_import_is_seen(statement: str, found: set[str]) -> None:
    """An import that the table leaves out is noticed in whatever form it is written (S4)."""
    assert set(imports_of(statement)) == found


def imports_of(source: str) -> Iterator[str]:
    """The modules of the package that a module imports, but for type checkers alone."""
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from filter(None, (module_named(name.name) for name in node.names))
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in node.names:
                found = module_named(f"{node.module}.{name.name}") or module_named(node.module)
                if found:
                    yield found
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "import_module":
            yield from filter(None, [module_named(ast.literal_eval(node.args[0]))])


def module_named(name: str) -> str | None:
    """The module of the package that has a name, as the table has it."""
    package, _, module = name.partition(".")
    module = module or "__init__"
    return module if package == "elastic_timer" and module in MODULES else None


def test_linters_are_the_same_everywhere() -> None:
    """The hooks of pre-commit run the linters that the dependency group `lint` names."""
    project = (REPOSITORY / "pyproject.toml").read_text()
    [group] = re.findall(r"^lint = \[(.*?)\]", project, re.M | re.S)
    hooks = (REPOSITORY / ".pre-commit-config.yaml").read_text()
    for tool in ("mypy", "ruff"):
        [requirement] = re.findall(rf'"({tool}[^"]*)"', group)
        assert set(re.findall(rf'"({tool}\W[^"]*)"', hooks)) == {requirement}
