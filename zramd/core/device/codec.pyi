from typing import Any

from _typeshed import ReadableBuffer

LZ4_VERSION: str
LEVELS: dict[str, tuple[int, int, int]]

def compress(block: ReadableBuffer, limit: int = 4095, name: str = "lz4", level: int = 0) -> int | bytes: ...
def decompress(payload: int | bytes, name: str = "lz4") -> bytes: ...

__test__: dict[str, Any]
