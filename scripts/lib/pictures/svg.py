"""A terminal's screen as an SVG picture: words as text, block characters as shapes.

Fonts disagree on how wide and how tall a character is; here each cell is CELL_WIDTH by CELL_HEIGHT. Each
phrase is told how long it has to be, and the characters that bars and graphs are made of are drawn, as
terminals do too, so that they join without gaps.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple
from xml.sax.saxutils import escape

import pyte
from pyte.screens import Char

CELL_WIDTH, CELL_HEIGHT = 10, 20
FONT_SIZE = 16.6  # of most monospaced fonts, characters are 0.6 times as wide
BASELINE = 15  # below the top of a cell
MARGIN = 20
BAR = 36  # height of the window's title bar
CONTRAST = 4.5  # of words to what is behind them, at least: what WCAG calls AA
FONTS = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono','Liberation Mono',monospace"

Box = tuple[float, float, float, float]  # x, y, width, height, in a cell


class Theme(NamedTuple):
    """The colours that are the terminal's to choose; a colour that has a number is the same in all themes."""

    name: str
    background: str
    words: str
    bar: str
    edge: str


LIGHT = Theme("light", "#ffffff", "#1f2328", "#f3f5f8", "#d1d9e0")
DARK = Theme("dark", "#11161d", "#e6edf3", "#1c232c", "#343c46")
BUTTONS = ("#ff5f57", "#febc2e", "#28c840")


def _shapes() -> dict[str, list[Box]]:
    w, h = CELL_WIDTH, CELL_HEIGHT
    shapes: dict[str, list[Box]] = {}
    for eighths, (rising, growing) in enumerate(zip("▁▂▃▄▅▆▇█", "▏▎▍▌▋▊▉█", strict=True), 1):
        shapes[growing] = [(0, 0, w * eighths / 8, h)]
        shapes[rising] = [(0, h - h * eighths / 8, w, h * eighths / 8)]
    shapes["┃"] = [(w / 2 - 1.5, 0, 3, h)]
    shapes["┊"] = [(w / 2 - 0.75, y, 1.5, h / 8) for y in (1.25, 6.25, 11.25, 16.25)]
    shapes["■"] = [(0.5, h / 2 - 4, 9, 9)]
    return shapes


SHAPES = _shapes()
# One space is part of a phrase. Where there are more, what follows has a place of its own.
PHRASE = re.compile("[^ {0}]+(?: [^ {0}]+)*".format("".join(SHAPES)))


def picture(screen: pyte.Screen, theme: Theme, title: str, description: str) -> str:
    """Return the picture of a screen in a window, with a title, and what it shows in words."""
    width = screen.columns * CELL_WIDTH + 2 * MARGIN
    height = screen.lines * CELL_HEIGHT + 2 * MARGIN + BAR - CELL_HEIGHT // 2
    shapes: dict[str, list[str]] = defaultdict(list)
    words: list[str] = []
    colours = _Classes()
    for row in range(screen.lines):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        y = BAR + MARGIN - CELL_HEIGHT // 2 + row * CELL_HEIGHT
        for column, run in _runs(cells):
            x = MARGIN + column * CELL_WIDTH
            front, back = _colours(run[0], theme)
            if back != theme.background:
                shapes[back].append(_box(x, y, len(run) * CELL_WIDTH, CELL_HEIGHT))
            text = "".join(cell.data for cell in run)
            for place, box in _boxes(text):
                shapes[front].append(_box(x + place * CELL_WIDTH + box[0], y + box[1], *box[2:]))
            for place, phrase in _phrases(text):
                is_read = any(map(str.isalnum, phrase))
                look = colours.name(readable(front, back) if is_read else front, run[0].bold)
                words.append(_text(x + place * CELL_WIDTH, y + BASELINE, phrase, look))
    drawn = [f'<path fill="{colour}" d="{"".join(boxes)}"/>' for colour, boxes in shapes.items()]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-labelledby="title description">',
        f'<title id="title">{escape(title)}</title>',
        f'<desc id="description">{escape(description)}</desc>',
        f"<style>text{{font:{FONT_SIZE}px {FONTS}}}{colours.rules()}</style>",
        *_window(theme, width, height, title),
        '<g shape-rendering="crispEdges">',
        *drawn,
        "</g>",
        *words,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def _window(theme: Theme, width: int, height: int, title: str) -> list[str]:
    look = f'fill="{theme.background}" stroke="{theme.edge}"'
    bar = f"M.5 {BAR}.5V10.5a10 10 0 0 1 10-10H{width - 10.5}a10 10 0 0 1 10 10V{BAR}.5z"
    buttons = [
        f'<circle cx="{22 + 20 * place}" cy="{BAR / 2 + 0.5:g}" r="6" fill="{colour}"/>'
        for place, colour in enumerate(BUTTONS)
    ]
    place = f'x="{width // 2}" y="{BAR // 2 + 6}" text-anchor="middle"'
    return [
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="10" {look}/>',
        f'<path fill="{theme.bar}" stroke="{theme.edge}" d="{bar}"/>',
        *buttons,
        f'<text {place} fill="{theme.words}">{escape(title)}</text>',
    ]


# ------------------------------------------------------------------------------------------------------------
# from cells to pieces


def _runs(cells: Sequence[Char]) -> Iterator[tuple[int, list[Char]]]:
    """Yield the cells that look alike and stand together, and the column that they begin in."""
    column = 0
    for _, group in groupby(cells, key=lambda cell: (cell.fg, cell.bg, cell.bold, cell.reverse)):
        run = list(group)
        yield column, run
        column += len(run)


def _boxes(text: str) -> Iterator[tuple[int, Box]]:
    """Yield the boxes that a text's block characters are, and the character that each begins in.

    Neighbours of one height are one box.
    """
    place = 0
    for character, group in groupby(text):
        count = len(list(group))
        boxes = SHAPES.get(character, [])
        if boxes and boxes[0][2] == CELL_WIDTH:
            x, y, width, height = boxes[0]
            yield place, (x, y, count * width, height)
        else:
            for _ in range(count):
                yield from ((place, box) for box in boxes)
        place += count


def _phrases(text: str) -> Iterator[tuple[int, str]]:
    """Yield the phrases between block characters and gaps, and the character that each begins at."""
    for match in PHRASE.finditer(text):
        yield match.start(), match[0]


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:g} {y:g}h{width:g}v{height:g}h{-width:g}z"


def _text(x: int, y: int, words: str, look: str) -> str:
    length = f' textLength="{len(words) * CELL_WIDTH}"' if len(words) > 1 else ""
    return f'<text x="{x}" y="{y}"{length} class="{look}">{escape(words)}</text>'


class _Classes:
    """Short names for how words look."""

    def __init__(self) -> None:
        self._names: dict[tuple[str, bool], str] = {}

    def name(self, colour: str, bold: bool) -> str:
        return self._names.setdefault((colour, bold), f"c{len(self._names)}")

    def rules(self) -> str:
        return "".join(
            f".{name}{{fill:{colour}{';font-weight:bold' if bold else ''}}}"
            for (colour, bold), name in self._names.items()
        )


# ------------------------------------------------------------------------------------------------------------
# colours


def _colours(cell: Char, theme: Theme) -> tuple[str, str]:
    """Return the colours of a cell, of what is in it and of what is behind that."""
    front = theme.words if cell.fg == "default" else f"#{cell.fg}"
    back = theme.background if cell.bg == "default" else f"#{cell.bg}"
    return (back, front) if cell.reverse else (front, back)


def readable(colour: str, background: str) -> str:
    """Return a colour for words: if they could hardly be read, darker or lighter until they can be."""
    end = "#000000" if _luminance(background) > 0.18 else "#ffffff"
    for percent in range(0, 101, 5):
        mixed = _mix(colour, end, percent / 100)
        if contrast(mixed, background) >= CONTRAST:
            break
    return mixed


def contrast(one: str, other: str) -> float:
    """Return how different two colours are in lightness, 1 to 21, as WCAG counts."""
    darker, lighter = sorted((_luminance(one), _luminance(other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in _parts(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _mix(one: str, other: str, share: float) -> str:
    parts = (a + (b - a) * share for a, b in zip(_parts(one), _parts(other), strict=True))
    return "#" + "".join(f"{round(part * 255):02x}" for part in parts)


def _parts(colour: str) -> list[float]:
    return [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
