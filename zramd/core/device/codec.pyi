from typing import Any

from _typeshed import ReadableBuffer

LZ4_VERSION: str

def compress(block: ReadableBuffer, limit: int = 4095, acceleration: int = 1) -> int | bytes: ...
def decompress(payload: int | bytes) -> bytes: ...

__test__: dict[str, Any]
