"""How long a request waits for others at the worst: for the holder of a lock, a pin, the gate or the GIL."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from bench.processes import library
from bench.results import NotMeasuredError, Row, at_most
from bench.setup import GIB, MIB, Setup
from zramd.core.pool.size_classes import CLASSES

COPY_SOURCE = Path(__file__).with_name("slow_copy.c")
COPY_MS = 2
PAYLOAD = 320  # bytes of what slow_copy moves
CORE_MS, GIL_MS = 5, 20  # the most that a request may wait


def _scene(setup: Setup, name: str, size: int, **environment: str) -> dict[str, float]:
    """Return the worst of all rounds; raises NotMeasuredError."""
    worst: dict[str, float] = {}
    setup.say(f"waiting: {name.replace('_', ' ')}")
    for _ in range(setup.rounds):
        done = subprocess.run(
            [sys.executable, "-m", "bench.waiting", name, str(setup.seconds), str(size)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise NotMeasuredError(
                f"{name}: {(done.stderr.strip() or str(done.returncode)).splitlines()[-1]}"
            )
        numbers: dict[str, float] = json.loads(done.stdout)
        worst = {what: max(number, worst.get(what, 0.0)) for what, number in numbers.items()}
    return worst


def _slow_copy(setup: Setup) -> dict[str, float]:
    slow = library(setup, COPY_SOURCE)
    chunk = next(size for size, _, _ in CLASSES if size >= PAYLOAD + 4)
    return _scene(
        setup,
        "slow_copy",
        setup.pick(4 * MIB, 4 * MIB),
        LD_PRELOAD=str(slow),
        ZRAMD_COPY=str(chunk - 4),
        ZRAMD_COPY_MS=str(COPY_MS),
    )


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    if os.geteuid():
        raise NotMeasuredError("who is real-time waits for whom: run it as root")
    alone = _scene(setup, "one_processor", setup.pick(256 * MIB, 32 * MIB))
    copy = _slow_copy(setup)
    if copy["copied"] != 3:
        raise NotMeasuredError("slow_copy: compaction copied nothing of that size")
    limit = _scene(setup, "at_the_limit", setup.pick(GIB, 64 * MIB))
    long_size = setup.pick(4 * GIB, 64 * MIB)
    long = _scene(setup, "long_request", long_size)
    slowest = "slowest of all rounds; in the core: the upper end of its bucket, a power of two"
    local = (
        f"{slowest}. A real-time client writes and trims as under swap=local, on one processor with four "
        f"programs that never rest, compaction ({alone['moved']:,.0f} objects moved), and a thread "
        "that makes statistics all the time"
    )

    def row(what: str, value: float, most: int, note: str) -> Row:
        return Row(f"slowest {what}", "ms", [value], at_most(most, "ms"), note=note)

    return [
        row("request beside four hogs, in the core", alone["core"], CORE_MS, local),
        row("wait for the GIL beside four hogs", alone["gil"], GIL_MS, local),
        row(
            f"real-time read past a copy of {COPY_MS} ms",
            copy["read"],
            CORE_MS,
            f"{slowest}. The compactor, an ordinary thread of the same processor, is moving the object",
        ),
        row(
            "trim beside writes at the limit",
            limit["trim"],
            CORE_MS,
            f"{slowest}. All zspages of a class are part-filled and hardly any has room on its pages; "
            f"{limit['written']:,.0f} written, {limit['refused']:,.0f} refused",
        ),
        row(
            f"read beside a trim of {long_size >> 20} MiB and a save",
            long["read"],
            CORE_MS,
            f"{slowest}. A save ends in the middle of the trim",
        ),
    ]
