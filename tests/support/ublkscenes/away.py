"""What is in the backing: it comes back by readers, and nobody else waits for it."""

import errno
import random
import threading
from collections.abc import Callable

from support.backings import Disk, write_out
from support.content import compressible, noise
from support.fakeublk import BLOCK, READ
from support.run import SEED, run_threads, wait_until
from support.ublkscenes import KERNEL, SIZE, over, play
from zramd.core.ublk.queues import Queues


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


if __name__ == "__main__":
    play(globals())
