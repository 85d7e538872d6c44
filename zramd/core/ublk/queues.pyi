from typing import Any

from zramd.core.device.device import Device

class Queues:
    def __init__(
        self,
        device: Device,
        queues: int = ...,
        depth: int = ...,
        max_io_bytes: int = ...,
        urgent: int = 0,
        pool_full: int = ...,
    ) -> None: ...
    @property
    def geometry(self) -> tuple[int, int, int]: ...
    @property
    def serving(self) -> bool: ...
    def serve(self, fd: int) -> None: ...
    def join(self, timeout: float | None = None) -> bool: ...
    def close(self) -> None: ...
    def stats(self) -> dict[str, int]: ...

__test__: dict[str, Any]
