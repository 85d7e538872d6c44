"""Over TCP on loopback with TLS and a shared key, beside nbdkit's memory plugin with the same."""

import subprocess
from contextlib import ExitStack
from pathlib import Path

from bench.processes import Keys, Server, ZramdServer, fio, library, plugin_offers, timed, whole
from bench.results import NotMeasuredError, Row, ratio_at_least
from bench.setup import MIB, Setup

MEMORY = "memory with TLS"
SOURCE = Path(__file__).with_name("allow_keys.c")
LOADS = ("randwrite", "randread")


def measure(setup: Setup) -> list[Row]:
    """Return the rows; raises NotMeasuredError."""
    if not plugin_offers("memory"):
        raise NotMeasuredError("nbdkit's memory plugin is not installed")
    size = setup.pick(256 * MIB, 16 * MIB)
    keys = Keys(setup.folder / "bench.psk")
    try:
        keys.make()
    except (OSError, subprocess.CalledProcessError):
        raise NotMeasuredError("psktool is not installed: gnutls-bin") from None
    allowed = {"LD_PRELOAD": str(library(setup, SOURCE))}
    with ExitStack() as stack:
        zramd, memory = servers = (
            stack.enter_context(ZramdServer(setup, "zramd with TLS", size, keys=keys)),
            stack.enter_context(Server(setup, MEMORY, "memory", str(size), keys=keys)),
        )
        for server in servers:
            fio(setup, server.device, whole("write", size), environment=allowed)
        # So that each measured run is of overwrites.
        fio(setup, zramd.device, timed(setup, "randwrite", "4k", 16, size), environment=allowed)
        found: dict[tuple[str, Server], list[float]] = {}
        for number in range(setup.rounds):
            setup.say(f"tls, round {number + 1} of {setup.rounds}")
            for rw in LOADS:
                for server in servers:
                    job = timed(setup, rw, "4k", 16, size)
                    measured = fio(setup, server.device, job, environment=allowed)
                    found.setdefault((rw, server), []).append(measured.iops)
    return [
        Row(
            f"4K {rw} QD16 over TCP, TLS",
            "IOPS",
            found[rw, zramd],
            ratio_at_least(0.9),
            MEMORY,
            found[rw, memory],
        )
        for rw in LOADS
    ]
