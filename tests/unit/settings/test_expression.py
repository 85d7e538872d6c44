"""Size expressions: what zram-generator's users write, units, and errors with place and remedy."""

import math
import re
from pathlib import Path

import pytest

from zramd.settings import expression
from zramd.settings.expression import ExpressionError, evaluate, size

MIB = 1 << 20
DOCUMENT = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()


@pytest.mark.parametrize(
    ("text", "ram", "megabytes"),
    [
        ("min(ram / 2, 4096)", 8192, 4096),
        ("min(ram / 2, 4096)", 1000, 500),
        ("0.5 * ram", 100, 50),
        ("min(min(ram, 4096) + max(ram - 4096, 0) / 2, 32 * 1024)", 8192, 6144),
        ("500", 1, 500),
        ("0", 1, 0),
        ("4G", 1, 4096),
        ("4GiB", 1, 4096),
        ("4gb", 1, 4096),
        ("1T", 1, 1 << 20),
        ("512m", 1, 512),
        ("1536K", 1, 1.5),
        ("1048576B", 1, 1),
        ("1G + 1", 1, 1025),
        ("1.5G", 1, 1536),
        ("1e3", 1, 1000),
        ("1e-1G", 1, 102.4),
        (".5", 1, 0.5),
        ("7.", 1, 7),
    ],
)
def test_sizes(text, ram, megabytes):
    assert size(text, ram) == int(megabytes * MIB)


def test_a_size_whose_bytes_no_float_can_count():
    assert size("1e308", 1) == int(1e308) * MIB


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2 ^ 3 ^ 2", 512),
        ("-2 ^ 2", 4),
        ("- 2 ^ 2", 4),
        ("2 ^ -1", 0.5),
        ("3 - -2", 5),
        ("10 - 3 - 2", 5),
        ("10 - 3 + 2", 9),
        ("100 / 10 / 5", 2),
        ("2 * 7 % 4", 6),  # % binds tighter
        ("9 / 7 % 4", 3),
        ("-7 % 4", -3),  # the sign of the left side, as C has it
        ("1 < 2 < 3", 1),
        ("3 > 2 > 1", 0),
        ("1 + 1 == 2", 1),
        ("0.1 + 0.2 == 0.3", 1),
        ("1 != 2 && 5", 5),
        ("0 && 5", 0),
        ("0 || 5", 5),
        ("3 || 5", 3),
        ("1 || 0 && 0", 1),
        ("!0 + !7", 1),
        ("[1 + 2] * (3)", 9),
        ("min(3; 1, 2)", 1),
        ("min(3)", 3),
        ("max[1, 2]", 2),
        ("int(-2.7)", -2),
        ("floor(-2.7)", -3),
        ("ceil(2.1)", 3),
        ("round(2.5)", 3),
        ("round(-2.5)", -3),
        ("round(0.49999999999999994)", 0),
        ("round(256, 1000)", 1024),
        ("abs(-3)", 3),
        ("sign(-3)", -1),
        ("log(1000)", 3),
        ("log(2, 8)", 3),
        ("log(3, 81)", 4),
        ("e()", math.e),
        ("sin(pi() / 2)", 1),
        ("ram() + ram", 128),
        ("+".join("1" * 2000), 2000),
        ("^".join("1" * 2000), 1),
        ("(" * 31 + "1" + ")" * 31, 1),
    ],
)
def test_values(text, value):
    assert evaluate(text, {"ram": 64.0}) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'', character 1: it is empty: write a size, such as min(ram / 2, 4096)"),
        ("min", "'min', character 1: 'min' is a function: write min(a, b, …)"),
        ("2 * pi", "'2 * pi', character 5: 'pi' is a function: write pi()"),
        ("min()", "'min()', character 1: 0 arguments for 'min': write min(a, b, …)"),
        ("abs(1, 2)", "'abs(1, 2)', character 1: 2 arguments for 'abs': write abs(x)"),
        ("rm / 2", "'rm / 2', character 1: there is no variable 'rm': did you mean 'ram'?"),
        ("two", "'two', character 1: there is no variable 'two': use ram"),
        ("maxx(1)", "'maxx(1)', character 1: there is no function 'maxx': did you mean 'max'?"),
        (
            "ram / 0",
            "'ram / 0', character 5: division by zero: use a divisor that is never 0, such as max(x, 1)",
        ),
        (
            "min(ram % 0, 1)",
            "'min(ram % 0, 1)', character 9: division by zero: "
            "use a divisor that is never 0, such as max(x, 1)",
        ),
        ("log(0)", "'log(0)', character 1: log(0) is not a finite number: use other values"),
        ("log(1, 2)", "'log(1, 2)', character 1: log(1, 2) is not a finite number: use other values"),
        ("round(0, 2)", "'round(0, 2)', character 1: round(0, 2) is not a finite number: use other values"),
        ("(-8) ^ 0.5", "'(-8) ^ 0.5', character 6: -8 ^ 0.5 is not a finite number: use other values"),
        ("2 ^ 9999", "'2 ^ 9999', character 3: 2 ^ 9999 is not a finite number: use other values"),
        ("1e308 * 10", "'1e308 * 10', character 7: 1e+308 * 10 is not a finite number: use other values"),
        ("1e999", "'1e999', character 1: 1e999 is not a finite number: use other values"),
        ("-5", "'-5' is -5 megabytes: use max(0, …) or a size above 0"),
        ("4X", "'4X', character 1: 'X' is not a unit: use K, M, G or T, or none for megabytes"),
        ("0x10", "'0x10', character 1: 'x10' is not a unit: use K, M, G or T, or none for megabytes"),
        ("4 G", "'4 G', character 3: an operator is missing before 'G': write 4G"),
        ("4 Gibi", "'4 Gibi', character 3: an operator is missing before 'Gibi'"),
        ("ram 2", "'ram 2', character 5: an operator is missing before '2'"),
        ("50%", "'50%', character 3: '%' is the remainder, not percent: write half of ram as ram * 0.5"),
        ("ram = 2", "'ram = 2', character 5: '=' has no meaning here: use == to compare"),
        (
            "4G # half",
            "'4G # half', character 4: '#' has no meaning here: put the comment on a line of its own",
        ),
        ("(1", "'(1', character 3: ')' is missing at the end, for '(' at 1"),
        ("[1)", "'[1)', character 3: ']' is missing before ')', for '[' at 1"),
        ("min(1 2)", "'min(1 2)', character 7: ')' is missing before '2', for '(' at 4"),
        ("1)", "'1)', character 2: ')' closes nothing: remove it"),
        ("1, 2", "'1, 2', character 2: ',' separates arguments: write it within a function's ()"),
        ("1 +", "'1 +', character 4: a number, a variable or a function is missing before the end"),
        (
            "min(1,)",
            "'min(1,)', character 7: a number, a variable or a function is missing before ')'",
        ),
    ],
)
def test_errors(text, message):
    with pytest.raises(ExpressionError) as caught:
        size(text, 64)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "text", ["(" * 33 + "1" + ")" * 33, "-" * 100 + "1", "min(" * 1000, "!" * 4000 + "1"]
)
def test_deep_nesting_is_refused(text):
    with pytest.raises(ExpressionError, match="nested too deeply: use at most 32 levels"):
        size(text, 64)


def test_long_text_is_refused():
    with pytest.raises(ExpressionError, match="too long: use at most 4096 characters"):
        size("1+" * 3000 + "1", 64)


def test_units_are_found():
    assert expression.units("min(ram / 2, 4G) + 512K + 3 + 1e3") == ["4G", "512K"]


def test_the_document_has_every_function():
    (row,) = [line for line in DOCUMENT.splitlines() if line.startswith("| functions |")]
    named = set(re.findall(r"`([a-z]+)", row))
    named.remove("h")  # `h`: stands for what follows
    hyperbolic = {f"{name}h" for name in ("sin", "cos", "tan", "asin", "acos", "atan")}
    assert named | hyperbolic == set(expression._FUNCTIONS)


def test_the_documents_examples_are_right():
    table = DOCUMENT.partition("| written | means |")[2].partition("\n\n")[0]
    written = {text: size(text, 12288) // MIB for text in re.findall(r"`([^`]+)`", table) if text != "ram"}
    assert written == {
        "4096": 4096,
        "4G": 4096,
        "4096M": 4096,
        "4GiB": 4096,
        "ram / 2": 6144,
        "min(ram / 2, 4G)": 4096,
        "min(ram, 4096) + max(ram - 4096, 0) / 2": 8192,
    }
    assert "`-2^2` is 4" in DOCUMENT
    assert evaluate("-2^2", {}) == 4
