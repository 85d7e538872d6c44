"""Saves of a device that threads change, and loads while others look: each block is whole, and of its own.

Scaled by ZRAMD_STRESS (1 by default); the seed is printed and can be given as ZRAMD_SEED.
"""

import os
import random
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial

import pytest
from support.content import block_content, noise
from support.run import SCALE, SEED, run_threads

from zramd import Device, PoolFullError
from zramd.core.device import saving
from zramd.errors import SaveError

BLOCK = 4096
WRITERS = 3
BLOCKS = 1024  # of each writer
VERSIONS = 4  # of each block; the first is a hole
SIZE = WRITERS * BLOCKS * BLOCK
SAVES = max(2, int(6 * SCALE))
LOADS = max(2, int(4 * SCALE))
SAVERS = 8  # at once, of few blocks that are written all the time
# In that time some 20 blocks are lost without the lock of the stripe, under ThreadSanitizer too.
SECONDS = 2 * SCALE


class Writers:
    """Threads that write, trim and write over blocks of their own while this is entered."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.errors: list[BaseException] = []
        self._done = threading.Event()
        self._threads = [threading.Thread(target=self._guard, args=(me,)) for me in range(WRITERS)]
        self._threads += [threading.Thread(target=self._guard, args=(-1,))]

    def __enter__(self) -> "Writers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *what: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()
        assert not self.errors, self.errors

    def _guard(self, me: int) -> None:
        try:
            if me < 0:
                self._disturb()
            else:
                self._write(random.Random(SEED + me), me * BLOCKS)
        except BaseException as error:
            self.errors.append(error)

    def _write(self, dice: random.Random, first: int) -> None:
        while not self._done.is_set():
            block = first + dice.randrange(dice.choice((16, BLOCKS)))
            if version := dice.randrange(VERSIONS):
                self.device.write(block_content(block, version), block * BLOCK)
            else:
                self.device.trim(block * BLOCK, BLOCK)

    def _disturb(self) -> None:
        while not self._done.is_set():
            self.device.compact()
            self.device.release_stock()
            self.device.check()


def contents(device: Device) -> list[bytes]:
    data = bytearray(device.disksize)
    device.read(data, 0)
    return [bytes(data[at : at + BLOCK]) for at in range(0, len(data), BLOCK)]


@pytest.mark.parametrize("verify", [False, True])
def test_live_saves(verify: bool) -> None:
    device = Device(SIZE, verify=verify)
    with Writers(device):
        for _ in range(SAVES):
            with tempfile.TemporaryFile() as file:
                numbers = saving.save(device, file.fileno(), live=True)
                file.seek(0)
                other = Device(SIZE)
                loaded = saving.load(other, file.fileno())
            assert loaded["blocks"] == numbers["blocks"]
            for block, found in enumerate(contents(other)):
                whole = (block_content(block, version) for version in range(VERSIONS))
                assert any(found == each for each in whole), f"block {block} is torn, or another's"
            other.check()
    device.check()
    with tempfile.TemporaryFile() as file:
        assert saving.save(device, file.fileno())["changes"] == 0
        file.seek(0)
        again = Device(SIZE)
        saving.load(again, file.fileno())
    assert contents(again) == contents(device)


def test_no_block_is_lost_in_a_save() -> None:
    """Saves wait for each other at an object whose slot they have read: no writer frees it meanwhile."""
    blocks = 4
    versions = [b"".join(noise(block + version) for block in range(blocks)) for version in range(8)]
    device = Device(blocks * BLOCK, verify=True)
    device.write(versions[0], 0)
    end = time.monotonic() + SECONDS
    written = 0
    found: list[dict[str, int]] = []

    def write(first: int) -> None:
        nonlocal written
        while time.monotonic() < end:
            device.write(versions[(first + written) % len(versions)], 0)
            written += 1

    def save() -> None:
        with open(os.devnull, "wb") as null:
            while time.monotonic() < end:
                found.append(saving.save(device, null.fileno(), live=True))

    run_threads([save] * SAVERS + [partial(write, first) for first in (0, 4)])
    print(f"{len(found)} saves, {written} writes")
    assert {numbers["blocks"] for numbers in found} == {blocks}
    assert sum(numbers["lost"] for numbers in found) == 0
    assert written > 100
    device.check()


def test_a_save_that_must_not_see_changes() -> None:
    """It is of one moment, or there is none."""
    device = Device(SIZE)
    changed = pytest.raises(SaveError, match="a client changed the device")
    with Writers(device), open(os.devnull, "wb") as null, changed:
        while True:
            assert saving.save(device, null.fileno())["changes"] == 0


def test_loads_that_others_watch() -> None:
    """The compactor, statistics, a save and a reset meanwhile; mem_limit stops some of them."""
    source = Device(SIZE)
    for block in range(0, SIZE // BLOCK, 2):
        source.write(block_content(block, 1), block * BLOCK)
    device = Device(SIZE)
    done = threading.Event()
    errors: list[BaseException] = []

    def watch() -> None:
        dice = random.Random(SEED)
        buffer = bytearray(BLOCK)
        try:
            while not done.is_set():
                device.compact(65536)
                device.release_stock()
                device.counters()
                device.block(dice.randrange(SIZE // BLOCK))
                device.read(buffer, dice.randrange(SIZE // BLOCK) * BLOCK)
                with open(os.devnull, "wb") as null, suppress(SaveError):  # it is being loaded
                    saving.save(device, null.fileno(), live=True)
        except BaseException as error:
            errors.append(error)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with tempfile.TemporaryFile() as file:
            saving.save(source, file.fileno())
            for number in range(LOADS):
                device.mem_limit = 1 << 20 if number % 2 else 0
                file.seek(0)
                if number % 2:
                    with pytest.raises(PoolFullError):
                        saving.load(device, file.fileno())
                    assert device.counters()["pages_stored"] == 0
                else:
                    saving.load(device, file.fileno())
                    assert contents(device) == contents(source)
                    device.reset()
    finally:
        done.set()
        watcher.join()
    assert not errors, errors
    device.check()
