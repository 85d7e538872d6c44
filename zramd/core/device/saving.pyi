from collections.abc import Callable
from typing import Any

from zramd.core.device.device import Device

MAGIC: bytes
VERSION: int

def save(device: Device, fd: int, *, live: bool = False, patience: float = -1) -> dict[str, int]: ...
def load(
    device: Device, fd: int, *, begun: bytes = b"", length: int = -1, patience: float = -1
) -> dict[str, int]: ...
def verify_stream(
    fd: int, *, copy: int = -1, progress: Callable[[int], object] | None = None
) -> dict[str, int]: ...

__test__: dict[str, Any]
