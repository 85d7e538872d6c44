from typing import Any, final

def filesystem(fd: int) -> int: ...
def page_size() -> int: ...

@final
class Region:
    """Memory for one table. For the core only."""

    size: int
    def __new__(cls, size: int, writable: bool = True, fd: int = -1, offset: int = 0) -> Region: ...

@final
class Memory:
    """Where a device's regions come from. For the core only."""

    fd: int
    end: int
    def __new__(cls, fd: int = -1) -> Memory: ...

__test__: dict[str, Any]
