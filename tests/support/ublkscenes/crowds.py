"""Many clients of a disk while its device is looked at, saved and emptied."""

import os
import random
import threading
import time
from collections.abc import Callable

from support.backings import Disk, write_out
from support.content import block_content
from support.fakeublk import BLOCK, DISCARD, NOUNMAP, ZEROES, FakeDisk
from support.run import SCALE, SEED, run_threads
from support.ublkscenes import KERNEL, SIZE, over, play
from zramd import Device
from zramd.core.device import saving
from zramd.core.ublk.queues import Queues


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
    play(globals())
