"""Over NBD: 4K and 128K requests, latency, CPU and minor faults per request."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bench.bare_lz4 import BareLz4
from bench.kernel import KernelZram
from bench.processes import (
    FIO_DATA,
    NOTHING,
    Environment,
    Measured,
    Server,
    ZramdServer,
    fio,
    library,
    plugin_offers,
    timed,
    whole,
)
from bench.results import Aim, NotMeasuredError, Row, at_most, number, ratio_at_least, ratio_at_most
from bench.setup import MIB, Setup
from zramd.process.buffers import SEND_BUFFER

ZRAMD, MEMORY, ZSTD, NULL, KERNEL = "zramd", "memory", "memory zstd", "null", "kernel zram"
WIDE_MEMORY = "memory, large buffers"
WIDE_SOURCE = Path(__file__).with_name("wide_sockets.c")


@dataclass(frozen=True)
class Pattern:
    """One kind of load, and the servers measured with it, in this order."""

    rw: str
    bs: str
    iodepth: int
    peers: tuple[str, ...]
    wide: bool = False  # fio's sockets have large send buffers, as those have that `zramd attach` makes


RANDWRITE = Pattern("randwrite", "4k", 16, (ZRAMD, MEMORY, ZSTD))
RANDREAD = Pattern("randread", "4k", 16, (ZRAMD, MEMORY))
WRITE_LATENCY = Pattern("randwrite", "4k", 1, (ZRAMD, NULL))
READ_LATENCY = Pattern("randread", "4k", 1, (ZRAMD, NULL))
WRITE = Pattern("write", "128k", 8, (ZRAMD, KERNEL))
READ = Pattern("read", "128k", 8, (ZRAMD, KERNEL))
WIDE_WRITE = Pattern("write", "128k", 8, (ZRAMD, WIDE_MEMORY, KERNEL), wide=True)
WIDE_READ = Pattern("read", "128k", 8, (ZRAMD, WIDE_MEMORY, KERNEL), wide=True)
PATTERNS = (RANDWRITE, RANDREAD, WRITE_LATENCY, READ_LATENCY, WRITE, READ, WIDE_WRITE, WIDE_READ)


@dataclass(frozen=True)
class Run:
    """One fio run: its result, and what it took on the server's side, per request."""

    fio: Measured
    cpu_us: float = 0.0
    minor_faults: float = 0.0


def _run(
    setup: Setup, pattern: Pattern, target: Server | KernelZram, size: int, wide: Environment = NOTHING
) -> Run:
    """Run fio once; `wide` is the environment that gives it large send buffers."""
    job = timed(setup, pattern.rw, pattern.bs, pattern.iodepth, size)
    if isinstance(target, KernelZram):
        return Run(fio(setup, target.device, job))
    cpu, faults = target.cpu_seconds(), target.minor_faults()
    measured = fio(setup, target.device, job, environment=wide if pattern.wide else NOTHING)
    cpu, faults = target.cpu_seconds() - cpu, target.minor_faults() - faults
    return Run(measured, cpu * 1e6 / measured.requests, faults / measured.requests)


def _start(setup: Setup, stack: ExitStack, size: int, wide: Environment) -> dict[str, Server | KernelZram]:
    """Start every server, filled: so reads read data and writes are overwrites."""
    targets: dict[str, Server | KernelZram] = {}
    targets[ZRAMD] = stack.enter_context(ZramdServer(setup, ZRAMD, size))
    if plugin_offers("memory"):
        targets[MEMORY] = stack.enter_context(Server(setup, MEMORY, "memory", str(size)))
        targets[WIDE_MEMORY] = stack.enter_context(
            Server(setup, WIDE_MEMORY, "memory", str(size), environment=wide)
        )
        if plugin_offers("memory", "zstd=yes"):
            targets[ZSTD] = stack.enter_context(Server(setup, ZSTD, "memory", str(size), "allocator=zstd"))
        else:
            setup.report.skip("nbdkit's memory plugin here has no allocator=zstd")
    else:
        setup.report.skip("nbdkit's memory plugin is not installed")
    if plugin_offers("null"):
        targets[NULL] = stack.enter_context(Server(setup, NULL, "null", str(size)))
    else:
        setup.report.skip("nbdkit's null plugin is not installed")
    try:
        targets[KERNEL] = stack.enter_context(KernelZram(size))
    except NotMeasuredError as reason:
        setup.report.skip(f"kernel zram: {reason}")
    for name, target in list(targets.items()):
        if name == NULL:
            continue
        try:
            fio(setup, target.device, whole("write", size))
        except NotMeasuredError as reason:
            if name != KERNEL:
                raise
            setup.report.skip(f"kernel zram: {reason}")  # io_uring may be switched off
            del targets[name]
    return targets


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    size = setup.pick(512 * MIB, 16 * MIB)
    wide = {"LD_PRELOAD": str(library(setup, WIDE_SOURCE)), "ZRAMD_BUFFER": str(SEND_BUFFER)}
    with ExitStack() as stack:
        targets = _start(setup, stack, size, wide)
        zramd = targets[ZRAMD]
        assert isinstance(zramd, ZramdServer)
        _run(setup, RANDWRITE, zramd, size)  # so that each measured run of overwrites is a later one
        runs: dict[tuple[Pattern, str], list[Run]] = {}
        for number in range(setup.rounds):
            setup.say(f"nbd, round {number + 1} of {setup.rounds}")
            for pattern in PATTERNS:
                for name in pattern.peers:
                    if name in targets:
                        runs.setdefault((pattern, name), []).append(
                            _run(setup, pattern, targets[name], size, wide)
                        )
        stats = zramd.stats()
    ratio = stats["orig_data_size"] / stats["compr_data_size"]
    setup.report.settings["fio's data"] = f"{' '.join(FIO_DATA)}, compressed {ratio:.2f} : 1 by zramd"
    return _rows(runs, _lz4_us(setup, min(size, 64 * MIB)))


def _lz4_us(setup: Setup, size: int) -> float:
    """What lz4 alone takes to compress a block of fio's data, in µs."""
    data = setup.folder / "fio.data"
    fio(setup, ["--ioengine=psync", f"--filename={data}"], whole("write", size))
    with BareLz4(setup, data) as bare:
        seconds = min(bare.seconds("compress") for _ in range(3 * setup.rounds))
        setup.report.settings["fio's data"] += f"; bare lz4 {seconds * 1e6 / bare.blocks:.2f} µs a block"
        return seconds * 1e6 / bare.blocks


def _rows(runs: dict[tuple[Pattern, str], list[Run]], lz4_us: float) -> list[Row]:
    def row(
        what: str,
        unit: str,
        take: Callable[[Run], float],
        pattern: Pattern,
        peer: str,
        aim: Aim,
        note: str = "",
    ) -> Row:
        mine = [take(run) for run in runs[pattern, ZRAMD]]
        others = [take(run) for run in runs.get((pattern, peer), ())]
        return Row(what, unit, mine, aim, peer, others, note)

    def iops(run: Run) -> float:
        return run.fio.iops

    def speed(run: Run) -> float:
        return run.fio.bytes_per_second / 1e6

    def p50(run: Run) -> float:
        return run.fio.p50

    def cpu(run: Run) -> float:
        return run.cpu_us

    past_nbd = "kernel zram: direct=1, io_uring, the same fio job; NBD is not on its way"

    def wide_row(what: str, pattern: Pattern) -> Row:
        found = row(what, "MB/s", speed, pattern, KERNEL, ratio_at_least(1))
        found.note = (
            f"fio's sockets with send buffers of {SEND_BUFFER >> 20} MiB, the server's own as it sets them"
        )
        if memory := runs.get((pattern, WIDE_MEMORY)):
            found.note += f"; nbdkit's memory plugin with both: {number(median(map(speed, memory)))} MB/s"
        return found

    write_cpu = row("server CPU per 4K write", "µs", cpu, RANDWRITE, MEMORY, ratio_at_most(1))
    if write_cpu.peer_values:
        write_cpu.note = (
            f"memory takes {number(median(write_cpu.peer_values))} µs; 1.5 of that and the {lz4_us:.2f} µs "
            "that lz4 alone takes for a block of fio's data are the peer's value here"
        )
        write_cpu.peer = "lz4 + 1.5 memory"
        write_cpu.peer_values = [lz4_us + 1.5 * value for value in write_cpu.peer_values]
    faults = [run.minor_faults for run in runs[RANDWRITE, ZRAMD]]
    return [
        row("4K randwrite QD16", "IOPS", iops, RANDWRITE, MEMORY, ratio_at_least(0.85)),
        row("4K randwrite QD16", "IOPS", iops, RANDWRITE, ZSTD, ratio_at_least(5)),
        row("4K randread QD16", "IOPS", iops, RANDREAD, MEMORY, ratio_at_least(0.9)),
        row("4K QD1 write p50", "µs", p50, WRITE_LATENCY, NULL, ratio_at_most(1.15)),
        row("4K QD1 read p50", "µs", p50, READ_LATENCY, NULL, ratio_at_most(1.15)),
        row("128K write QD8", "MB/s", speed, WRITE, KERNEL, ratio_at_least(1), past_nbd),
        row("128K read QD8", "MB/s", speed, READ, KERNEL, ratio_at_least(1), past_nbd),
        wide_row("128K write QD8, large buffers", WIDE_WRITE),
        wide_row("128K read QD8, large buffers", WIDE_READ),
        row("server CPU per 4K read", "µs", cpu, RANDREAD, MEMORY, ratio_at_most(1.5)),
        write_cpu,
        Row("minor faults per 4K write", "", faults, at_most(0.05, "")),
    ]
