"""What writes blocks to the backing device: what a pass by hand is."""

from typing import Any, NamedTuple, Protocol


class WritePass(NamedTuple):
    """A pass by hand, as zram's `writeback` means it: blocks of all these kinds, or the ranges."""

    kinds: frozenset[str] = frozenset()  # out of idle, huge, incompressible
    ranges: tuple[tuple[int, int], ...] = ()  # the first block, and the one after the last


class Writeback(Protocol):
    """What writes out, as others see it."""

    def submit(self, wanted: WritePass) -> None:
        """Queue a pass by hand, and do not wait for it. Raises DeviceError, one sentence."""

    def bring_back(self) -> None:
        """Have everything brought back into memory that is out. Raises DeviceError, one sentence."""

    def left(self) -> int | None:
        """Return the bytes that writeback_limit leaves, None: it is off."""

    def set_left(self, left: int) -> None:
        """Set them."""

    def numbers(self) -> dict[str, Any]:
        """Return the section `writeback` of stats.json."""
