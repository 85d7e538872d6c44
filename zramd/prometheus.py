"""The text for Prometheus, on /metrics and in metrics.prom.

Base units (bytes, seconds), counters end in _total, ratios are 0 to 1, and every sample names its device.
docs/monitoring has a table of all of it.
"""

import sys
from itertools import accumulate
from math import inf

from zramd.stats import ClassRow, Snapshot


def exposition(snapshot: Snapshot, rows: list[ClassRow]) -> str:
    """Return the snapshot in Prometheus' text format 0.0.4. Classes without objects are left out."""
    s = snapshot
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
        sample("request_duration_seconds_count", label, latency.count)
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
