"""A server takes over from another one, which holds the same state, and clients see only a pause.

`zramd restart` steers both:

    old     sends its listening sockets, and goes on
    new     starts with them, does all that may fail or takes time, says that it is ready, and waits
    old     on SIGUSR1 (sockets.HAND_OVER): accepts nobody; who is connecting gets done; answers what it has
            read, ends
    new     takes the run folder and the state, and answers those who have come meanwhile

A listening socket always exists, so who connects again is never refused: he waits in its queue. And nobody is
cut off while he connects: of that qemu makes a pause of a second.
"""

import os

WAITS = "ZRAMD_TAKES_OVER"  # in the environment of the new server: the descriptor on which it waits
MADE = "ZRAMD_RUNDIR_MADE"  # and whether zramd made the run folder

SYSTEMD = "systemd"  # as state=: the service manager keeps the file, see zramd.fdstore
KEPT_FD = "ZRAMD_STATE_FD"  # in the environment: which descriptor that is


def takes_over() -> bool:
    """Say whether this process is to take over from another one."""
    return WAITS in os.environ


def wait() -> None:
    """Say that we are ready, and wait until we are to go on.

    If who started us ends, go on too: either the old server has ended, or its locks tell that it has not.
    """
    fd = int(os.environ[WAITS])
    try:
        os.write(fd, b"ready")
        os.read(fd, 1)
    except OSError:
        pass
    os.close(fd)
