from typing import Any, final

@final
class Pool:
    """The allocator. For the device and Zsmalloc only."""

__test__: dict[str, Any]
