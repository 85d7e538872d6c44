"""Statistics: what the numbers are, and the texts that show them.

The device owns plain counters. `take` copies them into a `Snapshot`; the functions below turn a snapshot into
the texts that the run folder and the endpoint show. Names and columns are zram's and zsmalloc's own.
zramd.stats.prometheus has the text for Prometheus.
"""

import json
import os
import time
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from zramd.stats.buckets import quantile

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_GROUPS = ("10%", "20%", "30%", "40%", "50%", "60%", "70%", "80%", "90%", "99%", "100%")


class Number(NamedTuple):
    """One number of stats.json: its unit, what it means, and the Prometheus metric that shows it too."""

    name: str
    unit: str  # as a person reads it; '' for a count of things that the meaning names
    meaning: str
    metric: str = ""  # without the prefix zramd_; '': none, or one that is made of several numbers
    scale: float = 1  # the metric's value for each of the number's


# Every number there is, in the order in which they are shown.
NUMBERS = (
    Number("disksize", "bytes", "Size of the device before compression.", "disksize_bytes"),
    Number("orig_data_size", "bytes", "Data stored, before compression.", "orig_data_bytes"),
    Number("compr_data_size", "bytes", "Payloads in the pool, after compression.", "compr_data_bytes"),
    Number("mem_used_total", "bytes", "Pages of the pool in use.", "mem_used_bytes"),
    Number("mem_used_max", "bytes", "Peak of the pool's pages in use.", "mem_used_max_bytes"),
    Number("mem_limit", "bytes", "Most that the pool may take, 0 for no limit.", "mem_limit_bytes"),
    Number(
        "metadata_bytes",
        "bytes",
        "Memory beside the pool: slots, handle cells and all else.",
        "metadata_bytes",
    ),
    Number("reserve_bytes", "bytes", "Memory kept ready for pages to come.", "reserve_bytes"),
    Number("total_bytes", "bytes", "All memory for data: pool, reserve and metadata."),
    Number(
        "resident_bytes",
        "bytes",
        "Resident memory of the server process.",
        "process_resident_bytes",
    ),
    Number(
        "frag_ratio",
        "percent",
        "Share of the pool that payload fills, more is better; all of an empty one.",
        "frag_ratio",
        0.01,
    ),
    Number(
        "occupancy",
        "percent",
        "Share of the places for objects on resident pages that are in use; all if there are none.",
        "pool_occupancy_ratio",
        0.01,
    ),
    Number(
        "compression_ratio",
        "",
        "Bytes stored for each byte of pool; none while it is empty.",
        "compression_ratio",
    ),
    Number("pages_stored", "blocks", "Blocks that hold data."),
    Number(
        "same_pages", "blocks", "Blocks that hold one repeated word and take no pool memory.", "same_pages"
    ),
    Number("huge_pages", "blocks", "Blocks stored raw.", "huge_pages"),
    Number("huge_pages_since", "blocks", "Blocks stored raw since the start, also those freed since."),
    Number("objs_allocated", "objects", "Places for objects on the pool's resident pages."),
    Number("objs_used", "objects", "Objects in the pool."),
    Number("zspages", "zspages", "Runs of pages that hold the objects."),
    Number(
        "freeable_pages",
        "pages",
        "Pool memory that a whole compaction would free now, also pages kept for the next writes.",
        "freeable_bytes",
        4096,
    ),
    Number("num_compactions", "runs", "Compactions that freed something.", "compaction_runs_total"),
    Number(
        "limit_compactions",
        "runs",
        "Writes that compacted first because of mem_limit.",
        "compaction_limit_runs_total",
    ),
    Number("objects_migrated", "objects", "Objects moved by compaction.", "compaction_moved_objects_total"),
    Number("bytes_migrated", "bytes", "Bytes moved by compaction.", "compaction_moved_bytes_total"),
    Number("pages_compacted", "pages", "Pages freed by compaction.", "compaction_freed_pages_total"),
    Number("compact_ns", "ns", "Time spent compacting.", "compaction_seconds_total", 1e-9),
    Number("reads", "requests", "Read requests served."),
    Number("writes", "requests", "Write requests served."),
    Number("trims", "requests", "Trim requests served."),
    Number("zeroes", "requests", "Write-zeroes requests served."),
    Number("read_bytes", "bytes", "Bytes that clients have read."),
    Number("written_bytes", "bytes", "Bytes that clients have written."),
    Number("requests_inflight", "requests", "Requests being served now.", "requests_inflight"),
    Number("failed_reads", "requests", "Read requests that failed."),
    Number("failed_writes", "requests", "Write requests that failed, most for want of room."),
    Number("invalid_io", "requests", "Requests beyond the device's end."),
    Number("notify_free", "blocks", "Blocks freed by trim and zero.", "freed_blocks_total"),
    Number("reserve_misses", "pages", "Pages that were not ready when needed.", "reserve_misses_total"),
    Number(
        "checksum_errors", "reads", "Reads that found a block changed in memory.", "checksum_errors_total"
    ),
    Number("lost_blocks", "blocks", "Blocks that nothing leads to any more.", "lost_blocks"),
    Number("recovered_blocks", "blocks", "Blocks taken over from the state.", "recovered_blocks"),
    Number(
        "leaked_objects", "objects", "Objects without a block, freed at the start.", "recovery_leaked_objects"
    ),
    Number("recovery_ms", "ms", "Time that taking over the state took.", "recovery_seconds", 1e-3),
    Number("uptime", "seconds", "Time since the server started.", "uptime_seconds"),
)


class Source(Protocol):
    """What is read from a device."""

    def counters(self) -> dict[str, int]: ...
    def classes(self) -> list[tuple[int, ...]]: ...
    def latencies(self) -> dict[str, tuple[int, tuple[int, ...]]]: ...
    @property
    def latency_bounds(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Counters:
    """What the device counts; sizes in bytes, `compact_ns` in nanoseconds, all else in pieces.

    orig_data_size: 4096 for each block that holds data. compr_data_size: the payloads in the pool.
    mem_used_total: pages of the pool in use. freeable_pages: by how many a whole compaction would make it
    fall (what it lends to larger classes is guessed, to about a page in a hundred). metadata_bytes: slots,
    handle cells, all else beside the pool.
    reserve_bytes: pages kept ready for the pool (swap=local); reserve_misses: pages not ready when needed.
    recovery_ms, recovered_blocks, leaked_objects: what the start with a state took, found and took back; such
    objects were just written, or about to be freed, when the last server died. lost_blocks: those whose place
    in the state was changed in memory (verify=on). checksum_errors: reads of changed memory.
    """

    disksize: int
    orig_data_size: int
    compr_data_size: int
    mem_used_total: int
    mem_limit: int
    mem_used_max: int
    same_pages: int
    pages_compacted: int
    huge_pages: int
    huge_pages_since: int
    failed_reads: int
    failed_writes: int
    invalid_io: int
    notify_free: int
    pages_stored: int
    metadata_bytes: int
    reserve_bytes: int
    reserve_misses: int
    objs_allocated: int
    objs_used: int
    freeable_pages: int
    zspages: int
    objects_migrated: int
    bytes_migrated: int
    num_compactions: int
    compact_ns: int
    limit_compactions: int
    reads: int
    writes: int
    trims: int
    zeroes: int
    read_bytes: int
    written_bytes: int
    requests_inflight: int
    recovery_ms: int
    recovered_blocks: int
    leaked_objects: int
    lost_blocks: int
    checksum_errors: int


@dataclass(frozen=True)
class Latency:
    """How long the requests of one operation took, the failed ones too."""

    bounds: tuple[float, ...]  # seconds: the most that a request in each bucket took; the last has none
    counts: tuple[int, ...]  # requests in each bucket, one more than bounds
    sum: float  # seconds of all requests together

    @property
    def count(self) -> int:
        """All requests."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Return the seconds within which a share (0 to 1) of the requests was done, 0 without requests."""
        return quantile(self.bounds, tuple(accumulate(self.counts)), share) or 0.0


@dataclass(frozen=True)
class Snapshot(Counters):
    """All numbers of one device at one moment."""

    name: str
    comp_algorithm: str
    version: str
    pid: int
    uptime: float  # seconds since the server started
    resident_bytes: int  # of the whole server process
    latency: dict[str, Latency]  # by operation: read, write, trim, zero

    @property
    def total_bytes(self) -> int:
        """All memory the device takes: pool, reserve and metadata."""
        return self.mem_used_total + self.reserve_bytes + self.metadata_bytes

    @property
    def frag_ratio(self) -> float:
        """Percent of the pool's pages that payload fills, higher is better; 100 when the pool is empty."""
        return 100 * self.compr_data_size / self.mem_used_total if self.mem_used_total else 100.0

    @property
    def occupancy(self) -> float:
        """Percent of the places on resident pages that hold an object; 100 when the pool is empty."""
        return 100 * self.objs_used / self.objs_allocated if self.objs_allocated else 100.0

    @property
    def compression_ratio(self) -> float | None:
        """Bytes stored for each byte of pool; None when the pool has no page."""
        return self.orig_data_size / self.mem_used_total if self.mem_used_total else None


class ClassRow(NamedTuple):
    """One size class: zspages per fullness group (10 % … 90 %, 99 %, 100 %), objects and pages."""

    class_index: int
    size: int
    zspages: tuple[int, ...]
    obj_allocated: int
    obj_used: int
    pages_used: int
    pages_per_zspage: int
    freeable: int


_RATIOS = ("frag_ratio", "occupancy", "compression_ratio")
_COUNTERS = tuple(field.name for field in fields(Counters))


def take(device: Source, *, name: str, comp_algorithm: str, version: str, started: float) -> Snapshot:
    """Return the device's numbers now; `started` is the server's start on the clock of time.monotonic()."""
    counters = device.counters()
    return Snapshot(
        **{key: counters[key] for key in _COUNTERS},
        name=name,
        comp_algorithm=comp_algorithm,
        version=version,
        pid=os.getpid(),
        uptime=time.monotonic() - started,
        resident_bytes=resident_bytes(),
        latency=_take_latency(device),
    )


def _take_latency(device: Source) -> dict[str, Latency]:
    bounds = tuple(bound / 1e9 for bound in device.latency_bounds)
    return {op: Latency(bounds, counts, total / 1e9) for op, (total, counts) in device.latencies().items()}


def take_classes(device: Source) -> list[ClassRow]:
    """Return one row for each size class of the device's pool."""
    return [ClassRow(row[0], row[1], row[2:13], *row[13:]) for row in device.classes()]


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def mm_stat(snapshot: Snapshot) -> str:
    """Return zram's mm_stat line: nine numbers in zram's order and width."""
    s = snapshot
    return (
        f"{s.orig_data_size:8} {s.compr_data_size:8} {s.mem_used_total:8} {s.mem_limit:8} {s.mem_used_max:8} "
        f"{s.same_pages:8} {s.pages_compacted:8} {s.huge_pages:8} {s.huge_pages_since:8}\n"
    )


def io_stat(snapshot: Snapshot) -> str:
    """Return zram's io_stat line: four numbers in zram's order and width."""
    s = snapshot
    # zram prints a literal 0 for invalid_io, without a width: with no invalid request this is the same line.
    return f"{s.failed_reads:8} {s.failed_writes:8} {s.invalid_io} {s.notify_free:8}\n"


def sentence(snapshot: Snapshot) -> str:
    """Return what a service manager shows of a server in one line."""
    s = snapshot
    stored = f"{s.orig_data_size >> 20} MiB stored in {s.total_bytes >> 20} MiB of memory"
    return f"{stored}, frag ratio {s.frag_ratio:.0f} %" if s.mem_used_total else stored


def frag_ratio(snapshot: Snapshot) -> str:
    """Return the percentage of the pool that payload fills, with two decimals."""
    return f"{snapshot.frag_ratio:.2f}\n"


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


def to_dict(snapshot: Snapshot) -> dict[str, Any]:
    """Return every number of the snapshot, derived ones included, by name."""
    values = {field.name: getattr(snapshot, field.name) for field in fields(snapshot)}
    for name in ("total_bytes", *_RATIOS):
        values[name] = getattr(snapshot, name)
    return values


def to_json(snapshot: Snapshot) -> str:
    """Return every number of the snapshot, derived ones included, as one JSON object.

    `latency` holds, by operation, how many requests there were, with mean, p50, p90 and p99 in microseconds.
    """
    values = to_dict(snapshot)
    values["latency"] = {op: _latency_values(latency) for op, latency in snapshot.latency.items()}
    values["uptime"] = round(snapshot.uptime, 3)
    for name in _RATIOS:
        if values[name] is not None:
            values[name] = round(values[name], 4)
    return json.dumps(values, indent=2) + "\n"


def _latency_values(latency: Latency) -> dict[str, int | float]:
    """Return what stats.json tells: a quantile of buckets has no more than three digits worth showing."""
    values: dict[str, int | float] = {"count": latency.count}
    values["mean_us"] = round(latency.sum / latency.count * 1e6, 3) if latency.count else 0.0
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
