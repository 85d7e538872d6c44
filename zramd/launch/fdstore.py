"""What a service manager keeps for us from one server to the next: with state=systemd the memory file, with
`listen` the sockets, on which clients that connect again then queue while no server runs.

The manager gets it once (FDSTORE=1), holds it while no server runs, and passes it to the next one among the
descriptors from 3 on, after the listening sockets. nbdkit takes all of those for listening sockets; so the
launcher takes ours out before it becomes nbdkit, and tells the server by the environment where it is.
"""

import os
from contextlib import suppress
from typing import NamedTuple

from zramd.contract import handover
from zramd.contract.handover import KEPT_FD, SYSTEMD
from zramd.errors import StateError, ZramdError
from zramd.process import inherited, notify

_NAME = "zramd-state"


class Kept(NamedTuple):
    """What was passed to this process. memory: the file's descriptor, -1 if it is not there.

    listens: the name of the sockets that are passed, where they are those of a `listen`, else ''.
    """

    memory: int
    listens: str


def prepare(kept: int, theirs: int = -1) -> None:
    """Have the server find the memory file `kept`, a new one if it is -1. Raises StateError.

    `theirs`, if it is not -1, is the file of a server from which this one takes over: then it is that. The
    manager may have let go of it meanwhile.
    """
    if "NOTIFY_SOCKET" not in os.environ:
        raise StateError(
            f"state={SYSTEMD} needs systemd to keep the data: use it in a service with Type=notify and "
            "FileDescriptorStoreMax=1, or use a file such as /dev/shm/NAME.state"
        )
    known = kept >= 0 and (theirs < 0 or os.path.sameopenfile(kept, theirs))
    if not known:
        manager = notify.Manager()
        new = inherited.high(os.memfd_create(_NAME, 0)) if theirs < 0 else theirs
        # Before there is any data in a new one. No poll: it is always readable, and must stay.
        try:
            if kept >= 0:
                manager.forget(_NAME)
            kept = new
            manager.store(_NAME, kept)
        except ZramdError as error:
            raise StateError(
                f"state={SYSTEMD}: {error}, so it would not keep the data: start the service again"
            ) from None
    os.set_inheritable(kept, True)
    os.environ[KEPT_FD] = str(kept)


def take_out() -> Kept:
    """Take the memory file out of the descriptors that were passed to us, and say what there is.

    The sockets among them stay, one after the other from 3 on. Raises UsageError.
    """
    numbers = inherited.passed()
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    kept, rest, others = -1, [], set()
    for fd, name in zip(numbers, [*names, *[""] * len(numbers)], strict=False):
        if name != _NAME:
            rest.append(fd)
            others.add(name)
        elif kept < 0:
            kept = inherited.high(fd, inheritable=True)
    for place, fd in enumerate(rest, inherited.FIRST):
        if place != fd:
            os.dup2(fd, place)
    for fd in numbers[len(rest) :]:
        with suppress(OSError):  # it was not passed: whatever looks at it says so
            os.close(fd)
    if rest:
        os.environ["LISTEN_FDS"] = str(len(rest))
    else:
        _forget()
    (name,) = others if len(others) == 1 else ("",)
    return Kept(kept, name if handover.is_listens(name) else "")


def let_go(name: str, sockets: list[int]) -> None:
    """Close sockets of an address on which nobody is to listen any more, and have the manager do so."""
    for fd in sockets:
        os.close(fd)
    _forget()
    notify.Manager().tell("FDSTOREREMOVE=1", f"FDNAME={name}")


def _forget() -> None:
    os.environ.pop("LISTEN_FDS", None)
    os.environ.pop("LISTEN_PID", None)
