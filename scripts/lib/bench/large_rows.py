"""Time per operation, and memory beside the pool, with much stored against little."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import psutil  # type: ignore[import-untyped]

from bench.corpus import pages, requests
from bench.in_process_rows import write_pass
from bench.processes import ZramdServer
from bench.results import NotMeasuredError, Row, Table, ratio_at_most, take_turns
from bench.setup import BLOCK, GIB, MIB, REQUEST, Setup
from zramd import Device

FREED = 0.3  # share of the blocks that goes before a compaction
SNAPSHOTS = 100
PIECE = 2 * MIB  # what swap frees at once
COST = "cost over stored size"
START = "start of a server"


class Pool:
    """A device with much or little stored; each method gives µs."""

    def __init__(self, data: Sequence[memoryview], blocks: Sequence[bytes], size: int, count: int) -> None:
        self.device = Device(size)
        self.size = size
        self._blocks = blocks
        self._count = count
        self._dice = random.Random(size)
        self._freeing = 0.0
        write_pass(self.device, [data[number % len(data)] for number in range(size // REQUEST)])

    def _timed(self, run: Callable[[list[int]], None], offsets: list[int]) -> float:
        started = time.perf_counter()
        run(offsets)
        return (time.perf_counter() - started) * 1e6 / len(offsets)

    def _anywhere(self) -> list[int]:
        return [self._dice.randrange(self.size // BLOCK) * BLOCK for _ in range(self._count)]

    def _write(self, offsets: list[int]) -> None:
        device, blocks, count = self.device, self._blocks, len(self._blocks)
        for number, offset in enumerate(offsets):
            device.write(blocks[number % count], offset)

    def _read(self, offsets: list[int]) -> None:
        device, buffer = self.device, bytearray(BLOCK)
        for offset in offsets:
            device.read(buffer, offset)

    def _trim(self, offsets: list[int]) -> None:
        device = self.device
        for offset in offsets:
            device.trim(offset, BLOCK)

    def write(self) -> float:
        """Overwrite a random block."""
        return self._timed(self._write, self._anywhere())

    def read(self) -> float:
        """Read a random block."""
        return self._timed(self._read, self._anywhere())

    def read_range(self) -> float:
        """Read a random range of one request: what that takes for each block."""
        device, buffer = self.device, bytearray(REQUEST)
        offsets = [self._dice.randrange(self.size // REQUEST) * REQUEST for _ in range(self._count // 32)]
        started = time.perf_counter()
        for offset in offsets:
            device.read(buffer, offset)
        return (time.perf_counter() - started) * 1e6 / (len(offsets) * REQUEST // BLOCK)

    def free_range(self) -> float:
        """Free random ranges as swap does: what that takes for each block."""
        pieces = self.size // PIECE
        offsets = [piece * PIECE for piece in self._dice.sample(range(pieces), min(32, pieces // 2))]
        started = time.perf_counter()
        for offset in offsets:
            self.device.trim(offset, PIECE)
        took = (time.perf_counter() - started) * 1e6 / (len(offsets) * PIECE // BLOCK)
        self._write([at for offset in offsets for at in range(offset, offset + PIECE, BLOCK)])
        return took

    def compact(self) -> float:
        """Free blocks at random, then compact: what that takes for each page that it frees."""
        self.device.compact()
        count = self.size // BLOCK
        offsets = [block * BLOCK for block in self._dice.sample(range(count), int(count * FREED))]
        self._freeing = self._timed(self._trim, offsets)
        before = self.device.counters()["pages_compacted"]
        started = time.perf_counter()
        self.device.compact()
        seconds = time.perf_counter() - started
        freed = self.device.counters()["pages_compacted"] - before
        self._write(offsets)
        return seconds * 1e6 / freed

    def free(self) -> float:
        """Free a random block: what it took before the last compaction."""
        return self._freeing

    def snapshot(self) -> float:
        """Take all numbers and the table of size classes, as the stats files do once a second."""
        started = time.perf_counter()
        for _ in range(SNAPSHOTS):
            self.device.counters()
            self.device.classes()
        return (time.perf_counter() - started) * 1e6 / SNAPSHOTS


def measure(setup: Setup) -> list[Row]:
    """Return the rows up to 1 GiB; raises NotMeasuredError."""
    return _measure(setup, [64 * MIB, 256 * MIB, GIB])


def measure_large(setup: Setup) -> list[Row]:
    """Return the rows up to 8 GiB; raises NotMeasuredError."""
    return _measure(setup, [64 * MIB, 256 * MIB, GIB, 8 * GIB])


def _measure(setup: Setup, sizes: list[int]) -> list[Row]:
    if setup.quick:
        sizes = [8 * MIB, 32 * MIB]
    # Half of what is stored, and a corpus; with some room.
    if psutil.virtual_memory().available < sum(sizes) + GIB // 2:
        raise NotMeasuredError(
            f"pools of {sum(sizes) / GIB:.1f} GiB need as much free memory, and 0.5 GiB more"
        )
    setup.say(f"{sizes[-1] >> 20} MiB stored")
    data, blocks = requests(setup), pages(setup)
    pools = [Pool(data, blocks, size, setup.pick(100000, 5000)) for size in sizes]

    starts = itertools.count()

    def start(pool: Pool) -> float:
        with ZramdServer(setup, f"start {next(starts)}", pool.size) as server:
            return server.start_seconds * 1e3

    what: dict[str, Callable[[Pool], float]] = {
        "4K write": Pool.write,
        "4K read": Pool.read,
        "128K read, a block": Pool.read_range,
        "2M free, a block": Pool.free_range,
        "compaction of a freed page": Pool.compact,
        "4K free": Pool.free,
        "snapshot of the stats": Pool.snapshot,
        START: start,
    }
    runs: dict[str, Callable[[], float]] = {
        f"{name} {pool.size}": partial(run, pool) for name, run in what.items() for pool in pools
    }
    times = take_turns(setup.rounds, runs)
    setup.report.curves[COST] = {
        name: [(size, median(times[f"{name} {size}"])) for size in sizes] for name in what
    }
    setup.report.tables.append(_memory(pools))
    return [_row(name, times, sizes) for name in what]


def _row(name: str, times: dict[str, list[float]], sizes: list[int]) -> Row:
    little, much = sizes[0], sizes[-1]
    label = f"start of an empty server, {much >> 20} MiB"
    note = "empty devices of these sizes, until the first client can connect"
    if name != START:
        label = f"{name} with {much >> 20} MiB stored"
        note = "random blocks or ranges, one thread, in process; 30 % are freed before a compaction"
    return Row(
        label,
        "ms" if name == START else "µs",
        times[f"{name} {much}"],
        ratio_at_most(1.2),
        f"{little >> 20} MiB",
        times[f"{name} {little}"],
        note,
    )


def _memory(pools: Sequence[Pool]) -> Table:
    """Return what all that is not the pool's pages takes."""
    table = Table(
        "Memory beside the pool",
        "Slots, handles, the tables of the pool and scratch (metadata_bytes), after all of the above.",
        ["stored", "objects", "pool", "beside it", "bytes a block"],
    )
    for pool in pools:
        now = pool.device.counters()
        table.rows.append(
            [
                f"{pool.size >> 20:,} MiB",
                f"{now['objs_used']:,}",
                f"{now['mem_used_total'] / MIB:,.1f} MiB",
                f"{now['metadata_bytes'] / MIB:.2f} MiB",
                f"{now['metadata_bytes'] / (pool.size // BLOCK):.1f}",
            ]
        )
    return table
