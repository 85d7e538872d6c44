"""Blocks that are out, in a state and in a save: what is taken over, and what is refused."""

import os
from pathlib import Path

import pytest
from support.backings import SECTOR, Disk, write_out
from test_backing import BLOCK, BLOCKS, SIZE, filled, text, verify
from test_state_refused import fingerprint

from zramd import Device
from zramd.core.device import saving
from zramd.core.device.backing import EXTENT, Backing
from zramd.core.device.device import state_layout
from zramd.core.device.writeback import Writeback
from zramd.errors import BackingError, SaveError


class TestState:
    def make(self) -> int:
        fd = os.memfd_create("state")
        os.ftruncate(fd, state_layout(SIZE)["bytes"])
        return fd

    @pytest.mark.parametrize("verify_setting", [False, True])
    def test_taken_over(self, verify_setting: bool) -> None:
        disk, fd = Disk(), self.make()
        device, contents = filled(disk, state=fd, verify=verify_setting)
        device.cool(0, BLOCKS // 4)
        write_out(device, 0, 200)
        before = device.counters()
        again = disk.device(SIZE, state=fd, verify=verify_setting)
        after = again.counters()
        for name in before:
            if name.startswith(("out_", "bd_", "backing_", "written", "cold")):
                assert after[name] == before[name], name
        verify(again, contents)
        os.close(fd)

    def test_not_without_its_backing(self) -> None:
        disk, fd = Disk(), self.make()
        device, contents = filled(disk, state=fd)
        write_out(device, 0, 8)
        del device
        before = fingerprint(Path(f"/proc/self/fd/{fd}"))
        with pytest.raises(BackingError, match="another backing"):
            Device(SIZE, state=fd, cold_level=3)
        with pytest.raises(BackingError, match="another backing"):
            Device(SIZE, state=fd, cold_level=3, backing=disk.backing(), backing_id="0" * 31 + "1")
        with pytest.raises(BackingError, match="another backing"):
            Disk().device(SIZE, state=fd)
        assert fingerprint(Path(f"/proc/self/fd/{fd}")) == before
        verify(disk.device(SIZE, state=fd), contents)
        os.close(fd)

    def test_shrunk(self) -> None:
        """A place beyond the backing is no place: the state contradicts it."""
        disk, fd = Disk(), self.make()
        device, _ = filled(disk, state=fd)
        write_out(device)
        del device
        small = Backing(disk.fd, 3 * EXTENT, 16, SECTOR)
        with pytest.raises(Exception, match="beyond the backing"):
            Device(SIZE, state=fd, backing=small, backing_id=disk.backing_id)
        os.close(fd)

    def test_it_is_marked_before_the_first_goes_out(self) -> None:
        disk, fd = Disk(), self.make()
        marked: list[int] = []
        device = disk.device(SIZE, state=fd, mark_out=marked.append)
        device.write(text(1), 0)
        hands = Writeback(device)
        assert not marked
        hands.gather(0, 1, 0)
        assert len(marked) == 1
        hands.gather(0, 1, 0)
        assert len(marked) == 1
        os.close(fd)

    def test_reset(self) -> None:
        """Nothing is out any more, and all extents are free, without any I/O."""
        disk, fd = Disk(), self.make()
        device, _ = filled(disk, state=fd)
        write_out(device)
        device.reset()
        found = device.counters()
        assert (found["out_pages"], found["backing_free"], found["backing_live"]) == (0, 15, 0)
        device.check()
        Device(SIZE, state=fd)  # needs no backing
        os.close(fd)

    def test_the_budget_is_kept(self) -> None:
        disk, fd = Disk(), self.make()
        device = disk.device(SIZE, state=fd)
        assert device.budget == (0, 0)
        device.budget = (12345, 678)
        assert disk.device(SIZE, state=fd).budget == (12345, 678)
        os.close(fd)


@pytest.mark.parametrize("cold", [False, True])
def test_a_save_has_what_is_out(cold: bool) -> None:
    device, contents = filled(Disk())
    if cold:
        device.cool(0, BLOCKS)
    write_out(device, 0, 150)
    fd = os.memfd_create("saved")
    numbers = saving.save(device, fd, live=False)
    assert numbers["lost"] == 0
    os.lseek(fd, 0, os.SEEK_SET)
    copy = Device(SIZE)
    saving.load(copy, fd)
    verify(copy, contents)
    assert device.counters()["out_pages"] > 0
    os.close(fd)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("how", ["cannot be read", "its disk has other data"])
def test_a_save_without_the_backing(how: str, live: bool) -> None:
    """It is given up, and says so: the disk may be mended, and what a file says is lost stays lost."""
    disk = Disk()
    backing = disk.backing()
    device = Device(SIZE, backing=backing)
    for number in range(8):
        device.write(text(number), number * BLOCK)
    write_out(device, 3, 6)
    gone = os.open("/dev/null", os.O_WRONLY)
    whole = os.pread(disk.fd, disk.size, 0)
    if how == "cannot be read":
        backing.reopen(gone)
    else:
        os.pwrite(disk.fd, bytes(len(whole) - EXTENT), EXTENT)
    fd = os.memfd_create("saved")
    sentence = f"block 3 is out and {how}: see docs/backing.md, 'When the disk fails'"
    with pytest.raises(SaveError) as raised:
        saving.save(device, fd, live=live)
    assert str(raised.value) == sentence
    os.lseek(fd, 0, os.SEEK_SET)
    with pytest.raises(SaveError) as raised:
        saving.verify_stream(fd)
    assert str(raised.value) == sentence
    backing.reopen(disk.fd)
    os.pwrite(disk.fd, whole, 0)
    os.truncate(fd, 0)
    os.lseek(fd, 0, os.SEEK_SET)
    assert saving.save(device, fd, live=live)["lost"] == 0
    os.close(fd)
    os.close(gone)
