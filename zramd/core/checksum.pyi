from typing import Any

from _typeshed import ReadableBuffer

def of(data: ReadableBuffer, seed: int = 0, portable: bool = False) -> int: ...

__test__: dict[str, Any]
