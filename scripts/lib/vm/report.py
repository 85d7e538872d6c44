"""What a run found: the live line while it runs, and the report at its end as text, Markdown and JSON."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

from vm import dead
from vm.buddy import FreeBlocks
from vm.plan import KERNEL_ZRAM, NBD, UBLK

MIB = 1 << 20
# The moments that the report tells of, in their order.
MOMENTS = {
    "empty": "before the workload",
    "rested": "after --idle",
    "full": "after swap in/out",
    "before": "after freeing",
    "after": "after compaction",
    "joined": "after compact_memory",
}
LIVE_EVERY = 3  # heartbeats between two live lines, where they do not overwrite each other


@dataclass(frozen=True)
class Moment:
    """Server and guest at one moment; in bytes but for frag_ratio and what is named pages or counts.

    What the kernel's own zram does not tell is None.
    """

    used: int  # payloads of the live objects
    total: int  # the pool's pages
    frag_ratio: float  # used of total, in percent
    stored: int  # what the payloads were before compression
    freeable_pages: int | None
    spent: int  # pool and metadata
    resident: int | None  # of the server's process
    migrated: int | None  # objects moved so far
    notify_free: int  # blocks trimmed so far
    mem_free: int  # MemFree of the machine that holds the pool
    swapped: int  # what the guest has in swap and not also in memory
    guest: FreeBlocks  # the guest's free memory


@dataclass
class Expectation:
    """Something that must hold."""

    what: str
    met: bool
    found: str


@dataclass
class Result:
    """All that one run found."""

    mode: str
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    boot_seconds: list[float] = field(default_factory=list)
    workload_mib: int = 0
    pages_written: int = 0
    pages_verified: int = 0
    pages_bad: int = 0
    swap_outs: int = 0
    swap_ins: int = 0
    oom_kills: int = 0
    write_errors: int = 0  # lines of the guest's kernel; it leaves some out when there are many
    longest_gap: float = 0.0  # between two heartbeats, seconds of the guest
    alarms: list[str] = field(default_factory=list)
    moments: dict[str, Moment] = field(default_factory=dict)
    compaction: dict[str, Any] = field(default_factory=dict)
    guest_compaction: dict[str, Any] = field(default_factory=dict)  # by the guest's kernel
    hog: dict[str, Any] = field(default_factory=dict)
    daemon: dict[str, Any] = field(default_factory=dict)
    swapoff: dict[str, Any] = field(default_factory=dict)
    stall: dict[str, Any] = field(default_factory=dict)
    kills: dict[str, Any] = field(default_factory=dict)
    slowest: float = 0.0  # of the workload's pages, seconds: how long it stood still
    churn: dict[str, Any] = field(default_factory=dict)  # programs that come and go: see vm.churn
    rest: dict[str, Any] = field(default_factory=dict)  # what the device held while the guest rested: vm.rest
    idle: dict[str, Any] = field(default_factory=dict)  # what the server held after --idle
    requests: dict[str, Any] = field(default_factory=dict)  # what the server's requests cost in the guest
    writeback: dict[str, Any] = field(default_factory=dict)  # what went out to a disk: vm.writeback
    rates: list[dict[str, Any]] = field(default_factory=list)  # of devices side by side: vm.rates
    expectations: list[Expectation] = field(default_factory=list)
    error: str = ""

    def add_phase(self, answer: dict[str, Any]) -> None:
        """Count the pages of one phase of the workload."""
        self.pages_written += answer["written"]
        self.pages_verified += answer["verified"]
        self.pages_bad += answer["bad"]
        self.slowest = max(self.slowest, answer["slowest"])

    def expect(self, what: str, met: bool, found: object = "") -> None:
        """Take note of something that must hold."""
        self.expectations.append(Expectation(what, bool(met), str(found)))

    @property
    def ok(self) -> bool:
        """Whether the run came to its end and all held that must hold."""
        return not self.error and bool(self.expectations) and all(each.met for each in self.expectations)

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {**asdict(self), "ok": self.ok}


class Live:
    """Shows how a run goes: steps as lines of their own, and a line each few seconds between them."""

    def __init__(self, stream: TextIO = sys.stderr) -> None:
        self._stream = stream
        self._started = time.monotonic()
        self._overwrite = stream.isatty()
        self._beats = 0
        self._last: dict[str, Any] = {}
        self._shown = False

    def step(self, text: str) -> None:
        """Show a step of the run."""
        self._clear()
        print(f"{self._time()}  {text}", file=self._stream, flush=True)

    def beat(self, beat: dict[str, Any], stats: dict[str, Any] | None) -> None:
        """Show the guest's heartbeat and the server's numbers."""
        last, self._last = self._last, {**beat, "zramd": stats}
        self._beats += 1
        if self._overwrite:
            self._clear()
            print(f"{self._time()}  {live_line(beat, stats, last)}", end="", file=self._stream, flush=True)
            self._shown = True
        elif self._beats % LIVE_EVERY == 0:
            print(f"{self._time()}    {live_line(beat, stats, last)}", file=self._stream, flush=True)

    def _clear(self) -> None:
        if self._shown:
            print("\r\033[K", end="", file=self._stream)
            self._shown = False

    def _time(self) -> str:
        return f"{time.monotonic() - self._started:6.0f} s"


def live_line(beat: dict[str, Any], stats: dict[str, Any] | None, last: dict[str, Any]) -> str:
    """Return one line about now; `last` is the heartbeat before, or empty."""
    swapped = beat["SwapTotal"] - beat["SwapFree"]
    rates = [beat[key] - last.get(key, beat[key]) for key in ("pswpout", "pswpin")]
    text = f"guest: {beat['MemFree'] // MIB} MiB free, {swapped // 4096} pages swapped, "
    text += f"out {rates[0]}/s, in {rates[1]}/s"
    if not stats:
        return text
    before = last.get("zramd") or stats
    moved = stats["objects_migrated"] - before["objects_migrated"]
    freed = stats["pages_compacted"] - before["pages_compacted"]
    text += f" | zramd: {stats['orig_data_size'] // MIB} MiB in {stats['mem_used_total'] / MIB:.1f} MiB, "
    text += "frag ratio -" if stats["frag_ratio"] is None else f"frag ratio {stats['frag_ratio']:.1f} %"
    if moved or freed:
        text += f", compacting: {moved} objects moved, {freed} pages freed"
    return text


def text(result: Result) -> str:
    """Return the report of one run for people."""
    what = "the kernel's own zram" if result.mode == KERNEL_ZRAM else f"zramd, attached by {result.mode}"
    what = "requests by ublk, NBD, and to the kernel's zram" if result.rates else f"swap over {what}"
    lines = [f"{what}: {'all held' if result.ok else 'FAILED'}"]
    if result.rates:
        lines += ["", *(f"  {line}" for line in _rates_table(result.rates)), ""]
    else:
        lines += [f"  {name:<26} {value}" for name, value in _facts(result)]
    if result.compaction:
        lines += ["", *(f"  {line}" for line in _compaction_table(result)), ""]
    if result.churn:
        lines += ["", *(f"  {line}" for line in dead.table(result.churn)), ""]
    for each in result.expectations:
        lines.append(
            f"  {'ok    ' if each.met else 'FAILED'}  {each.what}{f' ({each.found})' if each.found else ''}"
        )
    if result.error:
        lines.append(f"  FAILED  {result.error}")
    return "\n".join(lines)


def comparison(found: dict[str, str]) -> str:
    """Return a comparison of two runs for people."""
    lines = [f"  {name:<36} {value}" for name, value in found.items()]
    return "\n".join(["zramd beside the kernel's own zram, on the same workload", *lines])


def _facts(result: Result) -> list[tuple[str, str]]:
    facts = [
        (
            "pages verified",
            f"{result.pages_verified} of {result.pages_written} written, {result.pages_bad} bad",
        ),
        ("swapped out and in", f"{result.swap_outs} and {result.swap_ins} pages"),
        ("booted in", ", ".join(f"{seconds:g} s" for seconds in result.boot_seconds)),
        ("whole run", f"{result.seconds:g} s"),
        ("longest gap of heartbeats", f"{result.longest_gap:.1f} s"),
        ("slowest page", f"{result.slowest:.3f} s"),
    ]
    full = result.moments.get("full")
    if full and full.spent:
        gained, spent = full.stored / MIB, full.spent / MIB
        facts.append(
            ("memory gained for spent", f"{gained:.1f} MiB for {spent:.1f} MiB, {gained / spent:.2f} for 1")
        )
    for name, found in (
        ("compaction", result.compaction),
        ("guest's compact_memory", result.guest_compaction),
        ("swapoff while swapped", result.swapoff),
        ("after nothing was asked for", result.idle),
        ("requests", result.requests),
        ("under pressure", result.hog),
        ("written out", _without_series(result.writeback)),
        ("server in the guest", result.daemon),
        ("server stood still", result.stall),
        ("server ended", result.kills),
        ("at rest", _without_series(result.rest)),
    ):
        if found:
            facts.append((name, ", ".join(f"{key} {value}" for key, value in found.items())))
    return facts


def _without_series(found: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if not isinstance(value, list)}


def _compaction_table(result: Result) -> list[str]:
    """The pool at each moment, and the guest's free memory: how much of it is in long blocks."""
    lines = [
        f"{'':<21} {'used MiB':>9} {'total MiB':>10} {'frag ratio':>11} {'MemFree MiB':>12} {'swapped':>8}"
        f" {'guest free':>11} {'>= 64K':>7} {'>= 2M':>7} {'2M blocks':>10}"
    ]
    for key, name in MOMENTS.items():
        if key in result.moments:
            m = result.moments[key]
            lines.append(
                f"{name:<21} {m.used / MIB:9.1f} {m.total / MIB:10.1f} {m.frag_ratio:9.1f} % "
                f"{m.mem_free / MIB:12.1f} {m.swapped // 4096:8} {m.guest.free / MIB:11.1f} "
                f"{m.guest.small:5.1f} % {m.guest.huge:5.1f} % {m.guest.huge_pages:9}"
            )
    return lines


def _rates_table(rows: list[dict[str, Any]]) -> list[str]:
    """What a request takes by each way to the kernel: see vm.rates."""
    doors = (UBLK, NBD, KERNEL_ZRAM)
    lines = [
        f"{'4 KiB, O_DIRECT':<16}{'req/s':^24}{'p50 µs':^18}{'p99 µs':^21}{'ublk/nbd':>9}{'zram/ublk':>10}",
        f"{'':<16}" + "".join(f"{name:>{width}}" for width in (8, 6, 7) for name in doors),
    ]
    for row in rows:
        numbers = "".join(
            f"{row[name][key]:{width}.0f}"
            for key, width in (("rate", 8), ("p50", 6), ("p99", 7))
            for name in doors
        )
        lines.append(f"{row['load']:<16}{numbers}{row['ublk to nbd']:9.2f}{row['zram to ublk']:10.2f}")
    doors = (UBLK, NBD)
    lines += [
        "",
        f"{'for each request':<16}{'server CPU µs':^16}{'machine busy µs':^18}{'system calls':^16}"
        f"{'switches':^16}{'allocations':^16}",
        f"{'':<16}" + "".join(f"{name:>{width}}" for width in (8, 9, 8, 8, 8) for name in doors),
    ]
    for row in rows:
        numbers = "".join(
            f"{row[name][key]:{width}.{digits}f}"
            for key, width, digits in (
                ("cpu", 8, 0),
                ("busy", 9, 0),
                ("system calls", 8, 2),
                ("switches", 8, 2),
                ("allocations", 8, 2),
            )
            for name in doors
        )
        lines.append(f"{row['load']:<16}{numbers}")
    calls, taken = (
        max(row[UBLK][f"{kind} of others"] for row in rows) for kind in ("system calls", "allocations")
    )
    lines += [
        "",
        f"ublk's server beside that: {calls:.0f} system calls and {taken:.0f} allocations a second at most",
    ]
    return lines


def write_markdown(path: Path, result: Result) -> None:
    """Put the report of a run into its place in a file, between its markers, or at the end."""
    mode = f"{result.mode}{'-pressure' if result.hog else ''}"
    if result.churn:
        mode += "-churn"
    if result.rest:
        mode += "-rest"
    if result.rates:
        mode += "-rates"
    if result.kills:
        mode += f"-{result.kills['by']}"
        if "standby MiB" in result.kills:
            mode += "-standby"
    if result.settings.get("hold_gil"):
        mode += "-gil"
    if result.writeback:
        mode += "-backing"
    begin, end = f"<!-- {mode} -->\n", f"<!-- /{mode} -->\n"
    machine = f"{_processor()}, {os.cpu_count()} CPUs; guest kernel {result.settings['kernel']}"
    section = (
        f"{begin}### {mode}\n\n`scripts/vm-swap {result.settings['command']}` on {machine}, "
        f"{result.settings['accel']}\n\n```\n{text(result)}\n```\n{end}"
    )
    old = path.read_text() if path.exists() else "# Swapping in a virtual machine\n\n"
    if begin in old and end in old:
        head, tail = old.partition(begin)[0], old.partition(end)[2]
        path.write_text(head + section + tail)
    else:
        path.write_text(f"{old.rstrip()}\n\n{section}")


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return "unknown processor"
