"""The pictures of `zramd top` are drawn from samples, at once: here beside what it shows of a real server."""

import sys
from collections.abc import Callable
from pathlib import Path

import pyte
from support.server import NbdkitProcess
from test_top import fill

from zramd.control.samples import take
from zramd.control.servers import find

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from pictures import samples, screen, top


def test_drawn_from_samples_as_top_draws_itself(serve: Callable[..., NbdkitProcess], tmp_path: Path) -> None:
    served = serve(compaction="off", mem_limit="32M")
    fill(served)
    frames: list[str] = []  # the first lines, of which each has another time

    def until(shown: pyte.Screen) -> bool:
        """Whether a whole frame was drawn after the first, which has rates since the server's start."""
        line = shown.display[0]
        if line.strip() and line not in frames:
            frames.append(line)
        return len(frames) > 4

    command = [sys.executable, "-P", "-m", "zramd", "top", "--rundir", str(served.rundir), "-i", "1"]
    live, _ = screen.run(command, top.environment(), top.COLUMNS, top.ROWS, until)
    path = str(served.rundir)
    record = tmp_path / "top.jsonl"
    samples.write(record, [take(find(None, path)), take(find(None, path))])
    drawn = top.draw(record)

    words = [row.split()[0] if row.strip() else "" for row in live.display]
    whole = {"stored", "spent", "■", "blocks", "compact", "zspages", "size", "100%", "50%", "10%"}
    assert whole <= set(words)
    for row, word in enumerate(words):
        # The rest has a history, which is longer the longer one looks.
        columns = top.COLUMNS if word in whole else 0 if row == 0 else 16
        for column in range(columns):
            assert live.buffer[row][column] == drawn.buffer[row][column], live.display[row]
