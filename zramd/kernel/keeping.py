"""What the keepers of both kinds of kernel devices share: their log, their eye on the server, their life.

A keeper is the process that `zramd attach` leaves behind: zramd.kernel.keeper for NBD, ublkkeeper for ublk.
It prints "ok" and the device's number once all is well, or one sentence that says why not.
"""

import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from zramd.contract import rundir
from zramd.errors import RundirError, SwapError, ZramdError, reason

RETRY = 0.01  # seconds between two looks for a new server; a server takes 100 to start
RETRY_LATER = 0.2  # the same, once it has been away for RETRY_SOON
RETRY_SOON = 5.0
LOOK = 60.0  # seconds between two looks whether the device is still there
LEAVE = 1.0  # seconds for which a keeper that is told to end waits for its device to go
HEAP_BYTES = 1 << 20


class KernelLog:
    """The kernel's log, where what the kernel says of the device stands too."""

    def __init__(self) -> None:
        self._fd = -1
        with suppress(OSError):  # a container may have none
            self._fd = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC | os.O_NONBLOCK)

    def say(self, device: str, sentence: str) -> None:
        """Write a sentence about a device, such as nbd0. It never blocks."""
        with suppress(OSError):
            os.write(self._fd, f"zramd: {device}: {sentence}\n".encode())


class ServerWatch:
    """The process that holds a run folder: `poll` has `fd` readable when it has ended."""

    def __init__(self, folder: str, poll: select.poll) -> None:
        self.fd = -1
        self._folder = folder
        self._poll = poll

    def begin(self) -> bool:
        """Watch the process that holds the folder now; say whether there is one."""
        self.end()
        with suppress(OSError, RundirError):
            pid = rundir.holder(self._folder)
            if pid:
                server = os.pidfd_open(pid)
                try:
                    # Else it has left its number to another process.
                    if rundir.holder(self._folder) == pid:
                        self._poll.register(server, select.POLLIN)
                        self.fd = server
                finally:
                    if self.fd != server:
                        os.close(server)
        return self.fd >= 0

    def end(self) -> None:
        """Watch it no more."""
        if self.fd >= 0:
            self._poll.unregister(self.fd)
            os.close(self.fd)
            self.fd = -1


class Keeps(Protocol):
    """A keeper of one kind."""

    def attach(self) -> None:
        """Attach the device and print "ok" and its number. Raises ZramdError, OSError: then it is not."""

    def keep(self) -> None:
        """Look after the device until it is gone."""

    def leave(self) -> None:
        """Leave it, because somebody has said so by a SIGTERM."""


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Have a SIGTERM wait: what the kernel was told just now, it is also told to undo."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM,))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def ready(number: int) -> None:
    """Say that all is well. Raises OSError when nobody is there any more to be told."""
    sys.stdout.write(f"ok {number}\n")
    sys.stdout.flush()


def run(make: Callable[[], Keeps]) -> int:
    """Be the keeper that `make` returns, and return the exit status.

    SIGTERM: the command that attaches has given up, or the one that detaches has done it.
    """
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(1))
    try:
        keeper = make()
        keeper.attach()
    except SwapError as error:
        print(error.missing)
        return 1
    except (ZramdError, OSError) as error:
        print(reason(error) if isinstance(error, OSError) else error)
        return 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in range(3):
            os.dup2(null, fd)
        keeper.keep()
    except SystemExit:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        keeper.leave()
    return 0
