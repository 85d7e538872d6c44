"""An NBD client that writes and reads back until told to stop; it connects again when its server leaves.

    client.py SOCKET SECONDS REPORT [STOP]

It ends after so many seconds, or once the file STOP exists, and reads everything once more. REPORT is then
one line: blocks written, connections, and the longest time that a request took, in milliseconds. A block that
is not as it was written, or an error in answer to a request, ends it with status 1.
"""

import hashlib
import os
import socket
import struct
import sys
import time

BLOCK = 4096
BLOCKS = 4096
READ, WRITE, DISCONNECT = range(3)
RECONNECT = 60.0  # seconds for which to try


class Client:
    """One client; its requests wait while there is no server."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.connections = 0
        self.longest = 0.0
        self._sock: socket.socket | None = None

    def ask(self, command: int, offset: int, length: int, payload: bytes = b"") -> bytes:
        """Send a request, again if the server leaves meanwhile; return what was read."""
        begun = time.monotonic()
        while True:
            try:
                answer = self._ask(command, offset, length, payload)
                self.longest = max(self.longest, time.monotonic() - begun)
                return answer
            except (ConnectionError, FileNotFoundError):
                self._sock = None
                if time.monotonic() > begun + RECONNECT:
                    raise
                time.sleep(0.001)

    def close(self) -> None:
        """Leave as a client should."""
        if self._sock:
            self._sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, DISCONNECT, 0, 0, 0))
            self._sock.close()

    def _ask(self, command: int, offset: int, length: int, payload: bytes) -> bytes:
        if self._sock is None:
            self._connect()
        assert self._sock
        self._sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, 1, offset, length) + payload)
        magic, error, _ = struct.unpack(">IIQ", self._receive(16))
        if magic != 0x67446698 or error:
            sys.exit(f"request {command} at {offset}: error {error}")
        return self._receive(length) if command == READ else b""

    def _connect(self) -> None:
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.connect(self.path)
        self._receive(18)
        self._sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 1, 0))
        self._receive(10)
        self.connections += 1

    def _receive(self, length: int) -> bytes:
        assert self._sock
        data = bytearray()
        while len(data) < length:
            part = self._sock.recv(length - len(data))
            if not part:
                raise ConnectionResetError
            data += part
        return bytes(data)


def content(number: int, version: int) -> bytes:
    """Return what a block holds in a version: half of it compresses."""
    seed = hashlib.sha256(b"%d %d" % (number, version)).digest()
    return (hashlib.shake_128(seed).digest(BLOCK // 2) + seed * (BLOCK // 2 // len(seed)))[:BLOCK]


def main(path: str, seconds: str, report: str, stop: str = "") -> None:
    """Work until it is time to stop, and report."""
    client = Client(path)
    end = time.monotonic() + float(seconds)
    written = 0
    known: dict[int, int] = {}

    def verify(number: int) -> None:
        if client.ask(READ, number * BLOCK, BLOCK) != content(number, known[number]):
            sys.exit(f"block {number} is not as it was written")

    while time.monotonic() < end and not (stop and os.path.exists(stop)):
        number = written * 2654435761 % BLOCKS
        known[number] = written
        client.ask(WRITE, number * BLOCK, BLOCK, content(number, written))
        written += 1
        verify(sorted(known)[written * 40503 % len(known)] if written % 64 == 0 else number)
    for number in known:
        verify(number)
    client.close()
    with open(report, "w") as file:
        file.write(f"{written} {client.connections} {client.longest * 1000:.0f}\n")


main(*sys.argv[1:])
