"""Time per operation with much stored against little."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence

import psutil  # type: ignore[import-untyped]

from bench_tools.corpus import pages, requests
from bench_tools.in_process_rows import write_pass
from bench_tools.results import NotMeasuredError, Row, ratio_at_most, take_turns
from bench_tools.setup import BLOCK, GIB, MIB, REQUEST, Setup
from zramd import Device


class Pool:
    """A device with much or little stored."""

    def __init__(self, data: Sequence[memoryview], blocks: Sequence[bytes], size: int, count: int) -> None:
        self._device = Device(size)
        self._blocks = blocks
        self._count = count
        self._size = size
        self._dice = random.Random(size)
        write_pass(self._device, [data[number % len(data)] for number in range(size // REQUEST)])

    def _per_operation(self, run: Callable[[Device, list[int]], None]) -> float:
        offsets = [self._dice.randrange(self._size // BLOCK) * BLOCK for _ in range(self._count)]
        started = time.perf_counter()
        run(self._device, offsets)
        return (time.perf_counter() - started) * 1e6 / self._count

    def write(self) -> float:
        """Return the µs that overwriting a random block takes."""

        def run(device: Device, offsets: list[int]) -> None:
            blocks, count = self._blocks, len(self._blocks)
            for number, offset in enumerate(offsets):
                device.write(blocks[number % count], offset)

        return self._per_operation(run)

    def read(self) -> float:
        """Return the µs that reading a random block takes."""

        def run(device: Device, offsets: list[int]) -> None:
            buffer = bytearray(BLOCK)
            for offset in offsets:
                device.read(buffer, offset)

        return self._per_operation(run)


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    much, little = setup.pick(8 * GIB, 64 * MIB), setup.pick(64 * MIB, 8 * MIB)
    if not setup.quick and psutil.virtual_memory().available < 10 * GIB:
        raise NotMeasuredError("a pool of 8 GiB needs 10 GiB of free memory")
    setup.say("large")
    data, blocks = requests(setup), pages(setup)
    count = setup.pick(200000, 5000)
    large, small = (Pool(data, blocks, size, count) for size in (much, little))
    times = take_turns(
        setup.rounds,
        {"write small": small.write, "write": large.write, "read small": small.read, "read": large.read},
    )
    note = "random blocks of 4K, one thread, in process"
    what, peer = f"with {much >> 20} MiB stored", f"{little >> 20} MiB"
    return [
        Row(f"4K {kind} {what}", "µs", times[kind], ratio_at_most(1.2), peer, times[f"{kind} small"], note)
        for kind in ("write", "read")
    ]
