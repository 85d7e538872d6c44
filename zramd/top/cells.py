"""What screens are made of: lines of (text, style) pieces, bars, graphs, and numbers in few characters."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

Line: TypeAlias = list[tuple[str, str]]

_MIB = 1 << 20


class Glyphs(NamedTuple):
    """The characters that a terminal can show."""

    eighths: str  # a cell filled from the left, from one eighth to whole
    steps: str  # a cell filled from below, from one eighth to whole
    payload: str
    gaps: str
    tables: str
    heat: str  # HEAT_LEVELS of them
    swatch: str  # in a legend; '' where colours alone do not distinguish the parts: then the part's own
    none: str  # no zspages
    rest: str  # of a bar
    limit: str
    peak: str
    up: str
    right: str
    micro: str
    out: str  # what is not in memory


COLOUR = Glyphs("▏▎▍▌▋▊▉█", "▁▂▃▄▅▆▇█", "█", "█", "█", "█" * 8, "■", "·", " ", "┃", "┊", "↑", "→", "µ", "█")
MONO = Glyphs("▏▎▍▌▋▊▉█", "▁▂▃▄▅▆▇█", "█", "▒", "░", "░░▒▒▓▓██", "", "·", " ", "┃", "┊", "↑", "→", "µ", "▚")
ASCII = Glyphs("", "_-=#", "#", "=", "-", ":-=+*%#@", "", ".", " ", "|", ":", "^", ">", "u", "~")


def fit(line: Line, width: int, style: str = "") -> Line:
    """Return a line cut or filled to a width."""
    fitted: Line = []
    left = width
    for text, name in line:
        if left and text:
            fitted.append((text[:left], name))
            left -= len(fitted[-1][0])
    return [*fitted, (" " * left, style)] if left else fitted


def plain(line: Line) -> str:
    """Return a line's text."""
    return "".join(text for text, _ in line)


def between(left: Line, right: Line, width: int) -> Line:
    """Return two lines in one, at both ends; what does not fit is missing in the middle."""
    room = width - sum(len(text) for text, _ in right)
    return fit([*fit(left, max(room - 1, 0)), (" ", ""), *right], width)


def number(value: float) -> str:
    """Return a count or a rate in at most five characters: 0, 7.5, 123, 12.3k, 4.5M."""
    if 0 < value < 9.95 and value != int(value):
        return f"{value:.1f}"
    for letter in ("", "k", "M", "G", "T"):
        if value < 999.5 or letter == "T":
            break
        value /= 1000
    if letter and value < 99.95:
        return f"{value:.1f}{letter}"
    return f"{value:.0f}{letter}"


def duration(seconds: float, glyphs: Glyphs) -> str:
    """Return a time that a request took: 250ns, 8.1µs, 1.2ms, 2.1s."""
    for unit, scale in (("ns", 1e9), (f"{glyphs.micro}s", 1e6), ("ms", 1e3), ("s", 1)):
        value = seconds * scale
        if value < 999.5 or unit == "s":
            break
    return f"{value:.1f}{unit}" if value < 9.95 and unit != "ns" else f"{value:.0f}{unit}"


def clock(seconds: float) -> str:
    """Return how long something has run: 0:07, 1:02:03, 4d 05:06."""
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


def graph(
    values: Sequence[float | None], low: float, high: float, width: int, height: int, glyphs: Glyphs
) -> list[str]:
    """Return `height` rows of the last `width` values as columns that stand on `low`, the newest right.

    A value of `low` or less still shows its lowest step: only what is None is blank.
    """
    per_cell = len(glyphs.steps) or 1
    steps = glyphs.steps or glyphs.payload
    shown = list(values)[-width:] if width > 0 else []
    span = (high - low) or 1
    filled = [
        0
        if value is None
        else min(max(round((value - low) / span * height * per_cell), 1), height * per_cell)
        for value in shown
    ]
    rows = []
    for row in range(height - 1, -1, -1):
        cells = (min(max(count - row * per_cell, 0), per_cell) for count in filled)
        rows.append("".join(steps[cell - 1] if cell else " " for cell in cells).rjust(width))
    return rows


def bar(
    parts: Iterable[tuple[int, str, str]], scale: int, width: int, glyphs: Glyphs
) -> list[tuple[str, str]]:
    """Return `width` cells for parts of (size, glyph, style), one after the other, of a whole of `scale`."""
    cells: list[tuple[str, str]] = []
    total = 0
    style = ""
    for size, glyph, name in parts:
        total += size
        if size > 0:
            until = min(total * width // scale, width)
            cells += [(glyph, name)] * (until - len(cells))
            style = name
    if total and len(cells) < width and glyphs.eighths:
        eighths = total * width * 8 // scale - len(cells) * 8
        if eighths > 0:
            cells.append((glyphs.eighths[min(eighths, 8) - 1], style))
    if total and not cells:
        cells.append((glyphs.eighths[:1] or glyphs.payload, style))
    return cells + [(glyphs.rest, "")] * (width - len(cells))


def scale_of(disksize: int, *sizes: int) -> int:
    """Return the size that a whole bar stands for: it changes seldom, and holds all sizes."""
    need = max(sizes)
    power = max(1 << (need - 1).bit_length(), _MIB) if need else _MIB
    return disksize if need <= disksize < power else power


def runs(cells: Iterable[tuple[str, str]]) -> Line:
    """Return cells as pieces: neighbours of one style together."""
    line: Line = []
    for text, style in cells:
        if line and line[-1][1] == style:
            line[-1] = (line[-1][0] + text, style)
        else:
            line.append((text, style))
    return line
