"""The steady state of aging, with nothing but background compaction: frag ratio, and what it costs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from bench.density_rows import AGING_TRIMS, AGING_WRITES, Trace, traces, usage_of
from bench.results import Aim, NotMeasuredError, Row, at_least, at_most
from bench.setup import BLOCK, Setup
from zramd import Device
from zramd.server.compactor import Compactor
from zramd.server.worker import Worker
from zramd.settings.config import parse

RATE = 5000  # requests a second: about 12 MB of writes, much for a machine that swaps
BATCH_SECONDS = 0.02
SAMPLE_SECONDS = 0.1
SETTLE = 2.5  # seconds after the last request: a run of compaction ends, the stock is given back


@dataclass(frozen=True)
class Steady:
    """A stretch of aging, or of nothing."""

    ratios: list[float]  # percent
    cpu: float  # of the compactor's thread, percent of a core
    requests: float  # a second
    runs: int  # of compaction
    freed: float  # pages a second

    def tell(self) -> str:
        """Say what went on."""
        return (
            f"{self.requests:,.0f} requests a second, {self.freed:,.0f} pages freed a second in "
            f"{self.runs} steps of compaction"
        )


class Aging:
    """A device with the compactor that a server gives it, and requests that age it."""

    def __init__(self, trace: Trace) -> None:
        """Fill as much as aging leaves filled, and start the compactor with its default settings."""
        config = parse([("disksize", str(trace.blocks * BLOCK))])
        self.device = Device(trace.blocks * BLOCK)
        self._compactor = Compactor(self.device, config)
        dice = random.Random(22)
        for block in range(trace.blocks):
            if dice.random() < AGING_WRITES / (AGING_WRITES + AGING_TRIMS):
                self.device.write(trace.new_block(dice), block * BLOCK)
        self._requests = trace.age(self.device, dice)
        self._worker = Worker(self._compactor)
        self._worker.start()
        thread = self._worker.thread
        assert thread is not None
        assert thread.ident is not None
        self._clock = time.pthread_getcpuclockid(thread.ident)

    def close(self) -> None:
        """End the compactor's thread."""
        self._worker.stop()

    def run(self, seconds: float, rate: float) -> Steady:
        """Make `rate` requests a second (0: none, infinity: as many as one thread can) and look meanwhile."""
        ratios: list[float] = []
        count = 0
        before = self.device.counters()
        cpu, started = time.clock_gettime(self._clock), time.monotonic()
        now = started
        while now < started + seconds:
            if now >= started + (len(ratios) + 1) * SAMPLE_SECONDS:
                ratios.append(usage_of(self.device.counters()).frag_ratio)
            batch_end = now + BATCH_SECONDS
            while count < rate * (now - started) and now < batch_end:
                for _ in range(10):
                    next(self._requests)
                count += 10
                now = time.monotonic()
            time.sleep(max(0, batch_end - time.monotonic()))
            now = time.monotonic()
        cpu, elapsed = time.clock_gettime(self._clock) - cpu, now - started
        if self._compactor.failure:
            raise NotMeasuredError(f"background compaction stopped: {self._compactor.failure}")
        after = self.device.counters()
        return Steady(
            ratios,
            100 * cpu / elapsed,
            count / elapsed,
            after["num_compactions"] - before["num_compactions"],
            (after["pages_compacted"] - before["pages_compacted"]) / elapsed,
        )


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    rows = []
    for trace in traces(setup):
        setup.say(f"steady aging, {trace.name}")
        aging = Aging(trace)
        try:
            warm_up = setup.pick(4, 1)
            seconds = setup.pick(15, 1)
            aging.run(warm_up, float("inf"))
            aging.run(warm_up, RATE)
            bounded = aging.run(seconds, RATE)
            fast = aging.run(seconds, float("inf"))
            time.sleep(SETTLE)
            idle = aging.run(setup.pick(8, 1), 0)
        finally:
            aging.close()
        rows += _rows(trace, bounded, fast, idle)
    return rows


def _rows(trace: Trace, bounded: Steady, fast: Steady, idle: Steady) -> list[Row]:
    def row(what: str, value: float, aim: Aim, note: str = "") -> Row:
        return Row(f"{what}, {trace.name}", "%", [value], aim, note=note)

    def ratios(what: str, take: Callable[[list[float]], float], steady: Steady) -> Row:
        return row(f"frag ratio, {what}", take(steady.ratios), at_least(95, "%"), steady.tell())

    return [
        ratios("steady aging, lowest", min, bounded),
        ratios("steady aging, median", median, bounded),
        ratios("aging at full speed, lowest", min, fast),
        ratios("aging at full speed, median", median, fast),
        row("CPU of compaction, steady aging", bounded.cpu, at_most(2, "%"), bounded.tell()),
        row("CPU of compaction, aging at full speed", fast.cpu, at_most(2, "%"), fast.tell()),
        row("CPU of compaction, idle", idle.cpu, at_most(0.1, "%"), "a look a second"),
    ]
