"""Tells the service manager that started us how we are: sd_notify, by hand."""

import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress

from zramd.errors import ZramdError, reason

PATIENCE = 30.0  # seconds: the manager's queue is short, and full while it is busy


class Manager:
    """The service manager; if there is none, nothing happens."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._path = os.environ.get("NOTIFY_SOCKET", "")
        if self._path[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def tell(self, *assignments: str) -> None:
        """Send assignments, such as STATUS=…: news that are not worth waiting for, or failing."""
        with suppress(ZramdError):
            self.insist(*assignments, patience=0)

    def insist(self, *assignments: str, fds: Sequence[int] = (), patience: float | None = None) -> None:
        """Send what must arrive, such as READY=1, and descriptors with it.

        Raises ZramdError if the manager does not take it within `patience` seconds, or PATIENCE.
        """
        if self._socket is None:
            return
        path = self._path.replace("@", "\0", 1) if self._path[0] == "@" else self._path
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))] if fds else []
        try:
            self._socket.settimeout(PATIENCE if patience is None else patience)
            self._socket.connect(path)  # without that, waiting for a full queue would spin
            self._socket.sendmsg(["\n".join(assignments).encode()], ancillary)
        except OSError as error:
            why = "its queue is full" if isinstance(error, TimeoutError) else reason(error)
            raise ZramdError(f"the service manager does not take '{assignments[0]}': {why}") from None

    def forget(self, name: str) -> None:
        """Have the manager close what it keeps under a name. Raises ZramdError as `insist`."""
        self.insist("FDSTOREREMOVE=1", f"FDNAME={name}")

    def store(self, name: str, fd: int) -> None:
        """Give the manager a descriptor to keep, which it passes to the next process of this service.

        Raises ZramdError if it does not take it in time.
        """
        self.insist("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[fd])
