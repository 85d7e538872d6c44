"""What a measurement gives: rows of the table, and how they are shown."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, TypeVar

T = TypeVar("T")
TIMES = "\N{MULTIPLICATION SIGN}"
DASH = "\N{EN DASH}"


class NotMeasuredError(Exception):
    """Something that is needed is not there or failed; the text says what, in one sentence."""


def take_turns(rounds: int, runs: dict[str, Callable[[], T]]) -> dict[str, list[T]]:
    """Call every one of `runs` once in each round, in the order given, and return its results by name."""
    results: dict[str, list[T]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            results[name].append(run())
    return results


@dataclass(frozen=True)
class Aim:
    """What a row has to reach: a bound on its ratio to the peer, on what it has more, or on its own value."""

    text: str
    bound: float
    at_least: bool
    of_ratio: bool
    of_more: bool = False

    def met(self, value: float, ratio: float | None, more: float | None = None) -> bool | None:
        """Say whether it is reached; None if it speaks of a peer that was not measured."""
        measured = ratio if self.of_ratio else more if self.of_more else value
        if measured is None:
            return None
        return measured >= self.bound if self.at_least else measured <= self.bound


def ratio_at_least(bound: float) -> Aim:
    return Aim(f"≥ {bound:g}{TIMES}", bound, at_least=True, of_ratio=True)


def ratio_at_most(bound: float) -> Aim:
    return Aim(f"≤ {bound:g}{TIMES}", bound, at_least=False, of_ratio=True)


def at_least(bound: float, unit: str) -> Aim:
    return Aim(f"≥ {bound:g} {unit}", bound, at_least=True, of_ratio=False)


def at_most(bound: float, unit: str) -> Aim:
    return Aim(f"≤ {bound:g} {unit}".rstrip(), bound, at_least=False, of_ratio=False)


def at_most_more(bound: float, unit: str) -> Aim:
    """As much as the peer, and so much."""
    return Aim(f"≤ + {bound:g} {unit}", bound, at_least=False, of_ratio=False, of_more=True)


@dataclass
class Row:
    """One row: zramd's value of each round, the peer's if there is one, and the aim."""

    what: str
    unit: str
    values: Sequence[float]
    aim: Aim
    peer: str = ""
    peer_values: Sequence[float] = ()
    note: str = ""

    @property
    def value(self) -> float:
        """zramd's median."""
        return median(self.values)

    @property
    def peer_value(self) -> float | None:
        """The peer's median."""
        return median(self.peer_values) if self.peer_values else None

    @property
    def ratios(self) -> list[float]:
        """zramd's value through the peer's, round by round: neighbours in time share the machine's mood."""
        return [mine / other for mine, other in zip(self.values, self.peer_values, strict=False) if other]

    @property
    def ratio(self) -> float | None:
        """The median of the ratios."""
        return median(self.ratios) if self.ratios else None

    @property
    def more(self) -> float | None:
        """The median of what zramd's value has more than the peer's, round by round."""
        pairs = list(zip(self.values, self.peer_values, strict=False))
        return median(mine - other for mine, other in pairs) if pairs else None

    @property
    def met(self) -> bool | None:
        """Whether the aim is met; None if it speaks of a peer that was not measured."""
        return self.aim.met(self.value, self.ratio, self.more)

    def as_dict(self) -> dict[str, Any]:
        """Return everything about the row, for JSON."""
        return {
            "what": self.what,
            "unit": self.unit,
            "value": self.value,
            "peer": self.peer,
            "peer_value": self.peer_value,
            "ratio": self.ratio,
            "aim": self.aim.text,
            "bound": self.aim.bound,
            "met": self.met,
            "note": self.note,
            "values": list(self.values),
            "peer_values": list(self.peer_values),
            "ratios": self.ratios,
        }

    def cells(self, note_number: int) -> list[str]:
        """Return the cells as the table shows them."""
        ratio = ""
        if self.ratio is not None:
            ratio = f"{self.ratio:.2f}{TIMES}"
            if len(self.ratios) > 1:
                ratio += f" ({min(self.ratios):.2f}{DASH}{max(self.ratios):.2f})"
        peer = f"{self.peer} {number(self.peer_value)}" if self.peer_value is not None else DASH
        met = {True: "met", False: "not met", None: DASH}[self.met]
        mark = f" [{note_number}]" if note_number else ""
        return [
            self.what + mark,
            f"{number(self.value)} {self.unit}".rstrip(),
            peer,
            ratio or DASH,
            self.aim.text,
            met,
        ]


@dataclass
class Table:
    """Figures that have no aim of their own, in more detail than a row."""

    title: str
    about: str
    head: list[str]
    rows: list[list[str]] = field(default_factory=list)

    def markdown(self) -> list[str]:
        """Return its lines as Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return [f"## {self.title}", "", self.about, "", *(f"| {' | '.join(line)} |" for line in lines), ""]

    def text(self) -> list[str]:
        """Return its lines for a terminal."""
        return [f"{self.title}: {self.about}", *aligned([self.head, *self.rows]), ""]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table, its head underlined."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in ruled
    ]


HEAD = ["what", "zramd", "peer", "ratio (range)", "aim", "result"]


def number(value: float) -> str:
    """Write a number with as many digits as it is worth."""
    if value and abs(value) < 1:
        return f"{value:.{min(2 - math.floor(math.log10(abs(value))) - 1, 6)}f}"
    digits = 0 if abs(value) >= 1000 else 1 if abs(value) >= 100 else 2
    return f"{value:,.{digits}f}"


class Report:
    """All that was measured, and what was not, with the reason."""

    def __init__(self, machine: dict[str, str], settings: dict[str, str]) -> None:
        """`machine` and `settings` are shown above the table, name by name."""
        self.machine = machine
        self.settings = settings
        self.rows: list[Row] = []
        self.skipped: list[str] = []
        self.tables: list[Table] = []
        self.curves: dict[str, dict[str, Any]] = {}  # what the pictures are drawn from

    def skip(self, sentence: str) -> None:
        """Take note of something that is not measured."""
        if sentence not in self.skipped:
            self.skipped.append(sentence)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {
            "machine": self.machine,
            "settings": self.settings,
            "rows": [row.as_dict() for row in self.rows],
            "skipped": self.skipped,
            "tables": [asdict(table) for table in self.tables],
            "curves": self.curves,
        }

    def text(self) -> str:
        """Return the report for a terminal."""
        table, notes = self._table()
        lines = [f"{name}: {value}" for name, value in {**self.machine, **self.settings}.items()]
        lines += ["", *aligned(table), ""]
        for detail in self.tables:
            lines += detail.text()
        lines += [*notes, *self._last_lines()]
        return "\n".join(lines) + "\n"

    def markdown(self) -> str:
        """Return the report as Markdown."""
        table, notes = self._table()
        table.insert(1, ["---"] * len(HEAD))
        lines = [f"- {name}: {value}" for name, value in {**self.machine, **self.settings}.items()]
        lines += ["", *(f"| {' | '.join(row)} |" for row in table), ""]
        lines += [f"- {line}" for line in (*notes, *self._last_lines())]
        for detail in self.tables:
            lines += ["", *detail.markdown()[:-1]]
        return "\n".join(lines) + "\n"

    def _table(self) -> tuple[list[list[str]], list[str]]:
        """Return the table, its head first, and the numbered notes; equal notes have one number."""
        notes: dict[str, int] = {}
        for row in self.rows:
            if row.note:
                notes.setdefault(row.note, len(notes) + 1)
        table = [HEAD, *(row.cells(notes.get(row.note, 0)) for row in self.rows)]
        return table, [f"[{n}] {note}" for note, n in notes.items()]

    def _last_lines(self) -> Iterable[str]:
        yield from (f"skipped: {sentence}" for sentence in self.skipped)
        counted = [row.met for row in self.rows]
        yield (
            f"{counted.count(True)} of {len(counted)} aims met, {counted.count(False)} not met, "
            f"{counted.count(None)} without a peer to tell"
        )
