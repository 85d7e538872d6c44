"""The text for Prometheus, on /metrics and in metrics.prom.

Base units (bytes, seconds), counters end in _total, ratios are 0 to 1, and every sample names its device.
docs/monitoring has a table of all of it.
"""

import sys
from itertools import accumulate
from math import inf

from zramd.stats.numbers import NUMBERS, Number, Values
from zramd.stats.snapshots import ClassRow, Snapshot
from zramd.stats.tiers import AGES_MEANING, MODES, TIERS, ages
from zramd.stats.writeback import WRITEBACK


def exposition(snapshot: Snapshot, rows: list[ClassRow]) -> str:
    """Return the snapshot in Prometheus' text format 0.0.4. Classes without objects are left out."""
    s, values = snapshot, snapshot.values
    lines: list[str] = []

    def head(name: str, kind: str, meaning: str) -> None:
        lines.append(f"# HELP zramd_{name} {meaning}\n# TYPE zramd_{name} {kind}\n")

    def sample(name: str, labels: str, value: int | float) -> None:
        shown = value if isinstance(value, int) else f"{value:.9g}"
        lines.append(f'zramd_{name}{{device="{s.name}"{labels}}} {shown}\n')

    def family(name: str, kind: str, meaning: str, *samples: tuple[str, int | float]) -> None:
        head(name, kind, meaning)
        for labels, value in samples:
            sample(name, labels, value)

    def by_op(name: str, meaning: str, **numbers: str) -> None:
        samples = [(f',op="{op}"', values[number]) for op, number in numbers.items()]
        family(f"{name}_total", "counter", meaning, *samples)

    def table(numbers: tuple[Number, ...], values: Values) -> None:
        for number in numbers:
            value = values[number.name]
            if number.metric and value is not None:
                kind = "counter" if number.metric.endswith("_total") else "gauge"
                shown = value if number.scale == 1 else value * number.scale
                family(number.metric, kind, number.meaning, ("", shown))

    def modes(name: str, meaning: str, now: str) -> None:
        family(name, "gauge", meaning, *((f',mode="{mode}"', int(mode == now)) for mode in MODES))

    table(NUMBERS, values)
    if s.tiers is not None:
        table(TIERS, s.tiers)
        family(
            "age_pages",
            "gauge",
            AGES_MEANING,
            *((f',age="{row.bound}"', row.blocks) for row in ages(s.tiers)),
        )
        modes("recompression_mode", "How eager recompression is: 1 for what it is now.", s.tiers["mode"])
    if s.writeback is not None:
        table(WRITEBACK, s.writeback)
        modes("writeback_mode", "How eager writing out is: 1 for what it is now.", s.writeback["mode"])
    by_op("requests", "Requests served.", read="reads", write="writes", trim="trims", zero="zeroes")
    head(
        "request_duration_seconds", "histogram", "Time from the start of a request to its end, by operation."
    )
    for op, latency in s.latency.items():
        label = f',op="{op}"'
        # Cumulative: each bucket holds all that took no longer than its bound.
        so_far = accumulate(latency.counts)
        for bound, count in zip((*latency.bounds, inf), so_far, strict=True):
            shown = "+Inf" if bound == inf else f"{bound:.9g}"
            sample("request_duration_seconds_bucket", f'{label},le="{shown}"', count)
        sample("request_duration_seconds_sum", label, latency.sum)
        sample("request_duration_seconds_count", label, latency.requests)
    by_op("request_bytes", "Bytes read and written by clients.", read="read_bytes", write="written_bytes")
    by_op("request_errors", "Requests that failed.", read="failed_reads", write="failed_writes")
    used = [row for row in rows if row.obj_allocated]
    objects = [(f',size="{row.size}"', row.obj_used) for row in used]
    pages = [(f',size="{row.size}"', row.pages_used) for row in used]
    family("class_objects", "gauge", "Objects in use, by size class.", *objects)
    family("class_pages", "gauge", "Pages in use, by size class.", *pages)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"
    labels = f',version="{s.version}",python="{version}",comp_algorithm="{s.comp_algorithm}"'
    family("build_info", "gauge", "What serves the device.", (labels, 1))
    return "".join(lines)
