"""The rules of what becomes cold: when, how much at a time, and when not.

No zram does anything by itself: scripts write to its files. So these rules are our own. They know neither
threads nor clocks: they are told what happened and answer what to do.
"""

import errno
from collections.abc import Sequence
from typing import NamedTuple

from zramd import meminfo
from zramd.server.ages import SWEEP, age_of
from zramd.settings.config import Config

ENOUGH = 16  # candidates: fewer are not worth a walk
CALM_SHARE, HURRY_SHARE = 0.05, 0.25  # of one processor, at most
# Seconds of a processor that are saved up and used in one go: after each rest the caches are others'.
BURST = 0.05
HURRY_AGE = 30.0  # seconds after which a block is cold when memory is wanted
NEAR, FAR = (
    0.8,
    0.7,
)  # of mem_limit, or of the budget: memory is wanted from the one on, until it is below the other
HOLD = 30.0  # seconds that memory is wanted, or the pool full, after it was the last time
GAIN = 0.01  # of the payload that a pass looked at: one that gains less is not repeated soon
MAX_PAUSE = 600.0  # seconds between passes that gain nothing
REFUSALS = 64  # blocks in a row that found no room, then there is none
NO_ROOM_PAUSE = 10.0  # seconds until the next try

PSI = "/proc/pressure/memory"
PSI_SHORT = 10.0  # percent of the last 10 s in which some program waited for memory
AVAILABLE_SHORT = 0.1  # of all memory, where the kernel has no PSI

_NO_ROOM = {
    errno.ENOSPC: "mem_limit or the budget leaves no room for a block's old and new payload at once",
    errno.EDQUOT: "the state's file system has no room for a block's old and new payload at once",
    errno.ENOMEM: "the system refuses memory for a block's new payload",
    errno.ENOBUFS: "half of the reserve is left, which is for requests",
}


class Census(NamedTuple):
    """What a sweep has counted, by age: blocks, and bytes of payloads that could leave memory."""

    stored: list[int]
    raw: list[int]  # candidates
    others: list[int]  # candidates
    tried: int
    unread: Sequence[int] = ()  # bytes in memory of blocks that nobody has read since they were written
    read: Sequence[int] = ()  # of others
    huge: Sequence[int] = ()  # of raw ones among both
    back: int = 0  # blocks that are out, and read again and again


class View(NamedTuple):
    """What the policy looks at."""

    used: int  # pages of the pool
    limit: int  # pages, 0 for none
    refused: int  # writes that have failed
    short: bool  # whether the machine is short of memory
    shared: float = 0.0  # share of the host's budget that is taken, as Device.pressure has it


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
        near = FAR if self._near else NEAR
        self._near = view.shared >= near or (view.limit > 0 and view.used >= near * view.limit)
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
