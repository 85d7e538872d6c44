from typing import Any, final

from zramd.core.device.device import Device

@final
class Queue:
    """One queue of a ublk disk, and the thread that serves it. For Queues only."""

    def __new__(
        cls, device: Device, number: int, depth: int, max_io_bytes: int, priority: int, full: int
    ) -> Queue: ...

__test__: dict[str, Any]
