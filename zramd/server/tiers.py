"""What makes blocks cold, and hot again: looks, sweeps, and passes in steps.

`zramd.server.tierpolicy` says when, and how much; zram's words only ask for a pass out of turn. The thread is
the worker's.

    sweep       each 10 s: every block grows older, and is counted by its age
    pass        a walk over the device in steps: first over raw blocks, then over all that are old enough
    promotion   the same over cold blocks that are read again and again
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from zramd.errors import DeviceError, sentence
from zramd.server.ages import COARSE, IDLE, SWEEP, WANTED, age_of, histogram
from zramd.server.compactor import MIN_PAUSE, Pressure
from zramd.server.minute import Minute
from zramd.server.tierpolicy import ENOUGH, GAIN, Census, Policy, View, memory_is_short
from zramd.settings.config import Config

KINDS = frozenset({"huge", "idle"})  # what a pass by hand can be narrowed down to

LOOK = 1.0  # seconds between looks at the pool and the machine's memory
STEP = 64  # blocks that are tried before looking at requests: 1.3 ms at zstd's level 4
# Smaller payloads are left alone. Measured on the swap of virtual machines: 7 % more blocks are tried than
# with 600, and the pool is 1 % smaller.
THRESHOLD = 300
MOST_PASSES = 16  # by hand, that wait


class Pass(NamedTuple):
    """A pass by hand, as zram's `recompress` means it."""

    kinds: frozenset[str] = frozenset()  # out of KINDS, a block is of all of them; empty: every block
    threshold: int = 0  # bytes: smaller payloads are left alone
    max_pages: int = 0  # most blocks that are tried, 0: all


class Step(NamedTuple):
    """What Tier.cool returns."""

    next: int
    tried: int
    tried_bytes: int
    done: int
    saved: int
    stopped: int


class Steps(Protocol):
    """What moves blocks: zramd.core.device.tier.Tier."""

    level: int

    def sweep(self, coarse: bool, keep: bool, threshold: int) -> tuple[Any, ...]: ...
    def mark_idle(self, age: int) -> int: ...
    def cool(
        self, first: int, tries: int, threshold: int, age: int, raw: bool = False, idle: bool = False
    ) -> tuple[int, int, int, int, int, int]: ...
    def promote(self, first: int, tries: int) -> tuple[int, int, int, int]: ...


class Source(Protocol):
    """What is read from a device."""

    disksize: int

    def pressure(self) -> tuple[int, int, int, int, int, float]: ...
    def counters(self) -> dict[str, int]: ...
    def compact(self, budget: int = 0) -> int: ...


class _Walk:
    """How far a pass is."""

    def __init__(self, wanted: Pass, age: int = 0, *, raw: bool = True) -> None:
        self.idle = "idle" in wanted.kinds
        self.threshold = wanted.threshold
        self.age = IDLE if self.idle else age
        self.left = wanted.max_pages or 1 << 62
        self.raw = raw  # first
        self._only_raw = "huge" in wanted.kinds
        self.begun = False
        self.next = 0
        self.looked = self.gained = 0

    def take(self, step: Step, end: int) -> bool:
        """Go on after a step; False: that was the last."""
        self.left -= step.tried
        self.looked += step.tried_bytes
        self.gained += step.saved
        self.next = step.next
        if self.next >= end and self.raw and not self._only_raw:
            self.raw = False
            self.next = 0
        return self.next < end and self.left > 0


class Tiers:
    """Makes blocks cold that nobody asks for, and hot again what is read again and again.

    A part of zramd.server.worker. `steps` moves blocks of the device, `cpu` tells the time of its thread.
    """

    title = "background recompression"

    def __init__(
        self,
        device: Source,
        steps: Steps,
        config: Config,
        *,
        clock: Callable[[], float] = time.monotonic,
        cpu: Callable[[], float] = time.thread_time,
        short: Callable[[], bool] = memory_is_short,
    ) -> None:
        self._device = device
        self._steps = steps
        self._clock, self._cpu, self._short = clock, cpu, short
        self._blocks = device.disksize >> 12
        self._config = config
        self._changed: Config | None = None  # what the thread is to go by from the next turn on
        self._policy = Policy(config)
        self._by_hand: deque[_Walk] = deque()
        self._walk: _Walk | None = None
        self._hot_again = -1  # where promotion goes on, -1: there is nothing to promote
        self._seen: Pressure | None = None
        self._sweeps = 0
        self._next_sweep = clock() + SWEEP
        self._next_look = float("-inf")
        self._census: Census | None = None
        self._minute = Minute()
        self._cpu_seconds = 0.0
        self.wake: Callable[[], None] = lambda: None
        self.failure = ""
        self._ended = False
        self.yields = False
        self.interval = LOOK

    # ------------------------------------------------------------------------------------------------
    # for other threads

    def configure(self, config: Config) -> None:
        """Go by these settings from the next step on.

        Waits for the step that is under way. Raises DeviceError and changes nothing when there is no memory.
        """
        try:
            if self._steps.level != config.cold_level:
                self._steps.level = config.cold_level
        except MemoryError as error:
            raise DeviceError(
                f"recompression stays {self._config.recompression}: {sentence(error) or error}"
            ) from None
        self._config = self._changed = config
        self.wake()

    @property
    def mode(self) -> str:
        """How memory stands: calm, wanted or full; one truth for all that goes by it, see Policy.look."""
        return self._policy.mode

    @property
    def census(self) -> Census | None:
        """What the last sweep has counted, None before the first; another object after each."""
        return self._census

    def submit(self, wanted: Pass) -> None:
        """Queue a pass by hand, and do not wait for it.

        Raises DeviceError, one sentence, when recompression is off or has failed, or when too many passes are
        queued.
        """
        if not self._config.cold_level:
            raise DeviceError("recompression is off: set it to zstd first")
        if self._ended:
            raise DeviceError(f"{self.title} does not run any more, the log says why: restart the server")
        if len(self._by_hand) >= MOST_PASSES:
            raise DeviceError(f"{MOST_PASSES} passes are queued already: try again when some are done")
        self._by_hand.append(_Walk(wanted))
        self.wake()

    def mark_idle(self, seconds: float | None) -> None:
        """Mark blocks idle that nobody has asked for in so many seconds, None: all.

        A request takes the mark off.
        """
        self._steps.mark_idle(0 if seconds is None else age_of(seconds))

    def numbers(self) -> dict[str, Any]:
        """Return the section `tiers` of stats.json; nothing is waited for.

        ages: rows [upper bound in seconds, blocks] of the last sweep; the bound of the last two is None, for
        more, and "idle", for marked. mode: calm, wanted, full, off or paused. reason: one sentence, why it
        does not do more right now.
        """
        found = self._device.counters()
        raw, cold, same = found["huge_pages"], found["cold_pages"], found["same_pages"]
        now, census = self._clock(), self._census
        recompressed, promoted = self._minute.rise(found["recompressed"], found["promoted"])
        return {
            "hot_pages": max(0, found["pages_stored"] - raw - cold - same - found["out_pages"]),
            "hot_data_size": max(0, found["compr_data_size"] - found["cold_data_size"] - (raw << 12)),
            "cold_pages": cold,
            "cold_data_size": found["cold_data_size"],
            "raw_pages": raw,
            "tried_pages": census.tried if census else 0,
            "same_pages": same,
            "ages": histogram(census.stored if census else [found["pages_stored"]]),
            "recompressed": found["recompressed"],
            "recompress_useless": found["recompress_useless"],
            "promoted": found["promoted"],
            "recompressed_minute": recompressed,
            "promoted_minute": promoted,
            "saved_bytes": found["recompress_saved"],
            "cpu_seconds": round(self._cpu_seconds, 3),
            "recompression": self._config.recompression,
            "cold_age": self._config.cold_age,
            "mode": self._shown_mode(now),
            "reason": self._reason(now),
        }

    def _shown_mode(self, now: float) -> str:
        if not self._config.cold_level:
            return "off"
        return "paused" if self._policy.is_paused(now) else self._policy.mode

    def _reason(self, now: float) -> str:
        policy = self._policy
        if not self._config.cold_level:
            return "recompression is off"
        if self.failure:
            return f"{self.title} failed: {self.failure}"
        if self._by_hand:
            return "a pass by hand is under way"
        if policy.is_paused(now):
            return f"{policy.no_room}, the next try comes in {policy.waits(now):.0f} s"
        if self._walk is not None or self._hot_again >= 0:
            return f"a pass is under way that takes at most {policy.share:.0%} of a processor"
        if policy.backs_off and policy.waits(now) > 0:
            return (
                f"the last pass gained less than {GAIN:.0%}, the next one comes in {policy.waits(now):.0f} s"
            )
        if policy.candidates() >= ENOUGH:
            return "a pass is about to begin"
        return (
            f"hardly any block that could become smaller was left alone for {max(SWEEP, policy.cold_age):g} s"
        )

    # ------------------------------------------------------------------------------------------------
    # for the worker

    def begin(self) -> None:
        """Take note that the thread runs."""

    def end(self) -> None:
        """Take note that it does not run any more."""
        self._ended = True

    def tick(self) -> float:
        """Do what is due, at most one step, and return the seconds until the next is due."""
        began = self._cpu()
        by_hand = False
        try:
            self.yields = False
            self._apply()
            now = self._clock()
            if now >= self._next_sweep:
                self._sweep(now)
            if now >= self._next_look:
                self._look(now)
            by_hand = bool(self._by_hand)
            return self._work(now)
        finally:
            used = self._cpu() - began
            self._cpu_seconds += used
            if not by_hand:
                self._policy.spent(used)

    def _apply(self) -> None:
        """Go by settings that were changed."""
        config, self._changed = self._changed, None
        if config is None:
            return
        self._policy.configure(config)
        self._walk = None
        if not config.cold_level:
            self._by_hand.clear()

    def _sweep(self, now: float) -> None:
        """Let the blocks grow older, once, however late it is."""
        self._next_sweep = now + SWEEP
        self._sweeps += 1
        policy = self._policy
        # What is read again is to be hot again, or back in memory: both are for calm.
        keep = policy.mode == "calm"
        census = Census(*self._steps.sweep(self._sweeps % COARSE == 0, keep, THRESHOLD))
        self._census = census
        policy.swept(census)
        if policy.promotes and census.stored[WANTED] > census.back:
            self._hot_again = 0
        found = self._device.counters()
        self._minute.add(now, found["recompressed"], found["promoted"])

    def _look(self, now: float) -> None:
        """See how memory stands, more seldom while nothing is stored."""
        found = self._device.counters()
        now_is = Pressure(*self._device.pressure())
        self._next_look = now + (LOOK if found["pages_stored"] else SWEEP)
        if self._policy.look(now, View(*now_is[1:3], found["failed_writes"], self._short(), now_is.shared)):
            self._walk = None  # what is cold, and how much it may cost, is another matter now

    def _work(self, now: float) -> float:
        """Do a step of what comes first, if there is anything."""
        policy = self._policy
        if self._by_hand:
            return self._timed(self._step_by_hand)
        if self._walk is None and policy.wants_pass(now):
            self._walk = _Walk(Pass(threshold=THRESHOLD), policy.age, raw=policy.has_raw)
        if self._hot_again >= 0 and not policy.promotes:
            self._hot_again = -1
        paused = policy.is_paused(now)
        if paused or (self._walk is None and self._hot_again < 0):
            return self._rest(now)
        owed = policy.owes(now)
        if owed:
            return min(max(owed, MIN_PAUSE), self._rest(now))
        return self._timed(self._promote if self._hot_again >= 0 else self._step)

    def _rest(self, now: float) -> float:
        return max(0.0, min(self._next_sweep, self._next_look) - now)

    def _timed(self, step: Callable[[], None]) -> float:
        """Do a step; return what is left to clients after it."""
        before = self._seen or Pressure(*self._device.pressure())
        began = self._clock()
        step()
        taken = self._clock() - began
        self._seen = Pressure(*self._device.pressure())
        pause = self._seen.pause(taken, before)
        self.yields = pause > 0
        return pause

    def _cool(self, walk: _Walk) -> Step:
        tries = min(STEP, walk.left)
        step = Step(
            *self._steps.cool(walk.next, tries, walk.threshold, walk.age, raw=walk.raw, idle=walk.idle)
        )
        if self._policy.stepped(self._clock(), step.done, step.stopped):
            self._device.compact()  # which also lends, so that there may be room where nothing was freeable
        return step

    def _step_by_hand(self) -> None:
        walk = self._by_hand[0]
        if not walk.begun:
            walk.begun = True
            self._policy.reset()
        if not walk.take(self._cool(walk), self._blocks) or self._policy.is_paused(self._clock()):
            self._by_hand.popleft()

    def _step(self) -> None:
        walk = self._walk
        if walk is None:
            return
        if not walk.take(self._cool(walk), self._blocks):
            self._walk = None
            self._policy.pass_ended(self._clock(), walk.looked, walk.gained)

    def _promote(self) -> None:
        at, _, _, stopped = self._steps.promote(self._hot_again, STEP)
        self._hot_again = -1 if stopped or at >= self._blocks else at
