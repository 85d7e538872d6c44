from typing import Any, final

from zramd.core.device.device import Device

@final
class Writeback:
    """Writes blocks to the backing, and brings them back; see the functions for what they raise."""

    pending: int
    def __new__(cls, device: Device) -> Writeback: ...
    def gather(
        self,
        first: int,
        end: int,
        age: int,
        raw: bool = False,
        idle: bool = False,
        unread: bool = False,
        tried: bool = False,
    ) -> tuple[int, int, bool]: ...
    def reclaim(self, share: float) -> int: ...
    def flush(self) -> tuple[int, int, int, int, int]: ...
    def drop(self) -> None: ...
    def bring_back(self, first: int, end: int, wanted: bool = True) -> tuple[int, int, int, int]: ...

__test__: dict[str, Any]
