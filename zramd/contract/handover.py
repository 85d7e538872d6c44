"""A server takes over from another one that holds the same state, and clients see only a pause.

`zramd restart` begins it. From "go" on the new server completes it, whatever becomes of the command:

    old     sends its listening sockets, and goes on
    new     starts with them, does all that may fail or takes time, says that it is ready, and waits
    command says "go". If the command ends before that, the new server ends too, and the old one goes on
    new     says that it tells the old one to leave, and does: SIGUSR1 (sockets.HAND_OVER)
    old     lets its clients go and ends: see zramd.server.leaving
    new     takes the run folder and the state, and answers the clients that have queued meanwhile

The listening socket never closes, so a client that connects again is queued, not refused.

A stop that comes meanwhile counts: a server that is stopped removes its pid file, one that hands over (or
crashes) leaves it, and by that the new server knows whether to go on.
"""

import errno
import os
from contextlib import suppress

from zramd.errors import RundirError, is_shortage, sentence
from zramd.process import pidfd
from zramd.process.steps import step

TAKES_OVER = "ZRAMD_TAKES_OVER"  # in the environment of the new server: `Order`, as words
MADE = "ZRAMD_RUNDIR_MADE"  # whether zramd made the run folder
TURN = "ZRAMD_TURN"  # the descriptor by which others are kept off until we serve: see zramd.control.life

SYSTEMD = "systemd"  # as state=: the service manager keeps the file, see zramd.launch.fdstore
KEPT_FD = "ZRAMD_STATE_FD"  # in the environment: which descriptor that is

# What command and new server say to each other.
READY = b"r"
GO = b"!"
TELLING = b"t"

STOPPED = "it was stopped meanwhile"  # what the new server says then


def takes_over() -> bool:
    """Say whether this process is to take over from another one."""
    return TAKES_OVER in os.environ


def order(link: int, process: int, leaves_pid: bool) -> str:
    """Return what the new server is told: its end of the link, the old one's pidfd, whether that is new.

    Servers before did not leave their pid file.
    """
    return f"{link} {process} {int(leaves_pid)}"


def must_be_left() -> bool:
    """Say whether this process takes over from a server that leaves its pid file, unless it is stopped."""
    return os.environ.get(TAKES_OVER, "").endswith(" 1")


def wait() -> None:
    """Say that we are ready, wait until we are to go on, tell the old server, and wait for its end.

    However long that takes: the old one has been told, and this one must serve when it has gone. Raises
    RundirError when the command that started us ends before it says "go".
    """
    import signal

    from zramd.server import sockets

    link, process = (int(word) for word in os.environ[TAKES_OVER].split()[:2])
    answer, why = b"", ""
    try:
        os.write(link, READY)
        answer = os.read(link, 1)
    except OSError as error:  # of a command that has ended there is nothing more to say
        why = f": {sentence(error)}" if is_shortage(error) else ""
    if answer != GO:
        raise RundirError(f"the restart was given up{why}")
    step("successor.go")
    with suppress(OSError):  # the command has ended: what it has begun goes on
        os.write(link, TELLING)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, sockets.HAND_OVER)
    step("successor.told")
    pidfd.has_ended(process, None)
    os.close(process)
    os.close(link)
    step("successor.alone")


def serving(folder: str) -> None:
    """Let others have their turn with the server of this run folder: it serves now.

    Raises OSError when the folder cannot be looked at: nobody has his turn until this was called again.
    """
    fd = os.environ.get(TURN, "")
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
    os.environ.pop(TURN, None)
