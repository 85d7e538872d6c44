"""What documents say of the tests, the code and each other, and that they can be read in a terminal."""

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
SECURITY = DOCS / "security.md"
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted(DOCS.rglob("*.md"))]
WIDTH = 100

NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"")
# Folders and files as the pages name them: with a slash, and no place that is filled in.
PLACE = re.compile(r"(?<![\w./-])((?:zramd|tests|scripts|docs|systemd)/[\w./-]*\w)")
# How architecture.md names a function: `core/device/blocks.pyx: put`, or several.
WALKED = re.compile(r"`([\w/]+\.(?:pyx|pxd|py)):\s+([\w.,\s]+)`")


def by_place(path: Path) -> str:
    return str(path.relative_to(ROOT))


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


# ------------------------------------------------------------------------------------------------------------
# docs/reference.md


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts/lib/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reference_is_what_the_code_says(reference: ModuleType) -> None:
    text = reference.PAGE.read_text()
    assert reference.made(text) == text, "run scripts/reference"


@pytest.mark.parametrize("known", ["FILES", "PATHS", "OWN", "STATUS"])
def test_what_has_no_meaning_is_an_error(
    reference: ModuleType, known: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new file, path, variable or status cannot be forgotten; nor can one that is there no more."""
    text = reference.PAGE.read_text()
    meanings = dict(getattr(reference, known))
    gone = list(meanings)[1]
    monkeypatch.setattr(reference, known, {name: meanings[name] for name in meanings if name != gone})
    with pytest.raises(SystemExit, match=f"not described here: {re.escape(str(gone))};"):
        reference.made(text)
    more = "ZRAMD_NEW" if known == "OWN" else "new"
    monkeypatch.setattr(reference, known, {**meanings, more: "what was never there"})
    with pytest.raises(SystemExit, match=f"but not there: {more}$"):
        reference.made(text)


# ------------------------------------------------------------------------------------------------------------
# all pages


def prose(text: str) -> list[tuple[int, str]]:
    """Numbered lines, but those of code, tables, and what is made by programs."""
    found, code, made = [], False, ""
    for number, line in enumerate(text.splitlines(), 1):
        mark = re.fullmatch(r"<!-- (/?)([\w-]+) -->", line)
        if line.lstrip().startswith("```"):
            code = not code
        elif mark and not code:
            made = "" if mark[1] else mark[2]
        elif not (code or made or line.startswith(("|", "    ", "<"))):
            found.append((number, line))
    return found


def test_prose_is_told_from_the_rest() -> None:
    text = "a\n```sh\nb\n```\n<!-- x -->\nc\n<!-- /x -->\n| d |\n    e\nf\n"
    assert prose(text) == [(1, "a"), (10, "f")]


@pytest.mark.parametrize("page", PAGES, ids=by_place)
def test_lines_fit_into_a_terminal(page: Path) -> None:
    long = [f"{number}: {line}" for number, line in prose(page.read_text()) if len(line) > WIDTH]
    assert not long, "\n".join(long)


def anchors(page: Path) -> set[str]:
    """The names by which the headings of a page are linked to, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=by_place)
def test_links_lead_somewhere(page: Path) -> None:
    lost = []
    for found in LINK.findall(page.read_text()):
        link = found[0] or found[1]
        if re.match(r"\w+:", link):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            lost.append(link)
    assert not lost


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=by_place)
def test_places_in_the_project_are_there(page: Path) -> None:
    """A file or folder that a page names has not been moved since."""
    text = re.sub(r"https?://\S+", "", page.read_text())
    gone = {place for place in PLACE.findall(text) if not (ROOT / place).exists()}
    assert not gone


def source(place: str) -> str:
    return (ROOT / "zramd" / place if (ROOT / "zramd" / place).exists() else ROOT / place).read_text()


def walked() -> list[tuple[str, str]]:
    """Each file with each function that architecture.md has in it."""
    found = WALKED.findall((DOCS / "architecture.md").read_text())
    return [(place, name) for place, names in found for name in re.split(r"[,\s]+", names)]


def test_the_walks_are_found() -> None:
    assert len(walked()) > 60


@pytest.mark.parametrize(("place", "name"), walked())
def test_the_walks_are_true(place: str, name: str) -> None:
    """architecture.md names functions, classes, and words of a table that are in that file."""
    text = source(place)
    last = name.rpartition(".")[2]
    made = rf"(?:def|class|struct|cdef [^\n(=]*?|ZR_REQUEST\(\w+,|#define) *\b{re.escape(last)}\b"
    assert re.search(made, text) or re.search(rf"^ *{re.escape(last)}\b.*=", text, re.MULTILINE), (
        f"{place} has no {name}"
    )


def sentences() -> set[str]:
    """Every text of the code as a pattern, with what is filled in as anything."""
    found = set()
    for path in (ROOT / "zramd").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (re.escape(p.value) if isinstance(p, ast.Constant) else ".+" for p in node.values)
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.escape(node.value))
    return {pattern for pattern in found if len(pattern) > 20}


def quoted(text: str) -> list[str]:
    """What a page quotes of a server's log."""
    return re.findall(r"\(zramd: (.+)\)$", text, re.MULTILINE)


def test_messages_that_are_quoted_are_still_said() -> None:
    patterns = sentences()
    found = [message for page in PAGES for message in quoted(page.read_text())]
    assert found
    for message in (*found, "/dev/nbd0 is in use as swap: stopping some day"):
        said = any(re.fullmatch(pattern, message) for pattern in patterns)
        assert said == (message in found), f"no message of zramd: {message}"


def test_threads_have_the_names_that_they_say() -> None:
    table = (DOCS / "architecture.md").read_text().partition("| thread | ")[2].partition("\n\n")[0]
    named = re.findall(r"^\| `([\w-]+)` ", table, re.MULTILINE)
    assert len(named) > 4
    text = "".join(path.read_text() for path in (ROOT / "zramd").rglob("*.py*") if path.suffix != ".pyc")
    # N stands for a number
    assert {name for name in named if f'"{name.removesuffix("N")}"' not in text} == set()
