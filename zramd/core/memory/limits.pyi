from typing import Any, final

from zramd.core.memory.region import Memory

@final
class Limits:
    """The count of the pages that are resident, and how many there may be. For the arena only."""

    def __new__(cls, memory: Memory) -> Limits: ...

__test__: dict[str, Any]
