"""A disk that stands still under a device: `standstill.py requests|save nothing|reset`, with shim_pread.c.

Blocks 0 and 1 are out. Whoever reads them waits for the disk; others go on, also check and reset. Ends with
0, or an AssertionError.
"""

import os
import sys
import threading
import time
from collections.abc import Callable

from support.backings import Disk, write_out
from zramd import Device
from zramd.core.device import saving
from zramd.errors import SaveError

BLOCK = 4096
FLAG = os.environ["SHIM_PREAD"]  # reads wait while this file is there


def text(name: str) -> bytes:
    """A block that compresses well."""
    return (b"block %s, " % name.encode() * 700)[:BLOCK]


def look(device: Device, number: int, count: int = 1) -> bytes:
    """Read blocks."""
    found = bytearray(count * BLOCK)
    device.read(found, number * BLOCK)
    return bytes(found)


def look_at_both(device: Device) -> bytes:
    """Read blocks 0 and 1, which are brought by one read; return how 0 begins."""
    found = look(device, 0, 2)
    assert found[BLOCK:].startswith(b"block 1, "), found[BLOCK : BLOCK + 8]
    return found[:8]


class Waiting:
    """What waits for the disk, in threads, once each has begun to read."""

    def __init__(self, *works: Callable[[], object]) -> None:
        self.results: list[object] = []
        with open(FLAG, "w"):
            pass
        self._threads = [threading.Thread(target=self._run, args=(work,)) for work in works]
        for thread in self._threads:
            thread.start()
        while os.path.getsize(FLAG) < len(works):
            time.sleep(0.01)

    def _run(self, work: Callable[[], object]) -> None:
        self.results.append(work())

    def end(self) -> list[object]:
        """Let the disk answer, and return what came of each; until now that was nothing."""
        assert not self.results, self.results
        os.unlink(FLAG)
        for thread in self._threads:
            thread.join()
        return self.results


def requests(device: Device, comes: str) -> None:
    """A read of one block, and a write of a part of the other."""
    waiting = Waiting(lambda: look_at_both(device), lambda: device.write(b"part", BLOCK + 100))
    assert look(device, 2) == text("2")
    device.write(b"x" * BLOCK, 3 * BLOCK)
    device.write(b"y" * BLOCK, 0)  # of the very block
    device.write(text("z"), BLOCK)
    device.check()
    # What both read would be written again by now, if they were not there.
    for _ in range(6):
        for number in range(64, 128):
            device.write(os.urandom(BLOCK), number * BLOCK)
        assert write_out(device, 64, 128)
        device.trim(64 * BLOCK, 64 * BLOCK)
    assert device.counters()["written_out"] > 60
    if comes == "reset":
        device.reset()
    results = waiting.end()
    assert results in ([b"block 0,", None], [None, b"block 0,"]), results
    rest = bytes(50) if comes == "reset" else text("z")[50:100]
    assert look(device, 1)[50:104] == rest + b"part", look(device, 1)[50:104]


def save(device: Device, comes: str) -> None:
    """A save of all."""

    def work() -> object:
        try:
            return saving.save(device, os.memfd_create("saved"), live=True)["lost"]
        except SaveError as error:
            return str(error)

    waiting = Waiting(work)
    device.check()
    assert device.block(3)["kind"] == "lz4"
    if comes == "reset":
        device.reset()
    gave_up = "the device was reset or loaded while it was saved"
    results = waiting.end()
    assert results == [gave_up if comes == "reset" else 0], results


def main(what: str, comes: str) -> None:
    device = Device(256 * BLOCK, backing=Disk(4).backing())
    for number in range(4):
        device.write(text(str(number)), number * BLOCK)
    write_out(device, 0, 2)
    {"requests": requests, "save": save}[what](device, comes)
    device.check()


if __name__ == "__main__":
    main(*sys.argv[1:])
