"""A device and a disk with clocks of their own, for tests of what moves blocks out of memory by itself."""

import errno
import os
from collections import Counter
from collections.abc import Callable

from zramd.core.device.backing import EXTENT
from zramd.server.ages import IDLE, OLDEST, SWEEP, age_of
from zramd.server.tierpolicy import Census
from zramd.server.writeback import Writeback
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
