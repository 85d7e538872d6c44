"""What documents say of the tests."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SECURITY = ROOT / "docs" / "security.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows(text: str) -> list[str]:
    """The rows of all tables that have a column for tests, without their heads."""
    found, wanted = [], False
    for line in text.splitlines():
        if not line.startswith("|"):
            wanted = False
        elif re.search(r"\| test \|$", line):
            wanted = True
        elif wanted and not line.startswith("| ---"):
            found.append(line)
    return found


def functions(path: Path) -> set[str]:
    """The names of all tests in a file, also those in classes."""
    return {
        node.name
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


CLAIMS = rows(SECURITY.read_text())


def test_there_are_claims() -> None:
    assert len(CLAIMS) > 30
    assert rows("| claim | test |\n| --- | --- |\n| x | y |\n\n| a | b |\n") == ["| x | y |"]


@pytest.mark.parametrize("claim", CLAIMS)
def test_each_claim_about_security_has_its_test(claim: str) -> None:
    named = NAMED.findall(claim.rpartition(" | ")[2])
    assert named, "no test is named"
    for file, name in named:
        assert (ROOT / file).is_file(), file
        assert name in functions(ROOT / file), f"{file} has no {name}"
