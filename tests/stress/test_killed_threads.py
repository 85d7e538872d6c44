"""Processes that are killed in the middle of many threads' work, and the state they leave behind.

30 kills; ZRAMD_STRESS multiplies that. The seed is printed and can be given as ZRAMD_SEED.
(tests/integration/test_crash.py does it to servers with clients; here far more happens between two kills.)
"""

import mmap
import os
import random
import signal
import struct
import threading
import time

import pytest
from support.content import block_content
from support.run import PATIENCE, SCALE, SEED, wait_until

from zramd import Device
from zramd.core.device.device import state_layout

BLOCK = 4096
KILLS = max(1, int(30 * SCALE))
WORKERS = 4
BLOCKS = 2048  # of each worker
SIZE = WORKERS * BLOCKS * BLOCK
TOLD = WORKERS * BLOCKS * 16  # of each block: the version begun, the version done
COUNTS = struct.Struct("<QQ")  # behind that: blocks that the first worker has done, and rounds of the cooler


def work(fd: int, told: mmap.mmap, versions: list[int], seed: int) -> None:
    """Threads that write, trim and read blocks of their own, and tell what they begin and what is done.

    Others compact meanwhile, and make blocks cold.
    """
    device = Device(SIZE, state=fd, cold_level=3)
    counts = [0, 0]

    def count(which: int) -> None:
        counts[which] += 1
        COUNTS.pack_into(told, TOLD, *counts)

    def worker(me: int) -> None:
        rnd = random.Random(seed + me)
        version = versions[me]
        while True:
            version += 1
            index = rnd.randrange(64) if rnd.random() < 0.5 else rnd.randrange(BLOCKS)
            block = me * BLOCKS + index
            shown = 0 if rnd.random() < 0.3 else version
            data = block_content(block, shown)
            at = block * 16
            told[at : at + 8] = struct.pack("<Q", shown)
            if shown:
                device.write(data, block * BLOCK)
            else:
                device.trim(block * BLOCK, BLOCK)
            told[at + 8 : at + 16] = struct.pack("<Q", shown)
            if me == 0:
                count(0)
            if rnd.random() < 0.2:
                buf = bytearray(BLOCK)
                device.read(buf, block * BLOCK)
                assert buf == data

    def cooler() -> None:
        rnd = random.Random(seed)
        while True:
            device.sweep()
            device.cool(rnd.randrange(WORKERS * BLOCKS), 512, age=rnd.randrange(2))
            count(1)

    threading.Thread(target=cooler, daemon=True).start()
    for me in range(WORKERS):
        threading.Thread(target=worker, args=(me,), daemon=True).start()
    while True:
        device.compact(65536)
        device.release_stock()


@pytest.mark.timeout((120 + 10 * KILLS) * PATIENCE)
def test_threads_that_are_killed() -> None:
    if "libtsan" in os.environ.get("LD_PRELOAD", ""):
        # It forks with no other thread than its own, and those of earlier tests may be only just ending.
        wait_until(lambda: len(os.listdir("/proc/self/task")) <= 2)
    rnd = random.Random(SEED)
    fd = os.memfd_create("zramd")
    os.ftruncate(fd, state_layout(SIZE)["bytes"])
    told = mmap.mmap(-1, TOLD + COUNTS.size)
    versions = [0] * WORKERS
    known = [0] * WORKERS * BLOCKS
    leaked = pinned = written = cold = 0
    for _ in range(KILLS):
        COUNTS.pack_into(told, TOLD, 0, 0)
        child = os.fork()
        if child == 0:
            try:
                work(fd, told, versions, rnd.randrange(1 << 30))
            finally:
                os._exit(1)
        time.sleep(rnd.uniform(0.02, 0.3))
        wait_until(lambda: min(COUNTS.unpack_from(told, TOLD)) > 20, 60)  # whatever else the machine does
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), "it died by itself"
        device = Device(SIZE, state=fd)
        device.check()
        leaked += device.counters()["leaked_objects"]
        cold += device.counters()["cold_pages"]
        buf = bytearray(SIZE)
        device.read(buf, 0)
        for block in range(WORKERS * BLOCKS):
            begun, done = struct.unpack_from("<QQ", told, block * 16)
            found = buf[block * BLOCK : (block + 1) * BLOCK]
            if found != block_content(block, done):
                assert begun != done, f"block {block}: version {done} is lost"
                assert found == block_content(block, begun), f"block {block} is torn"
                done = begun
                pinned += 1
            struct.pack_into("<QQ", told, block * 16, done, done)
            written += done != known[block]
            known[block] = done
            versions[block // BLOCKS] = max(versions[block // BLOCKS], begun)
        device.check()
        del device
    print(
        f"{KILLS} kills: {KILLS * WORKERS * BLOCKS} blocks compared, {written} of them written since the kill"
        f" before, {cold} cold; {leaked} objects leaked, {pinned} blocks in flight were new"
    )
    assert max(versions) > KILLS
    assert cold > 10 * KILLS
    os.close(fd)
