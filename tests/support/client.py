"""NBD clients."""

import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from support.run import SEED, wait_until


class Served(Protocol):
    """What a client has to know of a server."""

    @property
    def name(self) -> str: ...
    @property
    def socket(self) -> Path: ...


class NbdSocket:
    """An NBD client of a few lines: it says what libnbd would refuse to say, and costs little."""

    READ, WRITE, DISCONNECT, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)

    def __init__(self, served: Served, timeout: float = 30.0) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(timeout)
        self.sock.connect(str(served.socket))
        magic, option_magic, _ = struct.unpack(">8s8sH", self.receive(18))
        assert (magic, option_magic) == (b"NBDMAGIC", b"IHAVEOPT")
        name = served.name.encode()
        export_name = 1  # the option that enters transmission without a further reply
        self.sock.sendall(struct.pack(">I8sII", 3, option_magic, export_name, len(name)) + name)
        self.size, self.flags = struct.unpack(">QH", self.receive(10))
        self._cookie = 0

    def receive(self, length: int) -> bytes:
        """Exactly `length` bytes; ConnectionError at the end of the connection."""
        data = bytearray()
        while len(data) < length:
            part = self.sock.recv(min(length - len(data), 1 << 20))
            if not part:
                raise ConnectionError("the server has closed the connection")
            data += part
        return bytes(data)

    def send(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> int:
        """Send a request and return its cookie."""
        self._cookie += 1
        header = struct.pack(">IHHQQI", 0x25609513, flags, command, self._cookie, offset, length)
        self.sock.sendall(header + payload)
        return self._cookie

    def reply(self) -> tuple[int, int]:
        """Error and cookie of the next reply; what was read follows it."""
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == 0x67446698
        return error, cookie

    def ask(self, command: int, offset: int, length: int, payload: bytes = b"", flags: int = 0) -> int:
        """Send a request, wait for its reply and return its error, 0 for none."""
        cookie = self.send(command, offset, length, payload, flags)
        error, answered = self.reply()
        assert answered == cookie
        return error

    def read(self, offset: int, length: int) -> bytes:
        """What is at `offset`."""
        assert self.ask(self.READ, offset, length) == 0
        return self.receive(length)

    def close(self) -> None:
        """Leave as a client should."""
        self.send(self.DISCONNECT, 0, 0)
        self.sock.close()


@contextmanager
def bystander(served: Served, length: int = 8 << 20) -> Iterator[None]:
    """Another client, which works on the first bytes of the device meanwhile and finds all as it left it."""
    stopping = threading.Event()
    failures: list[BaseException] = []
    turns = 0

    def work() -> None:
        nonlocal turns
        try:
            client = NbdSocket(served)
            dice = random.Random(SEED)
            model = bytearray(client.read(0, length))
            while not stopping.is_set():
                size = dice.randrange(1, 16384)
                offset = dice.randrange(length - size)
                data = (dice.randbytes(1 + size // 3) * 3)[:size]
                assert client.ask(client.WRITE, offset, size, data) == 0
                model[offset : offset + size] = data
                offset = dice.randrange(length - size)
                assert client.read(offset, size) == model[offset : offset + size]
                turns += 1
            assert client.read(0, length) == model
            client.close()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        wait_until(lambda: turns or failures)
        yield
    finally:
        stopping.set()
        thread.join(60)
    assert not failures, f"{failures[0]!r} after {turns} turns; log: {served.log.read_text()[-500:]}"
