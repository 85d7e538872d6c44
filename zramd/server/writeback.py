"""What moves blocks out of memory to the backing, and back: passes in steps, in a thread of their own.

`zramd.server.writebackpolicy` says when, and how much; zram's words only ask for a pass out of turn. A disk
that hangs holds up this thread, and nothing else: what other threads call here waits for nothing.

    pass        a walk over the device in looks: each step fills an extent's buffer further, or writes it
    reclaim     where few extents are free, the records that live of some others fill the buffer first
    bring back  after each sweep, a walk over blocks that are out and are read again
"""

import errno
import os
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from zramd.core.device.backing import EXTENT
from zramd.errors import BackingError, DeviceError
from zramd.server.ages import SWEEP
from zramd.server.compactor import IO_SHARE, Pressure
from zramd.server.log import say
from zramd.server.minute import Minute
from zramd.server.tierpolicy import Census
from zramd.server.withoutbacking import WritePass
from zramd.server.writebackpolicy import (
    CALM_RATE,
    ERROR_PAUSE,
    MOSTLY_DEAD,
    Budget,
    Pace,
    Policy,
    View,
    Walk,
    by_hand,
    spelled,
)
from zramd.settings.config import Config

if TYPE_CHECKING:
    from zramd.core.device.writeback import Writeback as Steps  # what moves blocks

KINDS = frozenset({"idle", "huge", "incompressible"})  # what a pass by hand can be narrowed down to

LOOK = 1.0  # seconds between looks at how memory stands
MOST_PASSES = 16  # by hand, that wait
HANGS = 30.0  # seconds that a write may take before health tells of it
# How many times as long as a step takes of the processor clients have after it. In calm one request of a
# hundred, and no more, is to notice a step: with 5 ms after each, their p99 was 2.2 times what it is without.
# While writes are refused, they wait for this.
SHARES = {"calm": 99, "wanted": IO_SHARE, "full": 1}
# Seconds that it is at most: where processors are slow, what becomes old has to go out all the same.
MOST_PAUSE = 0.03
ERROR_REST = 1.0  # seconds after a write that failed, or an extent that cannot be read
TELLS = 2.0  # seconds after which the reason does


class Source(Protocol):
    """What is read from a device, and kept in it.

    disksize: bytes. budget: bytes that may be written, and when it was so, in seconds of the boot's clock.
    """

    disksize: int
    budget: tuple[int, int]

    def pressure(self) -> tuple[int, int, int, int, int, float]: ...
    def counters(self) -> dict[str, int]: ...


class Memory(Protocol):
    """Who knows how memory stands: zramd.server.tiers.Tiers."""

    @property
    def mode(self) -> str: ...
    @property
    def census(self) -> Census | None: ...


class Writeback:
    """Moves blocks out that nobody asks for, and brings back what is read again.

    A part of zramd.server.worker. `steps` moves blocks of the device; `memory` knows how memory stands, and
    how old blocks are; `renew` has the superblock name the data that the device holds, and raises
    BackingError; `boottime` is the clock of the budget, `cpu` tells the time of its thread.
    """

    title = "background writeback"

    def __init__(
        self,
        device: Source,
        steps: "Steps",
        config: Config,
        memory: Memory,
        *,
        renew: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        boottime: Callable[[], float] = lambda: time.clock_gettime(time.CLOCK_BOOTTIME),
        cpu: Callable[[], float] = time.thread_time,
    ) -> None:
        self._device, self._steps, self._memory = device, steps, memory
        self._renew = renew
        self._clock, self._boottime, self._cpu = clock, boottime, cpu
        self._blocks = device.disksize >> 12
        self._config = config
        self._changed: Config | None = None  # what the thread is to go by from the next turn on
        self._given: int | None = None  # what the budget is to have from the next turn on
        self._forgotten = False  # what is under way is for data that is gone
        self._mended = False  # what the device did before is not to count any more
        self._policy = Policy(config)
        self._pace = Pace()
        self._budget = Budget(config.writeback_limit, device.budget, boottime())
        self._by_hand: deque[Walk] = deque()
        self._walk: Walk | None = None
        self._emptied = 0  # extents whose records are in the buffer
        self._dry = False  # no other extent is worth emptying
        self._resume = float("-inf")  # when the device may be written again
        self._back = -1  # where bringing back goes on, -1: there is nothing to bring back
        self._recall = False  # everything is to come back
        self._recalled = 0  # blocks that this has looked at
        self._held = False  # until somebody wants blocks out again
        self._recall_error = 0
        self._read_errors = device.counters()["bd_read_errors"]  # that were seen; a state has those of before
        self._unreadable_until = self._looked = float("-inf")
        self._census: Census | None = None
        self._rest = SWEEP
        self._minute = Minute()
        self._io_began: float | None = None
        self.wake: Callable[[], None] = lambda: None
        self.failure = ""
        self._ended = False
        self.yields = False
        self.interval = LOOK
        self._keep_budget()

    # ------------------------------------------------------------------------------------------------
    # for other threads: nothing is waited for

    def configure(self, config: Config) -> None:
        """Go by these settings from the next step on."""
        old, self._config = self._config, config
        self._changed = config
        if (old.writeback_age, old.writeback_limit) != (config.writeback_age, config.writeback_limit):
            self._held = self._recall
        self.wake()

    def submit(self, wanted: WritePass) -> None:
        """Queue a pass by hand, and do not wait for it: it ends early where the limit is used up meanwhile.

        Raises DeviceError, one sentence, when writing has failed, when the limit is used up already, or when
        too many passes are queued.
        """
        if self._ended:
            raise DeviceError(f"{self.title} does not run any more, the log says why: restart the server")
        if why := self._budget_now().used_up:
            raise DeviceError(f"{why}: raise it, as in 'zramd set NAME writeback_limit=10G'")
        if len(self._by_hand) >= MOST_PASSES:
            raise DeviceError(f"{MOST_PASSES} passes are queued already: try again when some are done")
        self._by_hand.append(by_hand(wanted, self._blocks))
        self._held = False
        self.wake()

    def bring_back(self) -> None:
        """Bring back all blocks, as far as there is room, and do not wait for it.

        Passes that are queued are dropped. Nothing goes out by itself after it, until writeback_age or
        writeback_limit is changed, or a pass is asked for. Raises DeviceError when the thread has ended.
        """
        if self._ended:
            raise DeviceError(f"{self.title} does not run any more, the log says why: restart the server")
        self._by_hand.clear()
        self._recalled = self._recall_error = 0
        self._recall = self._held = True
        self.wake()

    def forget(self) -> None:
        """Drop the passes that are queued, and what they had in the buffer: that data is gone."""
        self._by_hand.clear()
        self._forgotten = True
        self.wake()

    def try_again(self) -> None:
        """Take the device for a good one from the next turn on: somebody has seen to it."""
        self._mended = True
        self.wake()

    def left(self) -> int | None:
        """Return the bytes that may still be written, None: there is no limit."""
        return self._budget_now().left

    def _budget_now(self) -> Budget:
        """Return the budget as the thread is going to find it: it may look at it seconds later."""
        changed, given = self._changed, self._given
        now = self._budget.copy()
        now.fill(self._boottime())
        if changed is not None:
            now.change(changed.writeback_limit)
        if given is not None:
            now.left = given
        return now

    def set_left(self, size: int) -> None:
        """Let so many bytes be written from now on, whatever was. Raises DeviceError without a limit."""
        if not self._config.writeback_limit:
            raise DeviceError(
                "writeback_limit is off: set it to the bytes that may be written in a day first"
            )
        self._given = size
        self.wake()

    @property
    def silent(self) -> float:
        """Seconds for which the device has not answered."""
        began = self._io_began
        return self._clock() - began if began is not None else 0.0

    @property
    def trouble(self) -> str:
        """What is the matter, as a sentence for health; "" if nothing is."""
        if self.failure:
            return f"{self.title} failed: {self.failure}"
        hangs = self.silent
        if hangs >= HANGS:
            return f"backing '{self._config.backing}' has not answered for {hangs:.0f} s"
        if self._clock() < self._unreadable_until:
            return f"backing '{self._config.backing}' fails: blocks that are out cannot be read"
        why = self._policy.trouble(self._clock())
        return f"backing '{self._config.backing}' fails: {why}" if why else ""

    def numbers(self) -> dict[str, Any]:
        """Return the section `writeback` of stats.json.

        Sizes in bytes; limit_left is None without a limit. mode: calm, wanted, full, paused or off. reason:
        one sentence, why it does not do more right now.
        """
        found = self._device.counters()
        now = self._clock()
        written_out, brought_back = found["written_out"], found["brought_back"]
        out_minute, back_minute = self._minute.rise(written_out, brought_back)
        mode, reason = self._state(now, found)
        return {
            "backing": self._config.backing,
            "backing_size": found["backing_size"],
            "backing_free": found["backing_free"] * EXTENT,
            "backing_bad": found["backing_bad"] * EXTENT,
            "out_pages": found["out_pages"],
            "out_data_size": found["out_data_size"],
            "out_live_bytes": found["backing_live"],
            "bd_reads": found["bd_reads"],
            "bd_writes": found["bd_writes"],
            "written_out": written_out,
            "brought_back": brought_back,
            "written_out_minute": out_minute,
            "brought_back_minute": back_minute,
            "reclaimed_bytes": found["reclaimed_bytes"],
            "bd_read_errors": found["bd_read_errors"],
            "bd_write_errors": found["bd_write_errors"],
            "writeback_age": self._config.writeback_age,
            "writeback_limit": self._config.writeback_limit,
            "limit_left": self.left(),
            "mode": mode,
            "reason": reason,
        }

    def _state(self, now: float, found: dict[str, int]) -> tuple[str, str]:
        """Return mode and reason."""
        policy = self._policy
        if self.failure:
            return "paused", f"{self.title} failed: {self.failure}"
        hangs = self.silent
        if hangs >= TELLS:
            return "paused", f"the device has not answered for {hangs:.0f} s"
        if self._recall:
            return "off", "everything is being brought back"
        if self._held:
            if found["out_pages"]:
                why = os.strerror(self._recall_error) if self._recall_error else "some cannot be read"
                return "off", f"{found['out_pages']} blocks could not be brought back: {why}"
            return (
                "off",
                "everything was brought back: a change of writeback_age or writeback_limit starts it anew",
            )
        if policy.is_paused(now):
            return "paused", f"the device fails: {policy.trouble(now)}"
        if why := self._budget_now().used_up:
            return "paused", why
        if self._by_hand:
            return policy.mode, "a pass by hand is under way"
        if policy.is_full:
            return "paused", "the device is full, and no extent of it is mostly dead"
        return policy.mode, self._progress(now)

    def _progress(self, now: float) -> str:
        """Return the reason where nothing is in the way."""
        policy = self._policy
        if self._walk is not None:
            slow = self._pace.slowness
            if policy.mode == "calm":
                share = f", 1/{slow} of that as the device is slow" if slow > 1 else ""
                return f"a pass is under way that writes at most {CALM_RATE >> 20} MiB a second{share}"
            return "a pass is under way" + (
                f", 1/{slow} of the time as the device is slow" if slow > 1 else ""
            )
        if policy.backs_off and policy.waits(now) > 0:
            wait = spelled(policy.waits(now))
            return f"nothing went out, or it is read again, and the next pass comes in {wait}"
        if policy.mode == "calm":
            return f"less than an extent was left alone for {self._config.writeback_age:g} s"
        return "nothing is left in memory that was left alone"

    # ------------------------------------------------------------------------------------------------
    # for the worker

    def begin(self) -> None:
        """Take note that the thread runs."""

    def end(self) -> None:
        """Take note that it does not run any more."""
        self._ended = True

    def tick(self) -> float:
        """Do what is due, at most one step, and return the seconds until the next is due."""
        self.yields = False
        now = self._clock()
        self._apply()
        self._notice(now)
        if self._recall:
            return self._timed(self._step_recall)
        if self._back >= 0:
            if self._policy.brings_back(now, self._view()):
                return self._timed(self._step_back)
            self._back = -1
        walk = self._due(now)
        if walk is None:
            return self._rest
        if now < self._resume:
            return min(self._resume - now, LOOK)
        return self._timed(lambda: self._step(walk))

    def _apply(self) -> None:
        """Go by what was changed."""
        if self._forgotten:
            self._forgotten = False
            self._walk = None
            self._drop()
            # Nothing is out that could not be read.
            self._read_errors, self._unreadable_until = 0, float("-inf")
        if self._mended:
            self._mended = False
            self._policy.mended()
            self._resume = self._unreadable_until = float("-inf")
            self._read_errors = self._device.counters()["bd_read_errors"]
        budget = self._budget
        budget.fill(self._boottime())
        config, self._changed = self._changed, None
        if config is not None:
            budget.change(config.writeback_limit)
            self._policy.configure(config)
            self._forget_pass()
        given, self._given = self._given, None
        if given is not None:
            budget.left = given
        if config is not None or given is not None:
            self._keep_budget()

    def _notice(self, now: float) -> None:
        """See how memory stands, and what a sweep has counted."""
        if self._policy.look(now, self._memory.mode):
            self._forget_pass()
            self._back = -1
        if now >= self._looked + LOOK:  # sweeps are rarer, and health is not to be ok so long
            self._looked = now
            self._see_errors(now)
        census = self._memory.census
        if census is None or census is self._census:
            return
        self._census = census
        self._policy.swept(census)
        if self._policy.is_full:
            self._policy.room(self._view())  # what died since may be room
        self._keep_budget()
        found = self._device.counters()
        self._minute.add(now, found["written_out"], found["brought_back"])
        self._rest = LOOK if found["pages_stored"] else SWEEP
        if self._back < 0 and self._policy.is_wanted_back:
            self._back = 0

    def _see_errors(self, now: float) -> None:
        errors = self._device.counters()["bd_read_errors"]
        if errors > self._read_errors:
            self._unreadable_until = now + ERROR_PAUSE
        self._read_errors = errors

    def _forget_pass(self) -> None:
        """What goes out is another matter now; a pass by hand is what it was."""
        if self._walk is not None:
            self._walk = None
            self._drop()

    def _drop(self) -> None:
        self._steps.drop()
        self._emptied, self._dry = 0, False

    def _view(self) -> View:
        found = self._device.counters()
        _, used, limit, *_ = self._device.pressure()
        return View(
            used,
            limit,
            found["backing_extents"],
            found["backing_free"],
            found["brought_back"],
            self._budget.left,
        )

    def _keep_budget(self) -> None:
        if self._budget.limit:
            self._device.budget = self._budget.kept

    def _timed(self, step: Callable[[], None]) -> float:
        """Do a step; return what is left to clients after it: of the processor, a disk's time is no one's."""
        before = Pressure(*self._device.pressure())
        began = self._cpu()
        step()
        share = SHARES[self._policy.mode]
        pause = Pressure(*self._device.pressure()).pause(self._cpu() - began, before, share)
        self.yields = pause > 0
        return min(pause, MOST_PAUSE)

    # ------------------------------------------------------------------------------------------------
    # out

    def _due(self, now: float) -> Walk | None:
        """Return the pass to go on with, None: there is none now."""
        with suppress(IndexError):
            walk = self._by_hand[0]
            self._forget_pass()
            return walk
        policy = self._policy
        if self._held or policy.is_paused(now) or not self._budget.allows(EXTENT):
            self._forget_pass()
            return None
        if self._walk is None and policy.wants_pass(now):
            plan = policy.plan(self._view())
            if plan is not None:
                self._walk = Walk(plan)
        return self._walk

    def _step(self, walk: Walk) -> None:
        """Fill the buffer further, and write it if that is due."""
        look = walk.look
        if look is None or walk.is_enough or not self._budget.allows(EXTENT):
            self._end(walk)
            return
        view = self._view()
        if self._policy.reclaims(view) and self._empty_another():
            return
        if not self._policy.room(view) and not self._emptied:
            self._end(walk)
            return
        if not self._steps.pending and not self._is_named():
            if self._policy.is_paused(self._clock()):
                self._give_up(walk)
            return
        walk.next, _, full = self._steps.gather(
            walk.next,
            min(look.end, self._blocks),
            look.age,
            raw=look.raw,
            idle=look.idle,
            unread=look.unread,
            tried=look.tried,
        )
        if full:
            self._flush(walk)
        elif walk.next >= min(look.end, self._blocks):
            walk.look_over()
            if walk.look is None:
                self._write_rest(walk)

    def _is_named(self) -> bool:
        """Have the superblock say whose blocks will be there; False: it cannot be written now."""
        self._io_began = self._clock()
        try:
            self._renew()
        except BackingError:
            self._resume = self._clock() + ERROR_REST
            self._tell(errno.EIO)
            return False
        finally:
            self._io_began = None
        return True

    def _write_rest(self, walk: Walk) -> None:
        """Write what no look can add to, if that is worth it."""
        pending = self._steps.pending
        gains_room = self._emptied > 1  # what was in two extents is in one then
        worth = pending >= walk.plan.least and not self._policy.is_full
        if pending and (worth or gains_room):
            self._flush(walk)
        else:
            self._drop()

    def _empty_another(self) -> bool:
        """Move what lives of an extent into the buffer, if there is one that is worth it and fits."""
        if self._dry:
            return False
        self._io_began = self._clock()
        try:
            share = min(MOSTLY_DEAD, 1 - self._steps.pending / EXTENT)
            records = self._steps.reclaim(share) if share > 0 else 0
        except OSError as error:
            self._resume = self._clock() + ERROR_REST  # each costs an extent: what is wrong may be over soon
            self._tell(error.errno or errno.EIO)
            self._dry = self._policy.is_paused(self._clock())
            return not self._dry
        finally:
            self._io_began = None
        self._emptied += records > 0
        self._dry = not records
        return records > 0

    def _flush(self, walk: Walk) -> None:
        """Write the buffer. All of an extent is taken from the budget first: a kill gives nothing back."""
        budget = self._budget
        budget.spend(EXTENT)
        self._keep_budget()
        self._io_began = began = self._clock()
        try:
            blocks, written, moved, nanoseconds, stopped = self._steps.flush()
        except BaseException:
            budget.spend(-EXTENT)
            raise
        finally:
            self._io_began = None
            self._emptied, self._dry = 0, False
            self._keep_budget()
        # Of a write that failed nobody knows how much has reached the device.
        if not stopped or stopped == errno.EXFULL:
            budget.spend(written - EXTENT)
            self._keep_budget()
        seconds = nanoseconds / 1e9
        if stopped != errno.EXFULL:
            self._pace.took(seconds)
        mode = "wanted" if walk.by_hand else self._policy.mode
        rest = self._pace.rest(written, seconds, mode) if not stopped else ERROR_REST
        self._resume = began + seconds + rest
        walk.sent += written - moved
        walk.blocks += blocks
        self._policy.sent(written - moved)
        self._tell(stopped)
        if stopped == errno.EXFULL or self._policy.is_paused(self._clock()):
            self._give_up(walk)

    def _tell(self, stopped: int) -> None:
        """Let the policy know how a device's work has ended; say what has changed by it."""
        if self._policy.flushed(self._clock(), stopped):
            say(self.trouble or f"backing '{self._config.backing}' works again")

    def _give_up(self, walk: Walk) -> None:
        """Forget a pass and what it has in the buffer."""
        self._drop()
        if walk.by_hand:
            with suppress(ValueError, IndexError):  # another thread has dropped it
                self._by_hand.remove(walk)
        else:
            self._walk = None

    def _end(self, walk: Walk) -> None:
        self._give_up(walk)
        if not walk.by_hand:
            back = self._device.counters()["brought_back"]
            self._policy.pass_ended(self._clock(), walk.sent, walk.plan.need, walk.blocks, back)

    # ------------------------------------------------------------------------------------------------
    # back

    def _bring_back(self, first: int, *, wanted: bool) -> tuple[int, int, int]:
        """Return where to go on, how many blocks are in memory again, and what has stopped it."""
        self._io_began = self._clock()
        try:
            at, _, done, stopped = self._steps.bring_back(first, self._blocks, wanted)
        finally:
            self._io_began = None
        return at, done, stopped

    def _step_back(self) -> None:
        at, done, stopped = self._bring_back(self._back, wanted=True)
        self._policy.brought_back(done)
        self._back = -1 if stopped or at >= self._blocks else at

    def _step_recall(self) -> None:
        self._forget_pass()
        self._drop()  # of a pass by hand that was dropped
        self._recalled, _, self._recall_error = self._bring_back(self._recalled, wanted=False)
        if self._recall_error or self._recalled >= self._blocks:
            self._recall = False
