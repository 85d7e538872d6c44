"""What happens to queues that the fake kernel drives: `ublkscenes.py SCENE ...`, with shim_ublk.c preloaded.

Ends with 0, or an exception.
"""

import ctypes
import errno
import gc
import os
import random
import re
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from contextlib import suppress

import pytest

from support.backings import Disk, write_out
from support.content import block_content, compressible, noise
from support.fakeublk import BLOCK, CONTROL, DISCARD, FLUSH, NOUNMAP, READ, WRITE, ZEROES, FakeDisk, Kernel
from support.run import SANITIZED, SCALE, SEED, run_threads, wait_until
from zramd import Device
from zramd.core.device import saving
from zramd.core.ublk.control import Control, available
from zramd.core.ublk.queues import Queues
from zramd.errors import UblkError

SIZE = 8 << 20
KERNEL = Kernel()


def refused(code: int, words: str, work: Callable[[], object]) -> None:
    """Require that the kernel's refusal is told: its errno, and words of the sentence."""
    with pytest.raises(UblkError, match=re.escape(words)) as caught:
        work()
    assert caught.value.errno == code


def over(disk: FakeDisk, queues: Queues) -> None:
    """Stop a disk, and require that nothing of it is left."""
    disk.stop()
    assert queues.join(10)
    assert not queues.serving
    assert disk.fetched == 0
    disk.delete()


def commands() -> None:
    """Control says to the kernel what it must hear, and tells what that answers."""
    assert available(CONTROL) == ""
    with Control(CONTROL) as control:
        assert {"user_recovery_reissue", "ioctl_encode", "user_copy"} < control.features()
        assert "quiesce" not in control.features()
        info = control.add(5, queues=2, depth=16, max_io_bytes=65536, recovers=True)
        assert (info.number, info.queues, info.depth, info.max_io_bytes) == (5, 2, 16, 65536)
        assert (info.state, info.recovers) == ("dead", True)
        assert control.add(queues=1, depth=4).number == 0
        assert not control.info(0).recovers
        refused(errno.EEXIST, "/dev/ublkb5 exists already", lambda: control.add(5))
        refused(errno.EACCES, "ublks_max", lambda: control.add(1000))
        refused(
            errno.ENODEV, "cannot ask about /dev/ublkb7: there is no such device", lambda: control.info(7)
        )
        refused(errno.EINVAL, "no parameters yet", lambda: control.start(5, os.getpid()))
        control.set_params(5, SIZE, max_io_bytes=65536)
        assert control.params(5) == {
            "disksize": SIZE,
            "block": 4096,
            "max_io_bytes": 65536,
            "max_discard_bytes": 1 << 30,
            "max_zeroes_bytes": 1 << 30,
        }
        refused(errno.EINVAL, "process 1 is not its server", lambda: control.start(5, 1))
        control.start_recovery(5)
        refused(errno.EINVAL, "begun already", lambda: control.start_recovery(5))
        assert control.info(5).state == "quiesced"
        refused(errno.EINVAL, "does not outlive its server", lambda: control.start_recovery(0))
        control.stop(5)
        control.delete(5)
        control.delete(0, wait=False)
        refused(errno.ENODEV, "no such device", lambda: control.delete(0, wait=False))
        with pytest.raises(ValueError, match="not a multiple"):
            control.set_params(0, 5000)
        with pytest.raises(ValueError, match="1 or more"):
            control.add(queues=0)
        with pytest.raises(ValueError, match="4096 at most"):
            control.add(depth=4097)


def silence() -> None:
    """A kernel that does not answer is waited for so long; then the next command is refused at once."""
    KERNEL.library.fake_silent(1)
    with Control(CONTROL, timeout=0.2) as control:
        refused(errno.ETIME, "does not answer", lambda: control.info(0))
        KERNEL.library.fake_silent(0)
        refused(errno.EBADF, "has not answered an earlier command", lambda: control.info(0))


def no_rings() -> None:
    """Who cannot have a ring is told why."""
    reasons = {errno.ENOSYS: "older than Linux 5.4", errno.EPERM: "seccomp", errno.EINVAL: "Linux 6.0"}
    for code, words in reasons.items():
        KERNEL.library.fake_no_rings(code)
        assert words in available(CONTROL), available(CONTROL)
        refused(code, words, lambda: Control(CONTROL))
        refused(code, words, lambda: Queues(Device(SIZE), 2, 4))
    KERNEL.library.fake_no_rings(0)
    Queues(Device(SIZE), 2, 4)
    no_threads()


def threads() -> int:
    """How many of zramd's this process has; a sanitizer may have one, too."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{task}/comm") as file:
            names.append(file.read())
    return sum(name.startswith("zramd-") for name in names)


def no_threads() -> None:
    """Require that all of zramd's have ended. Who has waited for a thread may see it for another moment."""
    wait_until(lambda: threads() == 0)


def descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))


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


def damage() -> None:
    """What is out and not what it was is an error of the disk, whichever thread finds it."""
    store = Disk()
    device = store.device(SIZE)
    queues = Queues(device, 1, 4, 65536)
    disk = KERNEL.disk(queues, SIZE)
    disk.write(noise(1), 0)
    write_out(device)
    assert device.counters()["out_pages"] == 1
    for at in range(1 << 16, store.size, 512):
        store.flip(at)
    assert disk.request(READ, 0, BLOCK)[0] == -errno.EIO
    assert queues.stats()["ublk_away"] == 1
    over(disk, queues)


def out() -> None:
    """Blocks that are out come back by readers, beside what is in memory; each read counts once."""
    device = Disk(40).device(SIZE)
    queues = Queues(device, 2, 16, 65536)
    disk = KERNEL.disk(queues, SIZE)
    for number in range(128):
        disk.write(compressible(number, 2000), number * BLOCK, number % 2)
    write_out(device, 0, 64)
    assert device.counters()["out_pages"] == 64
    before = device.counters()

    def client(me: int) -> Callable[[], None]:
        def work() -> None:
            rnd = random.Random(SEED + me)
            for _ in range(200):
                number = rnd.randrange(120)
                count = rnd.randrange(1, 8)
                wanted = b"".join(compressible(i, 2000) for i in range(number, number + count))
                assert disk.read(number * BLOCK, count * BLOCK, me % 2) == wanted, number

        return work

    run_threads(client(me) for me in range(6))
    assert queues.stats()["ublk_away"] > 0
    after = device.counters()
    assert after["failed_reads"] == 0
    _, buckets = device.latencies()["read"]
    assert sum(buckets) == 6 * 200
    assert after["out_pages"] == before["out_pages"]
    over(disk, queues)
    device.check()


def readers() -> None:
    """While the disk of the backing stands still, its readers wait, and nobody else: each queue goes on."""
    device = Disk().device(SIZE)
    queues = Queues(device, 2, 8, 65536)
    disk = KERNEL.disk(queues, SIZE)
    KERNEL.library.fake_end_polls(2)
    for number in range(6):
        disk.write(compressible(number), number * BLOCK)
    write_out(device)
    disk.write(noise(9), 9 * BLOCK)
    KERNEL.library.fake_stand_still(1)
    found: list[bytes] = []
    waiting = [
        threading.Thread(target=lambda n=number: found.append(disk.read(n * BLOCK, queue=n % 2)))
        for number in range(6)  # more than there are readers
    ]
    for one in waiting:
        one.start()
    wait_until(lambda: queues.stats()["ublk_away"] == 6)
    for queue in (0, 1, 0, 1):
        assert disk.read(9 * BLOCK, queue=queue) == noise(9)
        disk.write(noise(10), 10 * BLOCK, queue)
    device.check()
    assert not found
    KERNEL.library.fake_stand_still(0)
    for one in waiting:
        one.join()
    assert sorted(found) == sorted(compressible(number) for number in range(6))
    # queues that end while a reader is at work wait for it, and nothing is left
    KERNEL.library.fake_stand_still(1)
    late = threading.Thread(target=lambda: found.append(disk.read(0)))
    late.start()
    wait_until(lambda: queues.stats()["ublk_away"] == 7)
    closing = threading.Thread(target=queues.close)
    closing.start()
    KERNEL.library.fake_stand_still(0)
    closing.join()
    disk.serve(successor := Queues(device, 2, 8, 65536))
    late.join()
    assert found[-1] == compressible(0)
    # who stops the disk waits, too, and then gets its end
    KERNEL.library.fake_stand_still(1)
    late = threading.Thread(target=lambda: found.append(disk.read(BLOCK)))
    late.start()
    wait_until(lambda: successor.stats()["ublk_away"] == 2)
    stopping = threading.Thread(target=disk.stop)
    stopping.start()
    assert not successor.join(0.1)
    assert disk.fetched == 16
    KERNEL.library.fake_stand_still(0)
    stopping.join()
    late.join()
    assert found[-1] == compressible(1)
    KERNEL.library.fake_end_polls(0)
    over(disk, successor)


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


def refusals() -> None:
    """A kernel that refuses: nothing serves then, nothing is left, and the same queues serve another disk."""
    device = Device(SIZE)
    no_threads()
    queues = Queues(device, 3, 4, 65536)
    assert threads() == 3
    before = descriptors()
    for code, words in (
        (errno.EINVAL, "it has not 3 queues of 4 requests"),
        (errno.EBUSY, "it is served already"),
        (errno.ENODEV, "it is being stopped"),
        (errno.EIO, "input/output error"),
    ):
        KERNEL.library.fake_no_fetch(1, code)
        refused(code, words, lambda: KERNEL.disk(queues, SIZE))
        assert not queues.serving
        no_threads()
        assert queues.join(0)
    KERNEL.library.fake_no_fetch(2**32 - 1, 0)
    with open("/dev/null") as null:
        refused(errno.ENODEV, "the descriptor is not /dev/ublkcN's", lambda: queues.serve(null.fileno()))
    disk = KERNEL.disk(queues, SIZE)
    disk.write(noise(1), 0)
    refused(errno.EBUSY, "serve a disk already", lambda: disk.serve(queues))
    assert disk.read(0) == noise(1)
    assert not queues.join(0.2)
    over(disk, queues)
    assert descriptors() == before + 4  # the fake kernel's: disks that were made and not deleted
    queues.close()
    no_threads()
    assert queues.join()
    disk = KERNEL.disk(queues, SIZE)
    assert disk.read(0) == noise(1)
    over(disk, queues)


def rounds() -> None:
    """A thousand disks leave nothing behind."""
    device = Device(SIZE)
    queues = Queues(device, 2, 8, 65536)
    sizes = []
    for turn in range(int(200 * max(1, SCALE))):
        disk = KERNEL.disk(queues, SIZE)
        disk.write(compressible(turn % 10), 0, turn % 2)
        over(disk, queues)
        if turn % 50 == 49:
            queues.close()
            no_threads()
            with open("/proc/self/statm") as file:
                sizes.append((descriptors(), int(file.read().split()[1]) // 256))  # in MiB
    assert len({count for count, _ in sizes}) == 1, sizes
    assert SANITIZED or sizes[-1][1] - sizes[0][1] <= 1, sizes


def ended(child: int) -> int:
    """What a process ends with; one that does not end is killed."""
    found = (0, 0)

    def look() -> int:
        nonlocal found
        found = os.waitpid(child, os.WNOHANG)
        return found[0]

    try:
        wait_until(look)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    return os.waitstatus_to_exitcode(found[1])


def forked() -> None:
    """A child that is forked off, and ends as any, disturbs nobody: it has no part of the disk."""
    device = Disk().device(SIZE)
    queues = Queues(device, 2, 8, 65536)
    disk = KERNEL.disk(queues, SIZE)
    before = queues.stats()["ublk_enters"]
    for closes in (False, True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of threads, which is what this is about
            child = os.fork()
        if child == 0:
            try:
                with open("/proc/self/maps") as file:
                    seen = sum("/memfd:ublkc" in line for line in file)
                if closes:
                    queues.close()
                del queues
                os._exit(seen)  # the fake kernel's own
            finally:
                os._exit(99)
        assert ended(child) == 1
        assert queues.stats()["ublk_enters"] == before
    disk.write(noise(1), 0)
    write_out(device)
    assert disk.read(0, queue=1) == noise(1)
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


def again() -> None:
    """One disk after the other, of the same threads, rings and buffers."""
    no_threads()
    device = Device(SIZE)
    queues = Queues(device, 2, 8, 65536)
    before = sorted(os.listdir("/proc/self/task"))
    for turn in range(20):
        disk = KERNEL.disk(queues, SIZE)
        if turn:
            assert disk.read(0) == noise(turn - 1)
        disk.write(noise(turn), 0, turn % 2)
        over(disk, queues)
    assert sorted(os.listdir("/proc/self/task")) == before
    del queues
    no_threads()


def successor() -> None:
    """Queues that leave a disk look as dead as a killed server: what was under way comes to the next."""
    device = Device(SIZE)
    first = Queues(device, 2, 8, 65536)
    disk = KERNEL.disk(first, SIZE, recovers=True)
    stop = threading.Event()
    errors: list[BaseException] = []
    done = [0] * 4

    def client(me: int) -> None:
        try:
            version = 0
            while not stop.is_set():
                version += 1
                disk.write(block_content(me, version), me * BLOCK, me % 2)
                assert disk.read(me * BLOCK, queue=version % 2) == block_content(me, version)
                done[me] += 1
        except BaseException as error:
            errors.append(error)

    clients = [threading.Thread(target=client, args=(me,)) for me in range(4)]
    for one in clients:
        one.start()
    served = first
    for _ in range(int(10 * max(1, SCALE))):
        seen = list(done)
        wait_until(lambda: errors or all(now > was for now, was in zip(done, seen, strict=True)))  # noqa: B023
        successor = Queues(device, 2, 8, 65536)
        served.close()
        assert not served.serving
        with Control(CONTROL) as control:
            control.start_recovery(disk.number)
            disk.serve(successor)
            control.end_recovery(disk.number, os.getpid())
        served = successor
    stop.set()
    for one in clients:
        one.join()
    assert not errors, errors
    over(disk, served)


def broken() -> None:
    """A thread whose ring fails is gone, and said to be; the next queues answer what it had."""
    device = Device(SIZE)
    first = Queues(device, 1, 4, 65536)
    disk = KERNEL.disk(first, SIZE, recovers=True)
    KERNEL.library.fake_break(errno.EFAULT)
    client = threading.Thread(target=lambda: disk.write(noise(1), 0))
    client.start()
    wait_until(lambda: not first.serving)
    assert first.join(0)
    no_threads()
    successor = Queues(device, 1, 4, 65536)
    with Control(CONTROL) as control:
        control.start_recovery(disk.number)
        disk.serve(successor)
        control.end_recovery(disk.number, os.getpid())
    client.join()
    assert disk.read(0) == noise(1)
    over(disk, successor)
    other = KERNEL.disk(first, SIZE)
    assert other.read(0) == noise(1)
    over(other, first)


def another() -> None:
    """Queues that were made for no device yet serve the one that comes, by the same threads and buffers."""
    queues = Queues(Device(BLOCK), 2, 8, 65536)
    tasks = sorted(os.listdir("/proc/self/task"))
    for turn in range(3):
        device = Device(SIZE)
        queues.use(device)
        disk = KERNEL.disk(queues, SIZE)
        disk.write(noise(turn), SIZE // 2, turn % 2)
        assert disk.read(SIZE // 2) == noise(turn)
        assert device.counters()["writes"] == 1
        refused(errno.EBUSY, "serve a disk already", lambda: queues.use(Device(SIZE)))
        over(disk, queues)
    assert sorted(os.listdir("/proc/self/task")) == tasks


def another_with_backing() -> None:
    """Its threads that wait for the disk come with it, and go with it."""
    queues = Queues(Device(BLOCK), 1, 4, 65536)
    before = threads()
    device = Disk(40).device(SIZE)
    queues.use(device)
    wait_until(lambda: threads() > before)
    queues.use(Device(SIZE))
    wait_until(lambda: threads() == before)


def abort() -> None:
    """Tags that are idle are over at once; those with requests are when these are answered."""
    device = Device(SIZE)
    queues = Queues(device, 2, 8, 65536)
    disk = KERNEL.disk(queues, SIZE)
    device.write(noise(1), 0)
    stopped = threading.Event()
    results: list[int] = []

    def client(me: int) -> None:
        while True:
            result, data = disk.request(READ, 0, BLOCK, queue=me % 2)
            results.append(result)
            if result < 0:
                return
            assert data == noise(1)

    clients = [threading.Thread(target=client, args=(me,)) for me in range(6)]
    for one in clients:
        one.start()
    wait_until(lambda: len(results) > 200)
    over(disk, queues)
    stopped.set()
    for one in clients:
        one.join()
    assert set(results) == {BLOCK, -errno.ENODEV}
    assert queues.stats()["ublk_lost"] == 0


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


def save(device: Device) -> None:
    """Save it as it is served."""
    fd = os.memfd_create("saved")
    try:
        saving.save(device, fd, live=True)
    finally:
        os.close(fd)


def stress() -> None:
    """Clients know their blocks, while it is looked at, compacted, saved, emptied, and disks change."""
    seconds = 4 * SCALE
    device = Disk(200).device(16 << 20)
    device.reserve_start(1 << 20)
    keeper = threading.Thread(target=device.reserve_keep)
    keeper.start()
    KERNEL.no_memory(50)
    queues = Queues(device, 2, 16, 65536)
    workers, blocks = 6, 4096
    contents: list[dict[int, int]] = [{} for _ in range(workers)]
    end = time.monotonic() + seconds
    for turn in range(3):
        disk = KERNEL.disk(queues, 16 << 20)
        stop = threading.Event()

        def worker(me: int, turn: int, disk: FakeDisk, stop: threading.Event) -> Callable[[], None]:
            def work() -> None:
                rnd = random.Random(SEED + me + 100 * turn)
                mine = contents[me]
                version = turn << 20
                while not stop.is_set():
                    version += 1
                    first = rnd.randrange(blocks // workers // 8 - 1) * workers * 8 + me * 8
                    count = rnd.randrange(1, 9)
                    queue = rnd.randrange(2)
                    span = range(first, first + count)
                    action = rnd.random()
                    if action < 0.4:
                        data = b"".join(block_content(block, version) for block in span)
                        disk.write(data, first * BLOCK, queue)
                        mine.update(dict.fromkeys(span, version))
                    elif action < 0.5:
                        what = rnd.choice([DISCARD, ZEROES, ZEROES | NOUNMAP])
                        result, _ = disk.request(what, first * BLOCK, count * BLOCK, queue=queue)
                        assert result == count * BLOCK
                        mine.update(dict.fromkeys(span, 0))
                    else:
                        found = disk.read(first * BLOCK, count * BLOCK, queue)
                        for i, block in enumerate(span):
                            piece = found[i * BLOCK : (i + 1) * BLOCK]
                            assert piece == block_content(block, mine.get(block, 0)), (me, block)

            return work

        def beside(turn: int, stop: threading.Event) -> None:
            while not stop.is_set() and time.monotonic() < end - seconds * (2 - turn) / 3:
                device.compact()
                device.check()
                save(device)
                write_out(device)
                queues.stats()
                time.sleep(0.01)
            stop.set()

        run_threads(
            [
                *(worker(me, turn, disk, stop) for me in range(workers)),
                lambda turn=turn, stop=stop: beside(turn, stop),  # type: ignore[misc]
            ]
        )
        disk.stop()
        assert queues.join(20)
        disk.delete()
        device.check()
        if turn == 1:
            device.reset()
            for mine in contents:
                mine.clear()
    numbers = queues.stats()
    assert numbers["ublk_away"]
    assert numbers["ublk_resent"]
    assert not numbers["ublk_lost"]
    device.reserve_stop()
    keeper.join()


def emptied() -> None:
    """A reset has the device alone, whatever is under way: after it a block reads as zeros, or is new."""
    device = Device(SIZE)
    queues = Queues(device, 2, 16, 65536)
    disk = KERNEL.disk(queues, SIZE)
    stop = threading.Event()

    def writer(me: int) -> Callable[[], None]:
        def work() -> None:
            version = 0
            while not stop.is_set():
                version += 1
                disk.write(block_content(me, version), me * BLOCK, me % 2)
                found = disk.read(me * BLOCK, queue=me % 2)
                assert found in (bytes(BLOCK), block_content(me, version)), (me, version)

        return work

    def resetter() -> None:
        for _ in range(int(100 * max(SCALE, 0.2))):
            device.reset()
            device.check()
        stop.set()

    run_threads([*(writer(me) for me in range(4)), resetter])
    over(disk, queues)


if __name__ == "__main__":
    for scene in sys.argv[1:]:
        globals()[scene]()
        gc.collect()  # a scene's queues may be part of a cycle, and no thread of theirs is to be left
        assert KERNEL.violation == "", (scene, KERNEL.violation)
