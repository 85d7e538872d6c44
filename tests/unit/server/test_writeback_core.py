"""What moves blocks out and back with the core's own hands, and tiers beside it; the clock is the test's."""

import os
import random

import pytest
from support.backings import Disk

from zramd.core.device.backing import EXTENT
from zramd.core.device.device import Device, state_layout
from zramd.core.device.tier import Tier
from zramd.core.device.writeback import Writeback as Hands
from zramd.server.tiers import Tiers
from zramd.server.writeback import Writeback, WritePass
from zramd.settings import amounts, config

BLOCK = 4096


def page(number: int, version: int = 0) -> bytes:
    """A block that shrinks to a half, more or less."""
    dice = random.Random(number << 8 | version)
    return dice.randbytes(1900) + bytes([number & 255 or 1]) * (BLOCK - 1900)


class World:
    """A server's two threads, in one: each has its turn whenever it is due."""

    def __init__(self, device: Device, **given: str) -> None:
        self.now = 1000.0
        self.device = device
        words = {"size": str(device.disksize), "rundir": "/tmp/zramd-test", "backing": "/dev/sdz"} | given
        self.config = config.parse(words.items())
        self.short = False
        clock = self.clock
        self.tiers = Tiers(
            device, Tier(device), self.config, clock=clock, cpu=float, short=lambda: self.short
        )
        self.hands = Hands(device)
        self.out = Writeback(
            device, self.hands, self.config, self.tiers, clock=clock, boottime=clock, cpu=float
        )

    def clock(self) -> float:
        return self.now

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += max(0.001, min(self.tiers.tick(), self.out.tick(), end - self.now))

    def write(self, first: int, count: int, version: int = 0) -> None:
        for number in range(first, first + count):
            self.device.write(page(number, version), number * BLOCK)

    def check(self, first: int, count: int, version: int = 0) -> None:
        found = bytearray(BLOCK)
        for number in range(first, first + count):
            self.device.read(found, number * BLOCK)
            assert found == page(number, version), number

    def __getitem__(self, name: str) -> int:
        return self.device.counters()[name]


def made(extents: int = 64, disksize: int = 8 << 20, **given: str) -> World:
    disk = Disk(extents)
    limit = amounts.parse_size(given.get("mem_limit", "0"))
    device = disk.device(disksize, mem_limit=limit)
    return World(device, **given)


def test_after_writeback_age() -> None:
    world = made(writeback_age="5min", writeback_limit="off")
    world.write(0, 1000)
    world.run(250)
    assert world["out_pages"] == 0
    world.run(120)
    assert world["out_pages"] > 950
    assert world["bd_writes"] % EXTENT == 0 or world["bd_writes"] > world["out_data_size"]
    assert world.out.numbers()["out_pages"] == world["out_pages"]
    world.check(0, 1000)
    world.device.check()


def test_what_is_read_twice_comes_back() -> None:
    world = made(writeback_age="5min", writeback_limit="off")
    world.write(0, 1000)
    world.run(400)
    out = world["out_pages"]
    for _ in range(3):
        world.check(0, 100)
        world.run(15)
    assert world["brought_back"] > 80
    world.run(200)
    assert world["out_pages"] == out - world["brought_back"]
    world.check(0, 1000)


def test_what_comes_back_where_zstd_is_hot() -> None:
    """Nothing is made hot again there, but memory is faster than a disk all the same."""
    disk = Disk(64)
    device = disk.device(8 << 20, codec="zstd", level=1, cold_level=0)
    world = World(device, writeback_age="5min", writeback_limit="off", comp_algorithm="zstd(level=1)")
    world.write(0, 1000)
    world.run(400)
    assert world["out_pages"] > 900
    for _ in range(3):
        world.check(0, 100)
        world.run(15)
    assert world["brought_back"] > 80


def test_the_limit() -> None:
    world = made(writeback_age="5min", writeback_limit="256K")
    world.write(0, 2000)
    world.run(3600)
    assert world["bd_writes"] == 256 << 10
    assert world.device.budget[0] == pytest.approx(3600 * (256 << 10) / 86400, rel=0.2)
    assert world.out.numbers()["reason"].startswith("writeback_limit is used up")


def test_the_limit_is_kept_with_the_state() -> None:
    """Another server that goes on with the state goes on with what is left."""
    disk = Disk(64)
    fd = os.memfd_create("state")
    os.ftruncate(fd, state_layout(8 << 20)["bytes"])
    device = disk.device(8 << 20, state=fd)
    world = World(device, writeback_age="5min", writeback_limit="256K")
    world.write(0, 2000)
    world.run(600)
    before, out = world.device.budget[0], world["out_pages"]
    assert world["bd_writes"] == 256 << 10
    assert out
    del world, device
    device = disk.device(8 << 20, state=fd)
    os.close(fd)
    world = World(device, writeback_age="5min", writeback_limit="256K")
    world.now += 600
    left = world.out.left()
    assert left is not None
    assert left <= before + 3000
    world.run(600)
    assert world["bd_writes"] == 256 << 10  # as before: the state counts on
    world.check(0, 2000)


def test_mem_limit() -> None:
    """The pool is near it: the oldest leave until it is below 70 %, and clients are never refused."""
    world = made(mem_limit="4M", writeback_limit="off", recompression="off")
    limit = world.device.pressure()[2]
    for first in range(0, 2000, 50):
        world.write(first, 50)
        world.run(31)
    assert world["failed_writes"] == 0
    assert world["out_pages"] > 300
    assert world.device.pressure()[1] < 0.85 * limit
    world.check(0, 2000)
    world.device.check()


def test_what_must_go_and_no_more() -> None:
    """Memory is wanted once, and not again."""
    world = made(mem_limit="4M", writeback_limit="off", recompression="off")
    limit = world.device.pressure()[2]
    world.write(0, 1600)
    world.run(300)
    assert world["out_pages"] == 0
    world.write(1600, 150)
    assert world.device.pressure()[1] > 0.8 * limit
    world.run(300)
    assert world["out_pages"] > 100
    assert 0.6 * limit < world.device.pressure()[1] < 0.8 * limit


def test_the_machine_lacks_memory() -> None:
    world = made(writeback_limit="off")
    world.write(0, 1000)
    world.run(60)
    assert world["out_pages"] == 0
    world.short = True
    world.run(12)
    assert 0 < world["out_pages"] < 400
    world.run(300)
    assert world["out_pages"] > 700
    world.check(0, 1000)


def test_a_mark_is_no_age() -> None:
    """A script marks all, to see an hour later what is marked still: until then nothing goes out for that."""
    world = made(writeback_age="5min", writeback_limit="off")
    world.write(0, 500)
    world.tiers.mark_idle(None)
    world.write(500, 500)
    world.run(400)
    assert 400 < world["out_pages"] <= 500
    world.out.submit(WritePass(frozenset({"idle"})))
    world.run(1)
    assert world["out_pages"] > 960


def test_marked_ones_go_where_memory_is_wanted() -> None:
    world = made(writeback_limit="off")
    world.write(0, 1000)
    world.tiers.mark_idle(None)
    world.short = True
    world.run(60)
    assert world["out_pages"] > 100


@pytest.mark.parametrize("how", ["reset", "trim", "overwrite"])
def test_what_is_in_the_buffer(how: str) -> None:
    """It was copied for the next extent, and is gone: that is not what is written."""
    world = made(writeback_limit="off")
    world.write(0, 20)
    world.hands.gather(0, 20, 0)
    assert world.hands.pending
    if how == "reset":
        world.device.reset()
    elif how == "trim":
        world.device.trim(0, 20 * BLOCK)
    else:
        world.write(0, 20, version=1)
    world.out.submit(WritePass())
    world.run(1)
    if how == "overwrite":
        world.check(0, 20, version=1)
        assert world["out_pages"] == 20
    else:
        assert world["out_pages"] == 0
        assert world["pages_stored"] == 0
    world.device.check()


def test_everything_back() -> None:
    world = made(writeback_age="5min", writeback_limit="off")
    world.write(0, 1000)
    world.run(400)
    assert world["out_pages"]
    world.out.bring_back()
    world.run(5)
    assert world["out_pages"] == 0
    assert world["backing_live"] == 0
    world.run(1000)
    assert world["out_pages"] == 0
    world.check(0, 1000)


def test_a_device_that_is_too_small() -> None:
    """What dies makes room: extents are emptied into others, and it goes on."""
    world = made(12, writeback_age="5min", writeback_limit="off")
    world.write(0, 1000)
    world.run(400)
    assert world["backing_free"] <= 1
    assert world.out.numbers()["mode"] == "paused"
    full = world["out_pages"]
    for number in range(1000):
        if number % 8:
            world.device.trim(number * BLOCK, BLOCK)
    world.write(1000, 1000)
    world.run(900)
    assert world["reclaimed_bytes"] > 0
    assert world["out_pages"] > 0.7 * full
    world.check(1000, 1000)
    world.device.check()
