"""A guest that has swapped out and rests: what the device takes over time."""

from __future__ import annotations

import time
from typing import Any

from vm.plan import KERNEL_ZRAM, MIB, Plan
from vm.report import Result
from vm.session import Boot, Session, booted

SHRUNK = 0.75  # of what it took at once, when all that rests had time to become cold


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
    if plan.mode != KERNEL_ZRAM and "recompression=off" not in plan.settings:
        result.expect(f"what rests takes {SHRUNK} of what it took, or less", ratio <= SHRUNK, f"{ratio:.3f}")


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
