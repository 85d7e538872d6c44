"""A guest with a disk for what leaves memory, and more in swap than the pool may take: what is written."""

from __future__ import annotations

import time
from typing import Any

from vm import backing
from vm.attach import KernelZram
from vm.plan import MIB, TIMES, Plan
from vm.report import Result
from vm.session import Boot, Session, booted

# Bytes that reach the disk and are no records: its superblock, and what looks at its ends.
BESIDE = 4 * MIB
SHARE, SHORT_SHARE = 2, 16  # one page of so many is written again; a short run is no measurement
OUT_TIMEOUT = 120.0  # seconds


def write_back(plan: Plan, boot: Boot, result: Result) -> None:
    """Let the guest write several times its memory, then write again and verify a part, and verify all.

    At a pace that a script which runs now and then can keep up with.
    """
    with booted(plan, boot, result) as session:
        session.swap_on()
        if isinstance(session.attachment, KernelZram):
            session.attachment.write_back_by_timer(plan.timer)
        mib = (plan.workload_bytes or TIMES * plan.memory) // MIB
        result.workload_mib = mib
        session.start_workload(mib)
        found = _phases(session, mib)
        stats = session.attachment.stats()
        found |= numbers(session, stats)
        result.writeback = found
        result.writeback["samples"] = _samples(session)
        if isinstance(session.attachment, KernelZram):
            result.writeback["rounds"] = session.attachment.rounds()
        _expect(session, found)
        session.guest.end_workload()
        session.swap_off()
        session.attachment.detach(session.guest)


def _phases(session: Session, mib: int) -> dict[str, Any]:
    """Do all phases; how many seconds of the guest each took.

    At a pace that is kept all of it takes what it must; waited_seconds is what the pages took themselves.
    """
    pages = mib * MIB // 4096
    pace = session.plan.pages_a_second
    began = session.beat()["time"]
    session.phase(f"pace {pace}")
    answers = {"fill": session.phase("fill", f"writing {mib} MiB of memory, {pace} pages a second")}
    if session.plan.short:
        _until_out(session)
    again = pages // (SHORT_SHARE if session.plan.short else SHARE)
    answers |= {
        "churn": session.phase(f"churn pages {again}", "writing again and verifying runs of pages"),
        "verify": session.phase("verify", "verifying every page"),
    }
    found = {f"{name}_seconds": round(answer["seconds"], 1) for name, answer in answers.items()}
    found["waited_seconds"] = round(sum(answer["busy"] for answer in answers.values()), 1)
    return {"seconds": round(session.beat()["time"] - began, 1), **found}


def _until_out(session: Session) -> None:
    """Ask for nothing until blocks go out: a short run may be over before any is old enough."""
    session.live.step("waiting until blocks go out")
    end = time.monotonic() + OUT_TIMEOUT
    while not numbers(session, session.attachment.stats()).get("out_pages") and time.monotonic() < end:
        time.sleep(1)


def numbers(session: Session, stats: dict[str, Any]) -> dict[str, Any]:
    """What the server says of its disk, and what the guest's kernel does where the disk is the guest's."""
    section = stats.get("writeback") or {}
    found = {key: section[key] for key in ("out_pages", "written_out", "brought_back") if key in section}
    found |= {
        "MiB_written": round(section.get("bd_writes", 0) / MIB, 1),
        "MiB_read": round(section.get("bd_reads", 0) / MIB, 1),
        "bytes_a_block": round(section.get("bd_writes", 0) / max(1, section.get("written_out", 0))),
        "failed_writes": stats.get("failed_writes", 0),
    }
    if session.plan.in_guest:
        read, written = backing.traffic(session.guest)
        found |= {"disk_MiB_written": round(written / MIB, 1), "disk_MiB_read": round(read / MIB, 1)}
    return found


def _expect(session: Session, found: dict[str, Any]) -> None:
    result = session.result
    result.expect("blocks go out to the disk", found["out_pages"] > 0, f"{found['out_pages']} at the end")
    result.expect(
        "no program is killed", not session.beat()["oom_kill"], f"{session.beat()['oom_kill']} killed"
    )
    if "disk_MiB_written" in found:
        beside = found["disk_MiB_written"] - found["MiB_written"]
        result.expect(
            "the disk is written what the server says",
            -0.1 <= beside <= BESIDE / MIB,
            f"{found['disk_MiB_written']} MiB, {found['MiB_written']} said",
        )


def _samples(session: Session) -> list[dict[str, Any]]:
    """What was in memory and what was written, second by second of the guest."""
    found = []
    for beat in session.guest.beats:
        stats = session.attachment.sample(beat)
        if stats:
            section = stats.get("writeback") or {}
            found.append(
                {
                    "time": round(beat["time"], 1),
                    "stored": stats["pages_stored"],
                    "mem_used_total": stats["mem_used_total"],
                    "available": beat["MemAvailable"],
                    "swapped_out": beat["pswpout"],
                    "out_pages": section.get("out_pages", 0),
                    "bd_writes": section.get("bd_writes", 0),
                }
            )
    return found


def comparison(kernel: Result, ours: Result) -> dict[str, Any]:
    """What zramd wrote and took for each byte and second of the kernel's zram, on the same workload."""
    first, second = kernel.writeback, ours.writeback
    bad = ours.pages_bad + kernel.pages_bad
    return {
        "pages verified": f"{ours.pages_verified} and {kernel.pages_verified}, {bad} bad",
        "bytes written": _ratio(second["disk_MiB_written"], first["disk_MiB_written"], "MiB"),
        "bytes a block": _ratio(second["bytes_a_block"], first["bytes_a_block"], ""),
        "time of the workload": _ratio(second["seconds"], first["seconds"], "s"),
        "time that its pages took": _ratio(second["waited_seconds"], first["waited_seconds"], "s"),
    }


def _ratio(ours: float, kernels: float, unit: str) -> str:
    return f"{ours:g} of {kernels:g} {unit}".rstrip() + f", {ours / kernels:.2f} for 1" if kernels else "-"
