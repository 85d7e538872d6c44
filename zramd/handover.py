"""A server takes over from another one, which holds the same state, and clients see only a pause.

`zramd restart` begins it, and the new server ends it, whatever becomes of the command meanwhile:

    old     sends its listening sockets, and goes on
    new     starts with them, does all that may fail or takes time, says that it is ready, and waits
    command says "go". If it ends before that, the new one ends too, and the old one goes on
    new     says that it tells the old one, and does: SIGUSR1 (sockets.HAND_OVER)
    old     accepts nobody; who is connecting gets done; answers what it has read, ends
    new     takes the run folder and the state, and answers those who have come meanwhile

A listening socket always exists, so who connects again is never refused: he waits in its queue. And nobody is
cut off while he connects: of that qemu makes a pause of a second.

If somebody stops the old server meanwhile, that counts: it removes its pid file then, which it leaves in a
hand-over (and in a crash), and the new one does not go on.
"""

import errno
import os
import select
from contextlib import suppress

from zramd.errors import RundirError
from zramd.steps import step

TAKES_OVER = "ZRAMD_TAKES_OVER"  # in the environment of the new server: `Order`, as words
MADE = "ZRAMD_RUNDIR_MADE"  # whether zramd made the run folder
TURN = "ZRAMD_TURN"  # the descriptor by which others are kept off until we serve: see zramd.life

SYSTEMD = "systemd"  # as state=: the service manager keeps the file, see zramd.fdstore
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

    However long that takes: it has been told, and somebody must serve when it has gone. Raises RundirError
    when who started us ends before.
    """
    import signal

    from zramd import sockets

    link, process = (int(word) for word in os.environ[TAKES_OVER].split()[:2])
    answer = b""
    with suppress(OSError):
        os.write(link, READY)
        answer = os.read(link, 1)
    if answer != GO:
        raise RundirError("the restart was given up")
    step("successor.go")
    with suppress(OSError):  # the command has ended: what it has begun goes on
        os.write(link, TELLING)
    with suppress(ProcessLookupError):
        signal.pidfd_send_signal(process, sockets.HAND_OVER)
    step("successor.told")
    ended = select.poll()
    ended.register(process, select.POLLIN)
    ended.poll()
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
