from collections.abc import Callable
from typing import Any, final

from zramd.core.device.device import Device
from zramd.core.device.loading import Stream

MAGIC: bytes
VERSION: int

@final
class Writer(Stream):
    """Writes a save. For this module only."""

    def __init__(self, device: Device, fd: int, live: bool, patience: int) -> None: ...
    def run(self) -> dict[str, int]: ...

def save(device: Device, fd: int, *, live: bool = False, patience: float = -1) -> dict[str, int]: ...
def load(
    device: Device, fd: int, *, begun: bytes = b"", length: int = -1, patience: float = -1
) -> dict[str, int]: ...
def verify_stream(
    fd: int, *, copy: int = -1, progress: Callable[[int], object] | None = None
) -> dict[str, int]: ...

__test__: dict[str, Any]
