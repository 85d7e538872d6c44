"""The columns in which devices are shown: zramctl's, then what only zramd has."""

import os
from collections.abc import Callable

from zramd.control.human import human
from zramd.errors import UsageError

TYPE_CHECKING = False  # what typing says too, without the time that it takes to import
if TYPE_CHECKING:
    from typing import Any, TypeAlias

    Cell: TypeAlias = str | int | float | None  # None: unknown, or nothing


class Column:
    """A column: what it is called, what it means, how its cells look, and the number it shows."""

    __slots__ = ("get", "kind", "meaning", "name")

    def __init__(self, name: str, kind: str, meaning: str, get: "Callable[[dict[str, Any]], Cell]") -> None:
        self.name = name
        self.kind = kind  # text, size (bytes), number, or ratio (two decimals)
        self.meaning = meaning
        self.get = get

    def show(self, cell: "Cell", in_bytes: bool) -> str:
        """Return a cell as text, '' for nothing, '-' for a ratio of nothing."""
        if cell is None and self.kind == "ratio":
            return "-"
        if cell is None or cell == "":
            return ""
        if self.kind == "size" and not in_bytes:
            return human(int(cell))
        return f"{cell:.2f}" if self.kind == "ratio" else str(cell)


def _number(name: str) -> "Callable[[dict[str, Any]], Cell]":
    return lambda stats: stats.get(name)


def _ratio(stats: "dict[str, Any]") -> "Cell":
    used = stats.get("mem_used_total")
    return stats["orig_data_size"] / used if used else None


COLUMNS = (
    Column("NAME", "text", "name of the device", _number("name")),
    Column("DISKSIZE", "size", "size of the device, before compression", _number("disksize")),
    Column("DATA", "size", "data stored, before compression", _number("orig_data_size")),
    Column("COMPR", "size", "the same data, compressed", _number("compr_data_size")),
    Column("ALGORITHM", "text", "compressor", _number("comp_algorithm")),
    Column(
        "STREAMS",
        "number",
        "processors that may compress at once",
        lambda stats: stats.get("streams", os.cpu_count()),
    ),
    Column("ZERO-PAGES", "number", "blocks of one repeated word: no memory", _number("same_pages")),
    Column(
        "TOTAL",
        "size",
        "memory of the pool now: COMPR, headers, holes",
        _number("mem_used_total"),
    ),
    Column("MEM-LIMIT", "size", "most that the pool may take, 0 for no limit", _number("mem_limit")),
    Column("MEM-USED", "size", "as PEAK (zramctl calls the peak so)", _number("mem_used_max")),
    Column("MIGRATED", "number", "pages that compaction has freed", _number("pages_compacted")),
    Column("COMP-RATIO", "ratio", "DATA divided by TOTAL", _ratio),
    Column("MOUNTPOINT", "text", "[SWAP], or where this machine has it mounted", _number("mountpoint")),
    Column("FRAG", "ratio", "percent of the pool that payload fills: more is better", _number("frag_ratio")),
    Column("HUGE-PAGES", "number", "blocks stored raw, because they do not compress", _number("huge_pages")),
    Column(
        "COLD-PAGES", "number", "blocks recompressed because nobody asked for them", _number("cold_pages")
    ),
    Column("OUT-PAGES", "number", "blocks on the backing device, and not in memory", _number("out_pages")),
    Column("PEAK", "size", "most that TOTAL ever was", _number("mem_used_max")),
    Column("METADATA", "size", "memory beside the pool, for tables", _number("metadata_bytes")),
    Column("SWAP-USED", "number", "blocks that swap of this machine uses", _number("swap_used")),
    Column(
        "DEAD", "number", "blocks that take memory, and swap has freed: zramd refresh", _number("dead_blocks")
    ),
    Column("REFRESHED", "number", "blocks that the last refresh gave back", _number("refresh_last_blocks")),
    Column("CLIENTS", "number", "connections of clients", _number("clients")),
    Column("FRONT", "text", "how it is reached: nbd or ublk", _number("front")),
    Column("PID", "number", "process that serves it", _number("pid")),
    Column("ATTACHED", "text", "device of this machine's kernel that is its client", _number("attached")),
)
# zramctl's, in its order, for scripts that count columns; then what only zramd has.
DEFAULT = ("NAME", "ALGORITHM", "DISKSIZE", "DATA", "COMPR", "TOTAL", "STREAMS", "MOUNTPOINT", "FRAG")
BY_NAME = {column.name: column for column in COLUMNS}


def columns(words: str | None, every: bool) -> list[Column]:
    """Return the columns that --output and --output-all ask for; raises UsageError for an unknown one."""
    if every:
        return list(COLUMNS)
    names = list(DEFAULT)
    if words is not None:
        wanted = words.removeprefix("+").upper().split(",")
        names = names + wanted if words.startswith("+") else wanted
    for name in names:
        if name not in BY_NAME:
            raise UsageError(f"unknown column '{name}': use some of {', '.join(BY_NAME)}")
    return [BY_NAME[name] for name in names]
