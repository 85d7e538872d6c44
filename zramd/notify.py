"""Tells the service manager that started us how we are: sd_notify, by hand.

A message that cannot be sent is not worth waiting for, or failing.
"""

import os
import socket
from contextlib import suppress


class Manager:
    """The service manager; if there is none, nothing happens."""

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        path = os.environ.get("NOTIFY_SOCKET", "")
        if path[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            with suppress(OSError):
                self._socket.connect(path.replace("@", "\0", 1) if path[0] == "@" else path)

    def tell(self, *assignments: str) -> None:
        """Send assignments, such as READY=1 and STATUS=…."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.send("\n".join(assignments).encode())

    def store(self, name: str, fd: int) -> None:
        """Give the manager a descriptor to keep, which it passes to the next process of this service."""
        if self._socket is not None:
            with suppress(OSError):
                socket.send_fds(self._socket, [f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0".encode()], [fd])
