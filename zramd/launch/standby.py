"""A server that waits, with all that it needs, for the end of the one that serves: then it takes over.

After a crash a new server has to be started, and to have memory for it, which is just what a machine may lack
that swaps to the device. One on standby has both: see zramd.contract.handover. `zramd attach` puts the first
one there, and the keeper of its device the next ones, by `main`.
"""

import os
import sys

from zramd.contract import rundir
from zramd.control import life, servers
from zramd.errors import DeviceError, ZramdError, reason, sentence
from zramd.kernel import attached, keeping
from zramd.launch import processes, takeover
from zramd.launch.wishes import Wanted
from zramd.process import interrupts


def start(name: str | None, folder: str | None = None) -> int:
    """Put a server on standby for a device, and return its process once it is ready.

    Raises DeviceError, UsageError.
    """
    interrupts.interruptible()
    served = servers.look(name, folder)
    with (
        interrupts.told(lambda: f"{served.name} has no server on standby"),
        life.turn(served.path, served.name) as turn,
    ):
        served.look_again()
        pid = takeover.stand_by(served, turn)
        interrupts.finish()
    return pid


def wanted(served: servers.Served, wish: Wanted) -> bool:
    """Say whether a server of front=ublk is to have another on standby.

    Raises DeviceError when the user wants one, and there can be none.
    """
    if wish.standby is False or not (wish.standby or wish.swap):
        return False
    process = served.process()
    try:
        why = takeover.no_standby(served, process, served.ask_json("GET", "/settings"))
    finally:
        process.close()
    if why and wish.standby:
        raise DeviceError(why)
    return not why


def start_for(name: str, folder: str) -> None:
    """Put a server on standby for a device that is attached, if none is. Raises ZramdError, OSError.

    Whoever detaches removes the record, and then ends the standby: here both come the other way round.
    """
    if rundir.standby(folder) is None:
        start(name, folder)
    if attached.find(name) is None:
        takeover.end_standby(folder)


def main(words: list[str]) -> int:
    """Do that for a keeper: for a name, run folder and device; return 0 if there is one now.

    What fails is told in the kernel's log, unless a further word says that it has failed before.
    """
    name, folder, device, *others = words
    stand_in = processes.find_stand_in(name, folder)
    if stand_in is not None:
        stand_in[0].close()
        return 1  # the one that its service starts now is to have one
    try:
        start_for(name, folder)
    except (ZramdError, OSError) as error:
        if rundir.standby(folder) is not None:
            return 0  # a restart has been faster
        if others:
            return 1
        why = reason(error) if isinstance(error, OSError) else sentence(error)
        keeping.KernelLog().say(device, f"no server is on standby: {why}")
        return 1
    return 0


if __name__ == "__main__":
    # A keeper is real-time; a server on standby is not before it has to act.
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    sys.exit(main(sys.argv[1:]))
