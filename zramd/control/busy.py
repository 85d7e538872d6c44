"""Whether this machine's kernel uses a device: then it must not be stopped, nor saved as it stands."""

import time

from zramd.control import servers
from zramd.errors import DeviceError
from zramd.kernel import attached, swap

LOOK_TIMEOUT = 2.0  # seconds; one that does not answer is stopped all the same


def refuse(served: servers.Served, what: str, more: str = "") -> None:
    """Raise DeviceError when this machine's kernel swaps to a device or has it mounted.

    `more` ends the sentence. Waits for an attach or a detach that is under way; none can begin while the
    caller has the server's turn.
    """
    try:
        stats = served.ask_json("GET", "/stats", timeout=LOOK_TIMEOUT)
        name, size = stats["name"], stats["disksize"]
    except DeviceError:  # it does not answer: then only what `zramd attach` has made is known
        name, size = served.name, 0
    end = time.monotonic() + attached.TURN_TIMEOUT
    while True:
        changes = attached.is_busy(name)  # first: what it changes must be seen below
        for device in attached.devices(name, size):
            for use in swap.uses(device):
                what_for, command = f"'{use}'", f"umount {device}"
                if use == swap.SWAP:
                    what_for, command = "swap", swap.swapoff_command([device], name)
                raise DeviceError(
                    f"cannot {what} {name}: {device} is in use as {what_for}: run '{command}' first{more}"
                )
        if not changes:
            return
        if time.monotonic() > end:
            raise DeviceError(
                f"cannot {what} {name}: another command attaches or detaches it: try again when that is done"
            )
        time.sleep(0.02)
