"""The texts that show the numbers, in the run folder's files and over the control socket.

Names and columns are zram's and zsmalloc's own. zramd.stats.prometheus has the text for Prometheus.
"""

import json
from typing import Any

from zramd.errors import printable
from zramd.stats.snapshots import ClassRow, Latency, Snapshot
from zramd.stats.writeback import used

ABOUT = ("name", "comp_algorithm", "version", "pid")  # what stats.json has beside the numbers
# The columns of zram's own files, in zram's order.
MM_STAT = (
    *("orig_data_size", "compr_data_size", "mem_used_total", "mem_limit", "mem_used_max"),
    *("same_pages", "pages_compacted", "huge_pages", "huge_pages_since"),
)
IO_STAT = ("failed_reads", "failed_writes", "invalid_io", "notify_free")
_GROUPS = ("10%", "20%", "30%", "40%", "50%", "60%", "70%", "80%", "90%", "99%", "100%")


def mm_stat(snapshot: Snapshot) -> str:
    """Return zram's mm_stat line: nine numbers in zram's order and width."""
    return " ".join(f"{snapshot.values[name]:8}" for name in MM_STAT) + "\n"


def io_stat(snapshot: Snapshot) -> str:
    """Return zram's io_stat line: four numbers in zram's order and width."""
    # zram prints a literal 0 for invalid_io, without a width: with no invalid request this is the same line.
    widths = {"invalid_io": 0}
    return " ".join(f"{snapshot.values[name]:{widths.get(name, 8)}}" for name in IO_STAT) + "\n"


def bd_stat(snapshot: Snapshot) -> str:
    """Return zram's bd_stat line, in its width: what is in use, read and written, in units of 4096 bytes."""
    section = snapshot.writeback
    columns = (used(section), section["bd_reads"], section["bd_writes"]) if section else (0, 0, 0)
    return " ".join(f"{size >> 12:8}" for size in columns) + "\n"


def backing_dev(snapshot: Snapshot) -> str:
    """Return zram's backing_dev: the device's path, or none."""
    return f"{printable(snapshot.writeback['backing']) if snapshot.writeback else 'none'}\n"


def sentence(snapshot: Snapshot) -> str:
    """Return what a service manager shows of a server in one line."""
    values = snapshot.values
    stored = f"{values['orig_data_size'] >> 20} MiB stored in {values['total_bytes'] >> 20} MiB of memory"
    if values["out_pages"]:
        stored += f" and {values['out_data_size'] >> 20} MiB on the backing device"
    return f"{stored}, frag ratio {values['frag_ratio']:.0f} %" if values["mem_used_total"] else stored


def frag_ratio(snapshot: Snapshot) -> str:
    """Return the percentage of the pool that payload fills, with two decimals."""
    return f"{snapshot.values['frag_ratio']:.2f}\n"


def classes_table(rows: list[ClassRow]) -> str:
    """Return zsmalloc's table of size classes with its Total line, in zsmalloc's columns and widths."""
    header = f" {'class':>5} {'size':>5} " + "".join(f"{group:>9} " for group in _GROUPS)
    header += "obj_allocated   obj_used pages_used pages_per_zspage freeable\n"
    lines = [header]
    for row in rows:
        lines.append(_class_line(row.class_index, row.size, row.zspages, row, row.pages_per_zspage))
    totals = ClassRow(
        0,
        0,
        tuple(sum(row.zspages[group] for row in rows) for group in range(len(_GROUPS))),
        sum(row.obj_allocated for row in rows),
        sum(row.obj_used for row in rows),
        sum(row.pages_used for row in rows),
        0,
        sum(row.freeable for row in rows),
    )
    lines.append("\n")
    lines.append(_class_line("Total", "", totals.zspages, totals, ""))
    return "".join(lines)


def _class_line(
    index: int | str, size: int | str, zspages: tuple[int, ...], row: ClassRow, per_zspage: int | str
) -> str:
    groups = "".join(f"{count:9} " for count in zspages)
    return (
        f" {index:>5} {size:>5} {groups}{row.obj_allocated:13} {row.obj_used:10} {row.pages_used:10} "
        f"{per_zspage:>16} {row.freeable:8}\n"
    )


def to_json(snapshot: Snapshot) -> str:
    """Return every number of the snapshot, derived ones included, as one JSON object.

    `latency` holds, by operation, how many requests there were, with mean, p50, p90 and p99 in microseconds;
    `tiers` what is hot and cold; `writeback` what is out, where there is a backing device: see the modules of
    these names in zramd.stats.
    """
    values = {
        name: round(value, 3 if name == "uptime" else 4) if isinstance(value, float) else value
        for name, value in snapshot.values.items()
    }
    about = {name: getattr(snapshot, name) for name in ABOUT}
    latency = {op: _latency_values(latency) for op, latency in snapshot.latency.items()}
    sections = {"tiers": snapshot.tiers, "writeback": snapshot.writeback}
    parts = {name: section for name, section in sections.items() if section is not None}
    return json.dumps({**about, **values, "latency": latency, **parts}, indent=2) + "\n"


def _latency_values(latency: Latency) -> dict[str, int | float]:
    """Return what stats.json has: a quantile of buckets has no more than three digits worth showing."""
    values: dict[str, int | float] = {"count": latency.requests}
    values["mean_us"] = round(latency.sum / latency.requests * 1e6, 3) if latency.requests else 0.0
    for percent in (50, 90, 99):
        values[f"p{percent}_us"] = round(latency.quantile(percent / 100) * 1e6, 3)
    return values


def classes_json(rows: list[ClassRow]) -> str:
    """Return the table of size classes as a JSON list, zspages by fullness group as an object."""
    classes = []
    for row in rows:
        values: dict[str, Any] = row._asdict()
        values["zspages"] = dict(zip(_GROUPS, row.zspages, strict=True))
        classes.append(values)
    return json.dumps(classes, indent=2) + "\n"
