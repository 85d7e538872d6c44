"""A device of front=ublk with a part in a budget, under the fake kernel: `ublkbudget.py FOLDER`."""

import errno
import os
import random
import sys

from support.fakeublk import BLOCK, CONTROL, WRITE, FakeDisk, Kernel
from support.ublkfront import attach
from zramd.contract import budget as file
from zramd.contract.rundir import Rundir
from zramd.core.ublk.control import Control
from zramd.server import opening
from zramd.server.fronts.ublk import Ublk
from zramd.server.routes import Routes
from zramd.server.service import Service
from zramd.server.trouble import Troubles
from zramd.settings import config

SIZE = 8 << 20


def main(folder: str) -> None:
    """Write what does not compress until the budget is reached, free it, and write again."""
    kernel = Kernel()
    words = {"size": str(SIZE), "rundir": f"{folder}/run", "front": "ublk", "budget": "2M"}
    settings = config.parse(words.items())
    made, front = opening.make_device(settings), Ublk(lambda: None)
    assert made.member is not None
    front.take(settings, made.device)
    service = Service(settings, made.device, Rundir(settings.rundir), Troubles(), front, member=made.member)
    front.begin(service)
    with Control(CONTROL) as control:
        info = control.add(queues=1, depth=8, max_io_bytes=32768)
        control.set_params(info.number, SIZE, max_io_bytes=32768)
        disk = FakeDisk(kernel, info)
        body = {"number": info.number, "queues": 1, "depth": 8, "max_io_bytes": 32768, "recovers": False}
        assert attach(Routes(service), body, disk) == 200
        control.start(info.number, os.getpid())
    first = random.randbytes(BLOCK)
    disk.write(first, 0)
    results = [
        disk.request(WRITE, number * BLOCK, BLOCK, random.randbytes(BLOCK))[0] for number in range(1, 1024)
    ]
    fitted = results.index(-errno.ENOSPC)
    assert 400 < fitted < 520, fitted
    assert set(results) == {BLOCK, -errno.ENOSPC}
    assert disk.read(0) == first
    shown = file.look(file.path(settings.rundir))
    assert shown is not None
    assert (shown.budget, shown.devices) == (2 << 20, 1)
    assert made.device.counters()["mem_used_total"] <= shown.used <= shown.budget
    made.device.trim(BLOCK, 1023 * BLOCK)
    made.member.tidy(made.device)
    disk.write(random.randbytes(BLOCK), BLOCK)
    disk.stop()
    disk.delete()
    assert kernel.violation == "", kernel.violation


if __name__ == "__main__":
    main(sys.argv[1])
