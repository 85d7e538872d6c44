"""A backing in memory, and what moves blocks to it and back, for tests; and a file for servers."""

import os
from pathlib import Path
from typing import Any

from zramd import Device
from zramd.contract.superblock import granule_of
from zramd.core.device.backing import EXTENT, Backing
from zramd.core.device.writeback import Writeback
from zramd.kernel import blockdevices

SECTOR = 512


class Disk:
    """What a backing is on: a file in memory, of so many extents; the first is the superblock's."""

    def __init__(self, extents: int = 16, *, granule: int = 0, sector: int = SECTOR) -> None:
        self.size = extents * EXTENT
        self.sector = sector
        self.granule = granule or granule_of(self.size)
        self.fd = os.memfd_create("backing")
        os.ftruncate(self.fd, self.size)

    def __del__(self) -> None:
        os.close(self.fd)

    @property
    def backing_id(self) -> str:
        """Whose it is, where the superblock has it: another process sees it, too."""
        return os.pread(self.fd, 32, 0).decode().strip("\0")

    @backing_id.setter
    def backing_id(self, name: str) -> None:
        os.pwrite(self.fd, name.encode(), 0)

    def backing(self) -> Backing:
        """Another look at it, as the next process has."""
        return Backing(self.fd, self.size, self.granule, self.sector)

    def device(self, size: int, *, claims: bool = True, **settings: Any) -> Device:
        """A device that has it, and claims it unless a block is out."""
        settings.setdefault("cold_level", 3)
        device = Device(size, backing=self.backing(), backing_id=self.backing_id, **settings)
        if claims and not device.counters()["out_pages"]:
            self.backing_id = device.data_id
            device.claim_backing()
        return device

    def flip(self, at: int, bit: int = 0) -> None:
        """Change one bit."""
        (byte,) = os.pread(self.fd, 1, at)
        os.pwrite(self.fd, bytes([byte ^ 1 << bit]), at)


def write_out(
    device: Device,
    first: int = 0,
    end: int = 1 << 40,
    age: int = 0,
    *,
    hands: Writeback | None = None,
    **which: bool,
) -> int:
    """Write blocks out until none is left, or no extent is free; how many are out now that were not."""
    hands = hands or Writeback(device)
    end = min(end, device.disksize >> 12)
    done = 0
    while first < end:
        first, _, full = hands.gather(first, end, age, **which)
        if full or first >= end:
            blocks, *_, stopped = hands.flush()
            done += blocks
            if stopped:
                break
    return done


def bring_back(device: Device, *, wanted: bool = False) -> int:
    """Bring blocks back until none is left, or there is no room; how many are in memory again."""
    hands = Writeback(device)
    at = done = 0
    while at < device.disksize >> 12:
        at, _, now, stopped = hands.bring_back(at, 1 << 40, wanted)
        done += now
        if stopped:
            break
    return done


def has_direct_io(folder: Path) -> bool:
    """Say whether a file there can be a backing."""
    try:
        os.close(os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT))
    except OSError:
        return False
    return blockdevices.filesystem(os.stat(folder).st_dev) != "tmpfs"


def preallocated(folder: Path, size: int = 16 << 20) -> Path:
    """Make a file that can be a server's backing; the folder has direct I/O, see disk_folder."""
    path = folder / "out"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size)
    finally:
        os.close(fd)
    return path
