"""A device that has nothing but numbers."""

from zramd.stats import numbers

# Each counter has a value of its own, so that a swapped column cannot hide.
COUNTERS = {
    "disksize": 1 << 30,
    "orig_data_size": 40960,
    "compr_data_size": 6144,
    "mem_used_total": 8192,
    "mem_limit": 1048576,
    "mem_used_max": 12345678901,
    "same_pages": 3,
    "pages_compacted": 5,
    "huge_pages": 7,
    "huge_pages_since": 11,
    "failed_reads": 13,
    "failed_writes": 17,
    "invalid_io": 0,
    "notify_free": 19,
    "pages_stored": 10,
    "metadata_bytes": 2048,
    "reserve_bytes": 8192,
    "reserve_misses": 3,
    "objs_allocated": 16,
    "objs_used": 12,
    "freeable_pages": 2,
    "zspages": 1,
    "objects_migrated": 23,
    "bytes_migrated": 2300,
    "num_compactions": 29,
    "compact_ns": 1500000000,
    "limit_compactions": 31,
    "reads": 37,
    "writes": 41,
    "trims": 43,
    "zeroes": 47,
    "read_bytes": 53,
    "written_bytes": 59,
    "requests_inflight": 2,
    "recovery_ms": 61,
    "recovered_blocks": 67,
    "leaked_objects": 71,
    "lost_blocks": 79,
    "checksum_errors": 73,
}
# (A new statistic has one too, without a line here.)
COUNTERS |= {name: 1000 + at for at, name in enumerate(numbers.COUNTED) if name not in COUNTERS}
ROWS = [
    (0, 32, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 1280, 640, 10, 1, 5),
    (4, 96, *(0,) * 11, 0, 0, 0, 3, 0),
    (254, 4096, *(0,) * 10, 21, 21, 21, 21, 1, 0),
]
LATENCIES = {
    "read": (10_000, (1, 2, 0, 34)),
    "write": (20_000, (0, 40, 1, 0)),
    "trim": (30_000, (43, 0, 0, 0)),
    "zero": (0, (0, 0, 0, 0)),
}
TIERS = {
    "hot_pages": 61234,
    "hot_data_size": 88 << 20,
    "cold_pages": 52210,
    "cold_data_size": 44 << 20,
    "raw_pages": 1203,
    "tried_pages": 907,
    "same_pages": 14000,
    "ages": [
        *([10, 12034], [30, 8034], [60, 3000], [300, 20000], [600, 2000], [1800, 40000], [3600, 3]),
        *([21600, 0], [None, 29376], ["idle", 14200]),
    ],
    "recompressed": 53313,
    "recompress_useless": 1311,
    "promoted": 340,
    "recompressed_minute": 230,
    "promoted_minute": 12,
    "saved_bytes": 27 << 20,
    "cpu_seconds": 2.312,
    "recompression": "zstd(level=5)",
    "cold_age": 300,
    "mode": "calm",
    "reason": "nothing has been cold for long enough",
}
WRITEBACK = {
    "backing": "/dev/disk/by-partlabel/swap-out",
    "backing_size": 8 << 30,
    "backing_free": 6 << 30,
    "backing_bad": 128 << 10,
    "out_pages": 1_200_000,
    "out_data_size": 1200 << 20,
    "out_live_bytes": 1300 << 20,
    "bd_reads": 40 << 20,
    "bd_writes": 1700 << 20,
    "written_out": 1_400_000,
    "brought_back": 2300,
    "written_out_minute": 4500,
    "brought_back_minute": 7,
    "reclaimed_bytes": 90 << 20,
    "bd_read_errors": 0,
    "bd_write_errors": 0,
    "writeback_age": 3600,
    "writeback_limit": 1 << 30,
    "limit_left": 700 << 20,
    "mode": "calm",
    "reason": "nobody has left a whole extent of blocks alone for 1 h",
}


class FakeDevice:
    latency_bounds = (250, 500, 1000)

    def latencies(self) -> dict[str, tuple[int, tuple[int, ...]]]:
        return dict(LATENCIES)

    def counters(self) -> dict[str, int]:
        return dict(COUNTERS)

    def classes(self) -> list[tuple[int, ...]]:
        return list(ROWS)
