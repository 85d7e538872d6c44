"""ublk: this machine's kernel is the only client, by a device of its own. No socket, no nbdkit.

`zramd attach` makes the device and gives us its descriptor (PUT /ublk). Threads of the core's then answer
the kernel; all memory that they need is had at the start, for nothing is to be had once a machine swaps to
the device. A device that recovers asks the next server when this one has ended, however it has.
"""

import errno
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from zramd.core.device.device import Device
from zramd.core.ublk import control
from zramd.core.ublk.queues import Queues
from zramd.errors import DeviceError, UblkError, sentence
from zramd.kernel import protection, swap
from zramd.server.fronts.front import END, Front
from zramd.server.housekeeping import Chore
from zramd.server.log import say
from zramd.settings.config import Config
from zramd.stats.numbers import UBLK

if TYPE_CHECKING:
    from zramd.server.service import Service

# Seconds that a device's threads have to end, once the kernel has stopped it: they need milliseconds.
ENDING = 5.0
_PLACEHOLDER = 4096  # bytes
WATCH = 1.0  # seconds between two looks whether the kernel has ended the device by itself


class Ublk(Front):
    """The kernel's queues, and the device that is attached, if one is."""

    name = "ublk"

    def __init__(self, shutdown: Callable[[], None]) -> None:
        """`shutdown` asks the process to end, and returns at once."""
        self._shutdown = shutdown
        self._lock = threading.Lock()  # one change at a time of all below
        self._service: Service
        self._config: Config
        self._spare: Queues | None = None  # which wait for a device
        self._queues: Queues
        self._device: Device
        self._number: int | None = None  # of the device that is attached
        self._recovers = False

    def prepare(self, config: Config) -> None:
        """See Front.prepare. What is had for a device that is none yet serves the one that comes."""
        self._spare = _queues(config, Device(_PLACEHOLDER), *_geometry())

    def take(self, config: Config, device: Device) -> None:
        """See Front.take."""
        self._config, self._device = config, device
        if self._spare is None:
            self._queues = _queues(config, device, *_geometry())
        else:
            self._queues, self._spare = self._spare, None
            self._queues.use(device)

    def begin(self, service: "Service") -> None:
        """See Front.begin."""
        self._service = service

    def attach(self, fd: int, wanted: dict[str, Any]) -> None:
        """See Front.attach. Raises DeviceError."""
        number, recovers = wanted["number"], wanted["recovers"]
        geometry = (wanted["queues"], wanted["depth"], wanted["max_io_bytes"])
        with self._lock:
            if self._number is not None and self._queues.serving:
                raise DeviceError(f"{_path(self._number)} is attached already: detach it first")
            if recovers and not self._config.state:
                raise DeviceError(
                    f"{_path(number)} would wait for another server after the end of this one, but without "
                    "state= no other has its data"
                )
            self._release()
            self._service.client_opened()
            try:
                if geometry != self._queues.geometry:
                    self._queues.close()
                    self._queues = _queues(self._config, self._device, *geometry)
                self._queues.serve(fd)
            except BaseException as error:
                self._service.client_closed()
                if isinstance(error, (UblkError, OSError, MemoryError, ValueError)):
                    why = sentence(error) or error
                    raise DeviceError(f"{_path(number)} is not served: {why}") from None
                raise
            self._number, self._recovers = number, recovers

    def detach(self, number: int) -> None:
        """See Front.detach; nothing is done if no device is attached. Raises DeviceError."""
        with self._lock:
            if self._number is None:
                return
            if number != self._number:
                raise DeviceError(f"{_path(number)} is not attached: it is {_path(self._number)}")
            if not self._release(ENDING):
                raise DeviceError(
                    f"the kernel has not stopped {_path(number)}: 'zramd detach' does that first"
                )

    def chores(self) -> list[Chore]:
        """See Front.chores."""
        return [Chore("the device's end is not seen", self._watch, lambda: WATCH)]

    def _watch(self) -> None:
        """Take note of a device that the kernel has ended, and that nobody has detached."""
        with self._lock:
            number = self._number
            if number is not None and not self._queues.serving and self._release():
                say(f"the kernel has ended {_path(number)}")

    def _release(self, patience: float = 0) -> bool:
        """Have no device, if the one that was attached has ended or does within so many seconds; say so."""
        if self._number is None:
            return True
        if not self._queues.join(patience):
            return False
        self._number, self._recovers = None, False
        self._service.client_closed()
        return True

    def health(self) -> dict[str, Any]:
        """See Front.health."""
        queues, depth, max_io_bytes = self._queues.geometry
        shown = {
            "number": self._number,
            "queues": queues,
            "depth": depth,
            "max_io_bytes": max_io_bytes,
            "recovers": self._recovers,
            "serving": self._number is not None and self._queues.serving,
        }
        return {"front": self.name, "ublk": shown}

    def numbers(self) -> dict[str, int]:
        """See Front.numbers."""
        counted = self._queues.stats()
        return {name: counted[name] for name in UBLK}

    def swap_devices(self) -> list[str]:
        """See Front.swap_devices."""
        device = "" if self._number is None else _path(self._number)
        return [device] if device and swap.areas(device) else []

    def end(self, stopping: threading.Event) -> bool:
        """See Front.end. What is under way the kernel asks the next server, or nobody if none is to come."""
        self._shutdown()
        return stopping.wait(END)


def _geometry() -> tuple[int, int, int]:
    """Return queues, depth and most bytes of a request, as a device is to have them."""
    processors = len(os.sched_getaffinity(0))
    return min(control.QUEUES, processors), control.DEPTH, control.MAX_IO_BYTES


def _queues(config: Config, device: Device, queues: int, depth: int, max_io_bytes: int) -> Queues:
    return Queues(
        device,
        queues,
        depth,
        max_io_bytes,
        urgent=protection.SERVE if config.swap == "local" else 0,
        pool_full={"enospc": errno.ENOSPC, "eio": errno.EIO}[config.pool_full],
    )


def _path(number: int) -> str:
    return f"/dev/ublkb{number}"
