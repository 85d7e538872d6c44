"""What a docstring owes its reader, as far as a machine can see: that it is there, what is raised, and units.

A source becomes `Said`s: one for each public class, function and method. Python is parsed; of Cython, which
Python cannot parse, the heads are found by their shape, and the parameters' types come from the stub (.pyi).
"""

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "zramd"
PYTHON = sorted(PACKAGE.rglob("*.py"))
CYTHON = sorted(PACKAGE.rglob("*.pyx"))

# A class or a function of the compiled core that Python sees, to the end of its head.
HEAD = re.compile(
    r"^(?P<indent> *)(?:@\w[^\n]*\n *)*(?P<kind>(?:cdef )?class|def) (?P<name>\w+)"
    r"(?:\((?:[^()]|\([^()]*\))*\))?(?: except [^:\n]+)?:[^\n]*\n",
    re.MULTILINE,
)
DOCSTRING = re.compile(r'\s*"""(.*?)"""', re.DOTALL)

# Names of amounts, unless they end in their unit (`read_bytes`, `stats_seconds`).
AMOUNT = re.compile(
    r"(?:^|_)(?:size|offset|length|timeout|interval|age|budget|patience|period|duration|delay|pause)$"
    r"|(?:^|_)limit$",
    re.IGNORECASE,
)
# What a docstring says of errors by naming a neighbour that raises the same.
AS = re.compile(r"\b[Rr]aises as\s+`(\w+)`")
UNIT = re.compile(
    r"\b(?:bytes?|[KMG]i?B|megabytes?|pages?|blocks?|objects?|clients?|connections?|lines?|columns?|cells?"
    r"|seconds?|s|ms|us|ns|milliseconds?|nanoseconds?|minutes?|words?|spans?|requests?|letters?)\b",
    re.IGNORECASE,
)


@dataclass
class Said:
    """One public name: its docstring (with that of its class), what it raises, and its amounts' names."""

    name: str
    docstring: str | None
    context: str = ""  # the docstring of its class
    raises: set[str] = field(default_factory=set)
    amounts: list[str] = field(default_factory=list)

    def faults(self, others: dict[str, str]) -> Iterator[str]:
        """Find what its reader misses, as parts of sentences; others: docstrings, for "raises as `NAME`"."""
        if self.docstring is None:
            yield "has no docstring"
            return
        text = f"{self.docstring}\n{self.context}"
        text += "".join(others.get(name, "") for name in AS.findall(text))
        for name in sorted(self.raises):
            if not re.search(rf"\b{name}\b", text):
                yield f"raises {name} and does not say so"
        if not UNIT.search(text):
            yield from (f"says no unit of {amount}" for amount in self.amounts)


def exceptions() -> dict[str, tuple[str, ...]]:
    """Return the exceptions whose raising is to be said, each with the names that catch it too."""
    tree = ast.parse((PACKAGE / "errors.py").read_text())
    bases = {"OSError": ("Exception",), "MemoryError": ("Exception",), "ValueError": ("Exception",)}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            direct = [base.id for base in node.bases if isinstance(base, ast.Name)]
            bases[node.name] = (*direct, *(above for base in direct for above in bases.get(base, ())))
    return bases


EXCEPTIONS = exceptions()


def is_public(name: str) -> bool:
    return not name.startswith("_")


# Python


def is_protocol(node: ast.ClassDef) -> bool:
    """Its members are what somebody else's are: their names and types say all."""
    return any(isinstance(base, ast.Name) and base.id == "Protocol" for base in node.bases)


def raised(function: ast.FunctionDef) -> set[str]:
    """Return the exceptions that a function's own statements raise and do not catch."""
    return set().union(*(_raised(node, frozenset()) for node in function.body))


def _raised(node: ast.AST, caught: frozenset[str]) -> set[str]:
    if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
        return set()  # what is defined here is not run here
    if isinstance(node, ast.Try):
        handled = frozenset(name for handler in node.handlers for name in _caught(handler))
        inside = set().union(*(_raised(each, caught | handled) for each in node.body))
        rest = [*node.orelse, *node.finalbody, *(each for handler in node.handlers for each in handler.body)]
        return inside.union(*(_raised(each, caught) for each in rest))
    found = set()
    if isinstance(node, ast.Raise) and node.exc is not None:
        name = _name(node.exc.func if isinstance(node.exc, ast.Call) else node.exc)
        if name in EXCEPTIONS and not caught & {name, *EXCEPTIONS[name]}:
            found.add(name)
    return found.union(*(_raised(child, caught) for child in ast.iter_child_nodes(node)))


def _caught(handler: ast.ExceptHandler) -> Iterator[str]:
    if handler.type is None:
        yield "Exception"
    elif isinstance(handler.type, ast.Tuple):
        yield from map(_name, handler.type.elts)
    else:
        yield _name(handler.type)


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_number(annotation: ast.expr | None) -> bool:
    """Say whether a value may be an amount: no annotation says no."""
    return annotation is None or bool(re.search(r"\b(?:int|float)\b", ast.unparse(annotation)))


def amounts_of(function: ast.FunctionDef) -> list[str]:
    """Return the parameters that need a unit, and the function itself if what it returns does."""
    arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    found = [each.arg for each in arguments if AMOUNT.search(each.arg) and _is_number(each.annotation)]
    if AMOUNT.search(function.name) and function.returns is not None and _is_number(function.returns):
        found.append(function.name)
    return found


def in_python(text: str) -> Iterator[Said]:
    """Find what a Python source says of its public names; '' is the module itself."""
    tree = ast.parse(text)
    lines = text.splitlines()
    if tree.body:
        yield Said("", ast.get_docstring(tree))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and is_public(node.name):
            yield Said(node.name, ast.get_docstring(node), "", raised(node), amounts_of(node))
        elif isinstance(node, ast.ClassDef) and is_public(node.name):
            yield from _in_class(node, lines)
    yield from _constants(tree, lines)


def _in_class(node: ast.ClassDef, lines: list[str]) -> Iterator[Said]:
    head = ast.get_docstring(node)
    yield Said(node.name, head)
    for member in node.body:
        if isinstance(member, ast.AnnAssign) and _is_number(member.annotation):
            name = _name(member.target)
            if is_public(name) and AMOUNT.search(name):
                yield Said(f"{node.name}.{name}", _comment(member, lines), head or "", amounts=[name])
        elif isinstance(member, ast.FunctionDef) and not is_protocol(node):
            said = ast.get_docstring(member)
            if is_public(member.name):
                name = f"{node.name}.{member.name}"
                yield Said(name, said, head or "", raised(member), amounts_of(member))
            elif member.name == "__init__":
                yield Said(node.name, said or head, head or "", raised(member), amounts_of(member))


def _constants(tree: ast.Module, lines: list[str]) -> Iterator[Said]:
    """Find the numbers of a module with the name of an amount."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            name = _name(node.targets[0])
            if AMOUNT.search(name) and isinstance(node.value.value, (int, float)):
                yield Said(name, _comment(node, lines), amounts=[name])


def _comment(node: ast.stmt, lines: list[str]) -> str:
    """Return the comments on a statement's lines and right above it."""
    first = node.lineno - 1
    while first and lines[first - 1].lstrip().startswith("#"):
        first -= 1
    return "\n".join(line.partition("#")[2] for line in lines[first : node.end_lineno])


# Cython


def in_cython(text: str, stub: str = "") -> Iterator[Said]:
    """Find what a Cython source says of what Python sees; '' is the module itself."""
    if not text.startswith(('"""', "# ")):
        yield Said("", None)
    amounts = _stub_amounts(stub)
    head, above = "", ""  # the class that we are in, and its docstring
    for match in HEAD.finditer(text):
        said = DOCSTRING.match(text, match.end())
        docstring = said[1] if said else None
        if "class" in match["kind"]:
            head, above = match["name"], docstring or ""
            if is_public(head):
                yield Said(head, docstring)
            continue
        if not match["indent"]:
            head = above = ""
        if not is_public(head) or not (is_public(match["name"]) or match["name"] == "__cinit__"):
            continue
        # (Of a property, the getter says what it is; and a class says how it is made.)
        name = f"{head}.{match['name']}" if head else match["name"]
        if match["name"] == "__cinit__" or ".setter" in match[0]:
            docstring = docstring or above
        body = _body(text, match)
        yield Said(name, docstring, above, _raised_in_cython(body), amounts.get(name, []))


def _stub_amounts(stub: str) -> dict[str, list[str]]:
    """Return the amounts of the functions in a stub, by their names."""
    found: dict[str, list[str]] = {}
    for node in ast.parse(stub).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = amounts_of(node)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef):
                    name = "__cinit__" if member.name == "__new__" else member.name
                    found[f"{node.name}.{name}"] = amounts_of(member)
    return found


def _body(text: str, head: re.Match[str]) -> str:
    """Return what is indented below a head."""
    lines = []
    for line in text[head.end() :].splitlines():
        if line.strip() and not line.startswith(head["indent"] + " "):
            break
        lines.append(line)
    return "\n".join(lines)


def _raised_in_cython(body: str) -> set[str]:
    names = set(re.findall(r"^ *raise (\w+)\(", body, re.MULTILINE)) & set(EXCEPTIONS)
    return names - set(re.findall(r"^ *except (\w+)", body, re.MULTILINE))


def faults(said: Iterable[Said]) -> list[str]:
    """Return a line for each fault of a source."""
    said = list(said)
    others = {each.name.rpartition(".")[2]: each.docstring or "" for each in said}
    return [f"{each.name or 'the module'} {fault}" for each in said for fault in each.faults(others)]


def stub_of(path: Path) -> str:
    """Return the text of a Cython source's stub, '' if there is none."""
    stub = path.with_suffix(".pyi")
    return stub.read_text() if stub.exists() else ""
