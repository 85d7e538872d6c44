"""What a new server does when it takes over from another one: its part of `zramd.contract.handover`."""

import errno
import os
import signal
from contextlib import suppress

from zramd.contract import handover
from zramd.errors import RundirError, is_shortage, sentence
from zramd.process import pidfd
from zramd.process.steps import step
from zramd.server import sockets


def wait() -> None:
    """Say that we are ready, wait until we are to go on, tell the old server, and wait for its end.

    However long that takes: the old one has been told, and this one must serve when it has gone. Raises
    RundirError when the command that started us ends before it says "go".
    """
    link, process = (int(word) for word in os.environ[handover.TAKES_OVER].split()[:2])
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
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, sockets.HAND_OVER)
    step("successor.told")
    pidfd.has_ended(process, None)
    os.close(process)
    os.close(link)
    step("successor.alone")


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
