"""A process that is killed at each step of each change, in builds that can do that: nothing of it shows.

In other builds the same process runs to its end.
"""

import mmap
import os
import random
import re
import signal
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.backings import Disk, bring_back, write_out
from support.run import SCALE

from zramd import Device
from zramd.contract import budget as budgetfile
from zramd.core.device.device import state_layout
from zramd.core.device.tier import Tier
from zramd.core.device.writeback import Writeback
from zramd.core.memory.budget import Budget
from zramd.core.pool.zsmalloc import CHECK_LEVEL

BLOCK = 4096
BLOCKS = 512
SIZE = BLOCKS * BLOCK
OPERATIONS = 1200
VISITS = (
    (1, 2, 17, *range(3, 2 + int(SCALE))) if CHECK_LEVEL >= 3 else (1,)
)  # the process dies when it comes to a point for the first time, the second, …

SOURCE = Path(__file__).resolve().parents[2] / "zramd" / "core"
POINTS = sorted(
    {
        name
        for path in SOURCE.rglob("*.pyx")
        for name in re.findall(r"zr_point\(points\.(\w+)\)", path.read_text())
    }
)
assert POINTS, "the core's modules are elsewhere"
IN_RESET = {"slots_cleared", "pool_cleared"}
ONCE = {"spans_rebuilt", "recovered", *IN_RESET}  # in the life of the process

Change = Callable[[bytearray], None]
Operation = tuple[Callable[[Device], object], Change]


def operations(seed: int) -> Iterator[Operation]:
    """What to do to the device, and what it does to its content."""
    rnd = random.Random(seed)

    def nothing(model: bytearray) -> None:
        pass

    def put(offset: int, data: bytes) -> Change:
        def change(model: bytearray) -> None:
            model[offset : offset + len(data)] = data

        return change

    for number in range(OPERATIONS):
        block, count = rnd.randrange(BLOCKS - 8), rnd.randrange(1, 8)
        offset, length = block * BLOCK, count * BLOCK
        kind = rnd.randrange(20)
        if number == 900:
            yield (lambda device: device.reset(), put(0, bytes(SIZE)))
        elif kind < 12:
            parts = [
                rnd.choice((bytes(8), rnd.randbytes(8), b"\1" * 8)) * 512,
                rnd.randbytes(BLOCK),
                rnd.randbytes(size := rnd.randrange(8, 3500)) + bytes(BLOCK - size),
                rnd.randbytes(BLOCK // 2).hex().encode(),  # raw, until it is cold
            ]
            data = b"".join(rnd.choice(parts) for _ in range(count))
            yield (lambda device, d=data, o=offset: device.write(d, o), put(offset, data))
        elif kind < 14:
            data = rnd.randbytes(5000)
            yield (lambda device, d=data, o=offset + 77: device.write(d, o), put(offset + 77, data))
        elif kind < 17:
            zeros = put(offset, bytes(length))
            yield (lambda device, o=offset, n=length: device.trim(o, n), zeros)
        elif kind == 17:
            zeros = put(offset, bytes(length))
            yield (lambda device, o=offset, n=length: device.zero(o, n, False), zeros)
        elif kind == 18 and number % 2:
            yield (lambda device: device.compact(), nothing)
        elif kind == 18:
            both = ((cool_and_warm, nothing), (out_and_back, put(0, bytes(SIZE // 16))))
            yield rnd.choice(both)
        else:
            yield (lambda device: device.release_stock(), nothing)


def cool_and_warm(device: Device) -> None:
    """Make all cold, and half of it hot again."""
    tier = Tier(device)
    device.cool(0, BLOCKS)
    tier.sweep(coarse=False, keep=True, threshold=0)
    device.read(bytearray(SIZE // 2), 0)
    tier.promote(0, BLOCKS)


def out_and_back(device: Device) -> None:
    """Write most blocks out, move what is left of the first extents, and bring some back."""
    hands = Writeback(device)
    write_out(device, 0, BLOCKS * 3 // 4, hands=hands)
    device.trim(0, SIZE // 16)
    while hands.reclaim(0.9):
        pass
    hands.flush()
    device.read(bytearray(SIZE // 4), SIZE // 4)
    if device.counters()["written_out"] % 2:
        bring_back(device)


def run(
    fd: int, disk: Disk, shared: int, verify: bool, seed: int, point: str, visit: int
) -> tuple[int, int, int]:
    """Do all operations in a child that dies at a point; how it ended, operations begun and done.

    `shared`: the file of the budget from which it takes its memory, a little at a time.
    """
    told = mmap.mmap(-1, 16)
    child = os.fork()
    if child == 0:
        try:
            if point:
                os.environ["ZRAMD_CRASH"] = f"{point}:{visit}"
            device = disk.device(SIZE, state=fd, verify=verify)
            budget = Budget(shared, 0)
            budget.budget = 16 * SIZE
            budget.begin(0, 0)
            device.join(budget)
            for number, (work, _) in enumerate(operations(seed)):
                if number % 20 == 0:
                    device.tidy_budget()
                    assert not budget.claim(32 * SIZE)
                told[:8] = struct.pack("<Q", number + 1)
                work(device)
                told[8:] = struct.pack("<Q", number + 1)
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    begun, done = struct.unpack("<QQ", told[:])
    return status, begun, done


def settle(device: Device, model: bytearray, seed: int, begun: int, done: int) -> None:
    """Apply what was done to the model; of what was begun, take over what the device has, block by block."""
    wanted = model
    for number, (_, change) in enumerate(operations(seed)):
        if number == done:
            wanted = model[:]
        if number >= begun:
            break
        change(model if number < done else wanted)
    now = bytearray(SIZE)
    device.read(now, 0)
    for start in range(0, SIZE, BLOCK):
        block = slice(start, start + BLOCK)
        assert now[block] in (model[block], wanted[block]), f"block {start // BLOCK}, operation {begun}"
    model[:] = now


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("point", POINTS)
def test_killed_at(point: str, verify: bool) -> None:
    fd = os.memfd_create("zramd")
    os.ftruncate(fd, state_layout(SIZE)["bytes"])
    shared = os.memfd_create("budget")
    os.ftruncate(shared, budgetfile.BYTES)
    disk = Disk(20)
    disk.device(SIZE, state=fd, verify=verify)  # who dies early has told nobody that it has it
    model = bytearray(SIZE)
    leaked = cold = out = 0
    # In the second round the process takes over what the first has left.
    for seed, visit in enumerate((0, *VISITS)):
        dies = bool(visit) and CHECK_LEVEL >= 3 and not (point in ONCE and visit > 1)
        status, begun, done = run(fd, disk, shared, verify, seed, point if visit else "", visit)
        if dies:
            assert os.WIFSIGNALED(status), f"{point} is not reached {visit} times"
            assert os.WTERMSIG(status) == signal.SIGKILL
        else:
            assert (status, done) == (0, OPERATIONS)
        device = disk.device(SIZE, state=fd, verify=verify, claims=False)
        device.check()
        # What a kill leaves in the slot is never less than what is there.
        assert Budget(shared, 0).mine >= device.counters()["mem_used_total"]
        settle(device, model, seed, begun, done)
        leaked += device.counters()["leaked_objects"]
        cold += device.counters()["cold_pages"]
        out += device.counters()["out_pages"]
        device.check()
        del device
    if point not in IN_RESET:
        assert leaked <= len(VISITS), "one kill leaks one object at most"
    if CHECK_LEVEL >= 3 and point in (
        "object_published",
        "cold_published",
        "cold_stored",
        "slot_stored",
        "free_pinned",
        "out_stored",
    ):
        assert leaked
    assert cold
    assert out
    os.close(fd)
    os.close(shared)


def test_there_are_points() -> None:
    assert len(POINTS) > 20
