from typing import Any, final

from zramd.core.device.device import Device

@final
class Tier:
    """Makes blocks of a device cold and hot again, in steps; see the functions for what they raise."""

    level: int
    def __new__(cls, device: Device) -> Tier: ...
    def sweep(
        self, coarse: bool, keep: bool, threshold: int
    ) -> tuple[list[int], list[int], list[int], int, list[int], list[int], list[int], int]: ...
    def mark_idle(self, age: int) -> int: ...
    def cool(
        self, first: int, tries: int, threshold: int, age: int, raw: bool = False, idle: bool = False
    ) -> tuple[int, int, int, int, int, int]: ...
    def promote(self, first: int, tries: int) -> tuple[int, int, int, int]: ...

__test__: dict[str, Any]
