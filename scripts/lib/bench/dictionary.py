"""What a dictionary would bring the cold tier: a table without aims, as zramd has none. See docs/tiers.md."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

from bench.corpus import pages
from bench.results import NotMeasuredError, Row, Table
from bench.setup import BLOCK, Setup
from zramd import Device
from zramd.core.pool.size_classes import CLASSES

SOURCE = Path(__file__).with_name("dictionary.c")
TRIED = ((3, 0), (4, 0), (5, 0), (6, 0), (4, 64), (5, 64), (6, 16), (6, 32), (6, 64), (6, 112))  # level, KiB
LEAST = 300  # bytes of a payload that zramd makes cold
NAMES = 1 + 8  # bytes of a cold object beside the frame: the codec's name, the handle


@cache
def chunk(size: int) -> float:
    """Return the bytes of the pool that so long an object takes, with its share of the zspage's end."""
    for chunk_size, zspage_pages, objects in CLASSES:
        if chunk_size >= size:
            return zspage_pages * BLOCK / objects
    return BLOCK


def measure(setup: Setup) -> list[Row]:
    """Put the table into the report; raises NotMeasuredError."""
    data = pages(setup)
    data = data[len(data) // 2 :]
    hot = Device(len(data) * BLOCK)
    for number, page in enumerate(data):
        hot.write(page, number * BLOCK)
    payloads = [int(hot.block(number)["payload_bytes"]) for number in range(len(data))]
    before = sum(chunk(size + NAMES - 1) for size in payloads)
    program = setup.compiled(SOURCE, SOURCE.stem, "-O2", "-l:libzstd.a")
    table = Table(
        "Dictionaries",
        f"{len(data):,} memory pages, compressed with a dictionary that was trained on as many others of the "
        "same programs; the pool as the size classes make it. µs to read: with all in the caches, and when "
        "nothing is there.",
        [
            "zstd level",
            "dictionary",
            "pool, of lz4's",
            "of level 4's",
            "µs to compress",
            "µs to read",
            "median",
            "90 %",
            "99 %",
        ],
    )
    rows = []
    for level, kib in TRIED:
        setup.say(f"dictionary of {kib} KiB, level {level}")
        found = subprocess.run(
            [str(program), str(setup.corpus), str(level), str(kib)], capture_output=True, text=True
        )
        if found.returncode:
            raise NotMeasuredError(
                f"{SOURCE.stem} ended with status {found.returncode}: {found.stderr.strip()}"
            )
        *sizes, times = found.stdout.splitlines()
        after = sum(
            min(chunk(size + NAMES - 1), chunk(int(cold) + NAMES))
            if size >= LEAST
            else chunk(size + NAMES - 1)
            for size, cold in zip(payloads, sizes, strict=True)
        )
        rows.append((level, kib, after, times.split()))
    plain = next(after for level, kib, after, _ in rows if (level, kib) == (4, 0))
    for level, kib, after, times in rows:
        name = f"{kib} KiB" if kib else "none"
        table.rows.append([str(level), name, f"{after / before:.3f}", f"{after / plain:.3f}", *times])
    setup.report.tables.append(table)
    return []
