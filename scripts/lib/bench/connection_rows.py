"""Many connections at once, beside nbdkit's memory plugin: fio's jobs, each with a connection of its own."""

from contextlib import ExitStack
from dataclasses import dataclass

from bench.processes import Measured, Server, ZramdServer, fio, plugin_offers, timed, whole
from bench.results import Aim, NotMeasuredError, Row, ratio_at_least
from bench.setup import MIB, Setup

MEMORY = "memory"
JOBS = (1, 4, 8)
EACH, MIXED = ratio_at_least(0.85), ratio_at_least(0.7)


@dataclass(frozen=True)
class Load:
    """One kind of load, and what it has to reach."""

    what: str
    rw: str
    iodepth: int
    jobs: int
    aim: Aim
    options: tuple[str, ...] = ()


LOADS = (
    *(
        Load(f"4K {rw} QD16, {jobs} job{'s' * (jobs > 1)}", rw, 16, jobs, EACH)
        for rw in ("randread", "randwrite")
        for jobs in JOBS
    ),
    # What libnbd's aio-parallel does to a server.
    Load(
        "1 to 16K unaligned randrw QD64, 8 jobs",
        "randrw",
        64,
        8,
        MIXED,
        ("--bsrange=1-16k", "--bs_unaligned=1"),
    ),
)


def _run(setup: Setup, load: Load, server: Server, size: int) -> Measured:
    together = (f"--numjobs={load.jobs}", "--group_reporting")
    return fio(
        setup, server.device, timed(setup, load.rw, "4k", load.iodepth, size, *together, *load.options)
    )


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    if not plugin_offers("memory"):
        raise NotMeasuredError("nbdkit's memory plugin is not installed")
    size = setup.pick(256 * MIB, 16 * MIB)
    with ExitStack() as stack:
        zramd, memory = servers = (
            stack.enter_context(ZramdServer(setup, "zramd of many", size)),
            stack.enter_context(Server(setup, "memory of many", "memory", str(size))),
        )
        for server in servers:
            fio(setup, server.device, whole("write", size))
        found: dict[tuple[Load, Server], list[float]] = {}
        for number in range(setup.rounds):
            setup.say(f"connections, round {number + 1} of {setup.rounds}")
            for load in LOADS:
                for server in servers:
                    iops = _run(setup, load, server, size).iops
                    found.setdefault((load, server), []).append(iops)
    return [
        Row(load.what, "IOPS", found[load, zramd], load.aim, MEMORY, found[load, memory]) for load in LOADS
    ]
