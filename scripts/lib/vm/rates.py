"""How fast a machine's own device is: zramd's by ublk and by NBD, and the kernel's zram, in one guest.

All are loaded in turns, several times, so that what else the host does hits all of them: what means something
is the ratio between two of one run.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from vm import attach
from vm.guest import Guest
from vm.plan import KERNEL_ZRAM, MIB, NBD, UBLK, Plan
from vm.report import Result
from vm.session import Boot, machine_of

MEMORY = 768 * MIB
SIZE = 64 * MIB  # of each device
ROUNDS, SHORT_ROUNDS = 5, 1
SECONDS = 2  # of one load
LOADS = (("read", 1), ("write", 1), ("read", 16), ("write", 16))  # and how many requests at a time
SETTINGS = {"swap": "local"}
TRACING = "/sys/kernel/tracing"
TRIGGER = "hist:keys=common_pid:size=2048"
LEAST = {"read QD1": 2.5, "write QD1": 2.5, "read QD16": 3.0, "write QD16": 1.5}  # of NBD's rate
# What is counted in the server's threads, by the kernel's events for it.
EVENTS = {
    "system calls": ("raw_syscalls/sys_enter",),
    "allocations": ("kmem/kmalloc", "kmem/kmem_cache_alloc"),
}
# load.sh DEVICE LOAD DEPTH SECONDS [PID]: and before and after it, what machine and server had run.
_LOAD = """
look() { cat /proc/uptime; [ -z "$1" ] || cat /proc/$1/task/*/schedstat; }
look $5
echo
/bin/guest_tool load $1 $2 $3 $4 7
echo
look $5
"""


@dataclass
class Door:
    """One way to a device, and what was found, by the load."""

    name: str
    device: str
    pid: int | None
    threads: str = ""  # how the names of those begin that answer requests
    found: dict[tuple[str, int], list[dict[str, float]]] = field(default_factory=dict)
    counted: dict[tuple[str, int], dict[str, float]] = field(default_factory=dict)

    def median(self, load: tuple[str, int], key: str) -> float | None:
        """Return the median of all rounds, None for what this door does not have."""
        values = [one[key] for one in self.found[load] if key in one]
        return median(values) if values else None


def rates(plan: Plan, boot: Boot, result: Result) -> None:
    """Load each device in turns, and compare."""
    machine = machine_of(plan, boot.machine, [], MEMORY)
    ways: list[attach.Attachment] = [
        attach.KernelZram(SIZE),
        attach.Local(SIZE, SETTINGS, of="zram1"),
        attach.Ublk(SIZE, SETTINGS),
    ]
    boot.live.step(f"booting a guest with {MEMORY // MIB} MiB and {plan.cpus} CPUs ({machine.accel})")
    with Guest(machine, boot.folder) as guest:
        guest.wait_for_boot()
        guest.put("/tmp/load.sh", _LOAD.encode())
        doors = []
        for way, name in zip(ways, (KERNEL_ZRAM, NBD, UBLK), strict=True):
            boot.live.step(f"attaching {way.device} ({name})")
            way.attach(guest)
            pid = way.pid() if isinstance(way, attach.Local) else None
            doors.append(Door(name, way.device, pid, "zramd-ublk" if name == UBLK else ""))
            guest.run(f"/bin/guest_tool load {way.device} fill 16 0 7")
        rounds = SHORT_ROUNDS if plan.short else ROUNDS
        for number in range(rounds):
            for load in LOADS:
                boot.live.step(f"round {number + 1} of {rounds}: {load[0]}, {load[1]} at a time")
                for door in doors:
                    door.found.setdefault(load, []).append(_load(guest, door, load, plan.cpus))
        _count_from_now_on(guest)
        for load in LOADS:
            boot.live.step(f"counting: {load[0]}, {load[1]} at a time")
            for door in doors:
                if door.pid is not None:
                    door.counted[load] = _count(guest, door, load)
        for way in ways:
            way.detach(guest)
        result.alarms += guest.alarms()
        result.boot_seconds.append(round(guest.booted, 2))
    result.rates = _rows(doors)
    _expect(result)


def _load(guest: Guest, door: Door, load: tuple[str, int], cpus: int) -> dict[str, float]:
    """Load the device once, and return its rate, and what a request took of time and of the processors."""
    words = f"{door.device} {load[0]} {load[1]} {SECONDS} {door.pid or ''}"
    before, answer, after = guest.run(f"sh /tmp/load.sh {words}").split("\n\n")
    done = json.loads(answer)
    requests = done["requests"]
    (early, *threads_early), (late, *threads_late) = (
        [[float(word) for word in line.split()] for line in text.splitlines()] for text in (before, after)
    )
    found = {
        "rate": requests / done["seconds"],
        "p50": done["p50"],
        "p99": done["p99"],
        "busy": ((late[0] - early[0]) * cpus - (late[1] - early[1])) * 1e6 / requests,
    }
    if door.pid is not None:
        found["cpu"] = _sum(threads_late, threads_early, 0) / 1e3 / requests
        found["switches"] = _sum(threads_late, threads_early, 2) / requests
    return {key: round(value, 3) for key, value in found.items()}


def _sum(late: list[list[float]], early: list[list[float]], column: int) -> float:
    return sum(line[column] for line in late) - sum(line[column] for line in early)


def _count_from_now_on(guest: Guest) -> None:
    """Have the kernel count, for the rest of the guest's life.

    That changes the kernel's code, which must not run meanwhile: an emulated processor may then see half of
    the change. So it is done once, while the devices are idle.
    """
    guest.run(f"mount -t tracefs none {TRACING}; sleep 1")
    for event in (event for kind in EVENTS.values() for event in kind):
        guest.run(f"echo '{TRIGGER}' >{TRACING}/events/{event}/trigger")


def _count(guest: Guest, door: Door, load: tuple[str, int]) -> dict[str, float]:
    """Let the kernel count what the server's threads do for one load.

    For each request, so much by the threads that answer; by the others, which have chores, so much a second.
    """
    for event in (event for kind in EVENTS.values() for event in kind):
        guest.run(f"echo '{TRIGGER}:clear' >>{TRACING}/events/{event}/trigger")
    done = json.loads(guest.run(f"/bin/guest_tool load {door.device} {load[0]} {load[1]} {SECONDS} 7"))
    names = guest.run(f"for one in /proc/{door.pid}/task/*; do echo ${{one##*/}} $(cat $one/comm); done")
    threads = dict(line.split(maxsplit=1) for line in names.splitlines())
    counts = {}
    for kind, events in EVENTS.items():
        text = "\n".join(guest.run(f"cat {TRACING}/events/{name}/hist") for name in events)
        by_thread = [
            (threads[thread], int(hits))
            for thread, hits in re.findall(r"common_pid: +(\d+) .*hitcount: +(\d+)", text)
            if thread in threads
        ]
        total = sum(hits for _, hits in by_thread)
        answers = sum(hits for name, hits in by_thread if name.startswith(door.threads))
        counts[kind] = round(answers / done["requests"], 3)
        counts[f"{kind} of others"] = round((total - answers) / SECONDS)
    return counts


def _rows(doors: list[Door]) -> list[dict[str, Any]]:
    """Return a row for each load: each number by the door, and the ratios."""
    zram, nbd, ublk = doors
    rows = []
    for load in LOADS:
        row: dict[str, Any] = {"load": f"{load[0]} QD{load[1]}"}
        for door in doors:
            keys = ("rate", "p50", "p99", "busy", "cpu", "switches")
            numbers = {key: door.median(load, key) for key in keys}
            row[door.name] = {key: value for key, value in numbers.items() if value is not None}
            row[door.name] |= door.counted.get(load, {})
        row["ublk to nbd"] = _ratio(ublk, nbd, load, "rate")
        row["p50 of ublk to nbd"] = _ratio(ublk, nbd, load, "p50")
        row["zram to ublk"] = _ratio(zram, ublk, load, "rate")
        rows.append(row)
    return rows


def _ratio(one: Door, other: Door, load: tuple[str, int], key: str) -> float:
    """Return the median of the rounds' ratios."""
    pairs = zip(one.found[load], other.found[load], strict=True)
    return round(median(mine[key] / max(theirs[key], 1) for mine, theirs in pairs), 2)


def _expect(result: Result) -> None:
    """See that a request by ublk costs what it should: counts and ratios: a busy host changes them little."""
    for row in result.rates:
        alone = row["load"].endswith("QD1")
        most, calls = (1.1 if alone else 0.15), row[UBLK]["system calls"]
        result.expect(f"system calls of a {row['load']}: {most} at most", calls <= most, f"{calls}")
        taken = row[UBLK]["allocations"]
        result.expect(f"a {row['load']} takes no memory of the kernel", taken < 0.01, f"{taken} allocations")
        result.expect(
            f"a {row['load']} by ublk for one by NBD: {LEAST[row['load']]} at least",
            row["ublk to nbd"] >= LEAST[row["load"]],
            f"{row['ublk to nbd']}",
        )
