"""One command at a time begins, ends, replaces or attaches the server of a device.

The lock is on the run folder itself, so it leaves nothing behind. A command that starts a server passes it
on: the server keeps others off until it serves, or has ended, also when the command is killed meanwhile.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from zramd import lockfile
from zramd.contract import handover, rundir
from zramd.errors import DeviceError, RundirError, is_shortage, reason, sentence
from zramd.process import inherited
from zramd.process.steps import step

PATIENCE = 10.0  # seconds: a start or a stop takes one, a large state or a busy machine a few
# Of a service, which nobody tries again: an emulated machine at its limit starts a server on standby in 27 s.
LONG_PATIENCE = 120.0


class Turn:
    """The right to begin or end the server in one run folder, until `done`."""

    def __init__(self, folder: str, fd: int, made: bool) -> None:
        self.folder = folder
        self.fd = fd
        self.made = made  # whether the folder is zramd's to remove

    def words(self) -> dict[str, str]:
        """Return what a server that is started finds in its environment."""
        return {handover.TURN: str(self.fd), **({handover.MADE: "1"} if self.made else {})}

    def done(self) -> None:
        """Let others have their turn, unless that is so already.

        The folder goes if it was made for a server that did not come.
        """
        if self.fd < 0:
            return
        with suppress(OSError, RundirError):
            is_ours = lockfile.stands_at(self.fd, self.folder, follow=True)
            if self.made and is_ours and rundir.holder(self.folder) is None:
                os.rmdir(self.folder)
        os.close(self.fd)
        self.fd = -1


@contextmanager
def turn(folder: str, name: str, make: bool = False, *, patience: float | None = None) -> Iterator[Turn]:
    """Wait until nobody else begins or ends the server in a run folder, and keep others off until `done`.

    With `make` the folder is made if it is not there. Raises DeviceError when it takes longer than `patience`
    seconds (None: PATIENCE) or the folder cannot be had, RundirError.
    """
    try:
        mine = take(folder, name, make, patience=patience)
    except FileNotFoundError:
        raise DeviceError(f"{name} has stopped meanwhile") from None
    except OSError as error:
        why = sentence(error) if is_shortage(error) else reason(error)
        raise DeviceError(f"'{folder}' cannot be used: {why}") from None
    try:
        yield mine
    finally:
        mine.done()


def take(folder: str, name: str, make: bool = False, *, patience: float | None = None) -> Turn:
    """Wait for our turn, and return it. Raises as `turn`, and OSError if there is no such folder."""
    end = time.monotonic() + (PATIENCE if patience is None else patience)
    made = waits = False
    while True:
        try:
            if make:
                made = rundir.make(folder) or _is_left(folder) or made
            fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if make and time.monotonic() < end:
                continue  # a server that stopped has just removed it
            raise
        try:
            if lockfile.take(fd):
                if lockfile.stands_at(fd, folder, follow=True):
                    return Turn(folder, inherited.high(fd), made)
                continue  # it was removed since we opened it
            if time.monotonic() > end:
                raise DeviceError(
                    f"{name} is being started, stopped, restarted or attached by another command: "
                    "try again when that is done"
                )
            if not waits:
                step("turn.waits")
                waits = True
            time.sleep(0.01)
        finally:
            os.close(fd)


def is_busy(folder: str) -> bool:
    """Say whether somebody begins or ends the server in a run folder."""
    return lockfile.folder_is_taken(folder)


def _is_left(folder: str) -> bool:
    """Say whether a folder is what a killed process left. (In an unusual place it may be the user's.)"""
    return os.path.dirname(folder) == rundir.base() and rundir.is_ours_alone(folder)
