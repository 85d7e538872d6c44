"""When to compact, and how much at a time.

The kernel compacts its zsmalloc only when asked to: by its shrinker, or by zram's file `compact`. So the
rules here are our own.

`Policy` holds the rules and knows neither threads nor time: it is told what happened and answers what to do.
`Compactor` looks, and compacts in steps, as the policy says; the thread is the worker's.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from zramd.settings.config import Config

MIN_FREEABLE = 16  # pages: below this a run is not worth waking the caches for
MAX_INTERVAL = 60.0  # seconds between looks after runs that gained nothing
IO_SHARE = 4  # pause this many step times when clients are active: 1 part work, 4 parts not, 20 %
MIN_PAUSE = 0.001  # seconds
# A zspage is at most 16 pages, so moving this much without freeing one means that nothing can be gained.
FRUITLESS_BYTES = 256 << 10


class Pressure(NamedTuple):
    """What `Device.pressure` returns."""

    freeable: int  # pages that compaction would free now
    used: int  # pages of the pool in use
    limit: int  # pages, 0 for none
    requests_done: int
    requests_inflight: int
    shared: float = 0.0  # of the host's budget, what is taken; 0: none, or only what is kept for the device

    def busy_since(self, before: "Pressure") -> bool:
        """Say whether clients make requests now, or made some since `before`."""
        return self.requests_inflight > 0 or self.requests_done != before.requests_done

    def pause(self, step_seconds: float, before: "Pressure", share: int = IO_SHARE) -> float:
        """Return the seconds to leave to clients after a step that took so long; 0 when there are none.

        `share`: how many times as long as the step.
        """
        return max(share * step_seconds, MIN_PAUSE) if self.busy_since(before) else 0.0


class Compactable(Protocol):
    """What the compactor needs of a device."""

    def pressure(self) -> tuple[int, int, int, int, int, float]: ...
    def compact(self, budget: int = 0) -> int: ...
    def release_stock(self) -> int: ...


class Policy:
    """The rules of background compaction."""

    def __init__(self, config: Config) -> None:
        self._enabled = config.compaction
        self._threshold = config.compaction_threshold / 100
        self._near_limit = config.compaction_near_limit / 100
        self._interval = config.compaction_interval
        self._step = config.compaction_step
        self._fruitless = 0  # bytes moved since a page was last freed
        self._backoff = 1

    @property
    def interval(self) -> float:
        """Seconds until the next look."""
        return max(self._interval, min(self._interval * self._backoff, MAX_INTERVAL))

    @property
    def fruitless(self) -> bool:
        """Whether the run has moved enough without freeing a page to show that it cannot."""
        return self._fruitless >= FRUITLESS_BYTES

    def worth_starting(self, now: Pressure) -> bool:
        """Say whether to start a run."""
        return self._enabled and (now.freeable >= self._enough(now) or self._wants_all(now))

    def worth_going_on(self, now: Pressure) -> bool:
        """Say whether a run goes on after a step.

        It goes on below the threshold that started it, so that runs are few and thorough.
        """
        if not self._enabled or self.fruitless:
            return False
        return now.freeable >= self._enough(now) / 4 or self._wants_all(now)

    def step_done(self, freed: int) -> None:
        """Take note of a step that freed `freed` pages."""
        self._fruitless = 0 if freed else self._fruitless + self._step

    def run_ended(self, freed: int) -> None:
        """Take note of a run that freed `freed` pages: without gain the next look comes later."""
        self._fruitless = 0
        if freed:
            self._backoff = 1
        elif self.interval < MAX_INTERVAL:
            self._backoff *= 2

    def reset_backoff(self) -> None:
        """Look again at the configured interval."""
        self._backoff = 1

    def _enough(self, now: Pressure) -> float:
        return max(self._threshold * now.used, MIN_FREEABLE)

    def _wants_all(self, now: Pressure) -> bool:
        near = now.limit > 0 and now.used >= self._near_limit * now.limit
        return now.freeable > 0 and (near or now.shared >= self._near_limit)


class Compactor:
    """Compacts a device in the background and on demand: a part of zramd.server.worker."""

    title = "background compaction"

    def __init__(
        self,
        device: Compactable,
        config: Config,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._clock = clock
        self.wake: Callable[[], None] = lambda: None
        self.configure(config)
        self._lock = threading.Lock()  # guards _tickets and _ended
        self._tickets: list[threading.Event] = []
        self._begun = False
        self._ended = False
        self._running = False
        self._run_freed = 0
        self._seen: Pressure | None = None
        self._trimmed = True  # nothing is kept before the first request
        self.pages_freed = 0
        self.failure = ""
        self.yields = False

    @property
    def status(self) -> str:
        """One of running, idle, off (only on demand), stopped, or failed with the reason."""
        if self.failure:
            return f"failed: {self.failure}"
        if self._ended or not self._begun:
            return "stopped"
        if self._running:
            return "running"
        return "idle" if self._enabled else "off"

    def configure(self, config: Config) -> None:
        """Go by these settings from the next step on."""
        self._policy = Policy(config)
        self._step_bytes = config.compaction_step
        self._enabled = config.compaction
        self.wake()

    @property
    def interval(self) -> float:
        """Seconds between looks."""
        return self._policy.interval

    def begin(self) -> None:
        """Take note that the thread runs."""
        self._begun = True

    def end(self) -> None:
        """Take note that it does not run any more, and let nobody wait for it."""
        with self._lock:
            self._ended = True
        self._answer(len(self._tickets))

    def compact_now(self, timeout: float) -> int:
        """Compact until nothing is freeable and return the pages freed meanwhile.

        Waits at most `timeout` seconds: what is not done by then goes on without the caller.
        Raises RuntimeError if the thread does not run.
        """
        ticket = threading.Event()
        before = self.pages_freed
        with self._lock:
            if self._ended or not self._begun:
                raise RuntimeError(f"compactor is not running: {self.failure or 'stopped'}")
            self._tickets.append(ticket)
        self.wake()
        ticket.wait(timeout)
        return self.pages_freed - before

    def tick(self) -> float:
        """Do what is due, at most one step, and return the seconds until the next is due."""
        now = Pressure(*self._device.pressure())
        last, self._seen = self._seen or now, now
        self.yields = False
        if self._tickets:
            self._policy.reset_backoff()
        if not self._running:
            if not self._tickets and not self._policy.worth_starting(now):
                self._trim_when_idle(last, now)
                return self._policy.interval
            self._running = True
            self._run_freed = 0
        return self._step(last)

    def _step(self, last: Pressure) -> float:
        asked = len(self._tickets)  # a later request may be about more than this step looks at
        started = self._clock()
        freed = self._device.compact(self._step_bytes)
        taken = self._clock() - started
        self.pages_freed += freed
        self._run_freed += freed
        self._policy.step_done(freed)
        now = self._seen = Pressure(*self._device.pressure())
        if asked:
            # On demand means everything, and at once.
            if now.freeable and not self._policy.fruitless:
                return 0.0
            freed = self._device.compact()  # what the steps leave: see compact_whole in lending.pyx
            self.pages_freed += freed
            self._run_freed += freed
            self._answer(asked)
        elif self._policy.worth_going_on(now):
            pause = now.pause(taken, last)
            self.yields = pause > 0
            return pause
        self._policy.run_ended(self._run_freed)
        self._running = False
        self._trimmed = False
        return self._policy.interval

    def _trim_when_idle(self, before: Pressure, now: Pressure) -> None:
        """Give the stock of kept pages back once no request came for one interval."""
        if now.busy_since(before):
            self._trimmed = False
        elif not self._trimmed:
            self._device.release_stock()
            self._trimmed = True

    def _answer(self, count: int) -> None:
        with self._lock:
            answered, self._tickets = self._tickets[:count], self._tickets[count:]
        for ticket in answered:
            ticket.set()
