"""What a new server does when it takes over from another one: its part of `zramd.contract.handover`."""

import errno
import os
import signal
import time
from contextlib import suppress

from zramd import lockfile
from zramd.contract import handover, rundir
from zramd.errors import RundirError, is_shortage, sentence
from zramd.process import pidfd
from zramd.process.steps import step
from zramd.server import sockets

PAUSE = 0.002  # seconds between two looks whether a successor serves


def wait(folder: str) -> None:
    """Say that we are ready to serve this run folder, and return when the server there has ended.

    Tells it to end, unless we are on standby. However long it takes: it has been told, or may end at any
    time, and this one must serve then. Raises RundirError when the command that started us ends before it
    says "go", and when the server is stopped for whom we stand by.
    """
    link, process = handover.link_and_process()
    if handover.is_standby():
        _stand_by(folder, link, process)
        return
    if link != handover.NOBODY:
        _await_go(link)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, sockets.HAND_OVER)
    step("successor.told")
    pidfd.has_ended(process, None)
    os.close(process)
    if link != handover.NOBODY:
        os.close(link)
    step("successor.alone")


def _await_go(link: int) -> None:
    """Say that we are ready, and return once the command that started us lets us go. Raises RundirError."""
    answer, why = b"", ""
    try:
        os.write(link, handover.READY)
        answer = os.read(link, 1)
    except OSError as error:  # of a command that has ended there is nothing more to say
        why = f": {sentence(error)}" if is_shortage(error) else ""
    if answer != handover.GO:
        raise RundirError(f"the restart was given up{why}")
    step("successor.go")
    with suppress(OSError):  # the command has ended: what it has begun goes on
        os.write(link, handover.TELLING)


def _stand_by(folder: str, link: int, process: int) -> None:
    """Say that we are ready, and return once the server has ended and nobody else takes over from it.

    Raises RundirError when it was stopped, or another server is on standby already.
    """
    place = rundir.Standby(folder)
    with suppress(OSError):  # the command has ended: nobody is to know
        os.write(link, handover.READY)
    os.close(link)
    step("standby.ready")
    while True:
        pidfd.has_ended(process, None)
        os.close(process)
        step("standby.alone")
        following = _successor(folder)
        if following is None:
            break
        process = following
    place.leave()


def _successor(folder: str) -> int | None:
    """Return the pidfd of the server that has taken over from the one that has ended; None: we are to.

    One that has left to a successor has removed its control socket, one that crashed has not. The successor
    has the turn, the folder's lock, until it serves: see zramd.control.life. (An attach has it too, but that
    may wait for us.)
    """
    while True:
        with suppress(OSError, RundirError):  # it cannot be known, or one has just ended: look again
            pid = rundir.holder(folder)
            crashed = os.path.exists(f"{folder}/{rundir.CONTROL_SOCKET}")
            if pid is None and (crashed or not lockfile.folder_is_taken(folder)):
                return None
            if pid:
                other = os.pidfd_open(pid)
                if rundir.holder(folder) == pid:
                    return other
                os.close(other)
        time.sleep(PAUSE)


def serving(folder: str) -> None:
    """Let others have their turn with the server of this run folder: it serves now.

    Raises OSError when the folder cannot be looked at: no other command gets its turn until this is called
    again.
    """
    fd = os.environ.get(handover.TURN, "")
    if fd.isdigit():
        try:
            # What another process was given with the same word is not ours to close.
            is_it = os.path.samestat(os.fstat(int(fd)), os.stat(folder))
        except OSError as error:
            if error.errno not in (errno.EBADF, errno.ENOENT):
                raise
            is_it = False
        if is_it:
            os.close(int(fd))
    os.environ.pop(handover.TURN, None)
