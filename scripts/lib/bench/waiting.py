"""A process of its own in which requests wait: python -m bench.waiting SCENE SECONDS SIZE.

It prints milliseconds as JSON; waiting_rows shows them. What a request waits in the core is told by the core
itself: the upper end of the slowest one's bucket.
"""

from __future__ import annotations

import ctypes
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from bench.setup import BLOCK
from zramd import Device, PoolFullError
from zramd.core.device import saving
from zramd.kernel import protection
from zramd.server.compactor import Compactor
from zramd.server.worker import Worker
from zramd.settings import config
from zramd.stats import snapshots, texts

HOGS = 4
PAUSE = 0.0002  # seconds between two requests
RESERVE = 4 << 20
GATE_HELD = 0.85  # of a save is done when the trim starts, so that it ends in the middle of it


def content(dice: random.Random, size: int) -> bytes:
    """Return a block that lz4 brings down to about `size` bytes."""
    size = max(8, size - 20 - size // 255)
    return dice.randbytes(size) + bytes(BLOCK - size)


@contextmanager
def hogs() -> Iterator[None]:
    """Let HOGS ordinary programs want this processor meanwhile."""
    children = []
    try:
        for _ in range(HOGS):
            child = os.fork()
            if child == 0:
                signal.alarm(3600)  # whatever becomes of the parent
                while True:
                    pass
            children.append(child)
        yield
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@contextmanager
def repeating(step: Callable[[], object]) -> Iterator[None]:
    """Call `step` over and over in a thread of its own until the `with` ends."""
    done = threading.Event()

    def work() -> None:
        while not done.is_set():
            step()

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


class Slowest:
    """The slowest request of some kinds that the device has served since this was made."""

    def __init__(self, device: Device, *kinds: str) -> None:
        self._device = device
        self._kinds = kinds
        self._before = self._counts()

    def _counts(self) -> list[int]:
        latencies = self._device.latencies()
        return [sum(each) for each in zip(*(latencies[kind][1] for kind in self._kinds), strict=True)]

    def ms(self) -> float:
        """Return milliseconds: the upper end of its bucket."""
        pairs = zip(self._counts(), self._before, strict=True)
        last = max((i for i, (now, before) in enumerate(pairs) if now > before), default=0)
        bounds = self._device.latency_bounds
        return bounds[min(last, len(bounds) - 1)] / 1e6


def in_a_thread(work: Callable[[], None]) -> None:
    """Do it in a thread of its own, and wait."""
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def one_processor(seconds: float, size: int) -> dict[str, float]:
    """As swap=local: a real-time client beside hogs, compaction, and a thread that makes statistics."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    dice = random.Random(5)
    contents = [content(dice, 300) for _ in range(256)]
    blocks = size // BLOCK
    device = Device(size)
    for block in range(blocks):
        device.write(contents[block % 256], block * BLOCK)
    for block in dice.sample(range(blocks), blocks // 2):
        device.trim(block * BLOCK, BLOCK)
    device.inherit_priority()
    sys.setswitchinterval(protection.SWITCH_INTERVAL)
    settings = config.parse([("disksize", str(size)), ("rundir", "/nowhere")])._replace(
        compaction_interval=0.01, compaction_threshold=0.1
    )
    numbers = {"gil": 0.0}

    def beside() -> None:
        snapshot = snapshots.take(device, name="bench", comp_algorithm="lz4", version="", started=0.0)
        texts.to_json(snapshot)
        texts.classes_table(snapshots.take_classes(device))
        time.sleep(0.002)

    def client() -> None:
        protection.take_priority(protection.SERVE)
        slowest = Slowest(device, "write", "trim")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            at = dice.randrange(blocks) * BLOCK
            if dice.random() < 0.5:
                device.write(dice.choice(contents), at)
            else:
                device.trim(at, BLOCK)
            began = time.perf_counter()
            time.sleep(PAUSE)
            numbers["gil"] = max(numbers["gil"], (time.perf_counter() - began - PAUSE) * 1000)
        numbers["core"] = slowest.ms()

    with hogs():
        protection.take_priority(protection.BESIDE)
        worker = Worker(Compactor(device, settings))
        worker.start()
        with repeating(beside):
            in_a_thread(client)
        worker.stop()
    return numbers | {"moved": device.counters()["objects_migrated"]}


def slow_copy(seconds: float, size: int) -> dict[str, float]:
    """A real-time reader on the processor of a compactor whose copy is stretched by slow_copy.c."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    dice = random.Random(1)
    copied = ctypes.c_int.in_dll(ctypes.CDLL(None), "slow_copy")
    device = Device(size)
    blocks = size // BLOCK
    for block in range(blocks):
        device.write(content(dice, 310), block * BLOCK)
    gone = set(dice.sample(range(blocks), blocks * 2 // 3))
    for block in gone:
        device.trim(block * BLOCK, BLOCK)
    device.inherit_priority()
    buffer = bytearray(BLOCK)
    numbers = {}

    def client() -> None:
        protection.take_priority(protection.SERVE)
        slowest = Slowest(device, "read")
        while copied.value == 1 and not done.is_set():
            time.sleep(PAUSE)
        for block in range(blocks):
            if block not in gone:
                device.read(buffer, block * BLOCK)
        numbers["read"] = slowest.ms()

    done = threading.Event()
    reader = threading.Thread(target=client)
    copied.value = 1
    reader.start()
    device.compact()
    done.set()
    reader.join()
    return numbers | {"copied": copied.value}


def at_the_limit(seconds: float, size: int) -> dict[str, float]:
    """A client that trims, while another writes to a full pool: each zspage has an object and no room."""
    dice = random.Random(2)
    per_zspage = 17  # of objects of 3.8 KB
    zspages = size // BLOCK // per_zspage
    blocks = zspages * per_zspage
    contents = [content(dice, 3835) for _ in range(256)]
    device = Device(4 * size)
    for block in range(blocks):
        device.write(contents[block % 256], block * BLOCK)
    kept = [first + dice.randrange(2, 15) for first in range(0, blocks, per_zspage)]
    for block in set(range(blocks)) - set(kept):
        device.trim(block * BLOCK, BLOCK)
    device.release_stock()
    device.mem_limit = device.counters()["mem_used_total"]
    # Real-time, so that no other program is waited for; with pauses, or the kernel makes one of 50 ms.
    device.inherit_priority()
    protection.take_priority(protection.SERVE)
    slowest = Slowest(device, "trim")
    free = iter(range(blocks, 4 * size // BLOCK))
    written = refused = 0

    def write() -> None:
        nonlocal written, refused
        if (written + refused) % 64 == 0:
            time.sleep(PAUSE)
        try:
            device.write(dice.choice(contents), next(free, blocks) * BLOCK)
            written += 1
        except PoolFullError:
            refused += 1

    end = time.monotonic() + seconds
    with repeating(write):
        for block in kept[: zspages // 2]:
            if time.monotonic() > end:
                break
            device.trim(block * BLOCK, BLOCK)
            time.sleep(0.002)
    return {"trim": slowest.ms(), "written": written, "refused": refused}


def long_request(seconds: float, size: int) -> dict[str, float]:
    """A client reads a block over and over, while another trims all others and a save closes the gate."""
    dice = random.Random(3)
    blocks = size // BLOCK
    contents = [content(dice, 600) for _ in range(256)]
    device = Device(size + BLOCK)
    for block in range(blocks + 1):
        device.write(contents[block % 256], block * BLOCK)
    null = os.open("/dev/null", os.O_WRONLY)
    began = time.monotonic()
    saving.save(device, null, live=True)
    taken = time.monotonic() - began
    buffer = bytearray(BLOCK)

    def read() -> None:
        device.read(buffer, size)
        time.sleep(PAUSE)

    slowest = Slowest(device, "read")
    with repeating(read):
        saver = threading.Thread(target=lambda: saving.save(device, null, live=True))
        saver.start()
        time.sleep(GATE_HELD * taken)
        device.trim(0, size)
        saver.join()
    return {"read": slowest.ms()}


SCENES = {scene.__name__: scene for scene in (one_processor, slow_copy, at_the_limit, long_request)}

if __name__ == "__main__":
    print(json.dumps(SCENES[sys.argv[1]](float(sys.argv[2]), int(sys.argv[3]))))
