from collections.abc import Callable
from typing import Any, final

from typing_extensions import disjoint_base

from zramd.core.device.device import Device

@disjoint_base
class Stream:
    """One direction of a save. For saving and loading only."""

    def __new__(cls, *arguments: object, **names: object) -> Stream: ...

@final
class Reader(Stream):
    """Reads a save. For saving only."""

    def __init__(
        self, fd: int, copy: int, device: Device | None, begun: bytes, limit: int, patience: int
    ) -> None: ...
    def run(self, progress: Callable[[int], object] | None) -> dict[str, int]: ...

__test__: dict[str, Any]
