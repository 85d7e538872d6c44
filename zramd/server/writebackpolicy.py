"""The rules of what leaves memory for the backing: when, how much, how fast, and when not.

They know neither threads nor clocks: they are told what happened and answer what to do. How memory stands
`zramd.server.tierpolicy` alone says; these rules go by it.

    Budget   bytes a day that may reach the device: a bucket that fills evenly and holds a day's
    Pace     how long to leave the device to others after an extent
    Policy   which blocks go out next, and whether any do
"""

import errno
import os
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from zramd.core.device.backing import EXTENT
from zramd.server.ages import IDLE, OLDEST, SWEEP, age_of
from zramd.server.tierpolicy import FAR, HURRY_AGE, MAX_PAUSE, Census
from zramd.server.withoutbacking import WritePass
from zramd.settings.config import Config

DAY = 86400  # seconds
MOST_KEPT = (1 << 64) - 1  # bytes of a budget: a state has 64 bits for them
WHOLE = EXTENT - 4096  # bytes: an extent with so many has no room for another block, or hardly
LEAST = EXTENT // 4  # bytes: fewer are not worth an extent of their own, when memory is wanted
BITE = 0.1  # of all payload: what goes out with a sweep while the machine, not mem_limit, lacks memory

CALM_RATE = 4 << 20  # bytes a second
SLOW = 0.05  # seconds for an extent: of a device that has much else to do
WINDOW = 100  # extents that its slowness is told from
MAX_SLOWNESS = 64

# Of all extents: from so few free ones on, others are emptied. The later, the more of them is dead by then:
# with a tenth, 7 % more was written on a backing of twice what lives, with a fiftieth, 1 %.
FEW = 0.005
MOSTLY_DEAD = 0.5  # an extent is emptied if no more of it lives
SPARE = 1  # free extents that the core leaves for emptying others into
ROOM_AGAIN = 0.05  # of all extents free: then a device that was full is tried again
ERRORS = 8  # in a row, then nothing is written for a while
ERROR_PAUSE = 600.0  # seconds
USELESS = 0.5  # of what a pass sent out is back by the next one: then it was better left in memory


class Budget:
    """What may still be written. Moments are seconds of the clock since boot, which goes on in sleep.

    What is kept, (left, at), is how it stood when: (0, 0) where nothing ever was. A new one is full: a day's.
    A time that lies ahead is of another boot, and nobody knows how long ago: nothing is added for it.

    What was used beyond a limit that was lowered is kept beside it, for one that is raised again, and is
    forgotten evenly within a day.
    """

    def __init__(self, limit: int, kept: tuple[int, int], now: float) -> None:
        """`limit`: bytes a day, 0 for none."""
        self.limit = 0
        self._left, self._at = float(kept[0]), float(kept[1])
        self._of = 0  # the limit that _left is of: the last one, while there is none
        self._over = self._fades = 0.0  # bytes used beyond it, and how many of them are forgotten a second
        self.change(limit)
        self.fill(now)

    def fill(self, now: float) -> None:
        """Add what has become due."""
        if not self.limit:
            return
        passed = now - self._at
        self._at = now
        if passed <= 0:
            return
        if self._left < self.limit:
            self._left = min(self._left + passed * self.limit / DAY, float(self.limit))
        self._over = max(0.0, self._over - passed * self._fades)

    def allows(self, size: int) -> bool:
        """Say whether so many bytes may be written now."""
        return not self.limit or self._left >= size

    def spend(self, size: int) -> None:
        """Take note of bytes that reach the device; fewer than 0: they did not."""
        if self.limit:
            self._left -= size

    def waits(self, size: int) -> float:
        """Return the seconds until so many bytes may be written."""
        return max(0.0, (size - self._left) * DAY / self.limit) if self.limit else 0.0

    @property
    def used_up(self) -> str:
        """Why no extent may be written now, as a sentence's beginning; "" if one may be."""
        if self.allows(EXTENT):
            return ""
        return f"writeback_limit is used up, the next extent may be written in {spelled(self.waits(EXTENT))}"

    def change(self, limit: int) -> None:
        """Go by another limit from now on: of a day's, as much is used as before."""
        self.limit = limit
        if not limit:
            return
        before, self._of = self._of, limit
        if not self._at:
            self._left = float(limit)
        elif before:
            left = self._left + limit - before - self._over
            self._left, self._over = max(0.0, left), max(0.0, -left)
            self._fades = self._over / DAY
        self._left = min(self._left, float(limit))

    def copy(self) -> "Budget":
        """Return another one that stands as this does."""
        made = Budget(0, (0, 0), 0.0)
        made.__dict__.update(self.__dict__)
        return made

    @property
    def left(self) -> int | None:
        """Bytes; None: there is no limit."""
        return max(0, int(self._left)) if self.limit else None

    @left.setter
    def left(self, size: int) -> None:
        """More than a day's are kept until they are used, but nothing is added before that."""
        self._left = float(size)
        self._over = 0.0

    @property
    def kept(self) -> tuple[int, int]:
        """What to keep."""
        return min(max(0, int(self._left)), MOST_KEPT), int(self._at)


def spelled(seconds: float) -> str:
    """Return a time as a sentence has it: 30 s, 1.5 h."""
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 3600:.1f} h"


class Pace:
    """How long to leave the device alone after an extent.

    It is slow if, of the last hundred extents, more than one took long: that is the 99th percentile. Then
    half as much is written, until a hundred in a row are fast.
    """

    def __init__(self) -> None:
        self.slowness = 1
        self._slow: deque[bool] = deque(maxlen=WINDOW)

    def took(self, seconds: float) -> None:
        """Take note of how long an extent took."""
        self._slow.append(seconds > SLOW)
        slow = sum(self._slow) > 1
        if slow:
            self.slowness = min(2 * self.slowness, MAX_SLOWNESS)
        elif len(self._slow) == WINDOW and self.slowness > 1:
            self.slowness //= 2
        else:
            return
        self._slow.clear()  # the new rate is told from what comes

    def rest(self, size: int, seconds: float, mode: str) -> float:
        """Return the seconds to wait after so many bytes, which took so long."""
        if mode == "calm":
            return max(0.0, size * self.slowness / CALM_RATE - seconds)
        return seconds * (self.slowness - 1)


class Look(NamedTuple):
    """What a walk takes of the blocks from `first` to before `end`: see Writeback.gather."""

    age: int = 0
    raw: bool = False
    idle: bool = False
    unread: bool = False
    tried: bool = False
    first: int = 0
    end: int = 1 << 62


class Plan(NamedTuple):
    """What a pass does: looks, one after the other, until so many bytes are out."""

    looks: tuple[Look, ...]
    need: int = 1 << 62
    least: int = WHOLE  # bytes that are worth an extent in the end; fewer stay in memory


class Walk:
    """How far a pass is."""

    def __init__(self, plan: Plan, *, by_hand: bool = False) -> None:
        self.plan = plan
        self.by_hand = by_hand
        self.sent = 0  # bytes
        self.blocks = 0
        self._looks = deque(plan.looks)
        self.next = plan.looks[0].first

    @property
    def look(self) -> Look | None:
        """What to take, None: the walk is over."""
        return self._looks[0] if self._looks else None

    def look_over(self) -> None:
        """Go on with the next look."""
        self._looks.popleft()
        self.next = self._looks[0].first if self._looks else 0

    @property
    def is_enough(self) -> bool:
        """Whether as much is out as was needed."""
        return self.sent >= self.plan.need


def by_hand(wanted: WritePass, blocks: int) -> Walk:
    """Return the pass that somebody asks for, on a device of so many blocks."""
    kinds = wanted.kinds
    ranges = wanted.ranges or ((0, blocks),)
    looks = (
        Look(
            idle="idle" in kinds,
            raw="huge" in kinds,
            tried="incompressible" in kinds,
            first=first,
            end=min(end, blocks),
        )
        for first, end in ranges
    )
    return Walk(Plan(tuple(looks), least=1), by_hand=True)


class View(NamedTuple):
    """What the policy looks at."""

    used: int  # pages of the pool
    limit: int  # pages, 0 for none
    extents: int
    free: int  # extents
    back: int  # blocks that were brought back, since the start
    left: int | None = None  # bytes that may be written, None for any


class Policy:
    """The rules. Each `now` is a moment of the monotonic clock."""

    def __init__(self, config: Config) -> None:
        self.mode = "calm"
        self._census: Census | None = None
        self._fresh = False  # the census is not used up yet
        self._gone = 0  # bytes that went out since it was made
        self._errors = 0  # in a row
        self._paused_until = float("-inf")
        self.error = 0  # errno of the last one
        self.is_full = False
        self.is_held = False  # everything was called back by hand
        self._returned = False  # blocks came back since memory was wanted the last time
        self._back_pause = SWEEP
        self._back_after = float("-inf")
        self._back_seen: int | None = None
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Go by these settings from now on."""
        self._writeback_age, self._cold_age = config.writeback_age, config.cold_age
        self._shrinks = config.cold_level > 0
        self._paused_until = float("-inf")  # a device that fails is tried at once, and has failed until then
        self.reset()

    def mended(self) -> None:
        """Take the device for a good one again."""
        self._errors = 0
        self._paused_until = float("-inf")
        self.reset()

    def reset(self) -> None:
        """Forget that passes were in vain."""
        self._pause = SWEEP
        self._next = float("-inf")
        self._fresh = self._census is not None

    def look(self, now: float, mode: str) -> bool:
        """Take note of how memory stands, and say whether that is another matter now."""
        if mode == self.mode:
            return False
        if self.mode == "calm":
            # What came back has made memory short again, perhaps: next time it comes later.
            self._back_pause = min(2 * self._back_pause, MAX_PAUSE) if self._returned else SWEEP
            self._returned = False
        elif mode == "calm":
            self._back_after = now + self._back_pause
        self.mode = mode
        self.reset()
        return True

    # ------------------------------------------------------------------------------------------------
    # what goes out

    def swept(self, census: Census) -> None:
        """Take note of how much has which age."""
        self._census, self._fresh, self._gone = census, True, 0

    def wants_pass(self, now: float) -> bool:
        """Say whether there may be something to do for a pass: then `plan` says what."""
        return self._fresh and not self.is_held and self.waits(now) <= 0

    def plan(self, view: View) -> Plan | None:
        """Return what the next pass is to do, None: nothing until the next sweep."""
        self._fresh = False
        census = self._census
        if census is None or not census.unread:
            return None
        if self.mode == "calm":
            plan = self._calm(census, view)
        elif self.mode == "wanted":
            # What would go out in calm does so when memory is wanted, too.
            plan = self._wanted(census, view) or self._calm(census, view)
        else:
            looks = (Look(1, raw=True), Look(idle=True), Look(1, unread=True), Look(1))
            plan = Plan(looks, least=LEAST) if _all(census, 1) + _marked(census) >= LEAST else None
        if self._back_seen is None:
            self._back_seen = view.back
        return plan

    def _calm(self, census: Census, view: View) -> Plan | None:
        """Whole extents of what nobody has asked for in writeback_age, and of what does not shrink."""
        least, cold = age_of(self._writeback_age), age_of(self._cold_age)
        # No more than the limit lets out: then it is the oldest.
        age = least if view.left is None else _age_for(census, max(view.left, EXTENT), least)
        looks = [Look(age, unread=True), Look(age)]
        found = _all(census, age)
        if cold < least:
            # Those that recompression may shrink wait for that.
            looks.append(Look(cold, raw=True, tried=self._shrinks))
            shrink = census.raw if self._shrinks else ()
            found += _old(census.huge, cold, age) - (_old(shrink, cold, age) << 12)
        return Plan(tuple(looks)) if found - self._gone >= EXTENT else None

    def _wanted(self, census: Census, view: View) -> Plan | None:
        """The oldest, as many as bring the pool below its mark: of these, what nobody has read goes first."""
        need = (view.used - int(FAR * view.limit)) << 12 if view.limit else 0
        if need <= 0:
            # The machine lacks memory, and nobody knows how much: some, and then a sweep's time to see.
            if self._gone:
                return None
            need = int(BITE * (sum(census.unread) + sum(census.read)))
        need = max(need if view.left is None else min(need, view.left), LEAST)
        age = _age_for(census, need + self._gone, age_of(min(self._writeback_age, HURRY_AGE)))
        if _all(census, age) + _marked(census) - self._gone < LEAST:
            return None
        return Plan((Look(idle=True), Look(age, unread=True), Look(age)), need, LEAST)

    def sent(self, payload: int) -> None:
        """Take note of bytes that went out."""
        self._gone += payload

    def pass_ended(self, now: float, sent: int, needed: int, blocks: int, back: int) -> None:
        """Take note of a pass that sent bytes, and so many blocks; `back`: as View has it.

        One that sent nothing, or whose blocks come back as fast as they go, is not repeated soon.
        """
        returned = back - (back if self._back_seen is None else self._back_seen)
        self._back_seen = back
        if not blocks or returned > USELESS * blocks:
            self._pause = min(2 * self._pause, MAX_PAUSE)
            self._next = now + self._pause
            return
        self._pause = SWEEP
        if self.mode == "wanted" and sent >= needed:
            # The census still says what is next: see whether more is wanted, once pages were given back.
            self._fresh = True
            self._next = now + 1

    @property
    def backs_off(self) -> bool:
        """Whether the last pass was in vain."""
        return self._pause > SWEEP

    def waits(self, now: float) -> float:
        """Return the seconds until the next pass may begin."""
        return max(self._next, self._paused_until) - now

    # ------------------------------------------------------------------------------------------------
    # what the device does

    def room(self, view: View) -> bool:
        """Say whether there is an extent for blocks of memory; a full device is to have some again."""
        enough = ROOM_AGAIN * view.extents if self.is_full else 0
        self.is_full = view.free <= max(SPARE, enough - 1)
        return not self.is_full

    def reclaims(self, view: View) -> bool:
        """Say whether to empty extents of which little lives."""
        few = ROOM_AGAIN if self.is_full else FEW  # a full device is not used again before that
        return view.free < few * view.extents or view.free <= SPARE

    def flushed(self, now: float, stopped: int) -> bool:
        """Take note of an extent, and of the errno that stopped it; 0: none, EXFULL: no extent is free.

        Say whether health changed.
        """
        if stopped == errno.EXFULL:
            self.is_full = True
            return False
        was = self.has_trouble
        if not stopped:
            self._errors = 0
            self._paused_until = float("-inf")
            return was
        self.error = stopped
        self._errors += 1
        if self.has_trouble:
            self._paused_until = now + ERROR_PAUSE
        return self.has_trouble and not was

    @property
    def has_trouble(self) -> bool:
        """Whether the device fails, again and again: until it has taken an extent."""
        return self._errors >= ERRORS

    def is_paused(self, now: float) -> bool:
        """Say whether the device is left alone because it fails."""
        return now < self._paused_until

    def trouble(self, now: float) -> str:
        """Return what is the matter with the device, as a sentence's end; "" if nothing is."""
        if not self.has_trouble:
            return ""
        wait = max(0.0, self._paused_until - now)
        return f"{os.strerror(self.error)} {self._errors} times in a row, the next try comes in {wait:.0f} s"

    # ------------------------------------------------------------------------------------------------
    # what comes back

    @property
    def is_wanted_back(self) -> bool:
        """Whether some that are out are read again and again."""
        return self._census is not None and self._census.back > 0

    def brings_back(self, now: float, view: View) -> bool:
        """Say whether blocks that are read again may take memory: not so that others have to leave it."""
        room = not view.limit or view.used < FAR * view.limit
        return self.mode == "calm" and room and now >= self._back_after

    def brought_back(self, blocks: int) -> None:
        """Take note of blocks that are in memory again."""
        self._returned = self._returned or blocks > 0


def _old(sizes: Sequence[int], age: int, below: int = OLDEST + 1) -> int:
    """Return the sum for what has this age or a greater one, and is not marked."""
    return sum(sizes[age:below])


def _all(census: Census, age: int) -> int:
    return _old(census.unread, age) + _old(census.read, age)


def _marked(census: Census) -> int:
    """Return the bytes of what is marked idle: the oldest, where memory is wanted."""
    return census.unread[IDLE] + census.read[IDLE]


def _age_for(census: Census, size: int, least: int) -> int:
    """Return the greatest age, `least` or more, of which there are so many bytes, or that are older."""
    age, found = OLDEST, _marked(census)
    while True:
        found += census.unread[age] + census.read[age]
        if found >= size or age <= least:
            return age
        age -= 1
