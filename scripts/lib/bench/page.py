"""docs/benchmarks.md, as far as a run writes it: pictures, tables, notes. What people wrote there stays."""

from __future__ import annotations

from pathlib import Path

from bench.results import Report

NAME = "benchmarks.md"
START, END = "<!-- bench -->\n", "<!-- /bench -->\n"


def write(report: Report, folder: Path, command: str) -> list[Path]:
    """Write the page and its pictures into a folder; return what was written."""
    from bench import plots  # only a report needs the library that draws

    pictures = plots.draw(report, folder)
    page = folder / NAME
    before = page.read_text() if page.exists() else f"# Figures\n\n{START}{END}"
    page.write_text(filled(before, "\n".join(_lines(report, pictures, command))))
    return [page, *(folder / name for name in pictures)]


def filled(page: str, text: str) -> str:
    """Return a page with the text between its marks; raises ValueError if it has none."""
    head, start, rest = page.partition(START)
    _, end, tail = rest.partition(END)
    if not start or not end:
        raise ValueError(f"{NAME} has no {START.strip()} and {END.strip()} around what is to be replaced")
    return head + start + text + end + tail


def _lines(report: Report, pictures: dict[str, str], command: str) -> list[str]:
    lines = [
        f"Made by `{command}`, all in one run. zramd and its peer take turns; a ratio is the median",
        "of the ratios of the rounds. Machines differ, so read the ratios and make your own table.",
        "",
    ]
    for name, caption in pictures.items():
        lines += [f"![{Path(name).stem}]({name})", "", f"{caption}.", ""]
    if "frag-ratio.svg" in pictures and not any(
        "kernel zram" in curve for name, curve in report.curves.items() if name.startswith("frag ratio")
    ):
        lines += ["The kernel's zram was not there to be measured.", ""]
    return [*lines, report.markdown()]
