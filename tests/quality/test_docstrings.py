"""Each public name says what it is for: there is a docstring. What is in it is for people to judge."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "zramd"
PYTHON = sorted(PACKAGE.rglob("*.py"))
CYTHON = sorted(PACKAGE.rglob("*.pyx"))

# A class or a function of the compiled core that Python sees, to the end of its head.
HEAD = re.compile(
    r"^(?P<indent> *)(?:@\w[^\n]*\n *)*(?:cdef )?(?:class|def) (?P<name>[A-Za-z]\w*)"
    r"(?:\((?:[^()]|\([^()]*\))*\))?(?: except [^:\n]+)?:[^\n]*\n",
    re.MULTILINE,
)


def public(node: ast.stmt) -> bool:
    return isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_")


def is_protocol(node: ast.ClassDef) -> bool:
    """Its members are what somebody else's are: their names and types say all."""
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def silent(text: str) -> Iterator[str]:
    """The public names in a Python source without a docstring, '' for the module itself."""
    tree = ast.parse(text)
    if tree.body and ast.get_docstring(tree) is None:
        yield ""
    for node in filter(public, tree.body):
        assert isinstance(node, (ast.FunctionDef, ast.ClassDef))
        if ast.get_docstring(node) is None:
            yield node.name
        if isinstance(node, ast.ClassDef) and not is_protocol(node):
            for member in filter(public, node.body):
                assert isinstance(member, (ast.FunctionDef, ast.ClassDef))
                if ast.get_docstring(member) is None:
                    yield f"{node.name}.{member.name}"


def silent_in_cython(text: str) -> Iterator[str]:
    if not text.startswith(('"""', "# ")):
        yield ""
    for match in HEAD.finditer(text):
        # (Of a property, the getter says what it is.)
        if ".setter" not in match[0] and not text[match.end() :].lstrip().startswith('"""'):
            yield match["name"]


def test_each_public_name_has_a_docstring() -> None:
    found = [(path, name) for path in PYTHON for name in silent(path.read_text())]
    found += [(path, name) for path in CYTHON for name in silent_in_cython(path.read_text())]
    assert not found, "\n".join(f"{path.relative_to(ROOT)}: {name or 'the module'}" for path, name in found)


def test_the_search() -> None:
    assert len(PYTHON) > 50
    assert len(CYTHON) > 10
    assert list(silent("x = 1")) == [""]
    assert list(
        silent('"""M."""\ndef f(): pass\ndef _g(): pass\nclass C:\n    """C."""\n    def m(self): pass')
    ) == [*("f", "C.m")]
    assert list(silent('"""M."""\nclass P(Protocol):\n    """P."""\n    def m(self): ...')) == []
    heads = sum(len(HEAD.findall(path.read_text())) for path in CYTHON)
    assert heads > 50
    assert list(silent_in_cython('"""M."""\ndef f(size_t a,\n      b=(1, 2)):\n    return 1\n')) == ["f"]
    assert list(
        silent_in_cython('"""M."""\ncdef class C:\n    """C."""\n    def m(self):\n        pass\n')
    ) == ["m"]
    assert list(silent_in_cython('"""M."""\ncdef int g() noexcept nogil:\n    return 1\n')) == []
