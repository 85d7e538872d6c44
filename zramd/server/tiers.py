"""What becomes cold, when, and how much at a time.

No zram does anything by itself: scripts write to its files. So the rules here are our own, and zram's words
only ask for a pass out of turn.

`Policy` holds the rules and knows neither threads nor clocks: it is told what happened and answers what to
do.
`Tiers` looks, sweeps, and recompresses in steps, as the policy says; the thread is the worker's.

    sweep       each 10 s: every block grows older, and is counted by its age
    pass        a walk over the device in steps: first over raw blocks, then over all that are old enough
    promotion   the same over cold blocks that are read again and again
"""

import errno
import time
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

from zramd import meminfo
from zramd.errors import DeviceError, sentence
from zramd.server.compactor import MIN_PAUSE, Pressure
from zramd.settings.config import Config

KINDS = frozenset({"huge", "idle"})  # what a pass by hand can be narrowed down to

SWEEP = 10.0  # seconds of the monotonic clock, which does not go on while the machine sleeps
COARSE = 16  # each so manieth sweep also ages the old blocks
LOOK = 1.0  # seconds between looks at the pool and the machine's memory
STEP = 64  # blocks that are tried before looking at requests: 1.3 ms at zstd's level 4
# Smaller payloads are left alone. Measured on the swap of virtual machines: 7 % more blocks are tried than
# with 600, and the pool is 1 % smaller.
THRESHOLD = 300
ENOUGH = 16  # candidates: fewer are not worth a walk
CALM_SHARE, HURRY_SHARE = 0.05, 0.25  # of one processor, at most
# Seconds of a processor that are saved up and used in one go: after each rest the caches are others'.
BURST = 0.05
HURRY_AGE = 30.0  # seconds after which a block is cold when memory is wanted
NEAR, FAR = 0.8, 0.7  # of mem_limit: memory is wanted from the one on, until it is below the other
HOLD = 30.0  # seconds that memory is wanted, or the pool full, after it was the last time
GAIN = 0.01  # of the payload that a pass looked at: one that gains less is not repeated soon
MAX_PAUSE = 600.0  # seconds between passes that gain nothing
REFUSALS = 64  # blocks in a row that found no room, then there is none
NO_ROOM_PAUSE = 10.0  # seconds until the next try
MOST_PASSES = 16  # by hand, that wait
MINUTE = 60.0

OLDEST, WANTED, IDLE = 252, 253, 254  # ages, see core/device/ages.pyx
_FINE = 128  # sweeps; above it only coarse ones count
BOUNDS = (10, 30, 60, 300, 600, 1800, 3600, 21600)  # seconds: the rows of the histogram

PSI = "/proc/pressure/memory"
PSI_SHORT = 10.0  # percent of the last 10 s in which some program waited for memory
AVAILABLE_SHORT = 0.1  # of all memory, where the kernel has no PSI

_NO_ROOM = {
    errno.ENOSPC: "mem_limit leaves no room for a block's old and new payload at once",
    errno.EDQUOT: "the state's file system has no room for a block's old and new payload at once",
    errno.ENOMEM: "the system refuses memory for a block's new payload",
    errno.ENOBUFS: "half of the reserve is left, which is for requests",
}


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


class Census(NamedTuple):
    """What a sweep has counted: blocks by their age."""

    stored: list[int]
    raw: list[int]  # candidates
    others: list[int]  # candidates
    tried: int


class View(NamedTuple):
    """What the policy looks at."""

    used: int  # pages of the pool
    limit: int  # pages, 0 for none
    refused: int  # writes that have failed
    short: bool  # whether the machine is short of memory


class Steps(Protocol):
    """What moves blocks: zramd.core.device.tier.Tier."""

    level: int

    def sweep(
        self, coarse: bool, keep: bool, threshold: int
    ) -> tuple[list[int], list[int], list[int], int]: ...
    def mark_idle(self, age: int) -> int: ...
    def cool(
        self, first: int, tries: int, threshold: int, age: int, raw: bool = False, idle: bool = False
    ) -> tuple[int, int, int, int, int, int]: ...
    def promote(self, first: int, tries: int) -> tuple[int, int, int, int]: ...


class Source(Protocol):
    """What is read from a device."""

    disksize: int

    def pressure(self) -> tuple[int, int, int, int, int]: ...
    def counters(self) -> dict[str, int]: ...
    def compact(self, budget: int = 0) -> int: ...


def least_seconds(age: int) -> int:
    """Return for how many seconds at least nobody has asked for a block of this age, up to OLDEST."""
    sweeps = age - 1 if age <= _FINE else _FINE + COARSE * (age - _FINE - 1)
    return max(0, int(SWEEP) * sweeps)


def most_seconds(age: int) -> float:
    """Return for how many seconds at most, just after a sweep, nobody has asked for a block of this age."""
    if age >= OLDEST:
        return float("inf")
    return SWEEP * (age if age < _FINE else _FINE + COARSE * (age - _FINE + 1) - 1)


def age_of(seconds: float) -> int:
    """Return the youngest age of blocks that nobody has asked for in so many seconds, OLDEST at most."""
    return next((age for age in range(OLDEST) if least_seconds(age) >= seconds), OLDEST)


def _row(age: int) -> int:
    """Return the row of the histogram for blocks of this age."""
    if age == IDLE:
        return -1
    # Readers keep what is wanted young.
    return 0 if age == WANTED else sum(most_seconds(age) > bound for bound in BOUNDS)


_ROWS = tuple(_row(age) for age in range(256))  # made once: it is as much work as a whole snapshot


def histogram(stored: list[int]) -> list[list[Any]]:
    """Return rows [upper bound in seconds, blocks] of what a sweep counted.

    The bound of the last two is None, for more, and "idle", for marked blocks.
    """
    rows: list[list[Any]] = [[bound, 0] for bound in (*BOUNDS, None, "idle")]
    for count, row in zip(stored, _ROWS, strict=False):
        rows[row][1] += count
    return rows


def memory_is_short(psi: str = PSI, path: str = meminfo.PATH) -> bool:
    """Say whether programs of this machine wait for memory; where no kernel tells, little is left."""
    try:
        with open(psi, "rb", buffering=0) as file:
            some = file.read(256).split(b"\n", 1)[0]
        return float(some.split(b"avg10=")[1].split()[0]) >= PSI_SHORT
    except (OSError, ValueError, IndexError):
        pass
    try:
        available, total = meminfo.read("MemAvailable", path), meminfo.read("MemTotal", path)
    except OSError:
        return False
    return available is not None and total is not None and available < AVAILABLE_SHORT * total


class Policy:
    """The rules. Each `now` is a moment of the monotonic clock."""

    def __init__(self, config: Config) -> None:
        self.mode = "calm"
        self._refused: int | None = None
        self._full_until = self._short_until = float("-inf")
        self._near = False
        self._saved = BURST  # seconds of a processor, below 0: owed
        self._works = False  # until they are used up, then it rests until as much is saved as may be
        self._filled = float("-inf")
        self._census: Census | None = None
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Go by these settings from now on."""
        self._cold_age = config.cold_age
        self.enabled = config.cold_level > 0
        # What zstd has compressed when it was written is read no faster than what is cold.
        self._promotes = config.comp_algorithm.partition("(")[0] != "zstd"
        self.reset()

    def reset(self) -> None:
        """Forget that passes were in vain."""
        self._pause = SWEEP
        self._next = float("-inf")
        self._paused_until = float("-inf")
        self._refusals = 0
        self.no_room = ""

    def look(self, now: float, view: View) -> bool:
        """Take note of how memory stands, and say whether the mode is another one now."""
        if self._refused is not None and view.refused > self._refused:
            self._full_until = now + HOLD
        self._refused = view.refused
        if view.short:
            self._short_until = now + HOLD
        self._near = view.limit > 0 and view.used >= (FAR if self._near else NEAR) * view.limit
        before, self.mode = self.mode, self._mode(now)
        if self.mode != before:
            self.reset()
        return self.mode != before

    def _mode(self, now: float) -> str:
        if now < self._full_until:
            return "full"
        return "wanted" if self._near or now < self._short_until else "calm"

    @property
    def share(self) -> float:
        """The share of a processor that may be used."""
        return CALM_SHARE if self.mode == "calm" else HURRY_SHARE

    @property
    def cold_age(self) -> float:
        """Seconds after which a block is cold."""
        if self.mode == "full":
            return 0.0
        return self._cold_age if self.mode == "calm" else min(self._cold_age, HURRY_AGE)

    @property
    def age(self) -> int:
        """The age from which a block is cold: at least a sweep, whatever is wanted."""
        return max(1, age_of(self.cold_age))

    @property
    def promotes(self) -> bool:
        """Whether blocks may be made hot again, which takes memory."""
        return self._promotes and self.mode == "calm"

    def swept(self, census: Census) -> None:
        """Take note of how many blocks have which age."""
        self._census = census

    def candidates(self) -> int:
        """Return how many blocks are cold by their age, and can become so."""
        if self._census is None:
            return 0
        return sum(self._census.raw[self.age :]) + sum(self._census.others[self.age :])

    @property
    def has_raw(self) -> bool:
        """Whether some of them are raw: they are worth most, and so come first."""
        return self._census is not None and any(self._census.raw[self.age :])

    def waits(self, now: float) -> float:
        """Return the seconds until the next pass may begin."""
        return max(self._next, self._paused_until) - now

    def wants_pass(self, now: float) -> bool:
        """Say whether to begin a pass."""
        return self.enabled and self.waits(now) <= 0 and self.candidates() >= ENOUGH

    def pass_ended(self, now: float, looked: int, gained: int) -> None:
        """Take note of a pass that tried payloads of so many bytes, and made them smaller by so many."""
        self._census = None  # those that it made cold are still in it
        if gained < GAIN * looked or not looked:
            self._pause = min(2 * self._pause, MAX_PAUSE)
            self._next = now + self._pause
        else:
            self._pause = SWEEP

    @property
    def backs_off(self) -> bool:
        """Whether the last pass gained too little."""
        return self._pause > SWEEP

    def stepped(self, now: float, done: int, stopped: int) -> bool:
        """Take note of a step that changed so many blocks, and of the errno that stopped it, 0: none.

        Returns whether compaction is to make room: a page is enough to begin with, as each block leaves more.
        """
        self._refusals = 0 if done else self._refusals
        if not stopped:
            return False
        self._refusals += 1
        first = stopped == errno.ENOSPC and self._refusals == 1
        # mem_limit may leave room for the next, of another size.
        if stopped != errno.ENOSPC or self._refusals >= REFUSALS:
            self._refusals = 0
            self._paused_until = now + NO_ROOM_PAUSE
            self.no_room = _NO_ROOM.get(stopped, f"errno {stopped} stopped it")
        return first

    def is_paused(self, now: float) -> bool:
        """Say whether there was no room, so that another try comes later."""
        return now < self._paused_until

    def owes(self, now: float) -> float:
        """Return the seconds to wait until more of the processor may be used, 0: none."""
        if self._filled == float("-inf"):
            self._filled = now
        self._saved = min(self._saved + self.share * (now - self._filled), BURST)
        self._filled = now
        if self._saved <= 0:
            self._works = False
        elif self._saved >= BURST:
            self._works = True
        return 0.0 if self._works else (BURST - self._saved) / self.share

    def spent(self, seconds: float) -> None:
        """Take note of time of a processor that was used."""
        self._saved -= seconds


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
        self._minute: deque[tuple[float, int, int]] = deque()
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
        before = self._minute[0] if self._minute else (0.0, found["recompressed"], found["promoted"])
        return {
            "hot_pages": max(0, found["pages_stored"] - raw - cold - same),
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
            "recompressed_minute": max(0, found["recompressed"] - before[1]),
            "promoted_minute": max(0, found["promoted"] - before[2]),
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
        census = Census(*self._steps.sweep(self._sweeps % COARSE == 0, policy.promotes, THRESHOLD))
        self._census = census
        policy.swept(census)
        if policy.promotes and census.stored[WANTED]:
            self._hot_again = 0
        found = self._device.counters()
        if self._minute and found["recompressed"] < self._minute[-1][1]:
            self._minute.clear()  # the device was reset, and counts from 0 again
            self._minute.append((now - SWEEP, 0, 0))
        self._minute.append((now, found["recompressed"], found["promoted"]))
        while len(self._minute) > 1 and self._minute[1][0] <= now - MINUTE:
            self._minute.popleft()

    def _look(self, now: float) -> None:
        """See how memory stands, more seldom while nothing is stored."""
        found = self._device.counters()
        _, used, limit, *_ = self._device.pressure()
        self._next_look = now + (LOOK if found["pages_stored"] else SWEEP)
        if self._policy.look(now, View(used, limit, found["failed_writes"], self._short())):
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
