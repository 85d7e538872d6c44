"""Threads on one pool, handing handles to each other, while compaction runs."""

import queue
import random
import threading
from functools import partial

from support.run import SCALE, SEED, run_threads

from zramd import HandleError, Zsmalloc


def tagged(handle: int, size: int) -> bytes:
    return (handle.to_bytes(8, "little") * (size // 8 + 1))[:size]


def test_handles_change_hands() -> None:
    pool = Zsmalloc(100_000)
    shared: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    done = threading.Event()

    def worker(me: int) -> None:
        rnd = random.Random(SEED + me)
        for _ in range(int(15_000 * SCALE)):
            if rnd.random() < 0.55 and shared.qsize() < 5000:
                size = rnd.choice([rnd.randint(1, 4096), rnd.randint(1, 200), 4096])
                handle = pool.malloc(size)
                pool.write(handle, tagged(handle, size))
                shared.put((handle, size))
                continue
            try:
                handle, size = shared.get_nowait()
            except queue.Empty:
                continue
            assert pool.read(handle, size) == tagged(handle, size)
            if rnd.random() < 0.3:
                shared.put((handle, size))
            else:
                pool.free(handle)

    def compactor() -> None:
        while not done.is_set():
            pool.compact(20_000)

    background = threading.Thread(target=compactor)
    background.start()
    try:
        run_threads(partial(worker, me) for me in range(4))
    finally:
        done.set()
        background.join()
    pool.check()
    assert pool.stats()["objects_migrated"] > 0
    while not shared.empty():
        handle, size = shared.get_nowait()
        assert pool.read(handle, size) == tagged(handle, size)
        pool.free(handle)
    pool.compact()
    pool.check()
    assert pool.stats()["mem_used_total"] == 0


def test_one_of_many_frees_wins() -> None:
    """A handle freed by several threads at once is freed once; the others are told that it is not live."""
    pool = Zsmalloc(1000)
    for _ in range(int(300 * SCALE) + 10):
        handle = pool.malloc(100)
        barrier = threading.Barrier(4)
        freed: list[bool] = []

        def work(
            handle: int = handle, barrier: threading.Barrier = barrier, freed: list[bool] = freed
        ) -> None:
            barrier.wait()
            try:
                pool.free(handle)
                freed.append(True)
            except HandleError:
                freed.append(False)

        run_threads([work] * 4)
        assert sorted(freed) == [False, False, False, True]
        pool.check()
