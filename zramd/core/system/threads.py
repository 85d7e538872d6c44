"""Starts threads, none of which is waited for where memory is short."""

import _thread
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from zramd.core.system.threadstate import begin

_PAUSE = 0.05  # seconds between two tries


class _Thread(threading.Thread):
    """A thread that the process's end does not wait for, and whose start never hangs.

    Python's own waits until the new thread says that it has begun. One that finds no memory for its first
    frame ends without a word, and the thread that started it waits for ever.
    """

    def __init__(self, name: str, work: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        super().__init__(name=name, daemon=True)
        self._work = work
        self._arguments = arguments
        self._news = _thread.allocate_lock()  # held until it has begun, or ended without that
        self._running = _thread.allocate_lock()
        self.has_begun = False
        self._number: int | None = None
        self._number_in_python: int | None = None

    @property
    def ident(self) -> int | None:
        """Python's number of the thread, None before it was started."""
        return self._number_in_python

    @property
    def native_id(self) -> int | None:
        """The kernel's number of the thread, None before it has begun."""
        return self._number

    def start(self) -> None:
        """Start it; raises RuntimeError when that cannot be."""
        self._news.acquire()
        self._running.acquire()
        self._number_in_python = _thread.start_new_thread(begin, (self._enter, self._news, self._running))
        self._news.acquire()
        if not self.has_begun:
            raise RuntimeError("no memory for a thread")

    def _enter(self) -> None:
        self._number = threading.get_native_id()
        self.has_begun = True
        self._news.release()
        try:
            self._work(*self._arguments)
        except BaseException:
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), self)))

    def join(self, timeout: float | None = None) -> None:
        """Wait until it has ended, at most `timeout` seconds."""
        if self._running.acquire(timeout=-1 if timeout is None else timeout):
            self._running.release()

    def is_alive(self) -> bool:
        """Say whether it has not ended yet."""
        return self._running.locked()


def start_thread(
    name: str, work: Callable[..., Any], *arguments: Any, patience: float = 2.0
) -> threading.Thread:
    """Start a thread that the process's end does not wait for; return it.

    Raises RuntimeError if there are too many threads or there is no memory for one, still after `patience`
    seconds: a server that was here before may be about to end.
    """
    end = time.monotonic() + patience
    while True:
        thread = _Thread(name, work, arguments)
        try:
            thread.start()
            return thread
        except RuntimeError:
            if time.monotonic() >= end:
                raise
            time.sleep(_PAUSE)
