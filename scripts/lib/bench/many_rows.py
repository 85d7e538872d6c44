"""Many devices on one host: what each server takes beside its data, and what that is."""

from __future__ import annotations

import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from bench.processes import ZramdServer, fio, whole
from bench.results import Row, at_most
from bench.setup import MIB, Setup
from zramd.launch import nbdkit

SETTLE = 5.0  # seconds: what a start has needed and nothing else does is given back by then
STARTS = 8  # at once
_HEAD = re.compile(r"[0-9a-f]+-[0-9a-f]+ (\S+) \S+ \S+ (\d+) *(.*)")


def kind(mode: str, name: str) -> str:
    """Say what a mapping is."""
    if name == "[heap]":
        return "heap"
    if "[stack" in name:
        return "stack"
    if name.startswith("/"):
        what = "Python" if "python" in name.lower() and "zramd" not in name else "other libraries"
        what = "zramd" if "/zramd/" in name else what
        return f"{what}, {'written' if 'w' in mode else 'shared'}"
    return "other anonymous" if name == "" else name


def split(smaps: str) -> Counter[str]:
    """Return the Pss of a process, in bytes, by what it is; `smaps` is what /proc/PID/smaps says."""
    found: Counter[str] = Counter()
    what = ""
    for line in smaps.splitlines():
        if head := _HEAD.match(line):
            what = kind(head[1], head[3])
        elif line.startswith("Pss:"):
            found[what] += int(line.split()[1]) << 10
    return found


def _start(setup: Setup, number: int) -> ZramdServer:
    return ZramdServer(setup, f"many {number}", "1G", environment=nbdkit.LEAN)


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    count = setup.pick(50, 4)
    size = 4 * MIB
    with ExitStack() as stack:
        # A server ends with the thread that has started it: the pool stays until they have been looked at.
        starters = stack.enter_context(ThreadPoolExecutor(STARTS))
        servers = list(starters.map(lambda number: _start(setup, number), range(count)))
        for server in servers:
            stack.enter_context(server)
        for server in servers:
            fio(setup, server.device, whole("write", size))
        time.sleep(SETTLE)
        beside = []
        parts: Counter[str] = Counter()
        for server in servers:
            of_one = split(Path(f"/proc/{server.pid}/smaps").read_text())
            beside.append(sum(of_one.values()) - server.stats()["total_bytes"])
            parts.update(of_one)
    note = "; ".join(
        f"{what} {total / count / 1e6:.2f}" for what, total in parts.most_common() if total > 1e4
    )
    return [
        Row(
            f"memory beside the data of each of {count} servers, Pss",
            "MB",
            [each / 1e6 for each in beside],
            at_most(8, "MB"),
            note=f"Pss with the data, MB: {note}",
        )
    ]
