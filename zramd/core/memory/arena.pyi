from typing import Any, final

from zramd.core.memory.region import Memory

@final
class Arena:
    """Reserved address space in spans, and the count of its resident pages. For the pool only."""

    span_count: int
    def __new__(cls, span_count: int, memory: Memory) -> Arena: ...

__test__: dict[str, Any]
