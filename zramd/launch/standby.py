"""A server that waits, with all that it needs, for the end of the one that serves: then it takes over.

After a crash a new server has to be started, and to have memory for it, which is just what a machine may lack
that swaps to the device. One on standby has both: see zramd.contract.handover.
"""

from zramd.control import life, servers
from zramd.launch import takeover
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
