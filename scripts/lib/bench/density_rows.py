"""Density: frag ratio and memory after the same requests on zramd, in process, and on the kernel's zram.

The same trace gives what compaction moves, see moves.py, and the curves of the report's picture.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from bench.corpus import pages
from bench.kernel import KernelBlocks, KernelZram
from bench.moves import CountedDevice, per_page
from bench.results import Aim, NotMeasuredError, Row, Table, at_least, ratio_at_most
from bench.setup import BLOCK, MIB, Setup
from zramd import Device
from zramd.server.compactor import Compactor
from zramd.settings.config import parse

SMALL = (
    64,
    96,
    128,
    192,
    256,
    384,
    512,
    700,
)  # random bytes in a highly compressible block; the rest is zeros
KIB = 1024
FREED = 0.65  # share of the blocks that is trimmed
AGING_ROUNDS = 2
AGING_WRITES, AGING_TRIMS = 0.5, 0.35  # for each block and round of aging
SAMPLES = 160  # along a trace, about

FILLED, FREED_SOME, COMPACTED, AGED, AGED_COMPACTED = STEPS = (
    "filling",
    "freeing 65 %",
    "compaction",
    "aging",
    "aging, compaction",
)
KERNEL = "kernel zram"


@dataclass(frozen=True)
class Trace:
    """A fixed series of requests: `new_block` makes what is written next."""

    name: str
    blocks: int
    new_block: Callable[[random.Random], bytes]

    def age(self, target: Target, dice: random.Random) -> Iterator[None]:
        """Write and trim at random without end; yields after each request."""
        while True:
            if dice.random() < AGING_WRITES:
                target.write(self.new_block(dice), dice.randrange(self.blocks) * BLOCK)
                yield
            if dice.random() < AGING_TRIMS:
                target.trim(dice.randrange(self.blocks) * BLOCK, BLOCK)
                yield


@dataclass(frozen=True)
class Usage:
    """What a device says of its memory, in bytes."""

    payload: int
    used: int
    total: int  # with all metadata

    @property
    def frag_ratio(self) -> float:
        """Percent."""
        return 100 * self.payload / self.used if self.used else 100.0


@dataclass
class History:
    """A device's usage over a trace: after each of STEPS, and along the way, by the number of requests."""

    steps: dict[str, Usage] = field(default_factory=dict)
    marks: dict[str, int] = field(default_factory=dict)  # requests done at the end of each step
    curve: list[tuple[int, Usage]] = field(default_factory=list)


class Target(Protocol):
    """A device that takes a trace."""

    def write(self, data: bytes, offset: int) -> None: ...
    def trim(self, offset: int, length: int) -> None: ...
    def compact(self) -> object: ...


class LeftAlone:
    """A device that nobody asks to compact: background compaction works by its default settings."""

    def __init__(self, blocks: int) -> None:
        self.device = Device(blocks * BLOCK)
        self.write, self.trim = self.device.write, self.device.trim
        config = parse([("disksize", str(blocks * BLOCK))])
        self._compactor = Compactor(self.device, config)
        self._rest = config.compaction_interval

    def compact(self) -> None:
        """Let a second pass: a look, and the run that it starts."""
        self._compactor.tick()  # notes that requests came
        while self._compactor.tick() < self._rest:
            pass


def run(trace: Trace, target: Target, usage: Callable[[], Usage]) -> History:
    """Fill, free at random, compact, age, and compact; return the usage meanwhile."""
    dice = random.Random(20)
    history = History()
    requests = 0
    aged = int(AGING_ROUNDS * trace.blocks * (AGING_WRITES + AGING_TRIMS))
    every = max(1, (int(trace.blocks * (1 + FREED)) + aged) // SAMPLES)

    def done() -> None:
        nonlocal requests
        requests += 1
        if requests % every == 0:
            history.curve.append((requests, usage()))

    def step(name: str) -> None:
        history.steps[name] = usage()
        history.marks[name] = requests
        history.curve.append((requests, history.steps[name]))

    for block in range(trace.blocks):
        target.write(trace.new_block(dice), block * BLOCK)
        done()
    step(FILLED)
    for block in dice.sample(range(trace.blocks), int(trace.blocks * FREED)):
        target.trim(block * BLOCK, BLOCK)
        done()
    step(FREED_SOME)
    target.compact()
    step(COMPACTED)
    aging = trace.age(target, dice)
    for _ in range(aged):
        next(aging)
        done()
    step(AGED)
    target.compact()
    step(AGED_COMPACTED)
    return history


def usage_of(counters: dict[str, int]) -> Usage:
    """Return what a device of zramd says of its memory."""
    used = counters["mem_used_total"]
    return Usage(counters["compr_data_size"], used, used + counters["metadata_bytes"])


def _on_kernel(trace: Trace) -> tuple[History, int]:
    """Return the kernel's history, and the pages that its compactions freed."""
    with KernelZram(trace.blocks * BLOCK) as zram, KernelBlocks(zram) as target:

        def usage() -> Usage:
            stored, payload, used, _, _, same = zram.mm_stat()[:6]
            return Usage(payload, used, used + zram.metadata_bytes(stored // BLOCK - same))

        history = run(trace, target, usage)
        return history, zram.mm_stat()[6]


def small_block(dice: random.Random) -> bytes:
    """Return a block that compresses well."""
    length = dice.choice(SMALL)
    return dice.randbytes(length) + bytes(BLOCK - length)


def traces(setup: Setup) -> tuple[Trace, Trace]:
    """Return the two traces; raises NotMeasuredError."""
    corpus = pages(setup)
    return (
        Trace("highly compressible", setup.pick(131072, 4096), small_block),
        Trace("memory pages", setup.pick(60000, 4096), lambda dice: dice.choice(corpus)),
    )


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    rows = []
    table = Table(
        "Density, step by step",
        "MiB; frag ratio in percent. The kernel's metadata is computed: 16 B a block and 8 B an object.",
        [
            "trace",
            "after",
            "payload",
            "used",
            "kernel",
            "ratio",
            "total",
            "kernel",
            "ratio",
            "frag",
            "kernel",
        ],
    )
    for trace in traces(setup):
        setup.say(f"density, {trace.name}")
        device = CountedDevice(trace.blocks)
        zramd = run(trace, device, lambda device=device: usage_of(device.device.counters()))  # type: ignore[misc]
        kernel, kernel_freed = None, 0
        try:
            kernel, kernel_freed = _on_kernel(trace)
        except (NotMeasuredError, OSError) as reason:
            setup.report.skip(f"kernel zram, density: {reason}")
        alone = LeftAlone(trace.blocks)
        background = run(trace, alone, lambda alone=alone: usage_of(alone.device.counters()))  # type: ignore[misc]
        rows += _rows(trace, zramd, kernel, background) + _moves(trace, device, kernel_freed)
        table.rows += _cells(trace, zramd, kernel)
        setup.report.curves[f"frag ratio, {trace.name}"] = {
            "marks": zramd.marks,
            **{
                name: [(at, usage.frag_ratio) for at, usage in history.curve]
                for name, history in (("zramd", zramd), (KERNEL, kernel))
                if history
            },
        }
    setup.report.tables.append(table)
    return rows


def _rows(trace: Trace, zramd: History, kernel: History | None, background: History) -> list[Row]:
    note = "one run: the trace is fixed; the kernel's metadata is computed: 16 B a block and 8 B an object"

    def row(
        what: str, unit: str, step: str, take: Callable[[Usage], float], aim: Aim, remark: str = ""
    ) -> Row:
        peer = [take(kernel.steps[step])] if kernel else []
        return Row(f"{what}, {trace.name}", unit, [take(zramd.steps[step])], aim, KERNEL, peer, note + remark)

    def worst(what: str, take: Callable[[Usage], float]) -> Row:
        """The step where zramd takes the most beside the kernel."""
        step = FREED_SOME
        if kernel:
            step = max(STEPS, key=lambda step: take(zramd.steps[step]) / take(kernel.steps[step]))
        return row(f"{what} at the worst step", "MiB", step, take, ratio_at_most(1), f"; after {step}")

    def left_alone(what: str, take: Callable[[Usage], float]) -> Row:
        """A second after freeing: one look of background compaction; the kernel's compacts on demand."""
        return Row(
            f"{what} a second after freeing 65 %, {trace.name}",
            "MiB",
            [take(background.steps[COMPACTED])],
            ratio_at_most(1),
            KERNEL,
            [take(kernel.steps[FREED_SOME])] if kernel else [],
            note
            + "; background compaction alone, by its default settings; the kernel compacts when it is asked",
        )

    def ratio(usage: Usage) -> float:
        return usage.frag_ratio

    def used(usage: Usage) -> float:
        return usage.used / MIB

    def total(usage: Usage) -> float:
        return usage.total / MIB

    return [
        row("frag ratio after compaction", "%", COMPACTED, ratio, at_least(98, "%")),
        row("frag ratio after aging, compaction", "%", AGED_COMPACTED, ratio, at_least(98, "%")),
        row("mem_used_total after filling", "MiB", FILLED, used, ratio_at_most(1)),
        row("total_bytes after filling", "MiB", FILLED, total, ratio_at_most(1)),
        worst("mem_used_total", used),
        worst("total_bytes", total),
        left_alone("mem_used_total", used),
        left_alone("total_bytes", total),
    ]


def _cells(trace: Trace, zramd: History, kernel: History | None) -> Iterator[list[str]]:
    """Yield the lines of the table of steps."""

    def beside(mine: float, other: float | None, unit: int, places: int) -> list[str]:
        cells = [f"{mine / unit:.{places}f}", "" if other is None else f"{other / unit:.{places}f}"]
        return cells if unit == 1 else [*cells, "" if other is None else f"{mine / other:.3f}"]

    for step, usage in zramd.steps.items():
        peer = kernel.steps[step] if kernel else None
        yield [
            trace.name,
            step,
            f"{usage.payload / MIB:.2f}",
            *beside(usage.used, peer.used if peer else None, MIB, 2),
            *beside(usage.total, peer.total if peer else None, MIB, 2),
            *beside(usage.frag_ratio, peer.frag_ratio if peer else None, 1, 2),
        ]


def _moves(trace: Trace, device: CountedDevice, kernel_freed: int) -> list[Row]:
    rows = []
    for number_of, step in enumerate((FREED_SOME, AGED)):
        mine, same, rest = device.as_much[number_of], device.same_state[number_of], device.zramd[number_of]
        rest -= mine
        note = (
            f"until zramd has freed as many pages as the kernel's algorithm, simulated, on the same zspages: "
            f"{mine.pages_freed:,} with {mine.bytes / KIB:,.1f} KiB in {mine.objects:,} moves, "
            f"beside {same.pages_freed:,} with {same.bytes / KIB:,.1f} KiB. "
            f"zramd then frees {rest.pages_freed:,} more with {rest.bytes / KIB:,.1f} KiB. "
            f"On the kernel's own zspages it is {per_page(device.kernel[number_of]):,.0f} B a page"
        )
        if kernel_freed:
            simulated = sum(moved.pages_freed for moved in device.kernel)
            note += f" (of both compactions, {simulated:,} pages; the real one freed {kernel_freed:,})"
        rows.append(
            Row(
                f"moved bytes per freed page after {step}, {trace.name}",
                "B",
                [per_page(mine)],
                ratio_at_most(1),
                "kernel's algorithm",
                [per_page(same)],
                note,
            )
        )
    return rows
