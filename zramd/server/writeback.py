"""What writes blocks to the backing device: what a pass by hand is."""

from typing import Any, NamedTuple, Protocol

from zramd.errors import DeviceError


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

    def set_left(self, size: int) -> None:
        """Let so many bytes be written from now on. Raises DeviceError without a limit."""

    def numbers(self) -> dict[str, Any] | None:
        """Return the section `writeback` of stats.json, None: there is no backing."""


class Without:
    """What a server has that has no backing."""

    _refusal = "there is no backing: start the server with backing=PATH"

    def submit(self, wanted: WritePass) -> None:
        """Raise DeviceError."""
        raise DeviceError(self._refusal)

    def bring_back(self) -> None:
        """Raise DeviceError."""
        raise DeviceError(self._refusal)

    def set_left(self, size: int) -> None:
        """Raise DeviceError."""
        raise DeviceError(self._refusal)

    def numbers(self) -> dict[str, Any] | None:
        """Return None: there is no such section."""
        return None
