"""Statistics: the only place where they are formatted.

The device owns plain counters. `take` copies them into a `Snapshot`; the functions below turn a snapshot into
the texts that the run folder and the endpoint show. Names and columns are zram's and zsmalloc's own.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, fields
from typing import NamedTuple, Protocol

_PAGE_SIZE = os.sysconf("SC_PAGE_SIZE")
_GROUPS = ("10%", "20%", "30%", "40%", "50%", "60%", "70%", "80%", "90%", "99%", "100%")


class Source(Protocol):
    """What is read from a device."""

    def counters(self) -> dict[str, int]: ...
    def classes(self) -> list[tuple[int, ...]]: ...


@dataclass(frozen=True)
class Counters:
    """What the device counts; sizes in bytes, `compact_ns` in nanoseconds, all else in pieces.

    orig_data_size: 4096 for each block that holds data. compr_data_size: the payloads in the pool.
    mem_used_total: pages of the pool in use. metadata_bytes: slots, handle cells, all else beside the pool.
    reserve_bytes: pages kept ready for the pool (swap=local); reserve_misses: pages not ready when needed.
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


@dataclass(frozen=True)
class Snapshot(Counters):
    """All numbers of one device at one moment."""

    name: str
    comp_algorithm: str
    version: str
    pid: int
    uptime: float  # seconds since the server started
    resident_bytes: int  # of the whole server process

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
        """Percent of the pool's objects that are in use; 100 when the pool is empty."""
        return 100 * self.objs_used / self.objs_allocated if self.objs_allocated else 100.0

    @property
    def compression_ratio(self) -> float:
        """Bytes stored for each byte of pool; 0 when the pool is empty."""
        return self.orig_data_size / self.mem_used_total if self.mem_used_total else 0.0


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
    )


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


def to_json(snapshot: Snapshot) -> str:
    """Return every number of the snapshot, derived ones included, as one JSON object."""
    values: dict[str, int | float | str] = {
        field.name: getattr(snapshot, field.name) for field in fields(snapshot)
    }
    values["uptime"] = round(snapshot.uptime, 3)
    values["total_bytes"] = snapshot.total_bytes
    values["frag_ratio"] = round(snapshot.frag_ratio, 4)
    values["occupancy"] = round(snapshot.occupancy, 4)
    values["compression_ratio"] = round(snapshot.compression_ratio, 4)
    return json.dumps(values, indent=2) + "\n"


def prometheus(snapshot: Snapshot, rows: list[ClassRow]) -> str:
    """Return the snapshot as Prometheus text: base units, counters end in _total, ratios are 0 to 1.

    Classes without objects are left out.
    """
    s = snapshot
    lines: list[str] = []

    def family(name: str, kind: str, meaning: str, *samples: tuple[str, int | float]) -> None:
        lines.append(f"# HELP zramd_{name} {meaning}\n# TYPE zramd_{name} {kind}\n")
        for labels, value in samples:
            shown = value if isinstance(value, int) else f"{value:.9g}"
            lines.append(f'zramd_{name}{{device="{s.name}"{labels}}} {shown}\n')

    def gauge(name: str, meaning: str, value: int | float) -> None:
        family(name, "gauge", meaning, ("", value))

    def counter(name: str, meaning: str, value: int | float) -> None:
        family(f"{name}_total", "counter", meaning, ("", value))

    def by_op(name: str, meaning: str, **values: int) -> None:
        samples = [(f',op="{op}"', value) for op, value in values.items()]
        family(f"{name}_total", "counter", meaning, *samples)

    gauge("disksize_bytes", "Size of the device before compression.", s.disksize)
    gauge("orig_data_bytes", "Data stored, before compression.", s.orig_data_size)
    gauge("compr_data_bytes", "Payloads in the pool, after compression.", s.compr_data_size)
    gauge("mem_used_bytes", "Pages of the pool in use.", s.mem_used_total)
    gauge("mem_used_max_bytes", "Peak of the pool's pages in use.", s.mem_used_max)
    gauge("mem_limit_bytes", "Most that the pool may take, 0 for no limit.", s.mem_limit)
    gauge("metadata_bytes", "Memory beside the pool: slots, handle cells and all else.", s.metadata_bytes)
    gauge("reserve_bytes", "Memory kept ready for pages to come.", s.reserve_bytes)
    gauge("same_pages", "Blocks that hold one repeated word and take no pool memory.", s.same_pages)
    gauge("huge_pages", "Blocks stored raw.", s.huge_pages)
    gauge("freeable_bytes", "Pool memory that compaction would free now.", s.freeable_pages * 4096)
    gauge("frag_ratio", "Share of the pool that payload fills, 1 is best.", s.frag_ratio / 100)
    gauge("pool_occupancy_ratio", "Share of the pool's objects in use.", s.occupancy / 100)
    gauge("compression_ratio", "Bytes stored for each byte of pool.", s.compression_ratio)
    gauge("requests_inflight", "Requests being served now.", s.requests_inflight)
    by_op("requests", "Requests served.", read=s.reads, write=s.writes, trim=s.trims, zero=s.zeroes)
    by_op("request_bytes", "Bytes read and written by clients.", read=s.read_bytes, write=s.written_bytes)
    by_op("request_errors", "Requests that failed.", read=s.failed_reads, write=s.failed_writes)
    counter("reserve_misses", "Pages that were not ready when needed.", s.reserve_misses)
    counter("freed_blocks", "Blocks freed by trim and zero.", s.notify_free)
    counter("compaction_runs", "Compactions that freed something.", s.num_compactions)
    counter("compaction_limit_runs", "Writes that compacted first because of mem_limit.", s.limit_compactions)
    counter("compaction_moved_objects", "Objects moved by compaction.", s.objects_migrated)
    counter("compaction_freed_pages", "Pages freed by compaction.", s.pages_compacted)
    counter("compaction_seconds", "Time spent compacting.", s.compact_ns / 1e9)
    used = [row for row in rows if row.obj_allocated]
    objects = [(f',size="{row.size}"', row.obj_used) for row in used]
    pages = [(f',size="{row.size}"', row.pages_used) for row in used]
    family("class_objects", "gauge", "Objects in use, by size class.", *objects)
    family("class_pages", "gauge", "Pages in use, by size class.", *pages)
    gauge("process_resident_bytes", "Resident memory of the server process.", s.resident_bytes)
    gauge("uptime_seconds", "Time since the server started.", s.uptime)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}.{sys.version_info[2]}"
    labels = f',version="{s.version}",python="{version}",comp_algorithm="{s.comp_algorithm}"'
    family("build_info", "gauge", "What serves the device.", (labels, 1))
    return "".join(lines)
