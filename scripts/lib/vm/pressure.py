"""The guest at its limit: a hog that takes all memory again and again, a pool that is full."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from vm import writeback
from vm.attach import Qemu
from vm.plan import MIB, Plan
from vm.report import Result
from vm.session import Boot, Session, booted

LONGEST_GAP = 30.0  # seconds between two heartbeats that still are no hang
CHURN_SECONDS = 10  # between two looks at the hog


def hog(plan: Plan, boot: Boot, result: Result) -> None:
    """Let a hog drive the guest to its limit for the plan's time; the workload verifies meanwhile."""
    with booted(plan, boot, result) as session:
        session.swap_on()
        available = session.available()
        mib = available // MIB // 2 if plan.serves_itself else available * 4 // 5 // MIB
        session.start_workload(mib)
        session.phase("fill", f"writing {mib} MiB of patterned memory, which must survive")
        before = session.beat()
        report = "/tmp/hog"
        session.live.step(f"a hog takes all memory again and again for {plan.hog_seconds} s")
        session.guest.run(f"/bin/guest_tool hog {plan.hog_seconds} {plan.seed} >{report} 2>&1 &")
        end = time.monotonic() + plan.hog_seconds
        while time.monotonic() < end:
            session.phase(f"churn seconds {CHURN_SECONDS}", "verifying and writing again meanwhile")
        session.guest.run(f"while ! [ -s {report} ]; do sleep 1; done", 180)
        result.hog = json.loads(session.guest.run(f"cat {report}"))
        session.phase("verify", "verifying every page")
        stats, after = session.attachment.stats(), session.beat()
        result.hog |= {
            "guest_seconds": round(after["time"] - before["time"], 1),
            "reserve_misses": stats["reserve_misses"],
            "writes": stats["writes"],
            "reads": stats["reads"],
            "failed_writes": stats["failed_writes"],
        }
        _expect_survival(session, before.get("daemon_pid", 0))
        if plan.backing:
            result.writeback = writeback.numbers(session, stats)
            out = result.writeback["written_out"]
            result.expect("blocks go out to the disk", out > 0, f"{out} blocks")
        elif plan.mem_limit:
            result.expect(
                "swap writes fail when the pool is full", stats["failed_writes"] > 0, stats["failed_writes"]
            )
        session.guest.end_workload()
        session.swap_off()
        session.attachment.detach(session.guest)


def _expect_survival(session: Session, pid: int) -> None:
    result, guest = session.result, session.guest
    found = result.hog
    enough = found["guest_seconds"] >= session.plan.hog_seconds
    result.expect("the guest was under pressure as long as asked", enough, f"{found['guest_seconds']} s")
    if not session.plan.mem_limit:  # a pool that is full has the kernel try and fail, instead of killing
        result.expect("the hog reached the limit", found["killed"] > 0, f"killed {found['killed']} times")
    gap = guest.longest_gap()
    result.expect("the guest never hangs", gap < LONGEST_GAP, f"longest gap between heartbeats {gap:.1f} s")
    if pid:
        last = guest.beats[-1]
        alive = last["daemon_alive"] and last["daemon_pid"] == pid
        result.expect("the server survives", alive, f"process {pid}")


def full_pool(plan: Plan, boot: Boot, result: Result) -> None:
    """Let the workload need more swap than mem_limit allows: writes fail, and no page is lost."""
    limit = plan.mem_limit or (16 * MIB if plan.short else 32 * MIB)
    with booted(plan, boot, result, mem_limit=str(limit)) as session:
        session.swap_on()
        available = session.available()
        # What the full pool holds, and a part of the memory beside: enough that the kernel tries and fails.
        mib = (available - (limit if plan.serves_itself else 0) + limit) // MIB
        session.start_workload(mib)
        session.phase("fill", f"writing {mib} MiB with a pool of {limit // MIB} MiB")
        session.phase("churn seconds 5", "writing again and verifying")
        session.phase("verify", "verifying every page")
        stats = session.attachment.stats()
        result.hog = {"mem_limit": limit, "failed_writes": stats["failed_writes"], "writes": stats["writes"]}
        result.expect(
            "swap writes fail when the pool is full", stats["failed_writes"] > 0, stats["failed_writes"]
        )
        result.expect("the pool stays below its limit", stats["mem_used_max"] <= limit, stats["mem_used_max"])
        session.guest.end_workload()
        session.swap_off()
        session.attachment.detach(session.guest)


def pause(plan: Plan, boot: Boot, result: Result) -> None:
    """Let the pool run full under qemu's own policy: it pauses the guest until there is room."""
    limit = plan.mem_limit or 16 * MIB
    with booted(plan, boot, result, mem_limit=str(limit)) as session:
        session.swap_on()
        assert isinstance(session.attachment, Qemu)
        mib = (session.available() + 2 * limit) // MIB
        session.start_workload(mib)
        pauses = 0
        what = f"writing {mib} MiB with a pool of {limit // MIB} MiB"
        for phase, text in (("fill", what), ("verify", "verifying every page")):
            for _ in _pauses(session, phase, text):
                pauses += 1
                limit += limit // 4
                session.live.step(f"qemu has paused the guest: a pool of {limit // MIB} MiB, and go on")
                session.attachment.request("PUT", "/mem_limit", str(limit))
                session.guest.resume()
        stats = session.attachment.stats()
        result.hog = {"pauses": pauses, "mem_limit": limit, "failed_writes": stats["failed_writes"]}
        result.expect("qemu pauses the guest when the pool is full", pauses > 0, f"{pauses} times")
        errors = [line for line in session.guest.kernel_log() if "Write-error" in line]
        result.expect(
            "it goes on once mem_limit is raised, and has seen no failed write", not errors, errors[:1]
        )
        session.guest.end_workload()
        session.swap_off()


def _pauses(session: Session, phase: str, what: str) -> Iterator[None]:
    """Let the workload do one phase; yields each time that qemu has paused the guest meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(session.phase, phase, what)
        while not done.done():
            time.sleep(0.2)
            if session.guest.ask_qemu("query-status")["status"] == "io-error":
                yield
        done.result()
