"""Threads on one device or one pool, one interleaving a seed: `python interleavings.py FIRST COUNT`.

Where schedule.c is preloaded (debug builds), the seed decides which thread goes on at each named point and
lock, so that it repeats what happened, step by step. Elsewhere the same threads run side by side.
With TRACE instead of COUNT: prints the steps of one seed.

Whatever was written is looked for again: each read must find a content that its block can have had at some
moment of the read. At the end every block is read, and all structures are checked.
"""

import ctypes
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from support import backings
from zramd import Device, HandleError, PoolFullError, Zsmalloc
from zramd.core.device import saving
from zramd.core.device.tier import Tier
from zramd.core.device.writeback import Writeback
from zramd.errors import SaveError

BLOCK = 4096
BLOCKS = 80  # of the device; most of what they hold goes before the threads begin
HOT = 10  # blocks that all threads use, or only the first two
SHARED = 2  # blocks behind those, of which each thread has a part
PART = BLOCK // 4
OPERATIONS = 16  # of each thread
WORKERS = 3  # beside the one that compacts, and of a device the one that writes to its backing
# Few sizes, so that all meet in few classes: with lists of free chunks, with bitmaps, raw blocks.
SIZES = (90, 600, 1500, 3000, BLOCK)
SLOTS = 40

Work = Callable[[], None]


@dataclass
class Write:
    """A content of a block, and when it was written."""

    content: bytes
    began: int
    ended: float = float("inf")


@dataclass
class Block:
    """What was written to a block."""

    writes: list[Write] = field(default_factory=lambda: [Write(bytes(BLOCK), 0, 0)])

    def allowed(self, began: int) -> list[bytes]:
        """What a read that began then, and ends now, may find."""
        # What was over when a write began that was over when the read began is gone.
        last = max(w.began for w in self.writes if w.ended <= began)
        return [w.content for w in self.writes if w.ended >= last]


class Disk:
    """A device that is looked at."""

    def __init__(self, dice: random.Random) -> None:
        self.blocks = [Block() for _ in range(BLOCKS)]
        self.clock = itertools.count(1)
        self.parts: dict[tuple[int, int], bytes] = {}
        self.resets = 0
        self.hot = dice.choice((2, HOT, HOT))  # with 2 it is mostly about cold blocks
        # Too small for all blocks: extents are emptied, and written again, while others read them.
        self.backing = backings.Disk(dice.choice((4, 6)))
        self.device = self.backing.device((BLOCKS + SHARED) * BLOCK, verify=dice.random() < 0.5, cold_level=1)
        self.tier, self.hands = Tier(self.device), Writeback(self.device)
        self.at = 0  # where a pass goes on
        for number in range(HOT, BLOCKS):
            self.write(number, content(dice))
        for number in dice.sample(range(HOT, BLOCKS), BLOCKS * 2 // 3):
            self.trim(number)
        for number in range(HOT):
            self.write(number, content(dice))
        if dice.random() < 0.3:
            # So little room that who writes has to compact.
            self.device.mem_limit = self.device.counters()["mem_used_total"] + dice.randrange(3) * BLOCK

    def _change(self, number: int, data: bytes, work: Callable[[], object]) -> None:
        block = self.blocks[number]
        write = Write(data, next(self.clock))
        block.writes.append(write)
        try:
            work()
            write.ended = next(self.clock)
        except PoolFullError:
            block.writes.remove(write)

    def write(self, number: int, data: bytes) -> None:
        self._change(number, data, lambda: self.device.write(data, number * BLOCK))

    def trim(self, number: int) -> None:
        self._change(number, bytes(BLOCK), lambda: self.device.trim(number * BLOCK, BLOCK))

    def reset(self) -> None:
        """Drop all: a write of zeros to each block, all at once."""
        self.resets += 1
        writes = [Write(bytes(BLOCK), next(self.clock)) for _ in self.blocks]
        for block, write in zip(self.blocks, writes, strict=True):
            block.writes.append(write)
        self.device.reset()
        ended = next(self.clock)
        for write in writes:
            write.ended = ended

    def save(self) -> None:
        """Save it while it changes, and look at each block as if it was read meanwhile."""
        began = next(self.clock)
        fd = os.memfd_create("saved")
        try:
            saving.save(self.device, fd, live=True)
        except SaveError:
            assert self.resets
            return
        finally:
            now = [block.allowed(began) for block in self.blocks]
            os.lseek(fd, 0, os.SEEK_SET)
            saved = os.fdopen(fd, "rb")
        with saved:
            copy = Device((BLOCKS + SHARED) * BLOCK)
            saving.load(copy, saved.fileno())
        for number in range(BLOCKS):
            found = bytearray(BLOCK)
            copy.read(found, number * BLOCK)
            assert found in now[number], f"block {number} is saved as {bytes(found[:32]).hex()}"

    def read(self, number: int, count: int = 1) -> None:
        """Read blocks by one request: those that are out may come by one read of the backing."""
        began = next(self.clock)
        whole = bytearray(min(count, BLOCKS - number) * BLOCK)
        self.device.read(whole, number * BLOCK)
        for at in range(0, len(whole), BLOCK):
            found, block = whole[at : at + BLOCK], number + at // BLOCK
            assert found in self.blocks[block].allowed(began), f"block {block} reads {found[:32].hex()}"

    def write_part(self, number: int, me: int, data: bytes) -> None:
        """Write what only this thread writes, in a block of which others write other parts."""
        resets = self.resets
        try:
            self.device.write(data, number * BLOCK + me * PART)
            self.parts[number, me] = data
        except PoolFullError:
            pass
        if resets == self.resets:
            self.read_part(number, me)

    def read_part(self, number: int, me: int) -> None:
        found = bytearray(PART)
        self.device.read(found, number * BLOCK + me * PART)
        if self.resets and not any(found):
            return
        assert found == self.parts.get((number, me), bytes(PART)), f"block {number} has lost part {me}"

    def works(self, dice: Callable[[], random.Random]) -> list[Work]:
        """What its threads do."""
        workers = [partial(self.worker, dice(), me) for me in range(WORKERS)]
        return [partial(self.mover, dice()), partial(self.sender, dice()), *workers]

    def end(self) -> None:
        self.device.check()
        for number in range(BLOCKS):
            self.read(number)
        for number, me in self.parts:
            self.read_part(number, me)
        # A server that ends here is followed by one that must know the backing again.
        assert self.backing.backing_id == self.device.backing_id
        self.hands.drop()
        self.device.trim(0, (BLOCKS + SHARED) * BLOCK)
        self.device.compact()
        self.device.check()
        assert self.device.counters()["mem_used_total"] == 0

    def worker(self, dice: random.Random, me: int) -> None:
        for _ in range(OPERATIONS):
            number = dice.randrange(self.hot) if dice.random() < 0.7 else dice.randrange(BLOCKS)
            kind = dice.randrange(10 if self.hot == HOT else 7)
            if kind < 3:
                self.read(number, count=1 + kind)
            elif kind < 5:
                self.write(number, content(dice))
            elif kind < 7:
                # The second may get what the one before the first had: the handle, and as many bytes.
                for _ in range(2):
                    self.write(number % self.hot, digits(dice, BLOCK))
            elif kind < 8:
                self.trim(number)
            else:
                self.write_part(BLOCKS + dice.randrange(SHARED), me, dice.randbytes(8) * (PART // 8))

    def mover(self, dice: random.Random) -> None:
        for _ in range(OPERATIONS // 2):
            kind = dice.randrange(40) if self.hot == HOT else dice.choice((17, 40))
            if kind < 5:
                self.device.compact()
            elif kind < 12:
                self.device.compact(dice.randrange(1, 20000))
            elif kind < 17:
                self.device.release_stock()
            elif kind < 28:
                self.tier.promote(0, BLOCKS + SHARED)  # what others have read since it became cold
                self.device.cool(0, dice.choice((self.hot, self.hot, BLOCKS + SHARED)), age=dice.randrange(2))
                self.device.sweep()
            elif kind < 32:
                self.save()
            elif kind < 35:
                self.reset()
            else:
                self.device.check()

    def sender(self, dice: random.Random) -> None:
        """What zramd-out does, in steps of every order."""
        for _ in range(OPERATIONS // 2):
            for _ in range(dice.choice((1, 1, 4))):
                self.leave(dice)
            assert self.device.counters()["bd_read_errors"] == 0

    def leave(self, dice: random.Random) -> None:
        """Blocks go out, or are about to, or move from one extent to another, or come back."""
        end = self.hot if dice.random() < 0.4 else BLOCKS + SHARED
        kind = dice.randrange(14)
        if kind < 6:
            if not self.hands.pending:
                self.claim()
            which = {name: True for name in ("raw", "idle", "unread", "tried") if dice.random() < 0.05}
            self.at, _, full = self.hands.gather(self.at, end, 0, **which)
            self.at = self.at if full and self.at < end else dice.choice((0, 0, dice.randrange(BLOCKS)))
            if full or dice.random() < 0.5:
                self.hands.flush()
        elif kind < 8:
            self.hands.flush()
        elif kind < 10:
            self.hands.reclaim(dice.choice((0.3, 1.0)))
        elif kind < 11:
            self.hands.drop()
        else:
            self.hands.bring_back(dice.choice((0, dice.randrange(BLOCKS))), end, dice.random() < 0.3)

    def claim(self) -> None:
        """Have the superblock name the data that there is since a reset, as the server does it."""
        name = self.device.data_id
        if self.device.backing_id != name and not self.device.counters()["out_pages"]:
            self.backing.backing_id = name
            self.device.claim_backing(name)


class Heap:
    """A pool that is looked at. Who takes a handle out of `slots` frees it; any may read it meanwhile."""

    def __init__(self, dice: random.Random) -> None:
        self.pool = Zsmalloc(1000)
        self.slots: list[tuple[int, bytes] | None] = [None] * SLOTS
        # One that was never freed has its content at all times; of others a read may come too late.
        self.kept = [self._make(dice) for _ in range(SLOTS)]
        for number in range(SLOTS):
            self.slots[number] = self._make(dice)
        for handle, _ in [self._make(dice) for _ in range(2 * SLOTS)]:
            self.pool.free(handle)
        for _ in range(SLOTS * 2 // 3):
            handle, _ = self.kept.pop(dice.randrange(len(self.kept)))
            self.pool.free(handle)

    def _make(self, dice: random.Random) -> tuple[int, bytes]:
        size = dice.choice(SIZES)
        handle = self.pool.malloc(size)
        data = whole(dice.randrange(1 << 32), size)
        self.pool.write(handle, data)
        return handle, data

    def worker(self, dice: random.Random, _me: int) -> None:
        for _ in range(OPERATIONS):
            number = dice.randrange(SLOTS)
            kind = dice.randrange(8)
            if kind < 2:
                handle, data = dice.choice(self.kept)
                assert self.pool.read(handle) == data, f"handle {handle} has another content"
            elif kind < 4:
                known = self.slots[number]
                if known:
                    self._read_shared(known[0])
            else:
                known, self.slots[number] = self.slots[number], None
                if known:
                    handle, data = known
                    assert self.pool.read(handle) == data, f"handle {handle} has another content"
                    if kind == 7:
                        data = whole(dice.randrange(1 << 32), len(data))
                        self.pool.write(handle, data)
                        assert self.pool.read(handle) == data, f"handle {handle} has another content"
                    self.pool.free(handle)
                if self.slots[number] is None and kind != 6:
                    made = self._make(dice)
                    if self.slots[number] is None:
                        self.slots[number] = made
                    else:
                        self.pool.free(made[0])

    def _read_shared(self, handle: int) -> None:
        try:
            found = self.pool.read(handle)
        except HandleError:
            return
        assert found in (bytes(len(found)), whole(int.from_bytes(found[:4], "little"), len(found))), (
            f"handle {handle} has parts of two contents"
        )

    def mover(self, dice: random.Random) -> None:
        for _ in range(OPERATIONS // 2):
            self.pool.compact(0 if dice.random() < 0.5 else dice.randrange(1, 20000))

    def works(self, dice: Callable[[], random.Random]) -> list[Work]:
        """What its threads do."""
        workers = [partial(self.worker, dice(), me) for me in range(WORKERS)]
        return [partial(self.mover, dice()), *workers]

    def end(self) -> None:
        self.pool.check()
        for handle, data in [*self.kept, *filter(None, self.slots)]:
            assert self.pool.read(handle) == data, f"handle {handle} has another content"
            self.pool.free(handle)
        self.pool.compact()
        self.pool.check()
        assert self.pool.stats()["mem_used_total"] == 0


def content(dice: random.Random) -> bytes:
    """A block: one word repeated, compressible, or raw; half of them get smaller when they become cold."""
    size = dice.choice((0, *SIZES, BLOCK))
    if size == 0:
        return dice.randbytes(8) * 512
    data = digits(dice, size) if dice.random() < 0.5 else dice.randbytes(size)
    return data + bytes(BLOCK - size)


def digits(dice: random.Random, size: int) -> bytes:
    """What lz4 cannot compress, and zstd can."""
    return dice.randbytes(size // 2).hex().encode()


def whole(number: int, size: int) -> bytes:
    """What only an object with this number holds, in each of its parts."""
    return number.to_bytes(4, "little") * (size // 4) + bytes(size % 4)


class Schedule:
    """schedule.c, where it is preloaded; else nothing is decided."""

    def __init__(self) -> None:
        library = ctypes.CDLL(None)
        self._library = library if hasattr(library, "schedule_begin") else None
        if self._library:
            self._library.schedule_begin.argtypes = [ctypes.c_uint64, ctypes.c_int]
            self._library.schedule_digest.restype = ctypes.c_uint64
            self._library.schedule_steps.restype = ctypes.c_uint64
            self._library.schedule_step.restype = ctypes.c_char_p
            self._library.schedule_step.argtypes = [ctypes.c_uint64, ctypes.POINTER(ctypes.c_int)]

    def run(self, seed: int, works: list[Work]) -> None:
        """Run each work in a thread; raise the first exception of one."""
        errors: list[BaseException] = []

        def run(number: int, work: Work) -> None:
            if self._library:
                self._library.schedule_enter(number)
            try:
                work()
            except BaseException as error:
                errors.append(error)
            if self._library:
                self._library.schedule_leave()

        if self._library:
            self._library.schedule_begin(seed, len(works))
        threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]

    def steps(self) -> list[tuple[int, str]]:
        """(thread, point) of each step of the last run."""
        assert self._library, "without schedule.c nothing is noted"
        found, thread = [], ctypes.c_int()
        for i in range(self._library.schedule_steps()):
            place = self._library.schedule_step(i, ctypes.byref(thread))
            if place is None:
                break
            found.append((thread.value, place.decode()))
        return found

    def digest(self) -> str:
        """The same for the same steps."""
        return f"{self._library.schedule_digest():016x}" if self._library else "-"


def play(schedule: Schedule, seed: int) -> None:
    """Run what a seed says; AssertionError or one of zramd's where something is not as it should be."""
    dice = random.Random(seed)
    scene = (Disk, Heap)[seed % 2](dice)

    schedule.run(seed, scene.works(lambda: random.Random(dice.randrange(1 << 32))))
    scene.end()


def main(first: int, count: str) -> None:
    schedule = Schedule()
    if schedule.digest() != "-":
        # One runs at a time: on one processor a change of threads is no wake-up of another.
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, [processors[os.getpid() % len(processors)]])
    if count == "TRACE":
        play(schedule, first)
        for thread, place in schedule.steps():
            print(thread, place)
        return
    for seed in range(first, first + int(count)):
        print("seed", seed, end=" ", flush=True)
        play(schedule, seed)
        print(schedule.digest(), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
