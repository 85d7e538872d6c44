"""Sizes as expressions, such as `min(ram / 2, 4096)`: the language of zram-generator's zram-size.

Values are floating-point numbers and mean megabytes (of 1 << 20 bytes). From loose to tight:

    ||   &&   < <= == != >= >   + -   * /   %   ^ (right to left)   + - ! before a value

Grouping is by ( ) or [ ], arguments are separated by , or ; and a comparison is 1 or 0. Functions: see
`_FUNCTIONS`. `%` binds tighter than `*`, and a sign tighter than `^`, as in zram-generator.

One thing is read otherwise. A number with a unit (K M G T P E in either case, then perhaps iB or B) is a size
in bytes, whatever stands around it: 4G is 4096. zram-generator multiplies the megabytes: there, 4G is four
thousand million megabytes, which nobody means. And what has no finite value is an error here, wherever in the
expression it is.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple, NoReturn

from zramd.errors import ConfigError

MEGABYTE = 1 << 20
MAX_LENGTH = 4096  # letters
MAX_DEPTH = 32

_TOKEN = re.compile(
    r"""
    (?P<number> (?:[0-9]+\.?[0-9]*|\.[0-9]+) (?:[eE][+-]?[0-9]+)? ) (?P<unit>\w*)
    | (?P<name> [A-Za-z_][A-Za-z_0-9]* )
    | (?P<operator> \|\| | && | [<>=!]= | [-+*/%^<>!()\[\],;] )
    """,
    re.VERBOSE,
)
_UNIT = re.compile(r"(?:([KMGTPE])(?:i?B)?|B)", re.IGNORECASE)
_CLOSING = {"(": ")", "[": "]"}
_EPSILON = 8 * 2.0**-52  # two numbers this close are equal


class ExpressionError(ConfigError):
    """An expression cannot be read, or has no value; the message quotes it and says where."""


class _Token(NamedTuple):
    kind: str  # number, name, operator or end
    text: str  # as written
    position: int  # of its first character, from 0
    number: str = ""
    unit: str = ""


def _round(value: float) -> float:
    whole = math.trunc(value)
    return float(whole + math.copysign(1, value) if abs(value - whole) >= 0.5 else whole)


def _log(*arguments: float) -> float:
    base, value = arguments if len(arguments) == 2 else (10.0, arguments[0])
    exact = {2.0: math.log2, 10.0: math.log10}.get(base)
    return exact(value) if exact else math.log(value) / math.log(base)


def _round_to(*arguments: float) -> float:
    modulus, value = arguments if len(arguments) == 2 else (1.0, arguments[0])
    return _round(value / modulus) * modulus


def _sign(value: float) -> float:
    return math.copysign(1, value)


class _Function(NamedTuple):
    least: int  # arguments
    most: int
    shape: str
    call: Callable[..., float]


_MANY = MAX_LENGTH  # arguments: as many as fit
_FUNCTIONS = {
    "min": _Function(1, _MANY, "min(a, b, …)", lambda *values: min(values)),
    "max": _Function(1, _MANY, "max(a, b, …)", lambda *values: max(values)),
    "int": _Function(1, 1, "int(x)", math.trunc),
    "ceil": _Function(1, 1, "ceil(x)", math.ceil),
    "floor": _Function(1, 1, "floor(x)", math.floor),
    "round": _Function(1, 2, "round(x) or round(multiple, x)", _round_to),
    "abs": _Function(1, 1, "abs(x)", abs),
    "sign": _Function(1, 1, "sign(x)", _sign),
    "log": _Function(1, 2, "log(x) or log(base, x)", _log),
    "e": _Function(0, 0, "e()", lambda: math.e),
    "pi": _Function(0, 0, "pi()", lambda: math.pi),
    **{
        name: _Function(1, 1, f"{name}(x)", getattr(math, name))
        for name in [
            "sin",
            "cos",
            "tan",
            "asin",
            "acos",
            "atan",
            "sinh",
            "cosh",
            "tanh",
            "asinh",
            "acosh",
            "atanh",
        ]
    },
}


def _equal(left: float, right: float) -> bool:
    return abs(left - right) <= _EPSILON


_BINARY: dict[str, Callable[[float, float], float]] = {
    "||": lambda left, right: right if _equal(left, 0) else left,
    "&&": lambda left, right: left if _equal(left, 0) else right,
    "<": lambda left, right: left < right,
    "<=": lambda left, right: left <= right,
    "==": _equal,
    "!=": lambda left, right: not _equal(left, right),
    ">=": lambda left, right: left >= right,
    ">": lambda left, right: left > right,
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": lambda left, right: left / right,
    "%": math.fmod,
    "^": math.pow,
}
# From loose to tight, each from left to right; ^, tighter than all, is apart.
_LEVELS = (("||",), ("&&",), ("<", "<=", "==", "!=", ">=", ">"), ("+", "-"), ("*", "/"), ("%",))


class _Parser:
    """Reads an expression and computes its value as it goes."""

    def __init__(self, text: str, variables: Mapping[str, float]) -> None:
        self.text = text
        self.variables = variables
        self.tokens = self._tokens()
        self.next = 0
        self.depth = 0

    def fail(self, position: int, why: str) -> NoReturn:
        shown = self.text if len(self.text) <= 80 else f"{self.text[:77]}…"
        raise ExpressionError(f"'{shown}', character {position + 1}: {why}")

    def _tokens(self) -> list[_Token]:
        if len(self.text) > MAX_LENGTH:
            self.fail(MAX_LENGTH, f"it is too long: use at most {MAX_LENGTH} characters")
        tokens: list[_Token] = []
        position = 0
        while True:
            position += len(self.text[position:]) - len(self.text[position:].lstrip())
            if position == len(self.text):
                return [*tokens, _Token("end", "", position)]
            match = _TOKEN.match(self.text, position)
            if match is None:
                hint = {"#": ": put the comment on a line of its own", "=": ": use == to compare"}
                character = self.text[position]
                self.fail(position, f"'{character}' has no meaning here{hint.get(character, '')}")
            kind = "number" if match["number"] else "name" if match["name"] else "operator"
            tokens.append(_Token(kind, match[0], position, match["number"] or "", match["unit"] or ""))
            position = match.end()

    @property
    def token(self) -> _Token:
        return self.tokens[self.next]

    def take(self, *texts: str) -> bool:
        """Step over the next token if it is one of `texts`."""
        found = self.token.text in texts and self.token.kind == "operator"
        self.next += found
        return found

    def compute(self, position: int, what: str, call: Callable[..., float], *arguments: float) -> float:
        """Return call(*arguments); fail unless the result is a finite number."""
        try:
            value = float(call(*arguments))
        except (ArithmeticError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            self.fail(position, f"{what} is not a finite number: use other values")
        return value

    def whole(self) -> float:
        if self.token.kind == "end":
            self.fail(0, "it is empty: write a size, such as min(ram / 2, 4096)")
        value = self.expression()
        if self.token.kind != "end":
            text = self.token.text
            if text in ")]":
                self.fail(self.token.position, f"'{text}' closes nothing: remove it")
            if text in ",;":
                self.fail(
                    self.token.position, f"'{text}' separates arguments: write it within a function's ()"
                )
            before = self.tokens[self.next - 1]
            is_unit = before.kind == "number" and not before.unit and _UNIT.fullmatch(text)
            hint = f": write {before.text}{text}" if is_unit else ""
            self.fail(self.token.position, f"an operator is missing before '{text}'{hint}")
        return value

    def expression(self, level: int = 0) -> float:
        if level == len(_LEVELS):
            return self.powers()
        left = self.expression(level + 1)
        while self.token.text in _LEVELS[level]:
            operator = self.token
            self.next += 1
            if operator.text == "%" and (self.token.kind == "end" or self.token.text in "),;]"):
                self.fail(
                    operator.position, "'%' is the remainder, not percent: write half of ram as ram * 0.5"
                )
            right = self.expression(level + 1)
            if operator.text in "/%" and right == 0:
                self.fail(
                    operator.position, "division by zero: use a divisor that is never 0, such as max(x, 1)"
                )
            left = self.binary(operator, left, right)
        return left

    def powers(self) -> float:
        values, operators = [self.value()], []
        while self.token.text == "^":
            operators.append(self.token)
            self.next += 1
            values.append(self.value())
        power = values.pop()
        while operators:  # from right to left
            power = self.binary(operators.pop(), values.pop(), power)
        return power

    def binary(self, operator: _Token, left: float, right: float) -> float:
        shown = f"{left:g} {operator.text} {right:g}"
        return self.compute(operator.position, shown, _BINARY[operator.text], left, right)

    def value(self) -> float:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(self.token.position, f"it is nested too deeply: use at most {MAX_DEPTH} levels")
        try:
            return self._value()
        finally:
            self.depth -= 1

    def _value(self) -> float:
        token = self.token
        if token.kind == "number":
            self.next += 1
            return self.number(token)
        if token.kind == "name":
            self.next += 1
            return self.named(token)
        if self.take("+"):
            return self.value()
        if self.take("-"):
            return -self.value()
        if self.take("!"):
            return float(_equal(self.value(), 0))
        if self.take("(", "["):
            value = self.expression()
            self.close(token)
            return value
        found = f"'{token.text}'" if token.text else "the end"
        self.fail(token.position, f"a number, a variable or a function is missing before {found}")

    def number(self, token: _Token) -> float:
        value = self.compute(token.position, token.text, float, float(token.number))
        if not token.unit:
            return value
        unit = _UNIT.fullmatch(token.unit)
        if unit is None:
            self.fail(
                token.position, f"'{token.unit}' is not a unit: use K, M, G or T, or none for megabytes"
            )
        power = "KMGTPE".index(unit[1].upper()) + 1 if unit[1] else 0
        return self.compute(token.position, token.text, float, value * 1024**power / MEGABYTE)

    def named(self, token: _Token) -> float:
        name, opening = token.text, self.token
        if not self.take("(", "["):
            if name in self.variables:
                return self.variables[name]
            if name in _FUNCTIONS:
                self.fail(token.position, f"'{name}' is a function: write {_FUNCTIONS[name].shape}")
            self.fail(token.position, f"there is no variable '{name}': {self.suggest(name, self.variables)}")
        arguments: list[float] = []
        while self.token.kind != "end" and self.token.text != _CLOSING[opening.text]:
            if arguments and not self.take(",", ";"):
                break
            arguments.append(self.expression())
        self.close(opening)
        if name in self.variables and not arguments:
            return self.variables[name]
        function = _FUNCTIONS.get(name)
        if function is None:
            self.fail(token.position, f"there is no function '{name}': {self.suggest(name, _FUNCTIONS)}")
        if not function.least <= len(arguments) <= function.most:
            self.fail(token.position, f"{len(arguments)} arguments for '{name}': write {function.shape}")
        shown = f"{name}({', '.join(f'{argument:g}' for argument in arguments)})"
        return self.compute(token.position, shown, function.call, *arguments)

    def close(self, opening: _Token) -> None:
        if not self.take(_CLOSING[opening.text]):
            before = f"before '{self.token.text}'" if self.token.text else "at the end"
            missing = f"'{_CLOSING[opening.text]}' is missing {before}"
            self.fail(self.token.position, f"{missing}, for '{opening.text}' at {opening.position + 1}")

    @staticmethod
    def suggest(name: str, known: Mapping[str, object]) -> str:
        from difflib import get_close_matches

        close = get_close_matches(name, known, n=1)
        return f"did you mean '{close[0]}'?" if close else f"use {', '.join(known)}"


def evaluate(text: str, variables: Mapping[str, float]) -> float:
    """Return the value of `text`, always finite; a size in it counts in megabytes.

    Raises ExpressionError, one sentence with the place and the remedy.
    """
    return _Parser(text, variables).whole()


def size(text: str, ram: int) -> int:
    """Return the bytes that `text` means on a machine of `ram` megabytes, rounded down.

    Raises ExpressionError also when that is less than 0.
    """
    value = evaluate(text, {"ram": float(ram)})
    if value < 0:
        raise ExpressionError(f"'{text}' is {value:g} megabytes: use max(0, …) or a size above 0")
    return int(value) * MEGABYTE + int(value % 1 * MEGABYTE)


def units(text: str) -> list[str]:
    """Return the numbers with a unit, which zram-generator reads otherwise; raises ExpressionError."""
    return [token.text for token in _Parser(text, {}).tokens if token.unit]


def is_number(text: str) -> bool:
    """Say whether an expression is nothing but a number without a unit."""
    return re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", text.strip(), re.ASCII) is not None
