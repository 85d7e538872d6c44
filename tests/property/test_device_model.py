"""The device against a bytearray: any ranges, trims, zeros, compactions, limits, and check() after each.

Also with a state file, which another device takes over again and again: as it was left, as after a kill.
"""

import errno
import os
import threading

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from support.backings import Disk, bring_back, write_out
from support.run import SCALE

from zramd import Device, PoolFullError
from zramd.core.device.device import state_layout
from zramd.core.device.tier import Tier
from zramd.core.device.writeback import Writeback

BLOCK = 4096
BLOCKS = 64
SIZE = BLOCKS * BLOCK

CODECS = ("lz4", "lz4hc", "zstd", "none")
OFFSETS = st.one_of(st.integers(0, SIZE), st.integers(0, BLOCKS).map(lambda block: block * BLOCK))
LENGTHS = st.one_of(st.integers(0, 3 * BLOCK), st.integers(0, 8).map(lambda blocks: blocks * BLOCK))


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int]:
    offset = draw(OFFSETS)
    return offset, min(draw(LENGTHS), SIZE - offset)


@st.composite
def contents(draw: st.DrawFn, length: int) -> bytes:
    """Zeros, one word, something compressible, or noise."""
    kind = draw(st.sampled_from("zwcn"))
    if kind == "z":
        return bytes(length)
    if kind == "w":
        return (draw(st.binary(min_size=8, max_size=8)) * (length // 8 + 1))[:length]
    rnd = draw(st.randoms(use_true_random=True))
    if kind == "n":
        return rnd.randbytes(length)
    part = rnd.randbytes(rnd.randint(20, 3000)) + bytes(rnd.randint(1, 4000))
    return (part * (length // len(part) + 1))[:length]


class DeviceModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fd = -1
        self.verify = False
        self.codec, self.cold_level, self.codecs = "lz4", 3, {"lz4"}
        self.disk = Disk(5)  # too small for all
        self.device = self.disk.device(SIZE)
        self.hands = Writeback(self.device)
        self.model = bytearray(SIZE)
        self.refiller: threading.Thread | None = None

    @initialize(
        full=st.booleans(),
        reserve=st.booleans(),
        kept=st.booleans(),
        verify=st.booleans(),
        codec=st.sampled_from(CODECS),
        granule=st.sampled_from((16, 64, 4096)),
        sector=st.sampled_from((512, 4096)),
        data=st.data(),
    )
    def start(
        self,
        full: bool,
        reserve: bool,
        kept: bool,
        verify: bool,
        codec: str,
        granule: int,
        sector: int,
        data: st.DataObject,
    ) -> None:
        self.verify, self.codec = verify, codec
        self.codecs = {codec}  # that the device has ever had
        if kept:
            self.fd = os.memfd_create("zramd")
            os.ftruncate(self.fd, state_layout(SIZE)["bytes"])
        self.disk = Disk(5, granule=granule, sector=sector)
        self.device = self.make()
        if reserve:
            self.device.reserve_start(SIZE // 4)
            self.refiller = threading.Thread(target=self.device.reserve_keep)
            self.refiller.start()
        if full:
            self.write((0, SIZE), data)

    def make(self) -> Device:
        device = self.disk.device(
            SIZE, codec=self.codec, state=self.fd, verify=self.verify, cold_level=self.cold_level
        )
        self.hands = Writeback(device)
        return device

    def stop_refiller(self) -> None:
        if self.refiller is not None:
            self.device.reserve_stop()
            self.refiller.join()
            self.refiller = None

    @precondition(lambda self: self.fd >= 0)
    @rule(codec=st.sampled_from(CODECS), cold_level=st.sampled_from((1, 3, 19)))
    def take_over(self, codec: str, cold_level: int) -> None:
        self.stop_refiller()
        self.codec, self.cold_level = codec, cold_level
        self.codecs.add(codec)
        before = self.device.counters()
        self.device = self.make()
        after = self.device.counters()
        assert after["leaked_objects"] == 0
        for name in before:
            changes = (
                "mem_used_total",
                "metadata_bytes",
                "stock_pages",
                "freeable_pages",
                "objs_allocated",
            )
            if name not in changes and not name.startswith(("reserve_", "recover")):
                assert after[name] == before[name], name
        assert after["mem_used_total"] <= before["mem_used_total"]
        assert after["recovered_blocks"] == before["pages_stored"]
        self.sound()
        self.read((0, SIZE))

    @rule(where=ranges(), data=st.data())
    def write(self, where: tuple[int, int], data: st.DataObject) -> None:
        offset, length = where
        content = data.draw(contents(length))
        try:
            self.device.write(content, offset)
        except PoolFullError:
            self.refused()
            self.accept_either(offset, content)
        else:
            self.model[offset : offset + length] = content

    @rule(
        first=st.integers(0, BLOCKS), count=st.integers(0, BLOCKS), threshold=st.sampled_from((0, 300, 5000))
    )
    def cool(self, first: int, count: int, threshold: int) -> None:
        before = self.device.counters()
        done, saved = self.device.cool(first, count, threshold)
        after = self.device.counters()
        # What zstd compressed when it was written may become cold as it is.
        settled = after["cold_pages"] - before["cold_pages"] - done
        assert 0 <= settled <= count
        assert settled == 0 or "zstd" in self.codecs
        assert before["compr_data_size"] - after["compr_data_size"] == saved
        assert saved >= done
        assert before["pages_stored"] == after["pages_stored"]
        if self.device.mem_limit:
            assert after["mem_used_total"] <= max(self.device.mem_limit, before["mem_used_total"])

    def refused(self) -> None:
        assert self.device.mem_limit
        assert self.device.pressure()[0] == 0, "refused while compaction could make room"

    def accept_either(self, offset: int, content: bytes) -> None:
        """After a failed write each block has its old content or its new one."""
        now = bytearray(SIZE)
        self.device.read(now, 0)
        wanted = self.model[:]
        wanted[offset : offset + len(content)] = content
        for start in range(0, SIZE, BLOCK):
            block = slice(start, start + BLOCK)
            assert now[block] in (self.model[block], wanted[block])
        self.model = now

    @rule(where=ranges())
    def trim(self, where: tuple[int, int]) -> None:
        offset, length = where
        self.device.trim(offset, length)
        first, last = -(-offset // BLOCK), (offset + length) // BLOCK
        if first < last:
            self.model[first * BLOCK : last * BLOCK] = bytes((last - first) * BLOCK)

    @rule(where=ranges(), may_trim=st.booleans())
    def zero(self, where: tuple[int, int], may_trim: bool) -> None:
        offset, length = where
        try:
            self.device.zero(offset, length, may_trim)
        except PoolFullError:
            self.accept_either(offset, bytes(length))
        else:
            self.model[offset : offset + length] = bytes(length)

    @rule(where=ranges())
    def read(self, where: tuple[int, int]) -> None:
        offset, length = where
        buf = bytearray(length)
        self.device.read(buf, offset)
        assert buf == self.model[offset : offset + length]

    @rule(where=ranges())
    def extents(self, where: tuple[int, int]) -> None:
        offset, length = where
        at = offset
        for start, size, kind in self.device.extents(offset, length):
            assert (start, size > 0) == (at, True)
            if kind:
                assert not any(self.model[start : start + size])
            at += size
        assert at == offset + length

    @rule(budget=st.one_of(st.just(0), st.integers(1, 20_000)))
    def compact(self, budget: int) -> None:
        self.device.compact(budget)

    @rule()
    def release_stock(self) -> None:
        self.device.release_stock()

    @rule(pages=st.one_of(st.just(0), st.integers(1, BLOCKS)))
    def set_limit(self, pages: int) -> None:
        self.device.mem_limit = pages * BLOCK

    @rule()
    def reset(self) -> None:
        self.device.reset()
        self.model = bytearray(SIZE)

    @invariant()
    def sound(self) -> None:
        self.device.check()
        counters = self.device.counters()
        assert counters["orig_data_size"] == counters["pages_stored"] * BLOCK
        assert counters["mem_used_total"] >= counters["compr_data_size"]
        assert counters["mem_used_max"] >= counters["mem_used_total"]

    def teardown(self) -> None:
        self.stop_refiller()
        if self.fd >= 0:
            os.close(self.fd)
        now = bytearray(SIZE)
        self.device.read(now, 0)
        assert now == self.model


class TierModel(DeviceModel):
    """With what the background does to blocks, step by step."""

    @rule(
        first=st.integers(0, BLOCKS), tries=st.integers(1, BLOCKS), age=st.integers(0, 3), raw=st.booleans()
    )
    def step(self, first: int, tries: int, age: int, raw: bool) -> None:
        """As the background does it, with blocks that have grown older."""
        before = self.device.counters()
        _, tried, _, done, saved, _ = Tier(self.device).cool(first, tries, 0, age, raw=raw)
        after = self.device.counters()
        assert done <= tried <= tries
        assert before["compr_data_size"] - after["compr_data_size"] == saved
        assert after["recompressed"] == before["recompressed"] + done

    @rule(coarse=st.booleans(), keep=st.booleans())
    def sweep(self, coarse: bool, keep: bool) -> None:
        stored, raw, others, tried, unread, read, huge, back = Tier(self.device).sweep(coarse, keep, 300)
        found = self.device.counters()
        assert sum(unread) + sum(read) == found["compr_data_size"]
        assert sum(huge) == found["huge_pages"] * BLOCK
        assert back <= found["out_pages"]
        assert sum(stored) == found["pages_stored"]
        assert sum(raw) <= found["huge_pages"]
        assert sum(raw) + sum(others) + tried <= found["pages_stored"] - found["same_pages"]

    @rule(first=st.integers(0, BLOCKS - 1), tries=st.integers(1, BLOCKS))
    def promote(self, first: int, tries: int) -> None:
        """What is read in two sweeps is made hot again, if there is room."""
        before = self.device.counters()
        tier = Tier(self.device)
        for _ in range(2):
            tier.sweep(False, True, 300)
            self.read((first * BLOCK, SIZE - first * BLOCK))
        _, tried, done, _ = tier.promote(first, tries)
        after = self.device.counters()
        assert done <= tried <= tries
        assert before["cold_pages"] - after["cold_pages"] == done == after["promoted"] - before["promoted"]
        assert before["pages_stored"] == after["pages_stored"]
        if self.device.mem_limit:
            assert after["mem_used_total"] <= max(self.device.mem_limit, before["mem_used_total"])

    @rule(
        first=st.integers(0, BLOCKS),
        count=st.integers(0, BLOCKS),
        age=st.integers(0, 2),
        raw=st.booleans(),
        unread=st.booleans(),
    )
    def write_out(self, first: int, count: int, age: int, raw: bool, unread: bool) -> None:
        self.hands.drop()
        before = self.device.counters()
        done = write_out(self.device, first, first + count, age, hands=self.hands, raw=raw, unread=unread)
        after = self.device.counters()
        assert after["out_pages"] - before["out_pages"] == done <= count
        assert after["written_out"] - before["written_out"] == done
        assert before["pages_stored"] == after["pages_stored"]
        if raw:
            assert before["huge_pages"] - after["huge_pages"] == done
        assert after["backing_free"] > 0, "the last one is for reclaim"

    @rule(first=st.integers(0, BLOCKS), count=st.integers(1, BLOCKS))
    def gather(self, first: int, count: int) -> None:
        """What is in the buffer changes nothing, whatever comes before it is written."""
        end = min(first + count, BLOCKS)
        at, taken, full = self.hands.gather(min(first, end), end, 0)
        # Behind the first that has no room there may be smaller ones that have.
        assert taken <= (end if full else at) - min(first, end)
        assert bool(self.hands.pending) >= bool(taken)

    @rule(drops=st.booleans())
    def flush(self, drops: bool) -> None:
        if drops:
            self.hands.drop()
        blocks, written, moved, _, stopped = self.hands.flush()
        assert not (drops and blocks)
        assert (written > 0) >= (blocks > 0)
        assert moved <= written
        assert stopped in (0, errno.EXFULL)
        assert self.hands.pending == 0

    @rule(share=st.sampled_from((0.1, 0.5, 1.0)))
    def reclaim(self, share: float) -> None:
        before = self.device.counters()
        while self.hands.reclaim(share):
            pass
        self.hands.flush()
        after = self.device.counters()
        assert after["bd_read_errors"] == 0
        assert after["backing_live"] == before["backing_live"] or after["written_out"] > before["written_out"]
        assert after["backing_free"] > 0

    @rule(wanted=st.booleans())
    def bring_back(self, wanted: bool) -> None:
        if wanted:
            for _ in range(2):
                Tier(self.device).sweep(False, True, 300)
                self.read((0, SIZE))
        before = self.device.counters()
        done = bring_back(self.device, wanted=wanted)
        after = self.device.counters()
        assert before["out_pages"] - after["out_pages"] == done
        if not self.device.mem_limit:
            assert wanted or after["out_pages"] == 0 == after["backing_live"]
        else:
            assert after["mem_used_total"] <= max(self.device.mem_limit, before["mem_used_total"])


TestDeviceModel = TierModel.TestCase
TestDeviceModel.settings = settings(
    deadline=None, stateful_step_count=40, max_examples=int(100 * max(SCALE, 1))
)
