from typing import Any, final

@final
class Arena:
    """Reserved address space in spans, and the count of its resident pages. For zsmalloc only."""

    span_count: int
    def __new__(cls, span_count: int) -> Arena: ...

__test__: dict[str, Any]
