"""What moves blocks out of memory by itself, with a clock, a device and a disk of the test's own."""

import errno
import os
import threading
from collections import Counter
from collections.abc import Callable
from itertools import pairwise

import pytest
from support.run import wait_until

from zramd.core.device.backing import EXTENT
from zramd.errors import BackingError, DeviceError
from zramd.server import writeback, writebackpolicy
from zramd.server.ages import IDLE, OLDEST, SWEEP, age_of
from zramd.server.tierpolicy import Census
from zramd.server.withoutbacking import Without
from zramd.server.worker import Worker
from zramd.server.writeback import Writeback, WritePass
from zramd.settings import config

RAW = 4096
HEAD = 16  # bytes of a record, about
DAY = 86400


def settings(**given: str) -> config.Config:
    return config.parse(
        (
            {"disksize": "64M", "rundir": "/tmp/zramd-test", "backing": "/dev/sdz", "writeback_limit": "off"}
            | given
        ).items()
    )


class Block:
    """A block that is stored: in memory, or in an extent."""

    def __init__(
        self, size: int = 2000, age: int = 0, *, read: bool = True, tried: bool = False, hot: bool = False
    ) -> None:
        self.size, self.age, self.read, self.tried = size, age, read, tried
        self.hot = hot  # somebody asks for it all the time
        self.extent = 0  # 0: it is in memory
        self.wanted = False  # it is to be brought back


class FakeDevice:
    """Blocks, a disk with extents, and clocks that go on while that works. It is its own Steps and Tiers."""

    def __init__(self, *blocks: Block, extents: int = 1000) -> None:
        self.disksize = 4096 * (len(blocks) or 1)
        self.now = 1000.0
        self.boot = 50_000.0  # what the clock since boot is ahead of the other
        self.cpu = 0.0
        self.cpu_of_a_look = 1e-4
        self.budget = (0, 0)
        self.budgets: list[int] = []  # what was kept before each write
        self.limit = 0  # pages
        self.mode = "calm"
        self.census: Census | None = None
        self.next_sweep = self.now + SWEEP
        self.extents = extents
        self.bad: set[int] = set()
        self.each = 0.001  # seconds that an extent takes
        self.error = 0
        self.unreadable: set[int] = set()  # extents
        self.read_errors = 0
        self.room_for = 1 << 30  # blocks that may come back
        self.inflight = 0
        self.log: Counter[str] = Counter()
        self.flushes: list[tuple[float, int]] = []  # when, and bytes
        self.order: list[int] = []  # blocks as they went out
        self.out = self.back = self.bd_writes = self.reclaimed = 0
        self.during_flush: Callable[[], None] = lambda: None
        self.fill(*blocks)
        self.drop()

    # -- what the device has

    def fill(self, *blocks: Block) -> None:
        self.blocks = list(blocks)
        self.lists: dict[int, set[int]] = {}  # of each extent that was used, its blocks
        self.live: Counter[int] = Counter()  # and its bytes
        self.stored = self.in_memory = sum(block.size for block in blocks)

    def put(self, number: int, extent: int) -> None:
        """Have a block be in an extent, 0: in memory."""
        block = self.blocks[number]
        self.live[block.extent] -= block.size + HEAD
        self.lists.setdefault(block.extent, set()).discard(number)
        self.in_memory += block.size * ((not extent) - (not block.extent))
        block.extent = extent
        self.live[extent] += block.size + HEAD
        self.lists.setdefault(extent, set()).add(number)

    @property
    def used(self) -> int:
        return self.in_memory >> 12

    def pressure(self) -> tuple[int, int, int, int, int]:
        return 0, self.used, self.limit, 0, self.inflight

    def holds(self) -> set[int]:
        return {extent for extent, numbers in self.lists.items() if extent and numbers}

    def free(self) -> list[int]:
        used = self.holds() | self.bad
        return [extent for extent in range(1, self.extents + 1) if extent not in used]

    def outside(self) -> list[int]:
        return [number for extent in self.holds() for number in self.lists[extent]]

    def counters(self) -> dict[str, int]:
        used = self.holds()
        return {
            "pages_stored": len(self.blocks),
            "out_pages": sum(len(self.lists[extent]) for extent in used),
            "out_data_size": self.stored - self.in_memory,
            "written_out": self.out,
            "brought_back": self.back,
            "bd_reads": 0,
            "bd_writes": self.bd_writes,
            "bd_read_errors": self.read_errors,
            "bd_write_errors": 0,
            "reclaimed_bytes": self.reclaimed,
            "backing_size": EXTENT * (self.extents + 1),
            "backing_extents": self.extents,
            "backing_free": self.extents - len(used | self.bad),
            "backing_bad": len(self.bad),
            "backing_live": sum(self.live[extent] for extent in used),
        }

    def sweep(self) -> None:
        unread, read, huge, raw = ([0] * 256 for _ in range(4))
        for block in self.blocks:
            block.age = 1 if block.hot else min(block.age + 1, OLDEST) if block.age <= OLDEST else block.age
            if block.extent:
                continue
            (read if block.read else unread)[block.age] += block.size
            if block.size == RAW:
                huge[block.age] += RAW
                raw[block.age] += not block.tried
        nothing = [0] * 256
        back = sum(block.wanted and block.extent > 0 for block in self.blocks)
        self.census = Census(nothing, raw, nothing, 0, unread, read, huge, back)

    # -- what moves blocks

    def gather(
        self,
        first: int,
        end: int,
        age: int,
        *,
        raw: bool = False,
        idle: bool = False,
        unread: bool = False,
        tried: bool = False,
    ) -> tuple[int, int, bool]:
        assert end <= len(self.blocks)
        self.log["gather"] += 1
        self.cpu += self.cpu_of_a_look
        taken = 0
        for number in range(first, min(end, first + 65536)):
            block = self.blocks[number]
            if block.extent or block.age < age or (raw and block.size != RAW) or (tried and not block.tried):
                continue
            if (idle and block.age != IDLE) or (unread and block.read) or number in self.leaving:
                continue
            if block.age == IDLE and age and not idle:
                continue
            if self.pending + block.size + HEAD > EXTENT:
                return number, taken, True
            self.buffer.append(number)
            self.leaving.add(number)
            self.pending += block.size + HEAD
            taken += 1
        return min(end, first + 65536), taken, False

    def reclaim(self, share: float) -> int:
        self.log["reclaim"] += 1
        most = min(share * EXTENT, EXTENT - self.pending)
        found = [
            (self.live[extent], extent)
            for extent in self.holds() - self.sources - self.bad
            if self.live[extent] <= most
        ]
        if not found:
            return 0
        _, extent = min(found)
        if extent in self.unreadable:
            self.bad.add(extent)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.sources.add(extent)
        self.moving += self.lists[extent]
        self.pending += self.live[extent]
        return len(self.lists[extent])

    def drop(self) -> None:
        self.log["drop"] += 1
        self.buffer: list[int] = []
        self.moving: list[int] = []
        self.leaving: set[int] = set()
        self.sources: set[int] = set()
        self.pending = 0

    def flush(self) -> tuple[int, int, int, int, int]:
        self.budgets.append(self.budget[0])
        self.during_flush()
        free = self.free()
        if len(free) <= (not self.moving):
            self.drop()
            return 0, 0, 0, 0, errno.EXFULL
        size = -(-self.pending // 4096) * 4096
        self.flushes.append((self.now, size))
        self.now += self.each
        if self.error:
            self.bad.add(free[0])
            self.drop()
            return 0, 0, 0, int(self.each * 1e9), self.error
        moved = sum(self.blocks[number].size + HEAD for number in self.moving)
        self.bd_writes += size
        self.order += self.buffer
        out = len(self.buffer)
        for number in self.buffer + self.moving:
            self.put(number, free[0])
        self.out += out
        self.reclaimed += moved
        self.drop()
        return out, size, moved, int(self.each * 1e9), 0

    def bring_back(self, first: int, end: int, wanted: bool = True) -> tuple[int, int, int, int]:
        self.log["bring_back"] += 1
        tried = done = 0
        while first < end and tried < 64:
            block = self.blocks[first]
            first += 1
            if not block.extent or (wanted and not block.wanted):
                continue
            tried += 1
            if block.extent in self.unreadable:
                continue
            if done + self.back >= self.room_for:
                self.back += done
                return first, tried, done, errno.ENOSPC
            self.put(first - 1, 0)
            block.wanted, block.age = False, 0
            done += 1
        self.back += done
        return first, tried, done, 0


def make(device: FakeDevice, renew: Callable[[], None] = lambda: None, **given: str) -> Writeback:
    return Writeback(
        device,
        device,
        settings(**given),
        device,
        clock=lambda: device.now,
        boottime=lambda: device.now + device.boot,
        cpu=lambda: device.cpu,
        renew=renew,
    )


def run(device: FakeDevice, served: Writeback, seconds: float) -> None:
    """Let time pass, with a turn whenever one is due, and a sweep each 10 s."""
    end = device.now + seconds
    idle = 0
    while device.now < end:
        if device.now >= device.next_sweep:
            device.next_sweep += SWEEP
            device.sweep()
        before = device.now
        delay = served.tick()
        assert 0 <= delay <= SWEEP
        device.now += min(delay, end - device.now, max(0.0, device.next_sweep - device.now))
        idle = idle + 1 if device.now == before else 0
        assert idle < 10_000, "it turns and turns"


def blocks(count: int, **given: object) -> list[Block]:
    return [Block(**given) for _ in range(count)]  # type: ignore[arg-type]


OLD = age_of(3600)


class TestCalm:
    def test_what_is_old_enough(self) -> None:
        device = FakeDevice(*blocks(100, age=OLD), *blocks(100, hot=True))
        run(device, make(device), 60)
        assert sorted(device.outside()) == list(range(96))

    def test_not_before(self) -> None:
        device = FakeDevice(*blocks(1000, age=OLD - 10))
        served = make(device)
        run(device, served, 90)
        assert device.log["gather"] == 0
        run(device, served, 60)
        assert device.out > 900

    def test_whole_extents_only(self) -> None:
        device = FakeDevice(*blocks(100, age=OLD))
        run(device, make(device), 600)
        assert {written for _, written in device.flushes} == {EXTENT}
        assert device.out == 96

    def test_unread_ones_first(self) -> None:
        device = FakeDevice(*blocks(64, age=OLD), *blocks(64, age=OLD, read=False))
        run(device, make(device), 60)
        assert len(device.order) == 128
        assert sorted(device.order[:64]) == list(range(64, 128))
        assert sorted(device.order[64:]) == list(range(64))

    def test_raw_ones_that_do_not_shrink(self) -> None:
        cold = age_of(300)
        device = FakeDevice(*blocks(32, size=RAW, age=cold, tried=True), *blocks(32, size=RAW, age=cold))
        run(device, make(device), 60)
        assert device.order == list(range(30))

    def test_raw_ones_without_recompression(self) -> None:
        """Nothing ever makes them smaller."""
        device = FakeDevice(*blocks(45, size=RAW, age=age_of(300)))
        run(device, make(device, recompression="off"), 60)
        assert device.out == 45

    def test_all_raw(self) -> None:
        """4096 bytes for 4096, and 15 in an extent: still no more than the limit."""
        device = FakeDevice(*blocks(3000, size=RAW, age=OLD, tried=True))
        run(device, make(device, writeback_limit="1M"), 3600)
        assert device.bd_writes == 1 << 20

    def test_four_mebibytes_a_second(self) -> None:
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device)
        run(device, served, 10.5)
        device.flushes.clear()
        run(device, served, 8)
        assert sum(written for _, written in device.flushes) == pytest.approx(8 * (4 << 20), rel=0.02)

    def test_nothing_stored(self) -> None:
        device = FakeDevice()
        served = make(device)
        assert served.tick() == SWEEP

    def test_few_turns_while_there_is_nothing_to_do(self) -> None:
        device = FakeDevice(*blocks(100, hot=True))
        served = make(device)
        device.sweep()
        assert served.tick() == 1.0
        run(device, served, 600)
        assert device.log["gather"] == 0


class TestWanted:
    def test_until_enough_is_gone(self) -> None:
        """Oldest first, until the pool is at 70 % of mem_limit."""
        device = FakeDevice(*blocks(1000, age=50), *blocks(1000, age=100), *blocks(1000, age=10))
        device.limit = device.used * 10 // 9
        device.mode = "wanted"
        run(device, make(device), 15)
        assert set(device.order) <= set(range(1000, 2000))
        assert device.used == pytest.approx(0.7 * device.limit, rel=0.03)

    def test_at_once(self) -> None:
        """It does not wait for a sweep, nor for its share of a second."""
        device = FakeDevice(*blocks(10_000, age=100))
        served = make(device)
        run(device, served, 11)
        assert device.out == 0
        device.limit, device.mode = device.used, "wanted"
        run(device, served, 1.5)
        assert device.out > 2500

    def test_the_machine_lacks_memory(self) -> None:
        """Without mem_limit: a tenth with each sweep, as long as it lasts."""
        device = FakeDevice(*blocks(10_000, age=100))
        served = make(device)
        device.mode = "wanted"
        run(device, served, 12)
        assert 960 <= device.out < 1100
        run(device, served, 10)
        assert 1800 <= device.out < 2100
        device.mode = "calm"
        run(device, served, 20)
        assert device.out < 2100

    def test_small_rests_go_too(self) -> None:
        device = FakeDevice(*blocks(10, age=100))
        device.mode, device.limit = "wanted", 4
        run(device, make(device), 15)
        assert device.out == 10
        assert device.flushes[0][1] == 20480

    def test_less_than_is_worth_an_extent(self) -> None:
        device = FakeDevice(*blocks(8, age=100))
        device.mode, device.limit = "wanted", 4
        run(device, make(device), 600)
        assert device.flushes == []

    def test_full(self) -> None:
        """Whatever was left alone for a sweep: raw ones first."""
        device = FakeDevice(*blocks(500), *blocks(60, size=RAW))
        device.mode, device.limit = "full", device.used
        run(device, make(device), 15)
        assert device.order[:60] == list(range(500, 560))
        assert device.out == 560

    def test_another_mode_is_another_pass(self) -> None:
        """What was copied for the earlier one is dropped."""
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device)
        run(device, served, 10.5)
        assert 0 < device.out < 10_000
        device.mode = "full"
        drops = device.log["drop"]
        served.tick()
        assert device.log["drop"] > drops

    def test_memory_is_at_ease_again(self) -> None:
        device = FakeDevice(*blocks(20_000, age=100))
        device.limit, device.mode = device.used, "wanted"
        served = make(device)
        run(device, served, 10.1)
        gone = device.out
        assert gone
        device.mode = "calm"
        run(device, served, 9)
        assert device.out == gone


class TestLimit:
    def test_what_reaches_the_device(self) -> None:
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device, writeback_limit="1M")
        run(device, served, 60)
        assert device.bd_writes == 1 << 20
        assert served.left() == pytest.approx(60 * (1 << 20) / DAY, abs=1000)
        assert served.numbers()["mode"] == "paused"
        assert served.numbers()["reason"].startswith("writeback_limit is used up, the next extent may be")

    def test_in_the_long_run(self) -> None:
        """Whatever the mode."""
        device = FakeDevice(*blocks(2000, age=100))
        device.mode, device.limit = "full", 1
        run(device, make(device, writeback_limit="2M"), DAY / 2)
        assert (2 << 20) * 1.45 < device.bd_writes <= (2 << 20) * 1.5

    def test_kept(self) -> None:
        """A server that goes on with the device goes on with its budget."""
        device = FakeDevice(*blocks(20_000, age=OLD))
        run(device, make(device, writeback_limit="1M"), 60)
        written = device.bd_writes
        for _ in range(5):
            run(device, make(device, writeback_limit="1M"), 12)
        assert device.bd_writes == written

    def test_a_kill_while_it_writes(self) -> None:
        """All of an extent is taken off before: nobody gets it back by dying."""
        device = FakeDevice(*blocks(20_000, age=OLD))
        run(device, make(device, writeback_limit="1M"), 12)
        expected = [(1 << 20) - EXTENT * number for number in range(1, 17)]
        assert device.budgets == pytest.approx(expected, abs=9)

    def test_what_was_not_written(self) -> None:
        """A small extent takes what it takes; a full device nothing."""
        device = FakeDevice(*blocks(10, age=100))
        device.mode, device.limit = "wanted", 4
        served = make(device, writeback_limit="1M")
        run(device, served, 15)
        assert served.left() == pytest.approx((1 << 20) - 20480, abs=100)
        device.extents = 1
        device.fill(*blocks(100, age=100))
        run(device, served, 15)
        assert served.left() == pytest.approx((1 << 20) - 20480, abs=400)

    def test_failed_writes_count(self) -> None:
        """Nobody knows how much of them has reached the device."""
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device, writeback_limit="1M")
        run(device, served, 25)
        assert served.left() == pytest.approx((1 << 20) - 8 * EXTENT, abs=500)

    def test_changed(self) -> None:
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device, writeback_limit="1M")
        run(device, served, 30)
        served.configure(settings(writeback_limit="2M"))
        run(device, served, 12)
        assert device.bd_writes == 2 << 20
        served.configure(settings(writeback_limit="off"))
        run(device, served, 12)
        assert device.bd_writes > 8 << 20
        assert served.left() is None
        assert served.numbers()["limit_left"] is None
        assert served.numbers()["writeback_limit"] == 0

    def test_given_by_hand(self) -> None:
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device, writeback_limit="1M")
        served.set_left(0)
        assert served.left() == 0
        run(device, served, 30)
        assert device.bd_writes == 0
        served.set_left(3 << 20)
        assert served.left() == 3 << 20
        run(device, served, 30)
        assert device.bd_writes == 3 << 20

    def test_given_without_a_limit(self) -> None:
        with pytest.raises(DeviceError, match=r"^writeback_limit is off: set it"):
            make(FakeDevice()).set_left(1 << 20)

    def test_reclaim_counts(self) -> None:
        device = full_of_holes()
        before = device.bd_writes
        served = make(device, writeback_limit="1M")
        run(device, served, 12)
        assert device.reclaimed
        assert device.bd_writes - before <= 1 << 20
        assert served.left() == pytest.approx((1 << 20) - (device.bd_writes - before), abs=200)


def full_of_holes(extents: int = 20) -> FakeDevice:
    """A device of which a quarter of each extent lives, but for one that is free; more wants to go out."""
    device = FakeDevice(*blocks(8 * (extents - 1)), *blocks(200, age=OLD), extents=extents)
    for number in range(8 * (extents - 1)):
        device.put(number, 1 + number // 8)
    return device


class TestRoom:
    def test_extents_are_emptied(self) -> None:
        """Four that hold a quarter are one; then there is room for what wants to go out."""
        device = full_of_holes()
        run(device, make(device), 30)
        assert device.out == 192
        assert device.reclaimed
        assert all(block.extent for block in device.blocks[:152]), "what was out is out"

    def test_not_while_there_is_room(self) -> None:
        device = full_of_holes()
        device.extents = 200
        run(device, make(device), 30)
        assert (device.reclaimed, device.out) == (0, 192)

    def test_not_without_need(self) -> None:
        """Nothing wants to go out: moving what is there would only wear the device out."""
        device = full_of_holes()
        for block in device.blocks[152:]:
            block.hot = True
        run(device, make(device), 600)
        assert device.flushes == []

    def test_not_what_lives_for_the_most_part(self) -> None:
        device = FakeDevice(*blocks(17 * 19), *blocks(200, age=OLD), extents=20)
        for number in range(17 * 19):
            device.put(number, 1 + number // 17)
        served = make(device)
        run(device, served, 600)
        assert (device.reclaimed, device.flushes) == (0, [])
        assert served.numbers()["mode"] == "paused"
        assert served.numbers()["reason"] == "the device is full, and no extent of it is mostly dead"

    def test_smaller_than_what_wants_to_go_out(self) -> None:
        """It takes what it holds, and writes no more: not the same again and again."""
        device = FakeDevice(*blocks(10_000, age=OLD), extents=40)
        served = make(device)
        run(device, served, 60)
        assert device.out == 39 * 32
        written = device.bd_writes
        run(device, served, 3600)
        assert device.bd_writes == written

    def test_one_extent(self) -> None:
        device = FakeDevice(*blocks(1000, age=OLD), extents=1)
        run(device, make(device), 600)
        assert device.out <= 32

    def test_room_again(self) -> None:
        """A twentieth must be free."""
        device = FakeDevice(*blocks(10_000, age=OLD), extents=100)
        served = make(device)
        run(device, served, 60)
        before = device.out
        for number in [number for extent in (1, 2, 3) for number in device.lists[extent]]:
            device.put(number, 0)
        run(device, served, 60)
        assert device.out == before
        for number in list(device.lists[4]):
            device.put(number, 0)
        run(device, served, 60)
        assert device.out == before + 4 * 32

    def test_none_after_all(self) -> None:
        """The device knows better than the count."""
        device = FakeDevice(*blocks(1000, age=OLD), extents=100)
        counters = device.counters
        device.counters = lambda: counters() | {"backing_free": 3}  # type: ignore[method-assign]
        device.free = list  # type: ignore[method-assign]
        served = make(device)
        run(device, served, 30)
        assert len(device.budgets) == 1
        assert served.numbers()["reason"].startswith("the device is full")
        assert served.trouble == ""

    def test_an_extent_that_cannot_be_read(self) -> None:
        """It stays as it is, and others are emptied."""
        device = full_of_holes()
        device.unreadable = {1, 2}
        run(device, make(device), 30)
        assert device.out == 192
        assert {block.extent for block in device.blocks[:16]} == {1, 2}

    def test_what_died_is_seen(self) -> None:
        """The next pass may be an hour away: until then it is not to say that the device is full."""
        device = FakeDevice(*blocks(1000, age=OLD), extents=20)
        served = make(device)
        run(device, served, 300)
        assert served.numbers()["reason"].startswith("the device is full")
        for number, block in enumerate(device.blocks):
            device.put(number, 0)
            block.age = 0
        run(device, served, 20)
        assert "full" not in served.numbers()["reason"]

    def test_no_room_below(self) -> None:
        """A file on a full file system fails as any disk: that is no want of extents."""
        device = FakeDevice(*blocks(1000, age=OLD))
        device.error = errno.ENOSPC
        served = make(device)
        run(device, served, 60)
        assert len(device.flushes) == writebackpolicy.ERRORS
        assert "fails: No space left on device 8 times" in served.trouble


class TestErrors:
    def test_eight_in_a_row(self, capfd: pytest.CaptureFixture[str]) -> None:
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device)
        run(device, served, 60)
        assert len(device.flushes) == writebackpolicy.ERRORS
        assert device.out == 0
        assert served.trouble.startswith("backing '/dev/sdz' fails: Input/output error 8 times")
        assert served.numbers()["mode"] == "paused"
        assert capfd.readouterr().err.count("\n") == 1
        run(device, served, 600)
        assert len(device.flushes) == writebackpolicy.ERRORS + 1
        device.error = 0
        run(device, served, 620)
        assert device.out
        assert served.trouble == ""
        assert capfd.readouterr().err == "zramd: backing '/dev/sdz' works again\n"

    def test_a_few(self) -> None:
        """What could not be written goes with the next."""
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 10.001)
        device.error = errno.EIO
        run(device, served, 5)
        device.error = 0
        run(device, served, 30)
        assert 4 <= len(device.bad) < 7
        assert device.out == 320
        assert served.trouble == ""

    def test_somebody_has_seen_to_it(self, capfd: pytest.CaptureFixture[str]) -> None:
        """It is a good one until it fails anew, and what waits goes out at once."""
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device)
        run(device, served, 60)
        assert served.trouble
        served.try_again()
        run(device, served, 1)
        assert served.trouble == ""
        assert len(device.flushes) > writebackpolicy.ERRORS
        run(device, served, 59)
        assert len(device.flushes) == 2 * writebackpolicy.ERRORS
        assert served.trouble
        device.error = 0
        served.try_again()
        run(device, served, 0.5)
        assert device.out
        assert served.trouble == ""
        assert capfd.readouterr().err.count("8 times in a row") == 2

    def test_a_setting_has_it_tried_once(self) -> None:
        """It fails until it has taken something: no setting changes that."""
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device)
        run(device, served, 60)
        served.configure(settings(cold_age="10min"))
        run(device, served, 0.0001)
        assert "Input/output error" in served.trouble
        run(device, served, 60)
        assert len(device.flushes) == writebackpolicy.ERRORS + 1

    def test_blocks_that_cannot_be_read(self) -> None:
        """Health tells of it for as long as writes would pause, or until somebody sees to it."""
        device = FakeDevice(*blocks(100))
        device.read_errors = 2  # of the server before
        served = make(device)
        run(device, served, 20)
        assert served.trouble == ""
        served = make(device)
        device.read_errors = 3  # before the first sweep
        run(device, served, 11)
        assert served.trouble == "backing '/dev/sdz' fails: blocks that are out cannot be read"
        run(device, served, 580)
        assert served.trouble
        run(device, served, 30)
        assert served.trouble == ""
        device.read_errors = 4
        run(device, served, 20)
        assert served.trouble
        served.try_again()
        run(device, served, 1)
        assert served.trouble == ""
        device.read_errors = 5
        run(device, served, 20)
        assert served.trouble
        device.read_errors = 0  # a reset
        run(device, served, 700)
        assert served.trouble == ""

    def test_others_go_by_their_own(self) -> None:
        """While the device fails, what is asked for by hand is tried, once each."""
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device)
        run(device, served, 60)
        for tries in (1, 2):
            served.submit(WritePass())
            run(device, served, 5)
            assert len(device.flushes) == writebackpolicy.ERRORS + tries


class TestSlow:
    @pytest.mark.parametrize("mode", ["calm", "full"])
    def test_how_much_it_writes(self, mode: str) -> None:
        """Whatever the part, it is said in English."""
        device = FakeDevice(*blocks(5000, age=OLD))
        device.mode, device.limit = mode, 1
        device.sweep()
        served = make(device)
        served.tick()
        start, of = "a pass is under way", "the time"
        if mode == "calm":
            start, of = f"{start} that writes at most 4 MiB a second", "that"
        assert served.numbers()["reason"] == start
        for _ in range(20):
            for _ in range(writebackpolicy.WINDOW):
                served._pace.took(1)
            part = served._pace.slowness
            assert served.numbers()["reason"] == f"{start}, 1/{part} of {of} as the device is slow"
        assert part == writebackpolicy.MAX_SLOWNESS

    def test_half_as_much(self) -> None:
        device = FakeDevice(*blocks(30_000, age=OLD))
        device.each = 0.06
        served = make(device)
        device.mode, device.limit = "full", 1
        run(device, served, 300)
        rests = [after - before for (before, _), (after, _) in pairwise(device.flushes[-10:])]
        assert max(rests) == pytest.approx(64 * 0.06, rel=0.01)
        assert "slow" in served.numbers()["reason"]

    def test_recovers(self) -> None:
        device = FakeDevice(*blocks(40_000, age=OLD), extents=2000)
        device.each = 0.06
        served = make(device)
        run(device, served, 10.3)
        device.each = 0.001
        run(device, served, 13)
        device.flushes.clear()
        run(device, served, 5)
        assert sum(written for _, written in device.flushes) == pytest.approx(5 * (4 << 20), rel=0.02)


class TestBack:
    def out(self, count: int = 320, **given: int) -> tuple[FakeDevice, Writeback]:
        device = FakeDevice(*blocks(count, age=OLD), *blocks(16, hot=True), **given)
        served = make(device)
        run(device, served, 12)
        assert device.out == count
        return device, served

    def test_what_is_read_again(self) -> None:
        device, served = self.out()
        for block in device.blocks[:100]:
            block.wanted = True
        run(device, served, 11)
        assert device.back == 100

    def test_nothing_is_read_again(self) -> None:
        device, served = self.out()
        run(device, served, 100)
        assert device.log["bring_back"] == 0

    def test_not_under_pressure(self) -> None:
        device, served = self.out()
        device.mode = "wanted"
        for block in device.blocks[:100]:
            block.wanted = True
        run(device, served, 100)
        assert device.back == 0
        device.mode = "calm"
        run(device, served, 25)
        assert device.back == 100

    def test_no_room(self) -> None:
        """It is tried again after a sweep."""
        device, served = self.out()
        for block in device.blocks[:100]:
            block.wanted = True
        device.room_for = 10
        run(device, served, 10.1)
        assert device.back == 10
        device.room_for = 1 << 30
        run(device, served, 20)
        assert device.back == 100

    def test_a_circle(self) -> None:
        """All that goes out is read again at once: less and less goes out, and the device is spared."""
        device = FakeDevice(*blocks(3200, age=OLD))
        served = make(device)
        written = []
        for _ in range(6):
            before = device.bd_writes
            for _ in range(60):
                for block in device.blocks:
                    block.wanted = True
                    block.age = OLD  # as if it were left alone: the worst that can be
                run(device, served, 10)
            written.append(device.bd_writes - before)
        assert written[-1] < written[0] / 3
        assert written[-1] <= 3200 * 2200

    def test_what_came_back_stays(self) -> None:
        """As long as for anything else that was asked for."""
        device, served = self.out()
        for block in device.blocks[:320]:
            block.wanted = True
        run(device, served, 600)
        assert (device.back, device.out) == (320, 320)


class TestRecall:
    def test_everything(self) -> None:
        device = FakeDevice(*blocks(1000, age=OLD))
        served = make(device)
        run(device, served, 20)
        assert device.out == 992
        served.bring_back()
        assert served.numbers()["reason"] == "everything is being brought back"
        run(device, served, 1)
        assert device.counters()["out_pages"] == 0
        for block in device.blocks:
            block.age = OLD
        run(device, served, 100)
        assert device.counters()["out_pages"] == 0, "who wants to take the disk away can"
        assert served.numbers()["mode"] == "off"
        assert served.numbers()["reason"].startswith("everything was brought back: ")

    def test_whatever_the_mode(self) -> None:
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 12)
        device.mode = "full"
        served.bring_back()
        run(device, served, 60)
        assert device.counters()["out_pages"] == 0

    def test_no_room(self) -> None:
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 12)
        device.room_for = 100
        served.bring_back()
        run(device, served, 60)
        assert device.back == 100
        assert served.numbers()["reason"] == ("220 blocks could not be brought back: No space left on device")

    def test_one_extent_cannot_be_read(self) -> None:
        """The others are not left for it."""
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 12)
        device.unreadable = {3}
        served.bring_back()
        run(device, served, 60)
        assert device.counters()["out_pages"] == 32
        assert served.numbers()["reason"] == "32 blocks could not be brought back: some cannot be read"

    @pytest.mark.parametrize("how", ["writeback_age", "writeback_limit", "by hand"])
    def test_begins_again(self, how: str) -> None:
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 12)
        served.bring_back()
        run(device, served, 5)
        for block in device.blocks:
            block.age = OLD
        served.configure(settings(compaction="off"))
        run(device, served, 15)
        assert device.out == 320
        if how == "by hand":
            served.submit(WritePass(frozenset({"huge"})))
        else:
            served.configure(settings(**{how: {"writeback_age": "50min", "writeback_limit": "1G"}[how]}))
        run(device, served, 15)
        assert device.out == 640

    def test_nothing_of_a_dropped_pass_is_left(self) -> None:
        """What it had taken is no longer marked as leaving."""
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        served.submit(WritePass(ranges=((0, 10), (10, 320))))
        served.tick()
        assert device.pending
        served.bring_back()
        run(device, served, 5)
        assert (device.pending, device.out) == (0, 0)

    def test_passes_that_wait_are_dropped(self) -> None:
        device = FakeDevice(*blocks(320))
        served = make(device)
        served.submit(WritePass())
        served.bring_back()
        run(device, served, 5)
        assert device.out == 0


class TestByHand:
    @pytest.mark.parametrize(
        ("wanted", "out"),
        [
            (WritePass(), [0, 1, 2, 3, 4, 5]),
            (WritePass(frozenset({"huge"})), [2, 3, 5]),
            (WritePass(frozenset({"idle"})), [1, 3]),
            (WritePass(frozenset({"huge", "idle"})), [3]),
            (WritePass(frozenset({"incompressible"})), [5]),
            (WritePass(ranges=((1, 3), (5, 6))), [1, 2, 5]),
            (WritePass(ranges=((5, 6), (0, 1))), [5, 0]),
            (WritePass(frozenset({"huge"}), ((0, 3),)), [2]),
            (WritePass(ranges=((4, 1 << 40),)), [4, 5]),
        ],
        ids=str,
    )
    def test_what_goes_out(self, wanted: WritePass, out: list[int]) -> None:
        device = FakeDevice(Block(), Block(), Block(RAW), Block(RAW), Block(100), Block(RAW, tried=True))
        for number in (1, 3):
            device.blocks[number].age = IDLE
        served = make(device)
        served.submit(wanted)
        run(device, served, 1)
        assert device.order == out
        assert served.numbers()["reason"] != "a pass by hand is under way"

    def test_many_ranges_share_extents(self) -> None:
        device = FakeDevice(*blocks(320))
        served = make(device)
        served.submit(WritePass(ranges=tuple((number, number + 1) for number in range(0, 320, 2))))
        run(device, served, 1)
        assert device.out == 160
        assert len(device.flushes) == 5

    def test_at_once(self) -> None:
        """It does not keep to what is written in calm."""
        device = FakeDevice(*blocks(10_000))
        served = make(device)
        served.submit(WritePass())
        run(device, served, 1)
        assert device.out == 10_000

    def test_ends_with_the_limit(self) -> None:
        """As the kernel's does: what is left waits for another."""
        device = FakeDevice(*blocks(10_000))
        served = make(device, writeback_limit="1M")
        served.submit(WritePass())
        run(device, served, 5)
        assert device.bd_writes == 1 << 20
        assert "by hand" not in served.numbers()["reason"]

    def test_comes_before_what_goes_by_itself(self) -> None:
        device = FakeDevice(*blocks(5000, age=OLD), *blocks(32))
        served = make(device)
        run(device, served, 10.1)
        before = device.out
        served.submit(WritePass(ranges=((5000, 5032),)))
        run(device, served, 0.1)
        assert device.order[before : before + 32] == list(range(5000, 5032))
        run(device, served, 30)
        assert device.out > 4950

    def test_a_setting_changes_meanwhile(self) -> None:
        """It is what it was asked to be."""
        device = FakeDevice(*blocks(1000))
        served = make(device)
        device.during_flush = lambda: served.configure(settings(writeback_age="30min"))
        served.submit(WritePass())
        run(device, served, 1)
        assert device.out == 1000

    def test_many(self) -> None:
        served = make(FakeDevice(*blocks(1)))
        for _ in range(writeback.MOST_PASSES):
            served.submit(WritePass())
        assert served.numbers()["reason"] == "a pass by hand is under way"
        with pytest.raises(DeviceError, match="16 passes are queued already"):
            served.submit(WritePass())

    def test_one_after_the_other(self) -> None:
        device = FakeDevice(*blocks(64))
        served = make(device)
        served.submit(WritePass(ranges=((32, 64),)))
        served.submit(WritePass(ranges=((0, 40),)))
        run(device, served, 1)
        assert device.order == [*range(32, 64), *range(32)]


def test_a_superblock_that_cannot_be_written() -> None:
    """A pass by hand does not wait for ever, and others after it."""

    def fail() -> None:
        raise BackingError("no")

    device = FakeDevice(*blocks(320))
    served = make(device, renew=fail)
    for _ in range(writeback.MOST_PASSES):
        served.submit(WritePass())
    run(device, served, 60)
    assert device.out == 0
    assert "Input/output error" in served.trouble
    served.submit(WritePass())


def test_a_superblock_that_is_not_answered() -> None:
    told = []

    def hang() -> None:
        device.now += 45
        told.append(served.trouble)

    device = FakeDevice(*blocks(32))
    served = make(device, renew=hang)
    served.submit(WritePass())
    run(device, served, 60)
    assert told == ["backing '/dev/sdz' has not answered for 45 s"]
    assert served.trouble == ""
    assert device.out == 32


@pytest.mark.parametrize(("mode", "pause"), [("calm", 0.99), ("wanted", 0.04), ("full", 0.04)])
def test_leaves_the_processor_to_clients(mode: str, pause: float) -> None:
    device = FakeDevice(*blocks(1000))
    device.mode = mode
    served = make(device)
    served.submit(WritePass())
    served.tick()
    assert not served.yields
    device.inflight = 1
    device.cpu_of_a_look = 0.01
    assert served.tick() == pytest.approx(pause)
    assert served.yields


@pytest.mark.parametrize(("mode", "pause"), [("calm", 0.005), ("wanted", 0.005), ("full", 0.001)])
def test_the_least_that_clients_have(mode: str, pause: float) -> None:
    """However little a step took; but not where their writes are refused until it has done enough."""
    device = FakeDevice(*blocks(1000))
    device.mode = mode
    device.inflight = 1
    device.cpu_of_a_look = 0.0001
    served = make(device)
    served.submit(WritePass())
    assert served.tick() == pytest.approx(pause)
    assert served.yields
    device.inflight = 0
    assert served.tick() == 0
    assert not served.yields


class TestADiskThatHangs:
    """The thread is in a write for minutes: nothing else stands still, and all of it is told."""

    @pytest.fixture
    def hung(self) -> tuple[FakeDevice, Writeback, Worker, threading.Event]:
        device = FakeDevice(*blocks(1000, age=OLD))
        served = make(device, writeback_limit="1G")
        device.next_sweep = 0
        device.sweep()
        hangs, answers = threading.Event(), threading.Event()

        def hang() -> None:
            hangs.set()
            assert answers.wait(30)

        device.during_flush = hang
        worker = Worker(served, name="zramd-out")
        worker.start()
        assert hangs.wait(10)
        return device, served, worker, answers

    def test_what_is_told(self, hung: tuple[FakeDevice, Writeback, Worker, threading.Event]) -> None:
        device, served, worker, answers = hung
        assert served.trouble == ""
        device.now += 45
        assert served.trouble == "backing '/dev/sdz' has not answered for 45 s"
        assert served.numbers()["mode"] == "paused"
        assert served.numbers()["reason"] == "the device has not answered for 45 s"
        answers.set()
        device.during_flush = lambda: None
        wait_until(lambda: not served.trouble)
        worker.stop()

    def test_what_is_asked(self, hung: tuple[FakeDevice, Writeback, Worker, threading.Event]) -> None:
        """It is done once the disk answers."""
        device, served, worker, answers = hung
        served.configure(settings(writeback_limit="2G"))
        served.set_left(1 << 20)
        assert served.left() == 1 << 20
        served.submit(WritePass(frozenset({"huge"})))
        served.bring_back()
        with pytest.raises(DeviceError):
            for _ in range(100):
                served.submit(WritePass())
        device.during_flush = lambda: None
        answers.set()
        wait_until(lambda: served.numbers()["limit_left"] == 1 << 20 and not device.buffer)
        worker.stop()

    def test_stop(self, hung: tuple[FakeDevice, Writeback, Worker, threading.Event]) -> None:
        """It ends after the write that is under way, and need not be waited for."""
        device, served, worker, answers = hung
        worker.stop(patience=0.01)
        assert worker.thread is not None
        assert worker.thread.is_alive()
        answers.set()
        worker.stop()
        assert device.out == 32
        with pytest.raises(DeviceError, match=r"^background writeback does not run any more"):
            served.submit(WritePass())
        with pytest.raises(DeviceError, match=r"^background writeback does not run any more"):
            served.bring_back()


def test_a_reset_meanwhile() -> None:
    """The device counts from 0 again, and has nothing that could go out until the next sweep."""
    device = FakeDevice(*blocks(1000, age=OLD))
    served = make(device)
    run(device, served, 31)
    assert served.numbers()["written_out_minute"] == device.out > 900
    device.fill(*blocks(1000))
    device.out = device.back = device.bd_writes = 0
    run(device, served, 60)
    assert (device.out, served.numbers()["written_out_minute"]) == (0, 0)


class TestForget:
    """A reset: what was wanted of the data that was there is not done to what comes next."""

    def test_what_is_queued(self) -> None:
        device = FakeDevice(*blocks(1000))
        served = make(device)
        for _ in range(3):
            served.submit(WritePass())
        served.forget()
        run(device, served, 5)
        assert device.out == 0
        assert "by hand" not in served.numbers()["reason"]

    @pytest.mark.parametrize("by_hand", [True, False])
    def test_what_is_in_the_buffer(self, by_hand: bool) -> None:
        """It was of the data that has gone: the disk never sees it."""
        device = FakeDevice(*blocks(10, age=OLD, read=False), *blocks(990, age=OLD))
        served = make(device)
        device.sweep()
        if by_hand:
            served.submit(WritePass(ranges=((0, 10), (10, 1000))))
        served.tick()
        assert device.pending
        drops, before = device.log["drop"], len(device.flushes)
        device.fill(*blocks(1000))
        served.forget()
        served.tick()
        assert device.log["drop"] == drops + 1
        run(device, served, 30)
        assert len(device.flushes) == before
        assert device.pending == 0

    def test_in_the_middle_of_a_write(self) -> None:
        device = FakeDevice(*blocks(1000))
        served = make(device)
        device.during_flush = served.forget
        for _ in range(2):
            served.submit(WritePass())
        run(device, served, 5)
        assert len(device.flushes) == 1
        device.during_flush = lambda: None
        served.submit(WritePass())
        run(device, served, 5)
        assert device.out == 1000


def test_what_cannot_be_begun(capfd: pytest.CaptureFixture[str]) -> None:
    """A state that cannot be marked as one with blocks outside: nothing is written, and nothing used up."""
    device = FakeDevice(*blocks(1000, age=OLD))
    served = make(device, writeback_limit="1M")
    device.sweep()

    def fail() -> None:
        raise OSError(errno.ENOMEM, "no memory")

    device.during_flush = fail
    worker = Worker(served, clock=lambda: device.now)
    for _ in range(30):
        device.now += worker.turn()
    assert served.trouble == "background writeback failed: no memory"
    assert served.left() == 1 << 20
    device.during_flush = lambda: None
    for _ in range(30):
        device.now += worker.turn()
    assert device.out
    assert served.trouble == ""


class TestNumbers:
    def test_sections(self) -> None:
        device = FakeDevice(*blocks(320, age=OLD), *blocks(100, hot=True))
        device.bad = {7}
        served = make(device, writeback_limit="1G")
        run(device, served, 25)
        found = served.numbers()
        assert (found["out_pages"], found["out_data_size"]) == (320, 640_000)
        assert found["out_live_bytes"] == 320 * (2000 + HEAD)
        assert found["backing"] == "/dev/sdz"
        assert found["backing_size"] == 1001 * EXTENT
        assert (found["backing_free"], found["backing_bad"]) == (989 * EXTENT, EXTENT)
        assert (found["written_out"], found["written_out_minute"]) == (320, 320)
        assert (found["writeback_age"], found["writeback_limit"]) == (3600, 1 << 30)
        assert found["limit_left"] == served.left()
        run(device, served, 75)
        assert served.numbers()["written_out_minute"] == 0

    def test_every_reason_is_one_sentence(self) -> None:
        device = FakeDevice(*blocks(9000, age=OLD), extents=200)
        served = make(device, writeback_limit="6M")
        reasons = set()
        for second in range(200):
            device.mode = ("calm", "wanted", "full")[second // 20 % 3]
            device.error = errno.EIO if 60 <= second < 80 else 0
            device.each = 0.06 if 80 <= second < 90 else 0.001
            run(device, served, 1)
            reasons.add(served.numbers()["reason"])
            if second == 100:
                served.set_left(1 << 40)
            elif second == 150:
                served.bring_back()
        assert len(reasons) > 4
        for reason in reasons:
            assert reason[0].islower()
            assert not reason.endswith(".")
            assert "\n" not in reason


def test_without_a_backing() -> None:
    without = Without()
    assert (without.numbers(), without.left(), without.trouble) == (None, None, "")
    without.configure(settings())
    asks: list[Callable[[], None]] = [
        lambda: without.submit(WritePass()),
        without.bring_back,
        lambda: without.set_left(1),
    ]
    for ask in asks:
        with pytest.raises(DeviceError, match=r"^there is no backing: start the server with backing=PATH$"):
            ask()
