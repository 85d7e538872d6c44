"""Disks that come, change their servers and go: nothing is left behind, and nothing is lost."""

import errno
import os
import signal
import threading
import warnings

from support.backings import Disk, write_out
from support.content import block_content, compressible, noise
from support.fakeublk import BLOCK, CONTROL, READ
from support.run import SANITIZED, SCALE, wait_until
from support.ublkscenes import KERNEL, SIZE, descriptors, no_threads, over, play, refused, threads
from zramd import Device
from zramd.core.ublk.control import Control
from zramd.core.ublk.queues import Queues


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


if __name__ == "__main__":
    play(globals())
