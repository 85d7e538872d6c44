"""The report's pictures, from what one run measured: to be read on white and on black.

The same figures give the same bytes.
"""

from __future__ import annotations

import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

from bench.results import Report, Row, number
from bench.setup import GIB, MIB

mpl.use("svg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Each has a contrast of at least 3.5 : 1 against both white and GitHub's dark page.
INK = "#7a828c"
COLORS = {"zramd": "#e0570f", "kernel zram": "#2f86dd"}
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text, so that a picture is small and can be searched
    "svg.hashsalt": "zramd",  # the same ids each time
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def draw(report: Report, folder: Path) -> dict[str, str]:
    """Write the pictures that the report has figures for; return what each shows, by the name of its file."""
    drawn: dict[str, str] = {}
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        for name, caption, figure in (
            ("frag-ratio.svg", FRAG_RATIO, _frag_ratio(report)),
            ("throughput.svg", THROUGHPUT, _throughput(report)),
            ("cost.svg", COST, _cost(report)),
        ):
            if figure:
                # (Without a date, or each run would change every file.)
                text = io.StringIO()
                figure.savefig(
                    text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
                )
                lines = [line.rstrip() for line in text.getvalue().splitlines()]
                (folder / name).write_text("\n".join(lines) + "\n")
                drawn[name] = caption
    return drawn


FRAG_RATIO = (
    "Frag ratio (payload through the pool's pages) along both traces: blocks are written, 65 % are freed at "
    "random, the pool is compacted, blocks come and go, the pool is compacted again"
)


def _frag_ratio(report: Report) -> Figure | None:
    curves = {name: curve for name, curve in report.curves.items() if name.startswith("frag ratio, ")}
    if not curves:
        return None
    figure = Figure(figsize=(9, 3.1), layout="constrained")
    axes = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for at, (name, curve) in zip(axes, curves.items(), strict=True):
        _frag_ratio_of(at, name.removeprefix("frag ratio, "), curve)
    axes[0].set_ylabel("frag ratio, %")
    return figure


def _frag_ratio_of(axes: Axes, title: str, curve: dict[str, Any]) -> None:
    marks: dict[str, int] = curve["marks"]
    filled, freed, _, aged, end = marks.values()
    axes.set_title(title, loc="left", pad=20)
    lines = {name: curve[name] for name in ("kernel zram", "zramd") if name in curve}
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), color=COLORS[name], linewidth=1.8)
    last = {name: points[-1][1] for name, points in lines.items()}
    for name, y in zip(last, apart(list(last.values()), 6.5), strict=True):
        axes.annotate(
            f"{name} {last[name]:.1f}",
            (end, y),
            xytext=(5, 0),
            textcoords="offset points",
            color=COLORS[name],
            va="center",
        )
    for x in (filled, freed, aged):
        axes.axvline(x, color=INK, linewidth=0.6, linestyle=(0, (2, 3)))
    for start, stop, word in ((0, filled, "write"), (filled, freed, "free"), (freed, aged, "age")):
        axes.text((start + stop) / 2, 103.5, word, ha="center", va="bottom")
    low = min(y for points in lines.values() for _, y in points)
    # (Aging is the longest part: there is room for both, one above the other.)
    axes.text(freed, low, "  \N{LEFTWARDS ARROW} compact", ha="left")
    axes.text(aged, low + 8, "compact \N{RIGHTWARDS ARROW}  ", ha="right")
    axes.set_xlabel("requests")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f} k" if value else "0")
    axes.set_xlim(0, end)
    axes.set_ylim(min(low, 30) // 10 * 10, 102)


def apart(values: Sequence[float], least: float) -> list[float]:
    """Return places for labels of these values that are at least so far from each other."""
    order = sorted(range(len(values)), key=values.__getitem__)
    places = list(values)
    for below, above in itertools.pairwise(order):
        gap = places[above] - places[below]
        if gap < least:
            places[below] -= (least - gap) / 2
            places[above] += (least - gap) / 2
    return places


THROUGHPUT = (
    "Throughput beside the peers, more is better: over NBD with fio, and in process on memory pages; bars are"
    " medians, lines reach from the lowest round to the highest"
)
# Title, unit, by how much a row's value is divided, and the rows.
PANELS = (
    (
        "4K random, queue depth 16",
        "thousand IOPS",
        1e3,
        {"4K randwrite QD16": "write", "4K randread QD16": "read"},
    ),
    ("128K sequential, queue depth 8", "MB/s", 1, {"128K write QD8": "write", "128K read QD8": "read"}),
    (
        "in process, one thread",
        "MB/s",
        1,
        {
            "in process, first write": "first write",
            "in process, overwrite": "overwrite",
            "in process, read": "read",
        },
    ),
)


def _throughput(report: Report) -> Figure | None:
    panels = []
    for title, unit, divisor, names in PANELS:
        bars = [bar for name, word in names.items() for bar in _bars(report.rows, name, word, divisor)]
        if bars:
            panels.append((title, unit, bars))
    if not panels:
        return None
    heights = [len(bars) + 2 for _, _, bars in panels]
    figure = Figure(figsize=(7.5, sum(heights) * 0.27), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for at, (title, unit, bars) in zip(axes, panels, strict=True):
        _bar_panel(at, f"{title}, {unit}", bars)
    return figure


def _bars(
    rows: Sequence[Row], what: str, word: str, divisor: float
) -> list[tuple[str, str, float, float, float]]:
    """Return (what, whose, median, lowest, highest) of zramd, once, and of its peers."""
    series: dict[str, Sequence[float]] = {}
    for row in rows:
        if row.what == what:
            series["zramd"] = row.values
            if row.peer_values:
                series[row.peer] = row.peer_values
    names = {"memory": "nbdkit memory", "memory zstd": "nbdkit memory, zstd"}
    return [
        (
            word,
            names.get(name, name),
            Row("", "", values, row.aim).value / divisor,
            min(values) / divisor,
            max(values) / divisor,
        )
        for name, values in series.items()
    ]


def _bar_panel(axes: Axes, title: str, bars: Sequence[tuple[str, str, float, float, float]]) -> None:
    axes.set_title(title, loc="left")
    y = 0.0
    ticks = []
    longest = max(high for *_, high in bars)
    word_before = ""
    for word, name, value, low, high in bars:
        if word_before not in ("", word):
            y += 0.5
        axes.barh(y, value, height=0.78, color=COLORS.get(name, INK), alpha=0.75 if name in COLORS else 0.4)
        axes.plot([low, high], [y, y], color=INK, linewidth=1)
        axes.text(max(high, value) + longest * 0.012, y, number(value), va="center")
        ticks.append((y, name if word == word_before else f"{word}    {name}"))
        word_before = word
        y += 1
    axes.set_yticks([at for at, _ in ticks], [text for _, text in ticks])
    axes.tick_params(left=False)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.12)
    axes.xaxis.set_visible(False)
    axes.spines["bottom"].set_visible(False)


COST = "Cost over the bytes that are stored, with a band up to 1.2 times the cost with the least"


def _cost(report: Report) -> Figure | None:
    from bench.large_rows import COST as NAME
    from bench.large_rows import START

    curves = report.curves.get(NAME)
    if not curves:
        return None
    figure = Figure(figsize=(12, 4), layout="constrained")
    grid = figure.subplots(2, 4, sharex=True).flat
    for axes, (name, points) in zip(grid, curves.items(), strict=True):
        sizes, values = zip(*points, strict=True)
        axes.set_title(f"{name}, {'ms' if name == START else 'µs'}", loc="left")
        axes.axhspan(values[0], values[0] * 1.2, color=INK, alpha=0.2, linewidth=0)
        axes.plot(sizes, values, color=COLORS["zramd"], marker="o", markersize=4, linewidth=1.8)
        for size, value in (points[0], points[-1]):
            axes.annotate(
                number(value),
                (size, value),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                color=COLORS["zramd"],
            )
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [_size(size) for size in sizes])
        axes.minorticks_off()
        axes.set_ylim(0, max(*values, values[0] * 1.2) * 1.3)
        axes.margins(x=0.12)
    figure.supxlabel("stored", fontsize=9.5, color=INK)
    return figure


def _size(size: int) -> str:
    return f"{size // GIB} GiB" if size >= GIB else f"{size // MIB} MiB"
