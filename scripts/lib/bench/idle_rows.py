"""A daemon that has nothing to do."""

from __future__ import annotations

import time

from bench.processes import ZramdServer, fio, whole
from bench.results import Row, at_most
from bench.setup import MIB, Setup

SETTLE = 3.0  # seconds after the last request: the stats are written once more, compaction looks once more


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    size = setup.pick(256 * MIB, 16 * MIB)
    with ZramdServer(setup, "empty", "100G") as empty, ZramdServer(setup, "idle", size) as idle:
        fio(setup, idle.device, whole("write", size))
        time.sleep(SETTLE)
        seconds = setup.pick(60, 5)
        setup.say(f"idle, {seconds} s")
        started, cpu = time.monotonic(), [server.cpu_seconds() for server in (empty, idle)]
        time.sleep(seconds)
        shares = [
            100 * (server.cpu_seconds() - before) / (time.monotonic() - started)
            for server, before in zip((empty, idle), cpu, strict=True)
        ]
        resident = empty.resident_bytes()
        fio(setup, empty.device, whole("read", MIB))  # a client by itself costs memory too
        before, total = empty.resident_bytes(), empty.stats()["total_bytes"]
        fio(setup, empty.device, whole("write", MIB))
        stored, total = empty.resident_bytes() - before, empty.stats()["total_bytes"] - total
    note = f"resident memory before and after; total_bytes grew by {total / MIB:.2f} MiB"
    return [
        Row("CPU of an idle daemon, empty", "%", shares[:1], at_most(0.1, "%")),
        Row(f"CPU of an idle daemon, {size >> 20} MiB stored", "%", shares[1:], at_most(0.1, "%")),
        Row("resident memory, empty, disksize=100G", "MB", [resident / 1e6], at_most(25, "MB")),
        Row(
            "resident memory that 1 MiB stored adds, disksize=100G",
            "MiB",
            [stored / MIB],
            at_most(2, "MiB"),
            note=note,
        ),
    ]
