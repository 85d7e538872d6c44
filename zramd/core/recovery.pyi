from typing import Any, final

@final
class Recovery:
    """Rebuilds a device from its state. For the device only."""

__test__: dict[str, Any]
