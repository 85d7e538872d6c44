from typing import Any, final

from zramd.core.device.device import Device

QUEUES: int
DEPTH: int
MAX_IO_BYTES: int

@final
class Queues:
    """The queues of a ublk disk over a Device; see the functions for what they raise."""

    def __new__(
        cls,
        device: Device,
        queues: int = ...,
        depth: int = ...,
        max_io_bytes: int = ...,
        urgent: int = 0,
        pool_full: int = ...,
    ) -> Queues: ...
    @property
    def geometry(self) -> tuple[int, int, int]: ...
    @property
    def serving(self) -> bool: ...
    def use(self, device: Device) -> None: ...
    def serve(self, fd: int) -> None: ...
    def join(self, timeout: float | None = None) -> bool: ...
    def close(self) -> None: ...
    def stats(self) -> dict[str, int]: ...

__test__: dict[str, Any]
