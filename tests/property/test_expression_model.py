"""Expressions against a reference: trees whose value Python computes, written with the fewest brackets."""

import math
import operator
from typing import Any

from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.run import FEWER

from zramd.settings.expression import evaluate, size

RAM = 8192.0
NEAR = 8 * 2.0**-52  # what is nearer to 0 counts as 0
# How tight an operator binds, and what it does.
BINARY = {
    "||": (1, lambda a, b: a if abs(a) > NEAR else b),
    "&&": (2, lambda a, b: b if abs(a) > NEAR else a),
    "<": (3, operator.lt),
    ">=": (3, operator.ge),
    "+": (4, operator.add),
    "-": (4, operator.sub),
    "*": (5, operator.mul),
    "/": (5, operator.truediv),
    "%": (6, math.fmod),
    "^": (7, math.pow),
}
VALUE = 8
CALLS = {
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
    "floor": math.floor,
    "abs": abs,
    "int": math.trunc,
}
UNITS = {"": 1, "K": 1 / 1024, "M": 1, "G": 1024, "T": 1 << 20}

# Mostly small numbers: most trees of others have no finite value.
small = st.tuples(st.just("number"), st.one_of(st.integers(1, 5), st.just(0.5)), st.just(""))
numbers = st.tuples(st.just("number"), st.integers(0, 9999), st.sampled_from([*UNITS]))
leaves = st.one_of(small, small, small, numbers, st.just(("ram",)))


def branches(children: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.one_of(
        st.tuples(st.just("binary"), st.sampled_from([*BINARY]), children, children),
        st.tuples(st.just("binary"), st.sampled_from("+-*/%^"), children, children),
        st.tuples(st.just("minus"), children),
        st.tuples(
            st.just("call"), st.sampled_from(["min", "max"]), st.lists(children, min_size=1, max_size=3)
        ),
        st.tuples(
            st.just("call"),
            st.sampled_from(["floor", "abs", "int"]),
            st.lists(children, min_size=1, max_size=1),
        ),
    )


trees = st.recursive(leaves, branches, max_leaves=12)


def value(tree: Any) -> float:
    match tree:
        case ("number", number, unit):
            return float(number * UNITS[unit])
        case ("ram",):
            return RAM
        case ("minus", child):
            return -value(child)
        case ("call", name, children):
            return float(CALLS[name](*map(value, children)))
        case (_, name, left, right):
            result = float(BINARY[name][1](value(left), value(right)))
            if not math.isfinite(result):
                raise OverflowError
            return result
    raise AssertionError(tree)


def text(tree: Any, tight: int = 0) -> str:
    """The tree as text, in brackets if something that binds as `tight` is around it."""
    match tree:
        case ("number", number, unit):
            return f"{number}{unit}"
        case ("ram",):
            return "ram"
        case ("minus", child):
            return f"-{text(child, VALUE)}"
        case ("call", name, children):
            return f"{name}({', '.join(map(text, children))})"
        case (_, name, left, right):
            own = BINARY[name][0]
            # ^ goes from right to left, all others from left to right.
            sides = (own + 1, own) if name == "^" else (own, own + 1)
            inner = f"{text(left, sides[0])} {name} {text(right, sides[1])}"
            return f"({inner})" if own < tight else inner
    raise AssertionError(tree)


def attempt(call: Any, *arguments: Any) -> tuple[Any, str]:
    """What a call returns, or None and why it has no result."""
    try:
        return call(*arguments), ""
    except (ArithmeticError, ValueError) as error:  # ConfigError is a ValueError
        return None, str(error) or "no finite value"


@settings(max_examples=int(1000 * FEWER), deadline=None)
@given(trees)
def test_same_as_python(tree):
    written = text(tree)
    expected, _ = attempt(value, tree)
    found, error = attempt(evaluate, written, {"ram": RAM})
    assume("nested" not in error)
    assert (found is None) == (expected is None), f"{written}: {found} {error}, not {expected}"
    assert found is None or math.isclose(found, expected, rel_tol=1e-12, abs_tol=1e-12), written


@settings(deadline=None)
@given(st.text(alphabet="0123456789.eEKMGram()[]+-*/%^<>=!|&,; minlogπ\t#", max_size=40))
def test_any_text_has_a_size_or_an_error(written):
    found, error = attempt(size, written, 64)
    assert error if found is None else found >= 0
    assert "\n" not in error
