from typing import Any, final

@final
class Cold:
    """What compresses cold blocks, and decompresses all of zstd. For the device only."""

    level: int
    def __new__(cls, level: int = 0, many: bool = False) -> Cold: ...

__test__: dict[str, Any]
