"""A server's front: how its clients reach the device, and how they are let go.

    nbd    nbdkit accepts any number of clients, here or elsewhere: zramd.server.fronts.nbd
    ublk   this machine's kernel is the only one, and gives us its device: zramd.server.fronts.ublk

The methods come in the order of a server's life: prepare, in one that takes over; take, before nbdkit forks;
begin, in the process that serves; what is asked meanwhile; let_go and end.
"""

import threading
from typing import TYPE_CHECKING, Any

from zramd.core.device.device import Device
from zramd.errors import DeviceError
from zramd.server.housekeeping import Chore
from zramd.settings.config import Config

if TYPE_CHECKING:
    from zramd.server.service import Service

END = 0.9  # seconds that a process has to end in its normal way


class Front:
    """What all fronts have in common.

    name: as the setting has it. listening: the sockets on which clients are accepted.
    """

    name = ""
    listening: tuple[int, ...] = ()

    def prepare(self, config: Config) -> None:
        """Have all that can fail for lack of something, before another server leaves. Raises as `take`."""

    def take(self, config: Config, device: Device) -> None:
        """Have all memory that serving this device takes. Raises MemoryError, OSError, UblkError."""

    def begin(self, service: "Service") -> None:
        """Begin to let clients in, to this service. Raises OSError."""

    def files(self) -> list[tuple[str, Any]]:
        """Return the sockets' files that are ours to remove in the end, each with its status."""
        return []

    def chores(self) -> list[Chore]:
        """Return what is to be done again and again."""
        return []

    def health(self) -> dict[str, Any]:
        """Return what GET /health says of it."""
        return {"front": self.name}

    def numbers(self) -> dict[str, int]:
        """Return what it counts, by the names in zramd.stats.numbers."""
        return {}

    def swap_devices(self) -> list[str]:
        """Return the kernel's devices that are ours and swapped to now. Raises OSError, AttachError."""
        return []

    def attach(self, fd: int, wanted: dict[str, Any]) -> None:
        """Serve the kernel's device on this descriptor, which stays the caller's. Raises DeviceError."""
        raise DeviceError(f"it is served by front={self.name}: a device is given to front=ublk only")

    def detach(self, number: int) -> None:
        """Let go of a device that the kernel has stopped. Raises DeviceError."""
        raise DeviceError(f"it is served by front={self.name}: it has no device of ublk's")

    def use_spare(self) -> None:
        """Let descriptors be used that are kept for the end."""

    def let_go(self, signals: int) -> bytes:
        """Let clients go in a way that they see only as a pause, for the state outlives this server.

        `signals` is the pipe to which signals come; returns those that have come meanwhile.
        """
        return b""

    def end(self, stopping: threading.Event) -> bool:
        """Have the process end in its normal way; say whether it does, which sets `stopping`."""
        raise NotImplementedError
