from typing import Any, final

EXTENT: int
MAX_PLACES: int

@final
class Backing:
    """What is on a backing; see the functions for what they raise."""

    size: int
    granule: int
    sector: int
    extents: int
    def __new__(cls, fd: int, size: int, granule: int, sector: int) -> Backing: ...
    def reopen(self, fd: int) -> None: ...
    def numbers(self) -> dict[str, int]: ...

__test__: dict[str, Any]
