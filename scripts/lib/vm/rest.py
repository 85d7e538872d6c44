"""A guest that has swapped out and rests: what the device takes over time."""

from __future__ import annotations

import time
from typing import Any

from vm.plan import KERNEL_ZRAM, MIB, Plan
from vm.report import Result
from vm.session import Boot, Session, booted

STILL = 25.0  # seconds: more than two sweeps of the server
PATIENCE = 300.0
# Of what it took at once, when all that rests had time to become cold: of memory pages, and of made-up ones.
SHRUNK, SHRUNK_MADE_UP = 0.75, 0.8


def rest(plan: Plan, boot: Boot, result: Result) -> None:
    """Let the guest swap out twice its memory, rest for the plan's time, and verify every page."""
    with booted(plan, boot, result) as session:
        session.swap_on()
        mib = plan.workload(session.available())
        result.workload_mib = mib
        session.start_workload(mib)
        session.phase("fill", f"writing {mib} MiB of memory")
        if plan.pageout:
            session.phase("pageout", "swapping all of it out")
        session.settle()
        first = session.attachment.stats()
        started = session.beat()["time"]
        session.live.step(f"the guest rests for {plan.rest:g} s")
        time.sleep(plan.rest)
        if _becomes_cold(plan):
            _wait_until_cold(session)
        last = session.attachment.stats()
        samples = _samples(session, started)
        session.phase("verify", "verifying every page")
        session.guest.end_workload()
        session.swap_off()
        session.attachment.detach(session.guest)
    ratio = last["total_bytes"] / first["total_bytes"]
    result.rest = {
        "seconds": plan.rest,
        "blocks": last["pages_stored"],
        "cold": _cold(last),
        "MiB at once": round(first["total_bytes"] / MIB, 1),
        "MiB later": round(last["total_bytes"] / MIB, 1),
        "ratio": round(ratio, 3),
        "bytes a block": round(last["total_bytes"] / max(1, last["pages_stored"])),
        "samples": samples,
    }
    if _becomes_cold(plan):
        # Of pages that are made up a third is noise, which nothing makes smaller.
        most = SHRUNK if plan.pages else SHRUNK_MADE_UP
        result.expect(f"what rests takes {most} of what it took, or less", ratio <= most, f"{ratio:.3f}")


def _becomes_cold(plan: Plan) -> bool:
    return plan.mode != KERNEL_ZRAM and "recompression=off" not in plan.settings


def _wait_until_cold(session: Session) -> None:
    """Wait until no block becomes cold any more: how long that takes depends on the machine."""
    before, since = -1, time.monotonic()
    end = since + PATIENCE
    while time.monotonic() < min(end, since + STILL):
        now = _cold(session.attachment.stats())
        if now != before:
            before, since = now, time.monotonic()
        time.sleep(1)


def _cold(stats: dict[str, Any]) -> int:
    """How many blocks are cold; the kernel's zram has none."""
    return int(stats["tiers"]["cold_pages"]) if "tiers" in stats else 0


def _samples(session: Session, started: float) -> list[dict[str, Any]]:
    """What the device took, second by second; the times of the guest, from its rest on."""
    found = []
    for beat in session.guest.beats:
        stats = session.attachment.sample(beat)
        if stats and beat["time"] >= started - 60:
            found.append(
                {
                    "time": round(beat["time"] - started, 1),
                    "stored": stats["pages_stored"],
                    "total_bytes": stats["total_bytes"],
                    "cold": _cold(stats),
                    "bytes_a_block": round(stats["total_bytes"] / max(1, stats["pages_stored"])),
                }
            )
    return found
