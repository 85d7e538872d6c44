"""The cold tier: what it saves, what a cold read costs, and what its passes cost others."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from statistics import quantiles
from typing import Any

from bench.corpus import pages, requests
from bench.density_rows import KERNEL, usage_of
from bench.kernel import KernelBlocks, KernelZram
from bench.processes import Measured, ZramdServer, fio, p99_rows, timed, whole
from bench.results import NotMeasuredError, Row, Table, at_most, ratio_at_most, take_turns
from bench.setup import BLOCK, GIB, MIB, REQUEST, Setup
from zramd import Device

COLD_SHARE = 0.8
LEVELS = (1, 3, 4, 5, 6, 9)
LEVEL = 4  # the default of recompression=
READS = 15000
SETTINGS = {"recompression": f"zstd(level={LEVEL})", "cold_age": "10"}
POLL = 0.05  # seconds
PATIENCE = 600.0  # seconds that a pass may take


def _filled(data: Sequence[bytes], level: int = 0) -> Device:
    device = Device(len(data) * BLOCK, cold_level=level)
    for number, page in enumerate(data):
        device.write(page, number * BLOCK)
    return device


def _cool(device: Device, blocks: Sequence[int]) -> float:
    """Make blocks cold; the CPU seconds that it took."""
    started = time.thread_time()
    for block in blocks:
        device.cool(block, 1)
    return time.thread_time() - started


def _density(setup: Setup, data: Sequence[bytes]) -> list[Row]:
    """Return the rows on memory, and put the table of levels into the report."""
    everything = range(len(data))
    hot = usage_of(_filled(data).counters())
    table = Table(
        "Cold blocks, level by level",
        f"{len(data):,} memory pages, all of them cold, beside the same pages with lz4 alone; µs of CPU for "
        "each block, and for a read of one in process.",
        ["level", "pool, MiB", "of lz4's", "total, MiB", "cold blocks", "µs to make cold", "µs to read"],
    )
    all_cold = hot
    for level in LEVELS:
        device = _filled(data, level)
        seconds = _cool(device, everything)
        device.compact()
        counters = device.counters()
        usage = usage_of(counters)
        if level == LEVEL:
            all_cold = usage
        table.rows.append(
            [
                str(level),
                f"{usage.used / MIB:.2f}",
                f"{usage.used / hot.used:.3f}",
                f"{usage.total / MIB:.2f}",
                f"{100 * counters['cold_pages'] / len(data):.1f} %",
                f"{seconds * 1e6 / len(data):.1f}",
                f"{_mean(_read_times(device, everything)):.1f}",
            ]
        )
    setup.report.tables.append(table)
    mixed = _filled(data, LEVEL)
    _cool(mixed, random.Random(17).sample(everything, int(COLD_SHARE * len(data))))
    mixed.compact()
    kernel = []
    try:
        kernel = [_kernel_total(data) / MIB]
    except (NotMeasuredError, OSError) as reason:
        setup.report.skip(f"kernel zram, tiers: {reason}")
    note = f"one run, {len(data):,} pages; recompression={SETTINGS['recompression']}; compacted"
    mostly = f"total_bytes, memory pages, {100 * COLD_SHARE:.0f} % cold"
    kernel_note = f"{note}; the kernel's metadata is computed: 16 B a block and 8 B an object"
    total = [usage_of(mixed.counters()).total / MIB]
    return [
        Row(mostly, "MiB", total, ratio_at_most(0.71), f"{KERNEL} lz4", kernel, kernel_note),
        Row(
            "mem_used_total, memory pages, all cold",
            "MiB",
            [all_cold.used / MIB],
            ratio_at_most(0.64),
            "all hot",
            [hot.used / MIB],
            note,
        ),
    ]


def _kernel_total(data: Sequence[bytes]) -> int:
    with KernelZram(len(data) * BLOCK) as zram, KernelBlocks(zram) as target:
        for number, page in enumerate(data):
            target.write(page, number * BLOCK)
        target.compact()
        stored, _, used, _, _, same = zram.mm_stat()[:6]
        return used + zram.metadata_bytes(stored // BLOCK - same)


def _read_times(device: Device, blocks: Sequence[int]) -> list[float]:
    """Return the µs of one read each, in an order of their own."""
    page = bytearray(BLOCK)
    dice = random.Random(23)
    found = []
    for block in dice.choices(blocks, k=min(READS, len(blocks))):
        started = time.perf_counter_ns()
        device.read(page, block * BLOCK)
        found.append((time.perf_counter_ns() - started) / 1e3)
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _p99(values: Sequence[float]) -> float:
    return quantiles(values, n=100)[98]


def _cold_reads(setup: Setup, data: Sequence[bytes]) -> list[Row]:
    hot, cold = _filled(data), _filled(data, LEVEL)
    _cool(cold, range(len(data)))
    # What zstd does not shrink is read as before, and not of interest here.
    blocks = [block for block in range(len(data)) if cold.block(block)["kind"] == "zstd"]
    runs = take_turns(
        setup.rounds, {"cold": lambda: _read_times(cold, blocks), "hot": lambda: _read_times(hot, blocks)}
    )
    p99 = {name: [_p99(run) for run in found] for name, found in runs.items()}
    means = {name: sorted(_mean(run) for run in found)[len(found) // 2] for name, found in runs.items()}
    note = (
        f"{min(READS, len(blocks)):,} random blocks of memory pages a round, 4K each, called from Python; "
        f"means {means['cold']:.1f} and {means['hot']:.1f} µs"
    )
    return [Row("cold read in process, p99", "µs", p99["cold"], at_most(12, "µs"), "hot", p99["hot"], note)]


class _Filled:
    """A server with memory pages in its first part, and what is asked of it."""

    def __init__(self, setup: Setup, stack: ExitStack, name: str, size: int, **settings: str) -> None:
        try:
            import nbd  # type: ignore[import-untyped]
        except ImportError:
            raise NotMeasuredError("the cold tier over NBD needs Debian's python3-libnbd") from None
        self.server = stack.enter_context(ZramdServer(setup, name, size, **settings))
        data = requests(setup)
        client: Any = nbd.NBD()
        client.connect_uri(self.server.uri)
        for at in range(0, size, REQUEST):
            client.pwrite(data[at // REQUEST % len(data)], at)
        client.shutdown()

    def tiers(self) -> dict[str, Any]:
        """Return the statistics of the tiers."""
        found: dict[str, Any] = self.server.stats()["tiers"]
        return found

    def tried(self) -> int:
        """Return how many blocks were tried so far."""
        found = self.tiers()
        return int(found["recompressed"]) + int(found["recompress_useless"])

    def wait_until_cold(self) -> None:
        """Wait until nothing becomes cold any more."""
        end, before, since = time.monotonic() + PATIENCE, -1, time.monotonic()
        while time.monotonic() < end:
            if (now := self.tried()) != before:
                before, since = now, time.monotonic()
            elif now and time.monotonic() - since > 5:
                return
            time.sleep(POLL)
        raise NotMeasuredError("the cold tier: blocks do not become cold")


def _over_nbd(setup: Setup) -> list[Row]:
    size = setup.pick(256 * MIB, 16 * MIB)
    with ExitStack() as stack:
        cold = _Filled(setup, stack, "tier cold", size, **SETTINGS)
        hot = _Filled(setup, stack, "tier hot", size, recompression="off")
        cold.server.request("PUT", "/idle", "all")
        cold.server.request("PUT", "/recompress", "type=idle")
        cold.wait_until_cold()
        cold.server.request("PUT", "/recompression", "off")  # what is read stays cold
        share = cold.tiers()["cold_pages"] * BLOCK / size

        def run(server: ZramdServer) -> Measured:
            return fio(setup, server.device, timed(setup, "randread", "4k", 1, size))

        runs = take_turns(setup.rounds, {"cold": lambda: run(cold.server), "hot": lambda: run(hot.server)})
    p50 = {name: [found.p50 for found in measured] for name, measured in runs.items()}
    note = f"memory pages, {100 * share:.0f} % of the blocks cold"
    return [
        Row("4K QD1 read p50, all cold", "µs", p50["cold"], ratio_at_most(1.15), "all hot", p50["hot"], note)
    ]


def _beside_a_pass(setup: Setup) -> list[Row]:
    """What clients feel of a pass, and how fast it goes at its share of the processor."""
    half = setup.pick(1024 * MIB, 128 * MIB)  # so that a pass outlasts the rounds
    with ExitStack() as stack:
        servers = {
            name: _Filled(setup, stack, f"pass {name}", 2 * half, **settings)
            for name, settings in (("with", SETTINGS), ("without", {"recompression": "off"}))
        }
        for filled in servers.values():
            fio(setup, filled.server.device, whole("write", half))
        busy = servers["with"]
        end = time.monotonic() + PATIENCE
        while not busy.tried():
            if time.monotonic() > end:
                raise NotMeasuredError("the cold tier: no pass begins")
            time.sleep(POLL)
        before, started = busy.tried(), time.monotonic()

        def run(name: str) -> Measured:
            return fio(setup, servers[name].server.device, timed(setup, "randrw", "4k", 4, half))

        runs = take_turns(setup.rounds, {name: lambda name=name: run(name) for name in servers})  # type: ignore[misc]
        last, seconds = busy.tried(), time.monotonic() - started
        time.sleep(2)  # it works in spells
        if busy.tried() == last:
            raise NotMeasuredError("the cold tier: the pass was over before the measurement")
        blocks = last - before
    note = (
        "memory pages; randrw QD4 on one half, while the other becomes cold by itself: "
        f"{blocks / seconds:,.0f} blocks a second; peer: recompression=off"
    )

    return p99_rows("hot 4K {}s while a pass runs", runs["with"], runs["without"], note)


def _speed(setup: Setup) -> list[Row]:
    size = setup.pick(256 * MIB, 16 * MIB)
    with ExitStack() as stack:
        filled = _Filled(setup, stack, "tier speed", size, **SETTINGS)
        filled.server.request("PUT", "/idle", "all")  # as if they had been left alone for long
        end = time.monotonic() + PATIENCE
        while not filled.tried() and time.monotonic() < end:
            time.sleep(POLL)
        started, first, cpu = time.monotonic(), filled.tried(), filled.tiers()["cpu_seconds"]
        answers: list[float] = []
        last, when = first, started
        while time.monotonic() - when < 3 and time.monotonic() < end:
            asked = time.monotonic()
            now = filled.tried()
            if now != last:
                answers.append(time.monotonic() - asked)
                last, when = now, time.monotonic()
            time.sleep(POLL)
        if last == first:
            raise NotMeasuredError("the cold tier: no pass begins")
        seconds = when - started
        share = 100 * (filled.tiers()["cpu_seconds"] - cpu) / seconds
    whole_gib = seconds / (last - first) * (GIB / BLOCK)
    note = (
        f"{last - first:,} blocks of memory pages in {seconds:.0f} s with {share:.1f} % of a processor, "
        "scaled to a GiB"
    )
    slowest = f"the slowest of {len(answers)} answers of the control socket while a pass ran"
    return [
        Row("1 GiB becomes cold", "s", [whole_gib], at_most(150, "s"), note=note),
        Row("stats answer during a pass", "ms", [1e3 * max(answers)], at_most(10, "ms"), note=slowest),
    ]


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    data = pages(setup)
    parts = {
        "density": lambda: _density(setup, data),
        "reads": lambda: _cold_reads(setup, data),
        "over NBD": lambda: _over_nbd(setup),
        "beside a pass": lambda: _beside_a_pass(setup),
        "speed": lambda: _speed(setup),
    }
    return setup.all_of("tiers", parts)
