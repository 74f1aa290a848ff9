"""What README.md and docs/differences.md say is so: snippets, commands, links, test names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support import REPOSITORY, Spawn

README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SNIPPETS = [text for language, text in BLOCKS if language == "python"]


@pytest.mark.long
@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(spawn: Spawn, tmp_path: Path, number: int) -> None:
    """Pasted into a file and run as it stands, below a server for those that need one."""
    script = tmp_path / "snippet.py"
    script.write_text(SNIPPETS[number])
    child = spawn(
        """
        import sys
        from elastic_timer._command.main import main
        sys.exit(main(["run", "--", sys.executable, *sys.argv[1:]]))
        """,
        str(script),
    )
    assert child.process.stdout is not None
    output = child.process.stdout.read()
    assert child.wait() == 0, child.stderr_text()
    if "the last one hangs" in SNIPPETS[number]:
        [shown] = [text for language, text in BLOCKS if language == "text"]
        assert output == shown
        [line] = [
            number
            for number, text in enumerate(SNIPPETS[number].splitlines(), 1)
            if "with expires(" in text
        ]
        assert f"{script}#{line}" in child.stderr_text()
    elif "exitcode" in SNIPPETS[number]:
        assert output == "exit code -9\n"
    else:
        assert output == ""


def test_two_commands_set_everything_up() -> None:
    """Two commands and no more: one ends with the demo, one with the tests; CI runs both."""
    commands = [text for language, text in BLOCKS if language == "bash"]
    assert [len(command.splitlines()) for command in commands] == [1, 1]
    demo, tests = commands
    assert demo.startswith("python3 -m venv .venv && ")
    assert demo.endswith(".venv/bin/elastic-timer demo\n")
    assert tests.startswith("python3 -m venv .venv-test && ")
    assert tests.endswith("-m pytest\n")
    ci = (REPOSITORY / ".ci/run").read_text()
    assert 'grep "^python3 -m venv $1 " README.md' in ci
    assert "readme_command .venv)" in ci
    assert "readme_command .venv-test)" in ci


def test_links_lead_somewhere() -> None:
    """Every relative link names a file that is there, and a heading in it."""
    links = re.findall(r"\]\(([^)#:]+)(?:#([^)]+))?\)", README)
    assert links
    for path, anchor in links:
        text = (REPOSITORY / path).read_text()
        headings = [re.sub(r"[^\w]+", "-", h.lower()) for h in re.findall(r"^#+ (.*)$", text, re.M)]
        assert not anchor or anchor in headings


def test_differences_name_their_tests() -> None:
    """Rows D1 to D18 of docs/differences.md name tests of their own; every test named is there."""
    text = (REPOSITORY / "docs/differences.md").read_text()
    there = (REPOSITORY / "tests/test_differences.py").read_text()
    rows = dict(re.findall(r"^### D(\d+)\. (.*?)(?=^##)", text, re.MULTILINE | re.DOTALL))
    assert sorted(map(int, rows)) == list(range(1, 19))
    for number, row in rows.items():
        tests = re.findall(r"`(test_d\d\d_\w+)`", row)
        assert tests
        for test in tests:
            assert test.startswith(f"test_d{int(number):02}_")
            assert f"def {test}(" in there
    assert not missing_tests(text)


def test_guarantees_name_their_tests() -> None:
    """Each promise of docs/guarantees.md names a test, and every test it names is there."""
    text = (REPOSITORY / "docs/guarantees.md").read_text()
    promises = re.findall(r"^\| (?!promise|---)(.*) \| (.*) \|$", text, re.MULTILINE)
    assert len(promises) > 20
    for promise, named in promises:
        assert re.search(r"`test_\w+`", named), promise
    assert not missing_tests(text)


def missing_tests(text: str) -> set[str]:
    """The names of tests in a page that no test has."""
    there = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("test_*.py"))
    return set(re.findall(r"`(test_\w+)`", text)) - set(re.findall(r"def (test_\w+)\(", there))
