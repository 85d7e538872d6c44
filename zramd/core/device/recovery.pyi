from collections.abc import Callable
from typing import Any, final

@final
class Recovery:
    """Rebuilds a device from its state. For the device only."""

    def run(self, progress: Callable[[int, int], object] | None) -> None: ...

__test__: dict[str, Any]
