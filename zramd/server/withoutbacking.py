"""What a server has in the place of zramd.server.writeback that has no backing."""

from typing import Any, NamedTuple

from zramd.errors import DeviceError
from zramd.settings.config import Config


class WritePass(NamedTuple):
    """A pass by hand, as zram's `writeback` means it."""

    kinds: frozenset[str] = frozenset()  # out of KINDS, a block is of all of them; empty: every block
    ranges: tuple[tuple[int, int], ...] = ()  # first, and the one after the last; empty: the whole device


class Without:
    """What a server has that has no backing."""

    trouble = ""
    silent = 0.0
    _refusal = "there is no backing: start the server with backing=PATH"

    def configure(self, config: Config) -> None:
        """Nothing goes by the settings."""

    def submit(self, wanted: WritePass) -> None:
        """Raise DeviceError."""
        raise DeviceError(self._refusal)

    def bring_back(self) -> None:
        """Raise DeviceError."""
        raise DeviceError(self._refusal)

    def set_left(self, size: int) -> None:
        """Raise DeviceError; `size`: bytes."""
        raise DeviceError(self._refusal)

    def forget(self) -> None:
        """Nothing is queued."""

    def try_again(self) -> None:
        """Nothing has failed."""

    def left(self) -> int | None:
        """Return None: nothing is limited."""
        return None

    def numbers(self) -> dict[str, Any] | None:
        """Return None: there is no such section."""
        return None
