"""A server's front over the core's queues, with the fake kernel of shim_ublk.c: `ublkfront.py FOLDER`."""

import json
import os
import sys
from typing import Any

from support.content import block_content
from support.fakeublk import BLOCK, CONTROL, FakeDisk, Kernel
from zramd import Device
from zramd.contract.rundir import Rundir
from zramd.core.ublk.control import Control
from zramd.server.fronts.ublk import Ublk
from zramd.server.routes import Routes
from zramd.server.service import Service
from zramd.server.trouble import Troubles
from zramd.settings import config

KERNEL = Kernel()
SIZE = 8 << 20


def attach(routes: Routes, body: dict[str, Any], disk: FakeDisk) -> int:
    """Hand a disk over as the keeper does; the status of the answer."""
    fd = KERNEL.library.fake_open(disk.number)
    try:
        return routes.answer("PUT", "/ublk", json.dumps(body).encode(), [fd]).status
    finally:
        os.close(fd)


def main(folder: str) -> None:
    """Attach a disk, write by it, detach it, and read the same by another."""
    settings = config.parse([("size", str(SIZE)), ("rundir", f"{folder}/run"), ("front", "ublk")])
    device, front = Device(SIZE), Ublk(lambda: None)
    front.take(settings, device)
    service = Service(settings, device, Rundir(settings.rundir), Troubles(), front)
    front.begin(service)
    routes = Routes(service)
    written = b"".join(block_content(number, 1) for number in range(8))
    for geometry in ((2, 16, 65536), (1, 8, 32768)):
        with Control(CONTROL) as control:
            queues, depth, max_io = geometry
            info = control.add(queues=queues, depth=depth, max_io_bytes=max_io)
            control.set_params(info.number, SIZE, max_io_bytes=max_io)
            disk = FakeDisk(KERNEL, info)
            body = {"number": info.number, "queues": queues, "depth": depth, "max_io_bytes": max_io}
            assert attach(routes, body | {"recovers": False}, disk) == 200
            control.start(info.number, os.getpid())
        shown = service.health()
        assert shown["clients"] == 1
        assert shown["ublk"] == body | {"recovers": False, "serving": True}
        if queues == 2:
            disk.write(written, BLOCK)
        assert disk.read(BLOCK, len(written)) == written
        assert service.snapshot().values["ublk_requests"] > 0
        gone = json.dumps({"number": info.number}).encode()
        disk.stop()
        assert routes.answer("DELETE", "/ublk", gone).status == 200
        assert service.health()["clients"] == 0
        disk.delete()
    assert KERNEL.violation == "", KERNEL.violation


if __name__ == "__main__":
    main(sys.argv[1])
