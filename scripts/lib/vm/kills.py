"""The server ends again and again while the guest swaps to it; the next one has the same state."""

from __future__ import annotations

import threading
import time
from statistics import median

from vm import attach
from vm.errors import VmError
from vm.plan import MIB, Plan
from vm.report import Result
from vm.session import Boot, Session, booted

CHURN_SECONDS = 5
START = (5, 15)  # seconds that a new server takes at most on the host, and in an emulated guest
LEAST = 3  # kills of a server for which another one is on standby
LONGER = 60.0  # seconds that a run may take for them beyond what was asked
LONGEST_PAUSE = 15.0  # seconds that one page may take: qemu waits 1, 2, 4 … between two tries to connect


class Killer(threading.Thread):
    """Ends the server each few seconds, until stopped."""

    def __init__(self, plan: Plan, server: attach.QemuWithState | attach.Ublk) -> None:
        super().__init__(daemon=True)
        self.away: list[float] = []  # seconds that nobody served, each time
        self.error = ""
        self._seconds = plan.kill
        self._standby = plan.standby
        self._end = server.restart if plan.restart else server.kill
        self._enough = threading.Event()

    def run(self) -> None:
        while not self._enough.wait(self._seconds):
            try:
                self.away.append(self._end())
            except VmError as error:
                self.error = str(error)
                return

    def waits(self, end: float) -> bool:
        """Whether more kills are to come: under emulation a server takes long to be on standby."""
        return self._standby and len(self.away) < LEAST and time.monotonic() < end + LONGER

    def stop(self) -> None:
        """Let the last server be."""
        self._enough.set()
        self.join()


def kills(plan: Plan, boot: Boot, result: Result) -> None:
    """Swap under pressure while the server ends, and verify every page."""
    seconds = plan.hog_seconds or (30 if plan.short else 60)
    with booted(plan, boot, result) as session:
        session.swap_on()
        available = session.available()
        mib = plan.workload(available)
        if plan.serves_itself and not plan.standby:
            # What the next server needs to start, while nothing can be swapped out: see docs/swapping.md.
            session.guest.confine(available // 2)
        session.start_workload(mib)
        session.phase("fill", f"writing {mib} MiB of patterned memory, which must survive")
        assert isinstance(session.attachment, (attach.QemuWithState, attach.Ublk))
        killer = Killer(plan, session.attachment)
        before = session.attachment.stats()
        killer.start()
        word = "restarted" if plan.restart else "killed"
        end = time.monotonic() + seconds
        try:
            while killer.is_alive() and (time.monotonic() < end or killer.waits(end)):
                session.phase(
                    f"churn seconds {CHURN_SECONDS}",
                    f"verifying and writing again; the server was {word} {len(killer.away)} times",
                )
        finally:
            killer.stop()
        session.phase("verify", "verifying every page")
        if killer.error:
            raise VmError(killer.error)
        _expect(session, killer, before, seconds)
        session.guest.end_workload()
        session.swap_off()


def _expect(session: Session, killer: Killer, before: dict[str, int], seconds: float) -> None:
    plan, result = session.plan, session.result
    after = session.attachment.stats()
    result.kills = {
        "by": "restart" if plan.restart else "kill",
        "times": len(killer.away),
        "in seconds": seconds,
        "median away": f"{median(killer.away or [0]):.3f} s",
        "longest away": f"{max(killer.away, default=0):.3f} s",
        "recovered MiB": after["recovered_blocks"] * 4096 // MIB,
    }
    if plan.standby and isinstance(session.attachment, attach.Ublk):
        result.kills["standby MiB"] = session.attachment.standby_bytes // MIB
    enough = len(killer.away) >= (
        LEAST if plan.standby else seconds / (plan.kill + START[plan.serves_itself])
    )
    result.expect("the server ends as often as asked", enough, f"{len(killer.away)} times")
    counted = after["writes"] - before["writes"] > 0 and after["recovered_blocks"] > 0
    result.expect(
        "each new server has what the last one held", counted, f"{after['recovered_blocks']} blocks"
    )
    slowest = result.slowest
    result.expect(
        "the guest goes on after each end", slowest < LONGEST_PAUSE, f"slowest page {slowest:.2f} s"
    )
    errors = [line for line in session.guest.kernel_log() if "I/O error" in line or "Write-error" in line]
    result.expect("no request fails", not errors, errors[:2])
