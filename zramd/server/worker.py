"""Threads that do what can wait. Compaction and recompression share one: each locks memory.

Each part says how long it wants to rest after a turn. What is due the longest has the next one. While a part
leaves its time to clients, the others do as well: two of them together are no more of a burden than one. What
waits for a disk has a thread of its own: nothing else stands still when that hangs.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Protocol

from zramd.core.system.process import name_thread
from zramd.core.system.threads import start_thread
from zramd.errors import is_shortage, sentence
from zramd.server.log import say

NICE = 10  # of a thread whose work can wait as long as clients have any
PAUSE = 0.1  # seconds, where there is no memory to wait longer


class Part(Protocol):
    """What the thread does one turn of after the other.

    title: what it is called in a sentence. failure: why the last turn failed, or "". yields: whether it rests
    now so that clients have the processor. wake: calls for a turn at once, from any thread.
    """

    title: str
    failure: str
    yields: bool
    wake: Callable[[], None]

    @property
    def interval(self) -> float:
        """Seconds to wait after a turn that found no memory."""

    def tick(self) -> float:
        """Do what is due, at most one step, and return the seconds until the next is due."""

    def begin(self) -> None:
        """Take note that turns will come."""

    def end(self) -> None:
        """Take note that none will come any more."""


class _Turn:
    def __init__(self, part: Part) -> None:
        self.part = part
        self.due = 0.0
        self.woken = True

    @property
    def when(self) -> float:
        return 0.0 if self.woken else self.due


class Worker:
    """The thread that serves some parts."""

    def __init__(
        self,
        *parts: Part,
        name: str = "zramd-worker",
        nice: int = NICE,
        prepare: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`prepare` is what the thread does first; it may raise OSError, which is passed over.

        nice: 0 leaves it as it is.
        """
        self._name = name
        self._nice = nice
        self._prepare = prepare
        self._clock = clock
        self._turns = [_Turn(part) for part in parts]
        self._wake = threading.Event()
        self._stopping = False
        self.thread: threading.Thread | None = None
        for turn in self._turns:
            turn.part.wake = partial(self._call, turn)

    @property
    def is_alive(self) -> bool:
        """Whether its thread has begun and not ended."""
        return self.thread is not None and self.thread.is_alive()

    def start(self) -> None:
        """Start the thread; only after the process has forked for the last time."""
        for turn in self._turns:
            turn.part.begin()
        self.thread = start_thread(self._name, self._work)

    def stop(self, patience: float | None = None) -> None:
        """End the thread; waits for the step it is in, at most `patience` seconds.

        A thread that is in a longer one ends after it, if the process does not end before.
        """
        self._stopping = True
        self._wake.set()
        if self.thread is not None:
            self.thread.join(patience)
            if self.is_alive:
                say(
                    f"{', '.join(turn.part.title for turn in self._turns)} is still under way: not waited for"
                )

    def turn(self) -> float:
        """Let the part have a turn that is due the longest; return the seconds until the next is due."""
        turn = min(self._turns, key=lambda turn: turn.when)
        now = self._clock()
        if turn.when > now:
            return turn.when - now
        turn.woken = False  # before the turn: whoever calls during it has another one
        delay = self._tick(turn)
        turn.due = self._clock() + delay
        return delay if turn.part.yields else 0.0

    def _tick(self, turn: _Turn) -> float:
        part = turn.part
        try:
            delay = part.tick()
            part.failure = ""
            return delay
        except Exception as error:
            part.yields = False
            if is_shortage(error):
                part.failure = sentence(error)
                return part.interval
            part.failure = f"{type(error).__name__}: {error}"
            say(f"{part.title} stopped: {part.failure}")
            self._turns.remove(turn)
            part.end()
            return 0.0

    def _call(self, turn: _Turn) -> None:
        turn.woken = True
        self._wake.set()

    def _rest(self, seconds: float) -> None:
        """Sleep until there is something to do, at most so many seconds."""
        try:
            self._wake.wait(seconds)
        except (MemoryError, RuntimeError):  # a wait takes memory, for a lock
            time.sleep(min(seconds, PAUSE))
        self._wake.clear()

    def _work(self) -> None:
        name_thread(self._name)
        if self._nice:
            thread = threading.get_native_id()
            with suppress(OSError):  # a sandbox may forbid it: clients then compete on equal terms
                nice = max(self._nice, os.getpriority(os.PRIO_PROCESS, thread))
                os.setpriority(os.PRIO_PROCESS, thread, nice)
        with suppress(OSError):
            self._prepare()
        try:
            while self._turns and not self._stopping:
                delay = self.turn()
                if delay > 0:
                    self._rest(delay)
        finally:
            for turn in self._turns:
                turn.part.end()
