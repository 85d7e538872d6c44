from typing import Any, final

from zramd.core.device.device import Device

@final
class Readers:
    """The threads that read blocks that are out. For Queues only."""

    def __new__(cls, device: Device, priority: int) -> Readers: ...

__test__: dict[str, Any]
