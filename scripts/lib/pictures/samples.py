"""Samples of a device in a file: one JSON object a line, each with what has changed since the one before."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zramd.control.samples import Histogram, Sample

WHOLE = 2  # samples at the end that are kept with their size classes and latencies: what `top` shows of them


def write(path: Path, taken: Sequence[Sample]) -> None:
    """Keep samples in a file. Raises OSError."""
    lines = []
    before: dict[str, Any] = {}
    for place, sample in enumerate(taken):
        # What the buckets tell is there twice; quantiles over all time are not shown.
        stats = {name: value for name, value in sample.stats.items() if name != "latency"}
        entry: dict[str, Any] = {"stats": _changes(before, stats)}
        if place >= len(taken) - WHOLE:
            entry |= {name: value for name, value in sample._asdict().items() if name != "stats"}
            entry["classes"] = _table(sample.classes)
        lines.append(json.dumps(entry, separators=(",", ":")))
        before = stats
    path.write_text("\n".join(lines) + "\n")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in now.items() if name not in before or before[name] != value}


def _table(classes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return size classes with their names only once."""
    rows = [
        [list(value.values()) if name == "zspages" else value for name, value in row.items()]
        for row in classes
    ]
    return {"names": list(classes[0]), "groups": list(classes[0]["zspages"]), "rows": rows}


def _classes(table: dict[str, Any]) -> list[dict[str, Any]]:
    rows = [dict(zip(table["names"], row, strict=True)) for row in table["rows"]]
    return [row | {"zspages": dict(zip(table["groups"], row["zspages"], strict=True))} for row in rows]


def read(path: Path) -> Iterator[Sample]:
    """Yield the samples that a file keeps. Raises OSError, ValueError."""
    stats: dict[str, Any] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        stats = stats | entry["stats"]
        latencies = {
            operation: Histogram(*map(tuple, histogram))
            for operation, histogram in entry.get("latencies", {}).items()
        }
        classes = _classes(entry["classes"]) if "classes" in entry else []
        yield Sample(stats, classes, entry.get("clients", 0), entry.get("uses", {}), latencies)
