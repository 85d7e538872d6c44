"""What a server reports unasked: statistics in files, its status to a service manager, corruption."""

import time
from collections.abc import Callable

from zramd.core.device.device import Device
from zramd.process import notify
from zramd.server.log import say
from zramd.server.published import StatsFiles
from zramd.stats import snapshots, texts

STATUS_INTERVAL = 10.0  # seconds between two words on how we are to the service manager, at least
READY_PATIENCE = 1.0  # seconds for the service manager to take our word, at each try


class Reports:
    """Reports what is new since its last report."""

    def __init__(
        self,
        device: Device,
        files: StatsFiles,
        manager: notify.Manager,
        snapshot: Callable[[], snapshots.Snapshot],
    ) -> None:
        self._device = device
        self._files = files
        self._manager = manager
        self._snapshot = snapshot
        self._corrupt = device.counters()["checksum_errors"]
        self._told: dict[str, int] = {}
        self._told_at = float("inf")  # nothing before we are ready

    def corruption(self) -> None:
        """Say so when blocks were found that were changed in memory."""
        errors = self._device.counters()["checksum_errors"]
        if errors > self._corrupt:
            say(
                f"{errors - self._corrupt} reads found a block that had changed in memory, most recently "
                f"block {self._device.corrupt_block}: test this machine's memory, and write the block again"
            )
        self._corrupt = errors

    def refresh(self, *, quiet: bool) -> None:
        """Write the stats files if there is news, and tell the service manager now and then, unless `quiet`.

        Raises RundirError.
        """
        if self._files.are_due(self._device.counters()):
            self.write()
        told_lately = time.monotonic() - self._told_at < STATUS_INTERVAL
        if self._files.written is not self._told and not told_lately and not quiet:
            self.status()

    def write(self) -> None:
        """Write the stats files. Raises RundirError."""
        self._files.write(self._device.counters(), self._snapshot(), snapshots.take_classes(self._device))

    def status(self) -> None:
        """Tell the service manager what is stored."""
        self._manager.tell(f"STATUS={texts.sentence(self._snapshot())}")
        self._told_at = time.monotonic()
        self._told = self._files.written

    def ready(self) -> None:
        """Tell the service manager that we serve. Raises ZramdError when it does not take it."""
        self._manager.insist("READY=1", patience=READY_PATIENCE)
