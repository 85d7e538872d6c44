"""The phases of a run: the fall and rise of the frag ratio, and what frees, swapoff and a stall do."""

from __future__ import annotations

import threading
import time

from vm import buddy, requests
from vm.plan import KERNEL_ZRAM, MIB, UBLK, Plan
from vm.report import Moment, Result
from vm.session import Boot, Session, booted

FULL_RATIO = 95.0  # percent that compaction must reach
SHORT_RATIO = 90.0  # with --short the pool is so small that the last zspage of each class weighs more
FITS = 0.8  # what is swapped out, as a part of the available memory, that swapoff can bring back safely
ROUNDS = 2  # of frees and refills before the frag ratio is looked at; one with --short


def fall_and_rise(plan: Plan, boot: Boot, result: Result) -> None:
    """Write, churn and free until holes are everywhere, compact, and verify every page."""
    with booted(plan, boot, result, compaction="off") as session:
        session.swap_on()
        result.moments["empty"] = session.moment()
        mib = plan.workload(session.available())
        result.workload_mib = mib
        session.start_workload(mib)
        session.phase("fill", f"writing {mib} MiB of patterned memory")
        result.moments["filled"] = session.moment()
        if plan.idle:
            _idle(session)
        if plan.stall:
            _stall(session)
        if plan.serves_itself:
            requests.measure(session)
        _make_holes(session)
        _compact(session)
        if plan.serves_itself:
            requests.expect_resident(session)
        result.guest_compaction = buddy.compact_memory(session.guest)
        result.moments["joined"] = session.moment()
        session.phase("verify", "verifying every page")
        _free_and_swap_off(session)
        session.guest.end_workload()
        if plan.serves_itself:
            requests.stop_waits_for_swapoff(session)
        if plan.mode == UBLK:
            _expect_gone(session)
        else:
            session.attachment.detach(session.guest)


def _expect_gone(session: Session) -> None:
    """See that the device goes by itself, now that its server has ended."""
    device = session.attachment.device
    wait = f"for i in $(seq 100); do [ -e {device} ] || exit 0; usleep 200000; done; exit 1"
    gone = session.guest.try_run(f"({wait})", 60)[0] == 0
    session.result.expect("a device without data is removed", gone, device)


def _idle(session: Session) -> None:
    """Ask for nothing for a while: what is swapped out becomes cold, if zramd is set to that."""
    session.live.step(f"nothing is asked for {session.plan.idle:g} s")
    time.sleep(session.plan.idle)
    stats = session.attachment.stats()
    session.result.moments["rested"] = session.moment()
    if "recompression" in session.plan.zramd_settings:
        cold = session.result.idle["cold_pages"] = stats["tiers"]["cold_pages"]
        session.result.expect("what rests becomes cold", cold > 0, f"{cold} pages")


def _make_holes(session: Session) -> None:
    """Swap in and out, free and fill again: what a long-running guest does to its swap in days."""
    short = session.plan.short
    pages = session.workload_mib * MIB // 4096 // (3 if short else 1)
    for _ in range(1 if short else ROUNDS):
        session.phase(f"churn pages {pages}", "writing again and verifying random runs of pages")
        session.phase("free 40", "freeing 40 % in random stretches of 2 MiB")
        session.phase("fill", "filling what was freed")
    if session.plan.pageout:
        _page_out(session, "swapping all of it out")
    session.result.moments["full"] = session.moment()
    session.phase("free 65", "freeing 65 % in random stretches of 2 MiB")
    session.settle()


def _compact(session: Session) -> None:
    result = session.result
    before = session.moment()
    session.live.step(f"before compaction: {moment_text(before)}")
    started = time.monotonic()
    freed = session.attachment.compact()
    seconds = time.monotonic() - started
    after = session.moment()
    session.live.step(f"after compaction:  {moment_text(after)}")
    result.moments |= {"before": before, "after": after}
    if after.migrated is not None and before.migrated is not None:
        result.compaction["num_migrated"] = after.migrated - before.migrated
    result.compaction |= {"pages_freed": freed, "seconds": round(seconds, 3)}
    _expect_compaction(session, before, after)


def _expect_compaction(session: Session, before: Moment, after: Moment) -> None:
    result, full = session.result, session.result.moments["full"]
    wanted = SHORT_RATIO if session.plan.short else FULL_RATIO
    trimmed = before.notify_free - full.notify_free
    result.expect("freed memory is trimmed from the device", trimmed > 0, f"{trimmed} pages")
    if session.plan.serves_itself:
        result.expect("less is stored when memory is freed", before.used < full.used, used_text(full, before))
    # Not before: the kernel may swap out others meanwhile, and the reserve of `local` keeps pages.
    what = "the pool shrinks when memory is freed and compacted"
    result.expect(what, after.total < full.total, pages_text(full, after))
    if session.plan.mode == KERNEL_ZRAM:
        return  # what it does is not ours to promise; under memory pressure it compacts by itself
    result.expect("the frag ratio falls", before.frag_ratio < full.frag_ratio, ratio_text(full, before))
    result.expect("compaction frees pages", after.total < before.total, pages_text(before, after))
    reached = after.frag_ratio >= wanted
    result.expect(f"compaction brings the frag ratio to {wanted:g} %", reached, ratio_text(before, after))


def _page_out(session: Session, why: str) -> None:
    """Swap all of the workload out.

    What MADV_PAGEOUT writes is still in the swap cache when it is written, and stays there while memory is
    plenty: swapoff would not have to read it. So the kernel is told to reclaim as much.
    """
    session.phase("pageout", why)
    session.settle()
    cached = int(session.beat()["SwapCached"])
    root = "/run/cgroup2"
    session.guest.try_run(f"mkdir -p {root} && mount -t cgroup2 none {root}")
    session.guest.try_run(f"echo {cached} >{root}/memory.reclaim; umount {root}")


def _free_and_swap_off(session: Session) -> None:
    """Free until what is left fits into memory, swap off while it is still swapped, and verify it."""
    result = session.result
    session.phase("free 30", "freeing 30 % of the rest")
    session.settle()
    _page_out(session, "swapping all of it out")
    # What is swapped out must fit into memory, and the pool does not shrink while swapoff works.
    # docs/swapping.md tells what happens else.
    while session.swap_used() > FITS * session.available():
        session.phase("free 30", "freeing more: what is swapped out does not fit into memory")
        session.settle()
        _page_out(session, "swapping the rest out again")
    swapped = session.moment().swapped
    session.live.step(f"swapoff while {swapped // 4096} pages are swapped")
    seconds = session.swap_off()
    answer = session.phase("verify", "verifying every page that is left")
    result.swapoff = {"swapped_pages": swapped // 4096, "seconds": round(seconds, 2), "bad": answer["bad"]}
    most = swapped // 4096 > answer["live"] // 2
    result.expect("swapoff brings every page back", most and not answer["bad"], f"{swapped // 4096} pages")


def _stall(session: Session) -> None:
    """Let the host's server stand still while the workload swaps."""
    seconds, attachment = session.plan.stall, session.attachment
    stall = getattr(attachment, "stall", None)
    if stall is None:
        return
    thread = threading.Thread(target=stall, args=(seconds,))
    session.live.step(f"the server stands still for {seconds:g} s")
    thread.start()
    started = time.monotonic()
    try:
        session.phase(f"churn seconds {int(seconds) + 5}")
    finally:
        thread.join()
    lines = [line for line in session.guest.kernel_log() if "nbd" in line or "I/O error" in line]
    session.result.stall = {
        "seconds": seconds,
        "churn_seconds": round(time.monotonic() - started, 1),
        "kernel": lines[-20:],
    }
    errors = [line for line in lines if "I/O error" in line]
    if "-timeout" not in session.plan.nbd_options:
        session.result.expect("a server that stands still is waited for", not errors, f"{seconds:g} s")


def moment_text(moment: Moment) -> str:
    """Return a moment on one line."""
    return (
        f"used {moment.used / MIB:.1f} MiB, total {moment.total / MIB:.1f} MiB, "
        f"ratio {moment.frag_ratio:.1f} %, MemFree {moment.mem_free / MIB:.1f} MiB"
    )


def pages_text(early: Moment, late: Moment) -> str:
    """Return the pool's pages at two moments."""
    return f"{early.total // 4096} to {late.total // 4096} pages"


def used_text(early: Moment, late: Moment) -> str:
    """Return the bytes of what the pool holds at two moments."""
    return f"{early.used / MIB:.1f} to {late.used / MIB:.1f} MiB"


def ratio_text(early: Moment, late: Moment) -> str:
    """Return the frag ratio at two moments."""
    return f"{early.frag_ratio:.1f} % to {late.frag_ratio:.1f} %"
