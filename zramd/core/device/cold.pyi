from typing import Any, final

ZSTD_VERSION: str
MAX_LEVEL: int

@final
class Cold:
    """What compresses cold blocks, and decompresses them. For the device only."""

    level: int

__test__: dict[str, Any]
