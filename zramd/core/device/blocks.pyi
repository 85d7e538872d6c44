from typing import Any, final

@final
class Blocks:
    """The table of slots. For the device only."""

__test__: dict[str, Any]
