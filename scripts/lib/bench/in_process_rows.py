"""In process: zramd against bare lz4 on the same memory pages, and two threads against one."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Sequence

from bench.bare_lz4 import BareLz4
from bench.corpus import requests
from bench.results import Row, ratio_at_least, take_turns
from bench.setup import BLOCK, REQUEST, Setup
from zramd import Device

LOADED_BYTES = 128 << 20  # each timed piece moves about this much, so that it takes a tenth of a second


def write_pass(device: Device, data: Sequence[memoryview], shift: int = 0) -> None:
    """Write the requests one after the other, starting with number `shift` of them."""
    for index in range(len(data)):
        device.write(data[(index + shift) % len(data)], index * REQUEST)


def read_pass(device: Device, start: int, end: int) -> None:
    """Read the requests with numbers from `start` to `end` into the same buffer."""
    buffer = bytearray(REQUEST)
    for index in range(start, end):
        device.read(buffer, index * REQUEST)


def timed(run: Callable[[], None]) -> float:
    """Return the seconds that a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


class Passes:
    """Timed passes of one thread over one device; each gives MB/s."""

    def __init__(self, data: Sequence[memoryview], passes: int, device: Device | None = None) -> None:
        self._data = data
        self._passes = passes
        self._shift = 0
        self._bytes = len(data) * REQUEST
        self.device = device or Device(self._bytes)
        write_pass(self.device, data)

    def _speed(self, seconds: float) -> float:
        return self._bytes / seconds / 1e6

    def fill(self) -> float:
        """Write to an empty device."""
        seconds = 0.0
        for _ in range(self._passes):
            self.device.reset()
            seconds += timed(lambda: write_pass(self.device, self._data))
        return self._speed(seconds / self._passes)

    def overwrite(self) -> float:
        """Write over other data: each pass puts the data elsewhere, so that most blocks change their size."""
        seconds = 0.0
        for _ in range(self._passes):
            self._shift += 1
            seconds += timed(lambda: write_pass(self.device, self._data, self._shift))
        return self._speed(seconds / self._passes)

    def read(self) -> float:
        """Read all."""
        seconds = 0.0
        for _ in range(self._passes):
            seconds += timed(lambda: read_pass(self.device, 0, len(self._data)))
        return self._speed(seconds / self._passes)


def passes_for(data: Sequence[memoryview], setup: Setup) -> int:
    """Return how many passes over the data move LOADED_BYTES."""
    return max(1, setup.pick(LOADED_BYTES, LOADED_BYTES // 16) // (len(data) * REQUEST))


def measure_lz4(setup: Setup) -> list[Row]:
    """Return the rows against bare lz4; raises NotMeasuredError."""
    data = requests(setup)
    passes = passes_for(data, setup)
    zramd = Passes(data, passes)
    with BareLz4(setup, setup.corpus) as bare:
        size = bare.blocks * BLOCK

        def bare_speed(what: str) -> float:
            return size * passes / bare.seconds(what, passes=passes) / 1e6

        setup.say("lz4")
        speeds = take_turns(
            setup.rounds * 3,  # they are short
            {
                "bare write": lambda: bare_speed("compress"),
                "fill": zramd.fill,
                "bare write again": lambda: bare_speed("compress"),
                "overwrite": zramd.overwrite,
                "bare read": lambda: bare_speed("decompress"),
                "read": zramd.read,
            },
        )
        setup.report.settings["memory pages"] = (
            f"{bare.blocks} of {setup.corpus_name}, no page of one repeated word among them, "
            f"lz4 {bare.version} {size / bare.stored_bytes:.2f} : 1, {bare.raw_blocks} raw"
        )
    note = (
        "requests of 128K from Python against LZ4_compress_fast / LZ4_decompress_safe in C on the same "
        "pages; bare lz4 compresses all of them with room for the worst case and keeps nothing; "
        "raw pages it copies on reading"
    )
    writing, reading = "LZ4_compress_fast", "LZ4_decompress_safe"
    return [
        Row(
            "in process, overwrite",
            "MB/s",
            speeds["overwrite"],
            ratio_at_least(0.95),
            writing,
            speeds["bare write again"],
            note,
        ),
        Row(
            "in process, first write",
            "MB/s",
            speeds["fill"],
            ratio_at_least(0.95),
            writing,
            speeds["bare write"],
            note,
        ),
        Row(
            "in process, read",
            "MB/s",
            speeds["read"],
            ratio_at_least(0.9),
            reading,
            speeds["bare read"],
            note,
        ),
    ]


def _threads(count: int, parts: int, run: Callable[[int, int], None]) -> float:
    """Run over `parts` requests, an equal share in each of `count` threads; return the seconds."""
    go = threading.Barrier(count + 1)

    def work(start: int, end: int) -> None:
        go.wait()
        run(start, end)

    bounds = [parts * number // count for number in range(count + 1)]
    threads = [threading.Thread(target=work, args=pair) for pair in itertools.pairwise(bounds)]
    for thread in threads:
        thread.start()
    go.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - started


def measure_threads(setup: Setup) -> list[Row]:
    """Return the rows of two threads against one; raises NotMeasuredError."""
    data = requests(setup)
    passes = passes_for(data, setup)
    device = Device(len(data) * REQUEST)
    write_pass(device, data)
    shift = 0

    def write(start: int, end: int) -> None:
        for number in range(passes):
            for index in range(start, end):
                device.write(data[(index + shift + number) % len(data)], index * REQUEST)

    def read(start: int, end: int) -> None:
        for _ in range(passes):
            read_pass(device, start, end)

    def speed(count: int, run: Callable[[int, int], None]) -> float:
        nonlocal shift
        shift += passes
        return passes * len(data) * REQUEST / _threads(count, len(data), run) / 1e6

    setup.say("threads")
    with BareLz4(setup, setup.corpus) as bare:
        speeds = take_turns(
            setup.rounds * 3,
            {
                "write 1": lambda: speed(1, write),
                "write 2": lambda: speed(2, write),
                "read 1": lambda: speed(1, read),
                "read 2": lambda: speed(2, read),
                "bare write 1": lambda: 1 / bare.seconds("compress", passes=passes),
                "bare write 2": lambda: 1 / bare.seconds("compress", threads=2, passes=passes),
                "bare read 1": lambda: 1 / bare.seconds("decompress", passes=passes),
                "bare read 2": lambda: 1 / bare.seconds("decompress", threads=2, passes=passes),
            },
        )

    def row(what: str) -> Row:
        bare_row = Row("", "", speeds[f"bare {what} 2"], ratio_at_least(0), "", speeds[f"bare {what} 1"])
        note = f"two threads of bare lz4 reach {bare_row.ratio:.2f} times one's speed here"
        two, one = speeds[f"{what} 2"], speeds[f"{what} 1"]
        return Row(f"two threads, {what}", "MB/s", two, ratio_at_least(1.7), "one thread", one, note)

    return [row("write"), row("read")]
