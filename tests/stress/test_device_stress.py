"""Threads on one device while compaction runs: every block tells who wrote it last, and nothing is torn.

Scaled by ZRAMD_STRESS (1 by default); the seed is printed and can be given as ZRAMD_SEED.
"""

import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from support.backings import Disk, write_out
from support.content import block_content
from support.pages import PAGE
from support.run import SCALE, SEED, run_threads

from zramd import Device, PoolFullError
from zramd.core.device import saving
from zramd.core.device.writeback import Writeback
from zramd.errors import SaveError

BLOCK = 4096


@contextmanager
def reserve(device: Device, size: int) -> Iterator[None]:
    """Keep `size` bytes ready meanwhile; 0: no reserve."""
    if not size:
        yield
        return
    device.reserve_start(size)
    refiller = threading.Thread(target=device.reserve_keep)
    refiller.start()
    try:
        yield
    finally:
        device.reserve_stop()
        refiller.join()


@pytest.mark.parametrize("ready", [0, 1 << 20])
@pytest.mark.parametrize("limit", [0, 3 << 20])
def test_owned_blocks_with_compaction(limit: int, ready: int) -> None:
    """Each thread has blocks of its own and knows their content; what one does never shows in another's."""
    if limit and ready:
        # A hundred classes have a page that is part-filled and one for what comes. With large ones that
        # would be all, and nothing would move.
        limit += 150 * (PAGE - BLOCK)
    device = Disk(48).device(16 << 20, mem_limit=limit)
    if ready:
        device.inherit_priority()  # as swap=local has it
    done = threading.Event()
    workers, blocks = 4, 4096
    rounds = int(4000 * max(SCALE, 0.5))  # with fewer the limit is not always met

    def worker(me: int) -> Callable[[], None]:
        def work() -> None:
            rnd = random.Random(SEED + me)
            mine: dict[int, bytes] = {}
            for version in range(1, rounds + 1):
                block = rnd.randrange(blocks // workers) * workers + me
                action = rnd.random()
                if action < 0.5:
                    data = block_content(block, version)
                    try:
                        device.write(data, block * BLOCK)
                        mine[block] = data
                    except PoolFullError:
                        assert limit
                elif action < 0.6 and block in mine:
                    part, at = rnd.randbytes(100), rnd.randrange(BLOCK - 100)
                    try:
                        device.write(part, block * BLOCK + at)
                        mine[block] = mine[block][:at] + part + mine[block][at + 100 :]
                    except PoolFullError:
                        assert limit
                elif action < 0.75:
                    device.trim(block * BLOCK, BLOCK)
                    mine.pop(block, None)
                elif action < 0.8:
                    assert (device.block(block)["kind"] == "hole") is (block not in mine)
                else:
                    buf = bytearray(BLOCK)
                    device.read(buf, block * BLOCK)
                    assert buf == mine.get(block, bytes(BLOCK)), f"block {block} of thread {me}"
            for block in range(me, blocks, workers):
                buf = bytearray(BLOCK)
                device.read(buf, block * BLOCK)
                assert buf == mine.get(block, bytes(BLOCK)), f"block {block} of thread {me}"

        return work

    def compactor() -> None:
        rnd = random.Random(SEED)
        while not done.is_set():
            device.compact(rnd.choice([0, 4096, 65536]))
            device.counters()
            device.classes()
            if rnd.random() < 0.1:
                device.release_stock()
            if rnd.random() < 0.05:
                device.check()

    def cooler() -> None:
        """Two at once, which is one more than there is work for."""
        rnd = random.Random(SEED)
        while not done.is_set():
            device.sweep(rnd.random() < 0.1)
            device.cool(rnd.randrange(blocks), 64, age=rnd.randrange(2))
            device.ages()

    def leaver() -> None:
        rnd = random.Random(SEED)
        hands = Writeback(device)
        while not done.is_set():
            at = rnd.randrange(blocks)
            write_out(device, at, at + 200, rnd.randrange(2), hands=hands)
            if device.counters()["backing_free"] < 10:
                while hands.reclaim(0.8):
                    pass
                hands.flush()
            if rnd.random() < 0.1:
                hands.bring_back(at, at + 100, False)

    background = [threading.Thread(target=work) for work in (compactor, cooler, cooler, leaver)]
    for thread in background:
        thread.start()
    try:
        with reserve(device, ready):
            run_threads([worker(me) for me in range(workers)])
    finally:
        done.set()
        for thread in background:
            thread.join()
    device.check()
    counters = device.counters()
    assert counters["objects_migrated"] > 0
    assert counters["recompressed"] > 0
    assert counters["written_out"] > 0
    assert counters["bd_reads"] > 0
    assert counters["bd_read_errors"] == 0
    if limit:
        assert counters["mem_used_max"] <= limit
        assert counters["limit_compactions"] > 0


def test_shared_blocks_are_never_torn() -> None:
    """All threads write the same few blocks: a reader sees one version of a block, never parts of two."""
    device = Device(1 << 20)
    blocks = 16
    rounds = int(5000 * SCALE)
    for block in range(blocks):
        device.write(block_content(block, 1), block * BLOCK)

    def writer(me: int) -> Callable[[], None]:
        def work() -> None:
            rnd = random.Random(SEED + me)
            for version in range(rounds):
                block = rnd.randrange(blocks)
                if rnd.random() < 0.1:
                    device.trim(block * BLOCK, BLOCK)
                else:
                    device.write(block_content(block, me << 20 | version), block * BLOCK)

        return work

    def reader(me: int) -> Callable[[], None]:
        def work() -> None:
            rnd = random.Random(SEED + me)
            buf = bytearray(BLOCK)
            for _ in range(rounds):
                block = rnd.randrange(blocks)
                device.read(buf, block * BLOCK)
                if not any(buf):
                    continue
                if buf[:8] == buf[8:16]:
                    version = int.from_bytes(buf[:4], "little")
                else:
                    assert buf[:18] == buf[-18:], "head and tail are of different versions"
                    version = int(buf[9:17])
                assert buf == block_content(block, version)

        return work

    def compactor() -> None:
        for _ in range(rounds):
            device.compact(2000)

    run_threads([writer(1), writer(2), reader(3), reader(4), compactor])
    device.check()


def test_partial_writes_lose_nobodys_bytes() -> None:
    """Threads own interleaved bytes of the same blocks: none may undo what another wrote."""
    device = Device(1 << 18)
    workers, size = 4, 1 << 18
    final: list[dict[int, int]] = [{} for _ in range(workers)]

    def worker(me: int) -> Callable[[], None]:
        def work() -> None:
            rnd = random.Random(SEED + me)
            for _ in range(int(3000 * SCALE)):
                at = rnd.randrange(size // 64 // workers) * 64 * workers + me * 64
                value = rnd.randrange(1, 256)
                device.write(bytes([value]) * 64, at)
                final[me][at] = value

        return work

    run_threads([worker(me) for me in range(workers)])
    device.check()
    now = bytearray(size)
    device.read(now, 0)
    for each in final:
        for at, value in each.items():
            assert now[at : at + 64] == bytes([value]) * 64


@pytest.mark.parametrize("ready", [0, 1 << 20])
def test_reset_and_limits_under_load(ready: int) -> None:
    device = Device(16 << 20, cold_level=1)
    if ready:
        device.inherit_priority()
    done = threading.Event()

    def writer() -> None:
        rnd = random.Random(SEED)
        buf = bytearray(3 * BLOCK)
        while not done.is_set():
            block = rnd.randrange(4000)
            try:
                device.write(block_content(block, 1), block * BLOCK + rnd.choice([0, 0, 17]))
                device.read(buf, block * BLOCK)
            except PoolFullError:
                pass

    def disturb() -> None:
        rnd = random.Random(SEED + 1)
        for _ in range(int(60 * SCALE) + 5):
            device.mem_limit = rnd.choice([0, 1 << 20, 8 << 20])
            device.compact(100_000)
            if rnd.random() < 0.3:
                device.reset()
            device.check()
            device.extents(0, 16 << 20)
            device.reset_mem_used_max()
        done.set()

    def watch() -> None:
        while not done.is_set():
            device.release_stock()
            device.counters()
            device.pressure()

    def cooler() -> None:
        while not done.is_set():
            device.sweep()
            device.cool(0, 4096)
            device.ages()

    def saver() -> None:
        while not done.is_set():
            with open(os.memfd_create("saved"), "wb") as file, suppress(SaveError):
                saving.save(device, file.fileno(), live=True)

    with reserve(device, ready):
        run_threads([writer, writer, disturb, watch, cooler, saver])
    device.check()
