"""Swap areas, parts of a disk that the kernel fills in a fixed order: what it says of them, and its calls."""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
from typing import NamedTuple

from . import files
from .files import MIB, PAGE, SECTOR, GuestError, read, read_or

MOST_AREAS = 8  # more gain nothing (docs/dead-blocks.md), and the kernel has some 28 in all
LEAST_AREA = 64 * MIB  # smaller ones gain nothing
ALIGNMENT = 2 * MIB
SERIAL = "zramd"  # what the serial number of a zramd disk begins with

_SWAP_FLAG_PREFER = 0x8000
DISCARD, DISCARD_ONCE, DISCARD_PAGES = 0x10000, 0x20000, 0x40000  # flags of swapon(2)
_BLKPG, _BLKPG_ADD, _BLKPG_DEL = 0x1269, 1, 2  # linux/blkpg.h


class Area(NamedTuple):
    """A swap area, as /proc/swaps has it; `pages` and `used` are in pages of the kernel."""

    path: str
    pages: int
    used: int
    priority: int

    @property
    def free(self) -> int:
        """Pages that the kernel can still put there."""
        return self.pages - self.used


def areas(disk: str = "") -> list[Area]:
    """Return the swap areas in the order in which the kernel fills them; with `disk` those on it alone."""
    found = []
    for line in read_or(f"{files.PROC}/swaps").splitlines()[1:]:
        path, _, size, used, priority = line.split()
        if not disk or disk_of(path) == disk:
            found.append(Area(path, int(size) * 1024 // PAGE, int(used) * 1024 // PAGE, int(priority)))
    return sorted(found, key=lambda area: -area.priority)


def disk_of(path: str) -> str:
    """Return the disk of /dev/vdb3 or /dev/nbd0p3: /dev/vdb, /dev/nbd0. What is no partition is its own."""
    name = os.path.basename(path)
    if os.path.exists(f"{files.SYS}/class/block/{name}/partition"):
        return (
            f"/dev/{os.path.basename(os.path.dirname(os.path.realpath(f'{files.SYS}/class/block/{name}')))}"
        )
    return path


def disks() -> list[str]:
    """Return the disks of this machine that a zramd serves from outside, by their serial number.

    Those that `zramd attach` has made here have none: they are its own.
    """
    found = []
    for name in sorted(os.listdir(f"{files.SYS}/block")):
        base = f"{files.SYS}/block/{name}"
        marks = (read_or(f"{base}/{file}") for file in ("serial", "device/serial", "device/vpd_pg80"))
        if any(_serial(mark).startswith(SERIAL) for mark in marks):
            found.append(f"/dev/{name}")
    return found


def _serial(mark: str) -> str:
    """Return a serial number: a SCSI disk's has four bytes before it, of which the first is 0."""
    return mark[4:] if mark.startswith("\0") else mark


def size_of(disk: str) -> int:
    """Return the bytes of a disk."""
    return int(read(f"{files.SYS}/block/{os.path.basename(disk)}/size")) * SECTOR


def default_count(size: int) -> int:
    """Return into how many areas a disk of `size` bytes is divided unless told."""
    return max(1, min(MOST_AREAS, size // LEAST_AREA))


def part(disk: str, number: int) -> str:
    """Return the path of a partition."""
    return f"{disk}{'p' if disk[-1].isdigit() else ''}{number}"


def divide(disk: str, count: int) -> list[str]:
    """Make `count` partitions of a disk and return their paths; the disk's own if it is 1. Raises GuestError.

    They are in the kernel's memory alone: nothing is written to the disk, and there is nothing to repair.
    The disk is opened for reading only: once a writer has closed it, udev looks for a table of partitions.
    """
    if count == 1:
        return [disk]
    each = size_of(disk) // count // ALIGNMENT * ALIGNMENT
    if not each:
        raise GuestError(f"{disk} is too small for {count} areas: an area has at least 2 MiB")
    for number in range(1, count + 1):
        _partition(disk, _BLKPG_ADD, number, (number - 1) * each, each)
    return [part(disk, number) for number in range(1, count + 1)]


def join(disk: str) -> None:
    """Remove the partitions of a disk. Raises GuestError if one is in use."""
    name = os.path.basename(disk)
    for entry in os.listdir(f"{files.SYS}/block/{name}"):
        number = read_or(f"{files.SYS}/block/{name}/{entry}/partition")
        if number:
            _partition(disk, _BLKPG_DEL, int(number))


def _partition(disk: str, operation: int, number: int, start: int = 0, length: int = 0) -> None:
    partition = ctypes.create_string_buffer(struct.pack("qqi64s64s4x", start, length, number, b"", b""), 152)
    words = struct.pack("iiiP", operation, 0, 152, ctypes.addressof(partition))
    try:
        fd = os.open(disk, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.ioctl(fd, _BLKPG, words)
        finally:
            os.close(fd)
    except OSError as error:
        verb = "made" if operation == _BLKPG_ADD else "removed"
        raise GuestError(f"partition {number} of {disk} cannot be {verb}: {error.strerror}") from None


def swap_on(path: str, priority: int, flags: int = DISCARD) -> None:
    """Swap to an area that mkswap has made, with all of it discarded first if `flags` say so.

    Raises OSError.
    """
    _call("swapon", path, flags | (_SWAP_FLAG_PREFER | priority if priority >= 0 else 0))


def swap_off(path: str) -> None:
    """Bring back what is swapped out to an area. Raises OSError: EINTR at a signal, the area still on."""
    _call("swapoff", path)


def _call(name: str, path: str, *flags: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(os.fsencode(path), *flags):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)


def sectors_written(path: str) -> int:
    """Return how many sectors the kernel has written to an area since the disk is there."""
    return int(read(f"{files.SYS}/class/block/{os.path.basename(path)}/stat").split()[6])


def cluster() -> int:
    """Return the pages of a cluster: as soon as nothing of it is used, the kernel discards it.

    It is as long as a huge page, or 256 pages where huge pages are not swapped whole.
    """
    huge = read_or(f"{files.SYS}/kernel/mm/transparent_hugepage/hpage_pmd_size")
    return max(256, int(huge) // PAGE if huge else 0)
