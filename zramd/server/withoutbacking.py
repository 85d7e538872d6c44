"""What a server has in the place of zramd.server.writeback that has no backing."""

from typing import Any

from zramd.errors import DeviceError
from zramd.server.writeback import WritePass
from zramd.settings.config import Config


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
