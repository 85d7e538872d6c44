"""What a state file and checksums cost, and how fast a state is taken over."""

from __future__ import annotations

import os
from collections.abc import Sequence

from bench.corpus import requests
from bench.in_process_rows import Passes, passes_for
from bench.results import Row, at_least, ratio_at_least, take_turns
from bench.setup import GIB, MIB, REQUEST, Setup
from zramd import Device
from zramd.core.device.device import state_layout

PERCENT_5 = ratio_at_least(0.95)
WHAT = {"fill": "first write", "overwrite": "overwrite", "read": "read"}


def memory_file(size: int) -> int:
    """Return the descriptor of an empty state in memory."""
    fd = os.memfd_create("zramd-bench")
    os.ftruncate(fd, state_layout(size)["bytes"])
    return fd


def make(size: int, *, kept: bool, verify: bool) -> Device:
    """Return a new device."""
    fd = memory_file(size) if kept else -1
    device = Device(size, state=fd, verify=verify)
    if kept:
        os.close(fd)
    return device


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    data = requests(setup)
    count = passes_for(data, setup)
    size = len(data) * REQUEST
    variants = {
        name: Passes(data, count, make(size, kept=name == "state", verify=name == "verify"))
        for name in ("plain", "state", "verify")
    }
    setup.say("state")
    speeds = take_turns(
        setup.rounds * 3,
        {f"{name} {what}": getattr(passes, what) for what in WHAT for name, passes in variants.items()},
    )
    rows = [
        Row(
            f"{label}, {WHAT[what]}",
            "MB/s",
            speeds[f"{name} {what}"],
            PERCENT_5,
            "without",
            speeds[f"plain {what}"],
        )
        for name, label in (("state", "state="), ("verify", "verify=on"))
        for what in WHAT
    ]
    return [*rows, _take_over(setup, data)]


def _take_over(setup: Setup, data: Sequence[memoryview]) -> Row:
    """Fill a state, and take it over again and again."""
    size = setup.pick(8 * GIB, 64 * MIB)
    fd = memory_file(size)
    device = Device(size, state=fd)
    for number in range(size // REQUEST):
        device.write(data[number % len(data)], number * REQUEST)
    used = device.counters()["mem_used_total"]
    del device

    def take_over() -> float:
        milliseconds: int = Device(size, state=fd).counters()["recovery_ms"]
        return used / 1e6 / max(milliseconds, 1)

    speeds = take_turns(setup.rounds, {"take over": take_over})["take over"]
    os.close(fd)
    note = f"a pool of {used / GIB:.2f} GiB that {size / GIB:g} GiB of data take"
    return Row("taking over a state", "GB/s of pool", speeds, at_least(10, "GB/s of pool"), note=note)
