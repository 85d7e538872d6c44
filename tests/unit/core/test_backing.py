"""Blocks that are out: what is on the backing, what reads of it, and what is refused."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.backings import SECTOR, Disk, bring_back, write_out
from support.run import PATIENCE, preloaded

import zramd
from zramd import Device
from zramd.core.device.backing import EXTENT, Backing
from zramd.core.device.device import state_layout
from zramd.core.device.tier import Tier
from zramd.core.device.writeback import Writeback

SUPPORT = Path(__file__).resolve().parents[2] / "support"
PACKAGES = Path(zramd.__file__).parents[1]
BLOCK = 4096
BLOCKS = 256
SIZE = BLOCKS * BLOCK


def text(seed: int) -> bytes:
    """A block that compresses well."""
    return (b"block %d of text " % seed * 300)[:BLOCK]


def noise(seed: int) -> bytes:
    """A block that does not."""
    return bytes(b ^ seed & 0xFF for b in os.urandom(BLOCK))


def filled(disk: Disk, **settings: object) -> tuple[Device, list[bytes]]:
    """A device with text, raw blocks, words and holes."""
    device = disk.device(SIZE, **settings)
    contents = [
        (text, noise, lambda _: b"w" * BLOCK, lambda _: bytes(BLOCK))[n % 4](n) for n in range(BLOCKS)
    ]
    for number, content in enumerate(contents):
        if number % 4 < 3:
            device.write(content, number * BLOCK)
    return device, contents


def look(device: Device, number: int) -> bytes:
    found = bytearray(BLOCK)
    device.read(found, number * BLOCK)
    return bytes(found)


def verify(device: Device, contents: list[bytes]) -> None:
    for number, content in enumerate(contents):
        assert look(device, number) == content, number
    device.check()


def state_slots(fd: int) -> int:
    """Where the slots begin in a state: after the head."""
    return 1 << 16


class TestBacking:
    @pytest.mark.parametrize(
        ("size", "granule", "sector"),
        [
            (EXTENT, 16, 512),
            (0, 16, 512),
            (1 << 20, 8, 512),
            (1 << 20, 24, 512),
            (1 << 20, 8192, 512),
            (1 << 20, 16, 256),
            (1 << 20, 16, 8192),
            (1 << 37, 16, 512),
        ],
    )
    def test_what_cannot_be(self, size: int, granule: int, sector: int) -> None:
        with pytest.raises(ValueError, match=r"size|granule|sectors"):
            Backing(0, size, granule, sector)

    def test_numbers(self) -> None:
        disk = Disk(5)
        assert disk.backing().numbers() == {
            "backing_size": 5 * EXTENT,
            "backing_extents": 4,
            "backing_free": 4,
            "backing_bad": 0,
            "backing_live": 0,
        }

    def test_a_device_without_one(self) -> None:
        device = Device(SIZE)
        with pytest.raises(ValueError, match="no backing"):
            Writeback(device)
        assert "backing_size" not in device.counters()


@pytest.mark.parametrize("verify_setting", [False, True])
@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
def test_out_and_back(codec: str, verify_setting: bool) -> None:
    disk = Disk()
    device, contents = filled(disk, codec=codec, verify=verify_setting)
    device.cool(0, BLOCKS // 2)
    before = device.counters()
    payload = before["compr_data_size"]
    assert write_out(device) == BLOCKS // 2
    device.compact()
    found = device.counters()
    assert (found["out_pages"], found["compr_data_size"], found["out_data_size"]) == (BLOCKS // 2, 0, payload)
    assert found["mem_used_total"] == 0
    assert found["huge_pages"] == found["cold_pages"] == 0
    assert found["same_pages"] == BLOCKS // 4
    assert payload < found["backing_live"] <= found["bd_writes"] < payload * 1.1 + 3 * BLOCK
    verify(device, contents)
    assert found["bd_reads"] < device.counters()["bd_reads"] <= BLOCKS // 2 * 2 * BLOCK
    assert device.block(0)["kind"] == device.block(1)["kind"] == "out"
    assert device.block(1)["codec"] == "raw"
    assert bring_back(device) == BLOCKS // 2
    after = device.counters()
    assert (after["out_pages"], after["backing_live"], after["backing_free"]) == (0, 0, 15)
    assert after["compr_data_size"] == payload
    verify(device, contents)


def test_parts_and_trims_of_what_is_out() -> None:
    device, contents = filled(Disk())
    write_out(device)
    device.write(b"part", 8 * BLOCK + 100)
    contents[8] = contents[8][:100] + b"part" + contents[8][104:]
    device.zero(12 * BLOCK + 50, 60)
    contents[12] = contents[12][:50] + bytes(60) + contents[12][110:]
    device.trim(16 * BLOCK, BLOCK)
    contents[16] = bytes(BLOCK)
    device.write(contents[0], 20 * BLOCK)
    contents[20] = contents[0]
    found = device.counters()
    assert found["out_pages"] == BLOCKS // 2 - 4
    assert found["bd_reads"] == 2 * SECTOR  # trims and whole writes do no I/O
    verify(device, contents)
    part = bytearray(10)
    device.read(part, 4 * BLOCK + 7)
    assert part == contents[4][7:17]
    whole = bytearray(SIZE)
    device.read(whole, 0)
    assert whole == b"".join(contents)


class TestTogether:
    """Blocks that are out, side by side, by one read of the backing."""

    @staticmethod
    def all_out(disk: Disk, blocks: int = 64) -> tuple[Device, list[bytes]]:
        device = disk.device(SIZE)
        contents = [text(number) for number in range(blocks)]
        for number, content in enumerate(contents):
            device.write(content, number * BLOCK)
        assert write_out(device) == blocks
        return device, contents

    @staticmethod
    def look_at(device: Device, offset: int, size: int) -> tuple[bytes, int]:
        """What is there, and the bytes that were read of the backing for it."""
        before = device.counters()["bd_reads"]
        found = bytearray(size)
        device.read(found, offset)
        return bytes(found), device.counters()["bd_reads"] - before

    def test_one_read(self) -> None:
        device, contents = self.all_out(Disk())
        whole = b"".join(contents)
        record = device.counters()["backing_live"] // 64
        for offset, size in ((0, 8 * BLOCK), (3 * BLOCK, 2 * BLOCK), (5 * BLOCK, 16 * BLOCK)):
            found, read = self.look_at(device, offset, size)
            assert found == whole[offset : offset + size]
            assert read < size // BLOCK * record + 2 * SECTOR, "each by itself reads a sector at least"
        # Sixteen at most, and parts of blocks by themselves.
        found, read = self.look_at(device, 100, 40 * BLOCK)
        assert found == whole[100 : 100 + 40 * BLOCK]
        assert read < 41 * record + 5 * 2 * SECTOR
        device.check()

    def test_what_lies_elsewhere(self) -> None:
        """Neighbours that went out at other times, are in memory, words, holes, or too far away."""
        disk = Disk(32)
        device, contents = filled(disk)
        hands = Writeback(device)
        for first in (2, 0, 1):
            for number in range(first, BLOCKS // 2, 3):
                write_out(device, number, number + 1, hands=hands)
        for number in range(BLOCKS // 2, BLOCKS, 8):
            write_out(device, number, number + 6, hands=hands)
        whole = b"".join(contents)
        for size in (2, 3, 8, 32, BLOCKS):
            for first in range(0, BLOCKS - size + 1, size - 1):
                found, _ = self.look_at(device, first * BLOCK, size * BLOCK)
                assert found == whole[first * BLOCK : (first + size) * BLOCK]
        device.check()
        assert device.counters()["bd_read_errors"] == 0

    def test_raw_blocks(self) -> None:
        device = Disk(32).device(SIZE)
        contents = [noise(number) for number in range(64)]
        for number, content in enumerate(contents):
            device.write(content, number * BLOCK)
        assert write_out(device) == 64
        found, read = self.look_at(device, 0, 64 * BLOCK)
        assert found == b"".join(contents)
        assert read < 64 * (BLOCK + 16) + 64 * 2 * SECTOR
        device.check()

    def test_one_that_is_wrong(self) -> None:
        """A request ends at the first block that cannot be read; those before it are right."""
        disk = Disk()
        device, contents = self.all_out(disk)
        place = int(device.block(3)["place"])
        disk.flip(place + 14)  # its payload
        wrong = [number for number in range(8) if not self.is_sound(device, number)]
        assert len(wrong) == 1
        errors = device.counters()["bd_read_errors"]
        found = bytearray(8 * BLOCK)
        with pytest.raises(OSError, match=f"block {wrong[0]}\\b"):
            device.read(found, 0)
        assert device.counters()["bd_read_errors"] == errors + 1
        assert found[: wrong[0] * BLOCK] == b"".join(contents[: wrong[0]])
        assert found[wrong[0] * BLOCK :] == bytes((8 - wrong[0]) * BLOCK)

    @staticmethod
    def is_sound(device: Device, number: int) -> bool:
        try:
            look(device, number)
        except OSError:
            return False
        return True

    def test_a_disk_that_fails(self) -> None:
        backing = Disk().backing()
        device = Device(SIZE, backing=backing)
        for number in range(8):
            device.write(text(number), number * BLOCK)
        assert write_out(device) == 8
        blank = os.open("/dev/null", os.O_RDWR)
        backing.reopen(blank)
        os.close(blank)
        with pytest.raises(OSError, match=r"block 0\b"):
            device.read(bytearray(8 * BLOCK), 0)
        assert device.counters()["bd_read_errors"] == 1
        device.write(text(1), 0)
        with pytest.raises(OSError, match=r"block 1\b"):
            device.read(bytearray(8 * BLOCK), 0)
        device.check()

    def test_each_is_noted_as_read(self) -> None:
        device, _ = self.all_out(Disk())
        tier, hands = Tier(device), Writeback(device)
        for _ in range(2):
            tier.sweep(False, True, 300)
            self.look_at(device, 0, 8 * BLOCK)
        assert hands.bring_back(0, BLOCKS)[1:3] == (8, 8)


def test_extents_show_data() -> None:
    device, _ = filled(Disk())
    before = device.extents(0, SIZE)
    write_out(device)
    assert device.extents(0, SIZE) == before


class TestGather:
    def test_what_is_asked_for(self) -> None:
        device, contents = filled(Disk())
        tier, hands = Tier(device), Writeback(device)
        assert hands.gather(0, BLOCKS, 1)[:2] == (BLOCKS, 0)
        assert hands.pending == 0
        tier.sweep(False, True, 300)
        assert hands.gather(0, 4, 1) == (4, 2, False)
        hands.drop()
        assert hands.gather(0, 8, 1, raw=True) == (8, 2, False)
        hands.drop()
        tier.mark_idle(0)
        look(device, 1)
        assert hands.gather(0, 8, 0, idle=True)[1] == 3
        hands.drop()
        # A read that comes in the same sweep as the write is not seen.
        assert hands.gather(0, 8, 0, unread=True)[1] == 3
        hands.drop()
        device.write(contents[1], BLOCK)
        tier.sweep(False, True, 300)
        assert hands.gather(0, 8, 0, unread=True)[1] == 3 + 0
        hands.drop()

    def test_tried(self) -> None:
        device, _ = filled(Disk())
        hands = Writeback(device)
        assert hands.gather(0, 8, 0, tried=True)[1] == 0
        device.cool(0, 8)
        assert hands.gather(0, 8, 0, tried=True, raw=True)[1] == 2

    def test_ages_are_put_back(self) -> None:
        device, _ = filled(Disk())
        tier, hands = Tier(device), Writeback(device)
        for _ in range(3):
            tier.sweep(False, True, 300)
        before = device.ages()
        hands.gather(0, BLOCKS, 0)
        assert device.ages() != before
        hands.drop()
        assert device.ages() == before

    def test_full(self) -> None:
        device, _ = filled(Disk())
        hands = Writeback(device)
        at, taken, full = hands.gather(0, BLOCKS, 0)
        assert full
        assert at < BLOCKS
        assert EXTENT - BLOCK - 16 <= hands.pending <= EXTENT
        assert hands.flush()[:3] == (taken, EXTENT, 0)

    def test_the_end_of_an_extent_is_filled(self) -> None:
        """Behind a block that has no room any more, a smaller one may have; the next begins with it."""
        device = Disk().device(SIZE)
        contents = [noise(number) for number in range(17)] + [text(17), noise(18)]
        for number, content in enumerate(contents):
            device.write(content, number * BLOCK)
        hands = Writeback(device)
        assert hands.gather(0, BLOCKS, 0) == (15, 16, True)
        assert hands.gather(15, BLOCKS, 0) == (15, 0, True)
        assert hands.flush()[0] == 16
        assert device.block(17)["kind"] == "out"
        assert device.block(15)["kind"] == "raw"
        assert hands.gather(15, BLOCKS, 0) == (BLOCKS, 3, False)
        assert hands.flush()[0] == 3
        verify(device, contents)

    def test_not_all_that_is_left_is_tried(self) -> None:
        """An extent is not full only once a device was looked at to its end."""
        device = Disk().device(SIZE)
        for number in range(40):
            device.write(noise(number), number * BLOCK)
        device.write(text(40), 40 * BLOCK)
        hands = Writeback(device)
        assert hands.gather(0, BLOCKS, 0) == (15, 15, True)
        hands.drop()
        assert hands.gather(9, BLOCKS, 0) == (24, 15, True)
        assert device.block(40)["kind"] == "lz4"
        hands.drop()
        assert hands.gather(10, BLOCKS, 0) == (25, 16, True)

    @pytest.mark.parametrize(
        "change",
        [
            lambda device: look(device, 0),
            lambda device: device.write(text(3), 0),
            lambda device: device.write(b"x", 5),
            lambda device: device.trim(0, BLOCK),
            lambda device: device.reset(),
        ],
    )
    def test_who_is_asked_for_stays(self, change: Callable[[Device], None]) -> None:
        device, _ = filled(Disk())
        hands = Writeback(device)
        hands.gather(0, 1, 0)
        change(device)
        now = look(device, 0)
        assert hands.flush()[0] == 0
        assert device.counters()["out_pages"] == 0
        assert device.counters()["backing_free"] == 15
        assert look(device, 0) == now
        device.check()

    def test_who_becomes_cold_meanwhile(self) -> None:
        device, contents = filled(Disk())
        hands = Writeback(device)
        hands.gather(0, 1, 0)
        assert device.cool(0, 1)[0] == 0, "it is about to leave"
        assert hands.flush()[0] == 1
        verify(device, contents)


class TestFull:
    def test_the_last_extent_is_for_reclaim(self) -> None:
        disk = Disk(4)
        device, contents = filled(disk)
        hands = Writeback(device)
        done = write_out(device, hands=hands)
        assert 0 < done < BLOCKS // 2
        assert device.counters()["backing_free"] == 1
        hands.gather(0, BLOCKS, 0)
        assert hands.flush() == (0, 0, 0, 0, errno.EXFULL)
        verify(device, contents)
        # Most of them die: two extents become one.
        for number in range(BLOCKS):
            if number % 16 != 1:
                device.trim(number * BLOCK, BLOCK)
                contents[number] = bytes(BLOCK)
        live = device.counters()["backing_live"]
        assert hands.reclaim(0.1) == 0
        moved = 0
        while (records := hands.reclaim(0.6)) > 0:
            moved += records
        assert moved > 0
        blocks, written, of_it, _, stopped = hands.flush()
        assert (blocks, stopped) == (0, 0)
        assert 0.9 * written < of_it <= written
        found = device.counters()
        assert found["backing_live"] == live
        assert found["backing_free"] == 2
        assert found["reclaimed_bytes"] == of_it
        verify(device, contents)

    def test_many_times_its_size(self) -> None:
        """Blocks die at random; what is written stays below twice what goes out."""
        disk = Disk(64)
        device, contents = filled(disk)
        hands = Writeback(device)
        for round_ in range(40):
            for number in range(round_ % 2, BLOCKS, 2):
                contents[number] = text(number + round_)
                device.write(contents[number], number * BLOCK)
            write_out(device, hands=hands)
            while hands.reclaim(0.5):
                pass
            hands.flush()
        device.check()
        verify(device, contents)


class TestErrors:
    def test_a_write_that_fails(self) -> None:
        disk = Disk()
        device, contents = filled(disk)
        hands = Writeback(device)
        path = f"/proc/self/fd/{disk.fd}"
        device_backing = os.open(path, os.O_RDONLY)
        backing = Backing(device_backing, disk.size, 16, SECTOR)
        device = Device(SIZE, backing=backing)
        for number, content in enumerate(contents):
            device.write(content, number * BLOCK)
        hands = Writeback(device)
        hands.gather(0, BLOCKS, 0)
        assert hands.flush()[0::4] == (0, errno.EBADF)
        found = device.counters()
        assert (found["out_pages"], found["bd_write_errors"], found["bd_writes"]) == (0, 1, 0)
        assert (found["backing_bad"], found["backing_free"]) == (1, 14)
        assert hands.pending == 0
        verify(device, contents)
        # It is back.
        backing.reopen(disk.fd)
        found = device.counters()
        assert (found["backing_bad"], found["backing_free"]) == (0, 15)
        assert write_out(device, hands=hands) == BLOCKS // 2
        verify(device, contents)
        os.close(device_backing)

    def test_what_was_given_up_is_tried_again(self) -> None:
        """The disk had vanished: what lives in an extent is counted as it was, and that is used again."""
        disk = Disk()
        backing = disk.backing()
        device = Device(SIZE, backing=backing)
        for number in range(BLOCKS):
            device.write(noise(number), number * BLOCK)
        hands = Writeback(device)
        write_out(device, hands=hands)
        device.trim(0, 100 * BLOCK)
        device.trim(120 * BLOCK, SIZE - 120 * BLOCK)
        before = backing.numbers()
        assert before["backing_free"] in (12, 13)
        writes_only = os.open(f"/proc/self/fd/{disk.fd}", os.O_WRONLY)
        backing.reopen(writes_only)
        with pytest.raises(OSError, match="Bad file descriptor"):
            hands.reclaim(1.0)
        hands.drop()
        assert backing.numbers() == before | {"backing_bad": 1}
        backing.reopen(disk.fd)
        assert backing.numbers() == before
        os.close(writes_only)
        device.trim(0, SIZE)
        device.check()
        assert (backing.numbers()["backing_free"], backing.numbers()["backing_live"]) == (15, 0)

    def test_no_room_below_is_no_want_of_extents(self) -> None:
        """A file on a full file system: others would take it for a backing on which all is in use."""
        disk = Disk()
        backing = disk.backing()
        device = Device(SIZE, backing=backing)
        device.write(text(0), 0)
        full = os.open("/dev/full", os.O_RDWR)
        backing.reopen(full)
        hands = Writeback(device)
        hands.gather(0, BLOCKS, 0)
        assert hands.flush()[4] == errno.ENOSPC
        assert device.counters()["bd_write_errors"] == 1
        assert hands.flush()[4] == 0
        os.close(full)

    def test_a_read_that_fails(self) -> None:
        disk = Disk()
        device, contents = filled(disk)
        write_out(device)
        writes_only = os.open(f"/proc/self/fd/{disk.fd}", os.O_WRONLY)
        disk_again = disk.fd
        backing = disk.backing()
        device = Device(SIZE, backing=backing)
        for number, content in enumerate(contents):
            device.write(content, number * BLOCK)
        write_out(device)
        backing.reopen(writes_only)
        for number in (0, 1, 200, 201):
            with pytest.raises(OSError, match=rf"block {number}\b.*|out") as failure:
                look(device, number)
            assert failure.value.errno == errno.EIO
            assert f"block {number}: it is out, and the backing cannot be read" in str(failure.value)
            with pytest.raises(OSError, match="cannot be read"):
                device.write(b"part", number * BLOCK + 9)
        assert device.counters()["bd_read_errors"] == 8
        assert look(device, 2) == contents[2]
        with pytest.raises(OSError, match="Bad file"):
            device.trim(0, BLOCK)
            Writeback(device).reclaim(1.0)
        device.check()
        backing.reopen(disk_again)
        contents[0] = bytes(BLOCK)
        verify(device, contents)
        os.close(writes_only)

    def test_bits_that_change_on_the_backing(self) -> None:
        """Whichever it is: an error or the content, never another content."""
        disk = Disk(3)
        device = disk.device(SIZE)
        content = text(1)
        device.write(content, 0)
        write_out(device)
        place, size = int(device.block(0)["place"]), int(device.block(0)["payload_bytes"])
        failed = 0
        for bit in range((12 + size) * 8):
            disk.flip(place + bit // 8, bit % 8)
            try:
                assert look(device, 0) == content
            except OSError as error:
                failed += error.errno == errno.EIO and "as it was written" in str(error)
            disk.flip(place + bit // 8, bit % 8)
        assert failed == (12 + size) * 8
        assert look(device, 0) == content

    def test_bits_of_an_extent_that_is_reclaimed(self) -> None:
        disk = Disk(4)
        device = disk.device(SIZE)
        contents = [text(number) for number in range(8)]
        for number, content in enumerate(contents):
            device.write(content, number * BLOCK)
        hands = Writeback(device)
        hands.gather(0, 8, 0)
        hands.flush()
        first = int(device.block(0)["place"])
        for at in (first - 64, first - 60, first - 48, first, first + 4, first + 30):
            disk.flip(at, 3)
            with pytest.raises(OSError, match="Input/output"):
                hands.reclaim(1.0)
            assert device.counters()["backing_bad"] == 1
            hands.flush()
            disk.flip(at, 3)
            for number, content in enumerate(contents):
                assert look(device, number) == content
            device.check()
            bring_back(device)
            device.check()
            device = disk.device(SIZE)
            for number, content in enumerate(contents):
                device.write(content, number * BLOCK)
            hands = Writeback(device)
            hands.gather(0, 8, 0)
            hands.flush()

    def test_another_blocks_record(self) -> None:
        """A slot that leads to the record of another block reads as an error."""
        disk = Disk(3)
        fd = os.memfd_create("state")
        os.ftruncate(fd, state_layout(SIZE)["bytes"])
        device = disk.device(SIZE, state=fd)
        device.write(text(1), 0)
        device.write(text(2), BLOCK)
        write_out(device)
        slots = state_slots(fd)
        one, two = (os.pread(fd, 8, slots + 8 * number) for number in range(2))
        os.pwrite(fd, two, slots)
        with pytest.raises(OSError, match="block 0"):
            look(device, 0)
        os.pwrite(fd, one, slots)
        assert look(device, 0) == text(1)
        os.close(fd)


class TestReadAgain:
    def test_twice_within_ten_minutes(self) -> None:
        device, contents = filled(Disk())
        tier, hands = Tier(device), Writeback(device)
        look(device, 0)
        tier.sweep(False, True, 300)
        look(device, 0)  # before it goes out does not count
        tier.sweep(False, True, 300)
        write_out(device, hands=hands)
        assert device.ages()[:3] == [0, 1, BLOCKS * 3 // 4 - 1], "as old as before"
        look(device, 0)
        assert hands.bring_back(0, BLOCKS) == (BLOCKS, 0, 0, 0)
        for _ in range(59):
            tier.sweep(False, True, 300)
        look(device, 0)
        assert tier.sweep(False, True, 300)[7] == 1
        assert hands.bring_back(0, BLOCKS) == (BLOCKS, 1, 1, 0)
        assert device.block(0)["kind"] == "lz4"
        assert device.counters()["brought_back"] == 1
        verify(device, contents)

    def test_later_is_not_again(self) -> None:
        device, _ = filled(Disk())
        tier, hands = Tier(device), Writeback(device)
        write_out(device, hands=hands)
        look(device, 0)
        for _ in range(61):
            tier.sweep(False, True, 300)
        look(device, 0)
        assert hands.bring_back(0, BLOCKS) == (BLOCKS, 0, 0, 0)

    def test_once_since_the_start(self) -> None:
        """A server that takes a state over does not know who read what before."""
        disk, fd = Disk(), os.memfd_create("state")
        os.ftruncate(fd, state_layout(SIZE)["bytes"])
        device, _ = filled(disk, state=fd)
        write_out(device)
        device = disk.device(SIZE, state=fd)
        tier, hands = Tier(device), Writeback(device)
        tier.sweep(False, True, 300)
        look(device, 0)
        assert hands.bring_back(0, BLOCKS) == (BLOCKS, 0, 0, 0)
        tier.sweep(False, True, 300)
        look(device, 0)
        assert hands.bring_back(0, BLOCKS) == (BLOCKS, 1, 1, 0)
        os.close(fd)

    def test_no_room(self) -> None:
        disk = Disk()
        device = disk.device(SIZE)
        for number in range(64):
            device.write(noise(number), number * BLOCK)
        write_out(device)
        device.compact()
        device.mem_limit = 16 * BLOCK
        assert bring_back(device) < 64
        device.check()
        assert device.counters()["out_pages"] > 0


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
@pytest.mark.parametrize("comes", ["nothing", "reset"])
@pytest.mark.parametrize("what", ["requests", "save"])
def test_a_disk_that_stands_still(what: str, comes: str, tmp_path: Path) -> None:
    """Who waits for the disk holds nothing but the extent: others go on, also check and reset."""
    shim = tmp_path / "pread.so"
    subprocess.run(
        ["cc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-o", shim, SUPPORT / "shim_pread.c"],
        check=True,
    )
    found = subprocess.run(
        [sys.executable, "-P", SUPPORT / "standstill.py", what, comes],
        env={
            **os.environ,
            **preloaded(shim),
            "SHIM_PREAD": str(tmp_path / "flag"),
            "PYTHONPATH": f"{PACKAGES}:{SUPPORT.parent}",
        },
        capture_output=True,
        text=True,
        timeout=30 * PATIENCE,
    )
    assert (found.returncode, found.stderr) == (0, "")
