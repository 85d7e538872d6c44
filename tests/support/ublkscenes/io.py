"""What a disk's clients ask for, and what that costs."""

import ctypes
import errno
import os
import random

from support.backings import Disk, write_out
from support.content import compressible, noise
from support.fakeublk import BLOCK, DISCARD, FLUSH, NOUNMAP, READ, WRITE, ZEROES
from support.run import SANITIZED, SEED
from support.ublkscenes import KERNEL, SIZE, no_threads, over, play
from zramd import Device
from zramd.core.ublk.queues import Queues
from zramd.errors import UblkError


def requests() -> None:
    """Each kind of request does what it does to a device, and is answered as the kernel wants it."""
    device = Device(SIZE)
    queues = Queues(device, 2, 4, 65536)
    disk = KERNEL.disk(queues, SIZE)
    data = b"".join(noise(i) for i in range(16))
    for queue in (0, 1):
        at = queue << 20
        disk.write(data, at, queue)
        assert disk.read(at, 65536, 1 - queue) == data
        found = bytearray(65536)
        device.read(found, at)
        assert found == data
        assert disk.request(DISCARD, at, BLOCK, queue=queue) == (BLOCK, b"")
        assert disk.request(ZEROES, at + BLOCK, BLOCK, queue=queue) == (BLOCK, b"")
        assert disk.request(ZEROES | NOUNMAP, at + 2 * BLOCK, BLOCK, queue=queue) == (BLOCK, b"")
        assert disk.read(at, 65536) == bytes(3 * BLOCK) + data[3 * BLOCK :]
        kinds = [(length, kind) for _, length, kind in device.extents(at, 65536)]
        assert kinds == [(2 * BLOCK, 3), (BLOCK, 2), (13 * BLOCK, 0)], kinds
        assert disk.request(FLUSH, 0, 0, queue=queue) == (0, b"")
    # trims are longer than any buffer
    assert disk.request(DISCARD, 0, SIZE) == (SIZE, b"")
    assert device.counters()["pages_stored"] == 0
    assert disk.request(READ, SIZE - BLOCK, 2 * BLOCK)[0] == -errno.EIO  # beyond the end
    assert disk.request(WRITE, SIZE, BLOCK, bytes(BLOCK))[0] == -errno.EIO
    assert disk.request(READ, 0, 65536 + BLOCK)[0] == -errno.EIO  # beyond the buffer
    for other in (4, 10, 15, 18, 99):
        assert disk.request(other, 0, BLOCK)[0] == -errno.EOPNOTSUPP
    assert queues.stats()["ublk_requests"] == 2 * 7 + 9
    assert device.counters()["invalid_io"] == 2
    over(disk, queues)


def calls() -> None:
    """A request costs one system call, which waits for the next, too; so do many that come together."""
    queues = Queues(Device(SIZE), 1, 16, 65536)
    disk = KERNEL.disk(queues, SIZE)
    for together in (1, 16):
        before = queues.stats()
        for _ in range(200):
            assert disk.read_together(0, together) == bytes(together * BLOCK)
        after = queues.stats()
        assert after["ublk_requests"] - before["ublk_requests"] == 200 * together
        assert 199 <= after["ublk_enters"] - before["ublk_enters"] <= 201
    over(disk, queues)


def frugal() -> None:
    """No thread of a disk asks the heap for anything, whatever it does."""
    before = KERNEL.library.fake_allocations(1)
    ctypes.CDLL(None).calloc(1, 1)
    assert KERNEL.library.fake_allocations(0) > before or SANITIZED  # whose heap is not the shim's
    device = Disk(40).device(SIZE, mem_limit=2 << 20)
    queues = Queues(device, 2, 8, 65536)
    disk = KERNEL.disk(queues, SIZE)
    before = KERNEL.library.fake_allocations(0)
    refused_writes = 0
    for number in range(2, SIZE // BLOCK):
        data = noise(number) if number % 2 else compressible(number)
        refused_writes += disk.request(WRITE, number * BLOCK, BLOCK, data, number % 2)[0] != BLOCK
        disk.request(number % 3 + 3, number // 2 * BLOCK, BLOCK if number % 3 else 512, queue=number % 2)
        disk.read(number * BLOCK - 512, 1024)
    write_out(device)
    away = device.counters()["out_pages"]
    for number in range(0, SIZE // BLOCK, 16):
        disk.read(number * BLOCK, 65536, number // 16 % 2)
    assert refused_writes > 10
    assert away > 10
    assert queues.stats()["ublk_away"] > 10
    assert KERNEL.library.fake_allocations(0) == before
    over(disk, queues)


def model() -> None:
    """Whatever clients ask for, of any sectors: it is as in an array of bytes, also with a backing."""
    for store in (None, Disk(40)):
        device = Device(SIZE) if store is None else store.device(SIZE)
        queues = Queues(device, 2, 4, 65536)
        disk = KERNEL.disk(queues, SIZE)
        rnd = random.Random(SEED)
        wanted = bytearray(SIZE)
        for step in range(600):
            what = rnd.choice([READ, READ, WRITE, WRITE, DISCARD, ZEROES, ZEROES | NOUNMAP])
            unit = rnd.choice([512, BLOCK])
            first = rnd.choice([0, SIZE - (64 << 10), rnd.randrange(SIZE)]) // unit * unit
            size = min(rnd.randrange(1, 12 * BLOCK) // unit * unit or unit, SIZE - first)
            data = b"".join(compressible(step + i, rnd.choice([50, 700, 3000])) for i in range(12))[:size]
            result, found = disk.request(what, first, size, data if what == WRITE else b"", step % 2)
            assert result == size, (SEED, step, result)
            if what == READ:
                assert found == wanted[first : first + size], (SEED, step)
            elif what == WRITE:
                wanted[first : first + size] = data
            elif what == DISCARD:  # of whole blocks only
                whole = range((first + BLOCK - 1) // BLOCK * BLOCK, (first + size) // BLOCK * BLOCK)
                wanted[whole.start : max(whole.stop, whole.start)] = bytes(len(whole))
            else:
                wanted[first : first + size] = bytes(size)
            if store is not None and step % 50 == 49:
                write_out(device, rnd.randrange(SIZE // BLOCK), SIZE // BLOCK)
        for at in range(0, SIZE, 65536):
            assert disk.read(at, 65536) == wanted[at : at + 65536], (SEED, at)
        assert (queues.stats()["ublk_away"] > 0) == (store is not None)
        over(disk, queues)
        device.check()


def extremes() -> None:
    """The smallest and the largest that a disk can be, and its last block."""
    for queues, depth, max_io, size in (
        (1, 1, BLOCK, BLOCK),
        (8, 1, BLOCK, 3 * BLOCK),
        (1, 4096, BLOCK, SIZE),
        (2, 3, 1 << 20, 1 << 20),
    ):
        device = Device(size)
        served = Queues(device, queues, depth, max_io)
        disk = KERNEL.disk(served, size)
        assert disk.fetched == queues * depth
        for queue in range(queues):
            data = b"".join(noise(queue + block) for block in range(min(max_io, size) // BLOCK))
            disk.write(data, size - len(data), queue)
            assert disk.read(size - len(data), len(data), queue) == data
            assert disk.request(READ, size, BLOCK, queue=queue)[0] == -errno.EIO
            assert disk.request(DISCARD, 0, size + 512, queue=queue)[0] == -errno.EIO
            together = min(size // BLOCK, 64)
            assert disk.read_together(0, together, queue) == b"".join(
                disk.read(block * BLOCK, queue=queue) for block in range(together)
            )
        over(disk, served)
        device.check()


def full() -> None:
    """A full pool is told as asked for, and what was there stays."""
    for code in (errno.ENOSPC, errno.EIO):
        device = Device(SIZE, mem_limit=1 << 20)
        queues = Queues(device, 1, 4, 65536, pool_full=code)
        disk = KERNEL.disk(queues, SIZE)
        results = [disk.request(WRITE, i * BLOCK, BLOCK, noise(i))[0] for i in range(SIZE // BLOCK)]
        assert set(results) == {BLOCK, -code}, set(results)
        for i, result in enumerate(results):
            if result == BLOCK:
                assert disk.read(i * BLOCK) == noise(i)
        over(disk, queues)


def short_of_memory() -> None:
    """An answer that the kernel has no memory for is given again: no request hangs, none is done twice."""
    KERNEL.no_memory(3)
    queues = Queues(Device(SIZE), 2, 4, 65536)
    disk = KERNEL.disk(queues, SIZE)
    for number in range(300):
        disk.write(compressible(number), number * BLOCK, number % 2)
    for number in range(300):
        assert disk.read(number * BLOCK) == compressible(number)
    assert 200 <= queues.stats()["ublk_resent"] <= 400
    assert queues.stats()["ublk_requests"] == 600
    KERNEL.no_memory(0)
    over(disk, queues)


def urgent() -> None:
    """All threads of a disk are real-time ones, those for the backing, too; or it is said what they need."""
    no_threads()
    device = Disk().device(SIZE)
    try:
        queues = Queues(device, 2, 8, 65536, urgent=1)
    except UblkError as error:
        assert error.errno == errno.EPERM  # noqa: PT017
        assert "CAP_SYS_NICE" in str(error)  # noqa: PT017
        return
    disk = KERNEL.disk(queues, SIZE)
    ways = set()
    for task in map(int, os.listdir("/proc/self/task")):
        with open(f"/proc/self/task/{task}/comm") as file:
            if file.read().startswith("zramd-"):
                ways.add((os.sched_getscheduler(task), os.sched_getparam(task).sched_priority))
    assert ways == {(os.SCHED_RR, 1)}
    disk.write(noise(1), 0)
    write_out(device)
    assert disk.read(0, queue=1) == noise(1)
    assert queues.stats()["ublk_away"] == 1
    over(disk, queues)


def held() -> None:
    """Requests are served while a thread holds Python's lock, and a disk's threads hear no signal."""
    queues = Queues(Device(SIZE), 1, 8, 65536)
    disk = KERNEL.disk(queues, SIZE)
    disk.write(noise(1), 0)
    # PyDLL keeps the lock held in the call: by Python's threads nothing could be served meanwhile.
    holding = ctypes.PyDLL(os.environ["SHIM_UBLK"])
    holding.fake_io.argtypes = KERNEL.library.fake_io.argtypes
    buffer = ctypes.create_string_buffer(BLOCK)
    for _ in range(50):
        assert holding.fake_io(disk.number, 0, READ, 0, 8, buffer) == BLOCK
    assert buffer.raw == noise(1)
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        if fields["Name"].strip() == "zramd-ublk0":
            assert int(fields["SigBlk"], 16) & 0x7FFFFFFE == 0x7FFFFFFE & ~(1 << 8 | 1 << 18)
            break
    else:
        raise AssertionError("no thread is named zramd-ublk0")
    over(disk, queues)


if __name__ == "__main__":
    play(globals())
