"""Density: frag ratio and memory after the same requests on zramd, in process, and on the kernel's zram."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from bench_tools.corpus import pages
from bench_tools.kernel import KernelBlocks, KernelZram
from bench_tools.results import NotMeasuredError, Row, at_least, ratio_at_most
from bench_tools.setup import BLOCK, MIB, Setup
from zramd import Device

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
FREED = 0.65  # share of the blocks that is trimmed
AGING_ROUNDS = 2
AGING_WRITES, AGING_TRIMS = 0.5, 0.35  # for each block and round of aging


@dataclass(frozen=True)
class Trace:
    """A fixed series of requests: `new_block` makes what is written next."""

    name: str
    blocks: int
    new_block: Callable[[random.Random], bytes]


@dataclass(frozen=True)
class Usage:
    """What a device says of its memory, in bytes."""

    payload: int
    used: int
    total: int  # with all metadata

    @property
    def frag_ratio(self) -> float:
        """Percent."""
        return 100 * self.payload / self.used


class Target(Protocol):
    """A device that takes a trace."""

    def write(self, data: bytes, offset: int) -> None: ...
    def trim(self, offset: int, length: int) -> None: ...
    def compact(self) -> object: ...


def run(trace: Trace, target: Target, usage: Callable[[], Usage]) -> tuple[Usage, Usage, Usage]:
    """Fill, free at random and compact, age and compact; return the usage after each of the three."""
    dice = random.Random(20)
    for block in range(trace.blocks):
        target.write(trace.new_block(dice), block * BLOCK)
    filled = usage()
    for block in dice.sample(range(trace.blocks), int(trace.blocks * FREED)):
        target.trim(block * BLOCK, BLOCK)
    target.compact()
    compacted = usage()
    for _ in range(AGING_ROUNDS * trace.blocks):
        if dice.random() < AGING_WRITES:
            target.write(trace.new_block(dice), dice.randrange(trace.blocks) * BLOCK)
        if dice.random() < AGING_TRIMS:
            target.trim(dice.randrange(trace.blocks) * BLOCK, BLOCK)
    target.compact()
    return filled, compacted, usage()


def _on_zramd(trace: Trace) -> tuple[Usage, Usage, Usage]:
    device = Device(trace.blocks * BLOCK)

    def usage() -> Usage:
        now = device.counters()
        used = now["mem_used_total"]
        return Usage(now["compr_data_size"], used, used + now["metadata_bytes"])

    return run(trace, device, usage)


def _on_kernel(trace: Trace) -> tuple[Usage, Usage, Usage]:
    with KernelZram(trace.blocks * BLOCK) as zram, KernelBlocks(zram) as target:

        def usage() -> Usage:
            stored, payload, used, _, _, same = zram.mm_stat()[:6]
            return Usage(payload, used, used + zram.metadata_bytes(stored // BLOCK - same))

        return run(trace, target, usage)


def _small_block(dice: random.Random) -> bytes:
    length = dice.choice(SMALL)
    return dice.randbytes(length) + bytes(BLOCK - length)


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    corpus = pages(setup)
    traces = (
        Trace("highly compressible", setup.pick(131072, 4096), _small_block),
        Trace("memory pages", setup.pick(60000, 4096), lambda dice: dice.choice(corpus)),
    )
    rows = []
    for trace in traces:
        setup.say(f"density, {trace.name}")
        zramd = _on_zramd(trace)
        kernel: tuple[Usage, Usage, Usage] | tuple[()] = ()
        try:
            kernel = _on_kernel(trace)
        except (NotMeasuredError, OSError) as reason:
            setup.report.skip(f"kernel zram, density: {reason}")
        rows += _rows(trace, zramd, kernel)
    return rows


def _rows(
    trace: Trace, zramd: tuple[Usage, Usage, Usage], kernel: tuple[Usage, Usage, Usage] | tuple[()]
) -> list[Row]:
    note = "one run: the trace is fixed; the kernel's metadata is computed: 16 B a block and 8 B an object"

    def row(what: str, unit: str, step: int, take: Callable[[Usage], float], aim_percent: float = 0) -> Row:
        aim = at_least(aim_percent, unit) if aim_percent else ratio_at_most(1)
        peer = [take(kernel[step])] if kernel else []
        return Row(f"{what}, {trace.name}", unit, [take(zramd[step])], aim, "kernel zram", peer, note)

    return [
        row("frag ratio after compaction", "%", 1, lambda usage: usage.frag_ratio, 98),
        row("frag ratio after aging, compaction", "%", 2, lambda usage: usage.frag_ratio, 98),
        row("mem_used_total after filling", "MiB", 0, lambda usage: usage.used / MIB),
        row("total_bytes after filling", "MiB", 0, lambda usage: usage.total / MIB),
    ]
