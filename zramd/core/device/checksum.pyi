from typing import Any

from _typeshed import ReadableBuffer

def crc32c(data: ReadableBuffer, crc: int = 0, portable: bool = False) -> int: ...
def of(data: ReadableBuffer, seed: int = 0, portable: bool = False) -> int: ...

__test__: dict[str, Any]
