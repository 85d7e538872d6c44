"""The terminal: what it can do by terminfo, keys without Enter, and a screen that is put back as it was.

    with Terminal() as terminal:
        terminal.draw(lines)            lines of (text, style) pieces, as wide as terminal.size() says
        for key in terminal.read_keys(): ...

Of the curses library only the terminfo calls are used: they say what to send, and we send no more than that.
"""

import curses
import os
import re
import sys
import termios
from collections.abc import Sequence
from contextlib import suppress

from zramd.errors import UsageError

# Style: colour of 256, colour of 8, attributes for every terminal.
_STYLES: dict[str, tuple[int | None, int | None, tuple[str, ...]]] = {
    "bold": (None, None, ("bold",)),
    "dim": (245, None, ("dim",)),
    "title": (None, None, ("rev", "bold")),
    "alert": (203, 1, ("rev", "bold")),
    "message": (None, None, ("bold",)),
    "key": (None, None, ("rev",)),
    "stored": (75, 6, ()),
    "payload": (71, 2, ()),
    "gaps": (208, 3, ()),
    "tables": (97, 5, ()),
    "hot": (209, 1, ()),
    "cold": (75, 6, ()),
    "raw": (245, 7, ()),
    "out": (140, 5, ()),
    "limit": (203, 1, ("bold",)),
    "good": (71, 2, ()),
    "fair": (179, 3, ()),
    "bad": (203, 1, ("bold",)),
    "read": (75, 6, ()),
    "write": (176, 5, ()),
    "trim": (109, 4, ()),
    "gain": (71, 2, ()),
    "loss": (179, 3, ()),
    "empty": (241, None, ("dim",)),
    # From few to many: as the viridis scale of plots, which gets steadily brighter.
    "heat1": (54, 4, ()),
    "heat2": (61, 4, ()),
    "heat3": (31, 6, ()),
    "heat4": (37, 6, ()),
    "heat5": (36, 2, ()),
    "heat6": (71, 2, ()),
    "heat7": (149, 3, ()),
    "heat8": (220, 3, ()),
}
_KEYS = {
    b"\t": "next",
    b"\x1b[C": "next",
    b"\x1bOC": "next",
    b"\x1b[B": "next",
    b"\x1bOB": "next",
    b"\x1b[Z": "previous",
    b"\x1b[D": "previous",
    b"\x1bOD": "previous",
    b"\x1b[A": "previous",
    b"\x1bOA": "previous",
}
_KEY = re.compile(rb"\x1b[\[O][0-9;]*[@-~]|.", re.DOTALL)
_PADDING = re.compile(rb"\$<[0-9.]+[*/]*>")  # pauses, which the terminals of today do not need


class Terminal:
    """Standard input and output, if they are a terminal that can place its cursor."""

    def __init__(self) -> None:
        """Look the terminal up. Raises UsageError when it is none, or one that cannot be drawn on."""
        for stream, name in ((sys.stdin, "input"), (sys.stdout, "output")):
            if stream is None or not stream.isatty():
                raise UsageError(f"standard {name} is not a terminal: 'zramd top --once' draws without one")
        self._in, self._out = sys.stdin.fileno(), sys.stdout.fileno()
        kind = os.environ.get("TERM", "")
        try:
            curses.setupterm(kind, self._out)
            self._place = curses.tigetstr("cup")
        except curses.error:
            self._place = None
        if not self._place or not curses.tigetstr("clear"):
            raise UsageError(
                f"TERM='{kind}' is not a terminal that can show a screen: set TERM to what it is, "
                "such as xterm-256color, or use 'zramd top --once'"
            )
        self.colours = 0 if os.environ.get("NO_COLOR") else max(curses.tigetnum("colors"), 0)
        self._plain = _capability("sgr0")
        self._styles = {name: self._style(*style) for name, style in _STYLES.items()}
        self._drawn: list[Sequence[tuple[str, str]]] = []
        self._saved: list[int | list[bytes | int]] | None = None

    def __enter__(self) -> "Terminal":
        """Take the screen: `leave` gives it back."""
        self.enter()
        return self

    def __exit__(self, *_: object) -> None:
        """Give the screen back."""
        self.leave()

    def enter(self) -> None:
        """Keep what is on the screen, and read keys as they come, without showing them."""
        self._saved = termios.tcgetattr(self._in)
        mode = termios.tcgetattr(self._in)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        mode[6][termios.VMIN], mode[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._in, termios.TCSADRAIN, mode)
        self._write(_capability("smcup") + _capability("civis"))
        self.redraw()

    def leave(self) -> None:
        """Show what was on the screen before, and let the terminal work as it did."""
        if self._saved is None:
            return
        with suppress(OSError, termios.error):  # it may be gone
            back = _capability("rmcup") or _capability("clear")
            self._write(self._plain + _capability("cnorm") + back)
            termios.tcsetattr(self._in, termios.TCSADRAIN, self._saved)
        self._saved = None

    def fileno(self) -> int:
        """Return the descriptor that keys come from, for select."""
        return self._in

    def size(self) -> tuple[int, int]:
        """Return columns and lines now."""
        columns, lines = os.get_terminal_size(self._out)
        return columns or 80, lines or 24

    def read_keys(self) -> list[str]:
        """Return the keys that were pressed: next, previous, a character; 'end' when the terminal is gone."""
        try:
            data = os.read(self._in, 1024)
        except OSError:
            data = b""
        if not data:
            return ["end"]
        return [_KEYS.get(key, key.decode("ascii", "replace")) for key in _KEY.findall(data)]

    def redraw(self) -> None:
        """Forget what is on the screen: the next `draw` writes all of it."""
        self._drawn = []
        self._write(self._plain + _capability("clear"))

    def draw(self, lines: Sequence[Sequence[tuple[str, str]]]) -> None:
        """Show the lines, from the first row on; only those that differ from the last time are sent."""
        changed = b""
        for row, line in enumerate(lines):
            if row >= len(self._drawn) or self._drawn[row] != line:
                changed += self._at(row) + self.paint(line)
        self._drawn = list(lines)
        if changed:
            self._write(changed)

    def paint(self, line: Sequence[tuple[str, str]]) -> bytes:
        """Return what shows a line's pieces in their styles."""
        text = b""
        for piece, name in line:
            style = self._styles.get(name, b"")
            text += style + piece.encode(errors="replace") + (self._plain if style else b"")
        return text

    def _at(self, row: int) -> bytes:
        assert self._place is not None
        return _PADDING.sub(b"", curses.tparm(self._place, row, 0))

    def _style(self, many: int | None, few: int | None, attributes: tuple[str, ...]) -> bytes:
        colour = many if self.colours >= 256 else few if self.colours >= 8 else None
        text = b""
        for attribute in attributes:
            # A grey of 256 is dim enough.
            if attribute != "dim" or colour is None:
                text += _capability(attribute)
        if colour is not None and (foreground := curses.tigetstr("setaf")):
            text += _PADDING.sub(b"", curses.tparm(foreground, colour))
        return text

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._out, data) :]


def _capability(name: str) -> bytes:
    return _PADDING.sub(b"", curses.tigetstr(name) or b"")
