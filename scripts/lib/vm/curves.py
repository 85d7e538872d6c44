"""The pictures of runs over time: dead blocks and memory with --churn, cold blocks and memory with --rest."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from bench.plots import INK, STYLE, apart
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vm.dead import MIB, Samples
from vm.errors import VmError

COLORS = ("#e0570f", "#2f86dd", "#2f9e62", "#a868d8")  # readable on white and on black, as those of bench
Panels = tuple[tuple[str, Callable[[dict[str, Any]], float]], ...]
CHURN: Panels = (
    ("dead blocks, % of those that take memory", lambda sample: float(sample["dead_share"])),
    ("memory that they all take, MiB", lambda sample: sample["total_bytes"] / MIB),
)
REST: Panels = (
    ("memory for each block, bytes", lambda sample: float(sample["bytes_a_block"])),
    ("cold blocks, %", lambda sample: 100 * sample["cold"] / sample["stored"]),
)
LEAST_STORED = 500  # blocks: a share of fewer says nothing


def draw(path: Path, runs: dict[str, Samples]) -> None:
    """Write the picture of some runs as SVG; the same runs give the same bytes. Raises VmError."""
    if not 0 < len(runs) <= len(COLORS):
        raise VmError(f"the picture has room for 1 to {len(COLORS)} runs, and {len(runs)} are named")
    panels = CHURN if all("dead" in samples[0] for samples in runs.values() if samples) else REST
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(9, 3.3), layout="constrained")
        for axes, (title, value) in zip(figure.subplots(1, len(panels)), panels, strict=True):
            _panel(axes, title, value, runs)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n")


def _panel(
    axes: Axes, title: str, value: Callable[[dict[str, Any]], float], runs: dict[str, Samples]
) -> None:
    axes.set_title(title, loc="left")
    last = []
    for color, samples in zip(COLORS, runs.values(), strict=False):
        enough = [each for each in samples if each["stored"] >= LEAST_STORED and each["time"] >= 0]
        points = [(each["time"], value(each)) for each in enough] or [(0.0, 0.0)]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.6)
        last.append(points[-1])
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    room = axes.get_ylim()[1] * 0.07
    places = apart([y for _, y in last], room)
    lift = max(0.0, -min(places))  # none below the axis
    for (x, _), y, name, color in zip(last, places, runs, COLORS, strict=False):
        place: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        axes.annotate(name, (x, y + lift), color=color, **place)
    axes.set_xlabel("seconds")
    axes.tick_params(color=INK)
