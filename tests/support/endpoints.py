"""An endpoint, with a service that only notes what it is asked, for tests of the control socket."""

import os
import select
import socket
import threading
from pathlib import Path
from typing import Any

from support.numbers import TIERS, WRITEBACK, FakeDevice
from zramd.errors import CorruptionError, DeviceError
from zramd.server import endpoint
from zramd.server.tiers import Pass
from zramd.server.trouble import Troubles
from zramd.server.withoutbacking import Without
from zramd.server.writeback import WritePass
from zramd.settings import config
from zramd.stats import snapshots


class FakeWriteback:
    """What writes to a backing device; `limit` is the setting writeback_limit, 0 for off."""

    def __init__(self) -> None:
        self.passes: list[WritePass] = []
        self.returns = 0
        self.limit = 2 << 30
        self.rest = 5 << 20
        self.full = ""

    def submit(self, wanted: WritePass) -> None:
        if self.full:
            raise DeviceError(self.full)
        self.passes.append(wanted)

    def bring_back(self) -> None:
        self.returns += 1

    def set_left(self, size: int) -> None:
        if not self.limit:
            raise DeviceError("writeback_limit is off")
        self.rest = size

    def numbers(self) -> dict[str, Any]:
        return WRITEBACK | {"writeback_limit": self.limit, "limit_left": self.rest if self.limit else None}


class FakeService:
    def __init__(self) -> None:
        self.limit = 1048576
        self.clients = 0
        self.resets = 0
        self.peak = 4096
        self.fault = ""
        self.more: dict[str, object] = {}
        self.changed: dict[str, object] = {}
        self.hold = threading.Event()
        self.hold.set()
        self.device = self
        self.tiers = self
        self.disksize = 1 << 30
        self.passes: list[Pass] = []
        self.idle: list[float | None] = []
        self.tiers_off = ""
        self.writeback: FakeWriteback | Without = Without()

    def submit(self, wanted: Pass) -> None:
        if self.tiers_off:
            raise DeviceError(self.tiers_off)
        self.passes.append(wanted)

    def mark_idle(self, seconds: float | None) -> None:
        self.idle.append(seconds)

    def numbers(self) -> dict[str, object]:
        return dict(TIERS)

    def block_state(self, buf: bytearray, first: int, now: int, sweep: int) -> tuple[int, int]:
        self.hold.wait(10)
        count = min(len(buf) // 40, self.disksize // 4096 - first)
        buf[: 40 * count] = b"".join(b"%39d\n" % (first + block) for block in range(count))
        return 40 * count, first + count

    def snapshot(self) -> snapshots.Snapshot:
        made = snapshots.take(FakeDevice(), name="zram0", comp_algorithm="lz4", version="0", started=0.0)
        changed = {"mem_limit": self.limit, "mem_used_max": self.peak}
        return made._replace(values=made.values | changed, writeback=self.writeback.numbers())

    def classes(self) -> list[snapshots.ClassRow]:
        return snapshots.take_classes(FakeDevice())

    def health(self) -> dict[str, str | int]:
        return {"status": "ok", "compactor": "idle"}

    def compact(self, timeout: float) -> int:
        self.hold.wait(10)
        return 42

    def settings(self) -> dict[str, object]:
        self.hold.wait(10)
        return {"mem_limit": self.limit, **self.more}

    def change(self, name: str, text: str) -> object:
        value = config.value(config.find(name), text)
        self.changed[name] = value
        if name == "mem_limit":
            self.limit = value
        return value

    def check(self) -> None:
        if self.fault:
            raise CorruptionError(self.fault)

    def block(self, number: int) -> dict[str, int | str]:
        if number > 9:
            raise ValueError(f"block {number} is not on the device, which has blocks 0 to 9")
        return {"block": number, "kind": "hole"}

    def reset(self) -> bool:
        if self.clients:
            return False
        self.resets += 1
        return True

    def reset_mem_used_max(self) -> None:
        self.peak = 0


class Running:
    """An endpoint with the accepting thread that the server would give it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.service = FakeService()
        self.troubles = Troubles()
        self.endpoint = endpoint.Endpoint(str(path), self.service, self.troubles)
        self._stop_read, self._stop_write = os.pipe()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        poll = select.poll()
        poll.register(self.endpoint, select.POLLIN)
        poll.register(self._stop_read, select.POLLIN)
        while self._stop_read not in (ready := [fd for fd, _ in poll.poll()]):
            if ready:
                self.endpoint.accept()

    def close(self) -> None:
        os.write(self._stop_write, b"x")
        self._thread.join()
        self.endpoint.close()
        os.close(self._stop_read)
        os.close(self._stop_write)

    def connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(10)
        sock.connect(str(self.path))
        return sock

    def raw(self, data: bytes, end: bool = False) -> bytes:
        with self.connect() as sock:
            sock.sendall(data)
            if end:
                sock.shutdown(socket.SHUT_WR)
            return b"".join(iter(lambda: sock.recv(65536), b""))

    def ask(self, method: str, path: str, body: str = "") -> tuple[int, str]:
        request = f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        header, _, content = self.raw(request.encode()).decode().partition("\r\n\r\n")
        assert f"\r\nContent-Length: {len(content)}" in header
        assert "\r\nConnection: close" in header
        return int(header.split()[1]), content


def status(answer: bytes) -> int:
    return int(answer.split()[1])
