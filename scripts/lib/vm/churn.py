"""Programs that come and go in a guest: what it uses of its swap, and what the device still stores."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vm import dead
from vm.dead import Histogram, Sample
from vm.guest import Beat
from vm.plan import Plan
from vm.report import Result
from vm.session import Boot, Session, booted

# What runs in the guest: programs that stay, and others of one to four times so many MiB, which come and go.
# Together they have twice the memory of the guest.
DAEMONS, DAEMON_MIB = 16, 4
PROGRAMS, PROGRAM_MIB = 8, 24

WARM_UP = 45  # seconds until as much is swapped as ever will be: not counted
BUSY, CALM = 40, 25  # seconds with programs, and without any, in turn
AFTER = 40  # seconds that are looked at once all programs have ended
SLICE = 20  # seconds between two looks at how clusters are used

REFRESH_TIMEOUT = 300  # seconds
# Of memory must be available, or the guest's tool is not even started, as its unit does not start it: at the
# limit Python alone takes a minute and more until it runs, and takes memory from others.
AT_EASE = 1 / 16


@dataclass(frozen=True)
class Part:
    """A part of a run: so many programs at a time, for so many seconds."""

    programs: int
    seconds: float


def timeline(plan: Plan) -> list[Part]:
    """Return the parts of a run, of which the last has no programs."""
    parts, left = [], WARM_UP + plan.churn_seconds
    while left > 0:
        busy = min(BUSY, left) if plan.breaks else left
        parts.append(Part(PROGRAMS, busy))
        left -= busy
        if left > 0:
            parts.append(Part(0, min(CALM, left)))
            left -= min(CALM, left)
    if parts[-1].programs:
        parts.append(Part(0, 0))
    parts[-1] = Part(0, parts[-1].seconds + AFTER)
    return parts


def churn(plan: Plan, boot: Boot, result: Result) -> None:
    """Let programs come and go for the plan's time, and say how much of what is stored was dead."""
    with booted(plan, boot, result) as session:
        session.swap_on()
        session.guest.start(f"churn {plan.seed}")
        run = _Run(session)
        *parts, after = timeline(plan)
        for part in parts:
            run.part(part)
        ended = run.time(session.beat())
        run.part(after)
        run.finish(ended)


class _Run:
    """The workload of a run, and what it has said. All times are of the guest, since this was made."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._plan = session.plan
        self._faults: dict[str, Histogram] = {"busy": {}, "calm": {}, "refresh": {}}
        self._when = "busy"
        self._clusters: list[dict[str, Any]] = []
        self._refreshes: list[dict[str, Any]] = []
        self._killed = self._put_off = 0
        self._next = time.monotonic() + WARM_UP  # refresh
        self._started = session.beat()["time"]
        session.live.step(f"{DAEMONS} programs of {DAEMON_MIB} MiB begin that stay")
        self.phase(f"daemons {DAEMONS} {DAEMON_MIB}")

    def time(self, beat: Beat) -> float:
        """Return when a heartbeat was."""
        return round(beat["time"] - self._started, 1)

    def phase(self, words: str, when: str = "") -> dict[str, Any]:
        """Let the workload do one phase and count what was done since the last one.

        `when` is that of the page faults, if it is not as they are now.
        """
        answer = self._session.guest.phase(words, REFRESH_TIMEOUT)
        took: Histogram = {int(bucket): faults for bucket, faults in answer["took"].items()}
        result = self._session.result
        dead.add(self._faults[when or self._when], took)
        result.add_phase({**answer, "bad": answer["bad"] + answer["lost"], "slowest": dead.slowest(took)})
        self._killed += answer["killed"]
        return answer

    def part(self, part: Part) -> None:
        """Let so many programs run for a time, and refresh when it is time to."""
        many = f"{part.programs} at a time" if part.programs else "all have ended"
        self._session.live.step(f"programs come and go: {many}, for {part.seconds:.0f} s")
        end = time.monotonic() + part.seconds
        self.phase(f"programs {part.programs} {PROGRAM_MIB}")
        self._when = "busy" if part.programs else "calm"
        while (left := end - time.monotonic()) > 1:
            until_next = self._next - time.monotonic() if self._plan.refresh else left
            self.phase(f"run {max(1, int(min(left, SLICE, until_next)))}")
            if self._plan.refresh and time.monotonic() >= self._next:
                self._refresh_if_at_ease()
            self._look(part)

    def _refresh_if_at_ease(self) -> None:
        beat = self._session.beat()
        if beat["MemAvailable"] >= AT_EASE * beat["MemTotal"]:
            self._refresh()
        else:
            self._put_off += 1
        self._next = time.monotonic() + self._plan.refresh

    def _refresh(self) -> None:
        """Let the guest's tool refresh its swap, and count what it moved and what that brought."""
        self.phase("run 0")
        before, started = self._stand(), time.monotonic()
        said = self._session.guest_tool("refresh", REFRESH_TIMEOUT)
        seconds = time.monotonic() - started
        answer = self.phase("run 0", "refresh")
        after = self._stand()
        found = {
            "time": before["time"],
            "seconds": round(seconds, 1),
            # (What the programs read meanwhile is not the tool's; a cluster's other pages count for it.)
            "read_back": max(0, after["read"] - before["read"] - answer["faults"]),
            "freed": max(0, before["costly"] - after["costly"]),
            "faults": answer["faults"],
            "said": said,
        }
        self._refreshes.append(found)
        what = f"{found['read_back']} pages read back, {found['freed']} blocks freed"
        self._session.live.step(f"refresh: {found['seconds']} s, {what}")
        for line in said.splitlines():
            self._session.live.step(f"  {line}")

    def _stand(self) -> dict[str, Any]:
        session = self._session
        stats, beat = session.attachment.stats(), session.beat()
        costly = stats["pages_stored"] - stats["same_pages"]
        return {"time": self.time(beat), "read": beat["pswpin"], "costly": costly}

    def _look(self, part: Part) -> None:
        found = self._session.guest.phase(f"clusters {dead.CLUSTER}", REFRESH_TIMEOUT)
        beat = self._session.beat()
        total = beat["SwapTotal"] // 4096 // dead.CLUSTER
        now = self.time(beat)
        self._clusters.append({"time": now, "programs": part.programs, "total": total, **found})

    def finish(self, ended: float) -> None:
        """Put all into the result; `ended` is when programs no longer came."""
        session, result = self._session, self._session.result
        samples = list(self._samples())
        result.churn = {
            "samples": [sample.as_dict() for sample in samples],
            "steady": dead.means([each for each in samples if WARM_UP <= each.time <= ended]),
            "after": dead.means(samples[-5:]),
            "faults": {when: dead.times(took) for when, took in self._faults.items() if took},
            "histograms": self._faults,
            "clusters": self._clusters,
            "refreshes": self._refreshes,
            "put_off": self._put_off,
            "killed": self._killed,
        }
        result.expect("no program is killed", not self._killed, f"{self._killed} killed")
        lost = [line for line in session.guest.kernel_log() if "I/O error" in line or "Read-error" in line]
        result.expect("no request fails", not lost, lost[:1])

    def _samples(self) -> Iterator[Sample]:
        for beat in self._session.guest.beats:
            stats = self._session.attachment.sample(beat) if self.time(beat) >= 0 else None
            if stats:
                yield Sample(
                    time=self.time(beat),
                    used=(beat["SwapTotal"] - beat["SwapFree"]) // 4096,
                    stored=stats["pages_stored"],
                    same=stats["same_pages"],
                    trims=stats["notify_free"],
                    total_bytes=stats["total_bytes"],
                    available=beat["MemAvailable"],
                    swapped_in=beat["pswpin"],
                    swapped_out=beat["pswpout"],
                )
