"""The thread that looks after a server: whatever fails, it goes on, and no signal to stop is lost."""

import os
import select
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

from zramd.core.system.process import name_thread
from zramd.server.trouble import Troubles

SOON = 0.5  # seconds until the chores: a server that takes over has others to answer first
PAUSE = 0.1  # seconds after a failure: what is short then may be there again
DISTURBED = "housekeeping is disturbed"


class Chore(NamedTuple):
    """What is to be done again and again."""

    failing: str  # the beginning of the sentence that reports a failure
    work: Callable[[], None]
    interval: Callable[[], float]  # seconds, 0: not now


class Housekeeper:
    """Waits for what comes to a pipe and to others, and does chores."""

    def __init__(
        self,
        wake: int,
        stopping: threading.Event,
        troubles: Troubles,
        obey: Callable[[bytes], None],
        chores: list[Chore],
    ) -> None:
        """`wake` is a pipe without waiting that gets the numbers of signals, and zeros that only wake.

        `obey` gets the signals. It gets them again if it fails. The thread ends once `stopping` is set.
        """
        self._wake = wake
        self._stopping = stopping
        self._troubles = troubles
        self._obey = obey
        self._chores = chores
        self._due = dict.fromkeys((chore.failing for chore in chores), time.monotonic() + SOON)
        self._signals = b""
        self._answers: dict[int, Callable[[], None]] = {}
        self._poll = select.poll()
        self._poll.register(wake, select.POLLIN)

    def listen(self, fd: int, answer: Callable[[], None]) -> None:
        """Have `answer` called whenever there is something to read; before the thread starts."""
        self._answers[fd] = answer
        self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """Be the thread."""
        name_thread("zramd")
        while not self._stopping.is_set():
            try:
                self._guarded_turn()
            except Exception:  # not even memory to report it, or to wait: nothing may end this
                time.sleep(PAUSE)

    def _guarded_turn(self) -> None:
        try:
            self.turn()
        except Exception as error:
            self._troubles.begin(DISTURBED, error)
            self._stopping.wait(PAUSE)
        else:
            self._troubles.over(DISTURBED)

    def turn(self) -> None:
        """Wait until there is something to do, and do it. Raises what fails; signals come first."""
        ready = self._wait()
        if self._wake in ready:
            with suppress(BlockingIOError):
                self._signals += os.read(self._wake, 64)
        failure = None
        try:
            if any(self._signals):
                self._obey(self._signals)
            self._signals = b""
        except Exception as error:  # the signals stay, and whatever asks what is wrong gets an answer
            failure = error
        if self._stopping.is_set():
            return
        for fd, answer in self._answers.items():
            if fd in ready:
                try:
                    answer()
                except Exception as error:
                    failure = error
        for chore in self._chores:
            self._do(chore)
        if failure is not None:
            raise failure

    def _wait(self) -> set[int]:
        """Return what can be read, once there is something, or a chore is due."""
        try:
            return {fd for fd, _ in self._poll.poll(self._seconds() * 1000)}
        except (OSError, MemoryError) as error:
            # Then nobody knows: look at all. There may be a signal.
            self._troubles.begin(DISTURBED, error)
            self._stopping.wait(PAUSE)
            return {self._wake, *self._answers}

    def _seconds(self) -> float:
        """Return how long nothing is due; an hour at most."""
        now = time.monotonic()
        least = 3600.0
        for chore in self._chores:
            if interval := chore.interval():
                # An interval may have become shorter since.
                self._due[chore.failing] = min(self._due[chore.failing], now + interval)
                least = min(least, self._due[chore.failing] - now)
        return max(least, 0.0)

    def _do(self, chore: Chore) -> None:
        interval, now = chore.interval(), time.monotonic()
        if not interval or now < self._due[chore.failing]:
            return
        self._due[chore.failing] = now + interval
        try:
            chore.work()
        except Exception as error:
            self._troubles.begin(chore.failing, error)
        else:
            self._troubles.over(chore.failing)
