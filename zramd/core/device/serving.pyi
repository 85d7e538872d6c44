from typing import Any

from typing_extensions import disjoint_base

@disjoint_base
class Served:
    """What serves requests. For the device only."""

    disksize: int
    def __new__(cls, *arguments: object, **names: object) -> Served: ...

__test__: dict[str, Any]
