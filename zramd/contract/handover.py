"""A server takes over from another one that holds the same state, and clients see only a pause.

`zramd restart` begins it. From "go" on the new server completes it, whatever becomes of the command:

    old     sends its listening sockets, and goes on
    new     starts with them, does all that may fail or takes time, says that it is ready, and waits
    command says "go". If the command ends before that, the new server ends too, and the old one goes on
    new     says that it asks the old one to leave, and does: SIGUSR1 (sockets.HAND_OVER)
    old     lets its clients go and ends: see zramd.server.leaving
    new     takes the run folder and the state, and answers the clients that have queued meanwhile

The listening socket never closes, so a client that connects again is queued, not refused.

A server on standby (`zramd.launch.standby`) takes over as well, but tells nobody: it does all that may fail,
says that it is ready, and waits until the old one has ended, however that comes. Then it goes on as after a
crash, unless another server is the next one; then it waits for the end of that.

`zramd serve` takes over from one that was on standby and serves (`zramd.launch.inplace`). That process is the
new server itself, and no command waits for it: it needs no "go".

A stop that comes meanwhile counts: a server that is stopped removes its pid file, one that hands over (or
crashes) leaves it, and by that the new server knows whether to go on.
"""

import os

TAKES_OVER = "ZRAMD_TAKES_OVER"  # in the environment of the new server: `Order`, as words
MADE = "ZRAMD_RUNDIR_MADE"  # whether zramd made the run folder
TURN = "ZRAMD_TURN"  # the descriptor by which others are kept off until we serve: see zramd.control.life

SYSTEMD = "systemd"  # as state=: the service manager keeps the file, see zramd.launch.fdstore
KEPT_FD = "ZRAMD_STATE_FD"  # in the environment: which descriptor that is
UNIT = "ZRAMD_UNIT"  # in the environment of one on standby: the service for whose server it is

_LISTENS = "zramd-listen"  # how the service manager knows the sockets of `listen` that it keeps
# What command and new server say to each other.
READY = b"r"
GO = b"!"
TELLING = b"t"

NOBODY = -1  # instead of a link
_STANDBY = "standby"
STOPPED = "it was stopped meanwhile"  # what the new server says then


def listens(address: str) -> str:
    """Return the name by which the service manager keeps the sockets of this `listen`; it takes no colons."""
    return f"{_LISTENS} {address.replace(':', ' ')}"


def is_listens(name: str) -> bool:
    """Say whether the service manager keeps sockets of some `listen` by this name."""
    return name.startswith(f"{_LISTENS} ")


def takes_over() -> bool:
    """Say whether this process is to take over from another one."""
    return TAKES_OVER in os.environ


def order(link: int, process: int, leaves_pid: bool, *, standby: bool = False) -> str:
    """Return what the new server is told: its end of the link, the old one's pidfd, whether that is new.

    link: NOBODY if no command waits for it. Servers before did not leave their pid file. `standby`: it waits
    for the old one's end.
    """
    return f"{link} {process} {int(leaves_pid)}" + (f" {_STANDBY}" if standby else "")


def _words() -> list[str]:
    return os.environ.get(TAKES_OVER, "").split()


def link_and_process() -> tuple[int, int]:
    """Return the descriptors that `order` has named."""
    link, process = _words()[:2]
    return int(link), int(process)


def must_be_left() -> bool:
    """Say whether this process takes over from a server that leaves its pid file, unless it is stopped."""
    return _words()[2:3] == ["1"]


def is_standby() -> bool:
    """Say whether this process is on standby, or was until it took over."""
    return _words()[3:] == [_STANDBY]
