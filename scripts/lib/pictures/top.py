"""`zramd top` of the device that was recorded, drawn by the program itself on a terminal of a fixed size.

In that terminal runs this module. It hands the samples to zramd.control.samples, zramd.top.view and
zramd.top.terminal as zramd.commands.top does, but at once, without a server and without waiting: so the
screen depends on nothing but the samples and the program.
"""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import zramd
from pictures import samples
from zramd.errors import ZramdError

if TYPE_CHECKING:
    from pyte import Screen

LIBRARY = Path(__file__).resolve().parents[1]
RECORD = LIBRARY.parents[1] / "tests" / "quality" / "top.jsonl"
COLUMNS, ROWS = 100, 30
INTERVAL = 1.0  # seconds between two samples


class NotDrawnError(Exception):
    """The program drew nothing; the message says why."""


def pictures(record: Path = RECORD) -> dict[str, str]:
    """Return the pictures of a record by the names of their files. Raises NotDrawnError, OSError."""
    from pictures import svg

    drawn = draw(record)
    *_, last = samples.read(record)
    return {
        f"top-{theme.name}.svg": svg.picture(drawn, theme, "zramd top", describe(last))
        for theme in (svg.LIGHT, svg.DARK)
    }


def draw(record: Path) -> "Screen":
    """Return the screen that shows a record. Raises NotDrawnError."""
    from pictures import screen

    command = [sys.executable, "-P", "-m", "pictures.top", str(record)]
    drawn, status = screen.run(command, environment(), COLUMNS, ROWS)
    if status:
        # (Its lines may have been wrapped anywhere.)
        words = " ".join("".join(drawn.display).split())
        raise NotDrawnError(f"zramd top cannot draw {record}: {words or f'status {status}'}")
    return drawn


def environment() -> dict[str, str]:
    """Return what a program needs to find zramd and these tools, and no setting of the user's."""
    package = Path(zramd.__file__).parent.parent
    return {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": f"{package}:{LIBRARY}"}


def describe(sample: samples.Sample) -> str:
    """Return in words what there is to see, for those who cannot."""
    from zramd.control.human import human

    stats = sample.stats
    return (
        f"A terminal in which zramd top shows a device live: {human(stats['orig_data_size'])} of data are "
        f"stored in {human(stats['total_bytes'])} of memory; below, how well the memory is packed over "
        "time, the requests with their latencies, what compaction moves, and a map of all zspages by the "
        "size of their objects and by how full they are."
    )


def show(taken: Iterator[samples.Sample]) -> None:
    """Draw the last of the samples, after those before it, on this process's terminal."""
    from zramd.commands.top import glyphs
    from zramd.control.samples import Watch
    from zramd.top.terminal import Terminal
    from zramd.top.view import Frame, screen

    watch = Watch()
    for sample in taken:
        watch.add(sample)
    terminal = Terminal()
    frame = Frame(sample.stats["name"], watch, INTERVAL)
    terminal.draw(screen(frame, *terminal.size(), glyphs(terminal.colours)))


if __name__ == "__main__":
    try:
        show(samples.read(Path(sys.argv[1])))
    except (OSError, ValueError, ZramdError) as failure:
        sys.exit(str(failure))
