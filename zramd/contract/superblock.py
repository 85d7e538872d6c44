"""The superblock of a backing: its first 4 KiB say whose blocks are on it, and how they lie.

    | superblock, 4096 bytes | rest of extent 0, unused | extents 1 … n-1: records of blocks |

Where each record lies, the slots of the device know, in memory. So what is on a backing means nothing without
the data that the superblock names, and that is gone when its server had no state, or when the machine was
booted since: a state lies in memory.
"""

import os
import struct
import time
import zlib
from contextlib import suppress
from typing import NamedTuple

from zramd.errors import BackingError

MAGIC = b"zramd backing\n\x1a\xff"
VERSION = 1
BYTES = 4096  # of it, the last four of which are its checksum
EXTENT = 65536  # bytes; what is written at once, and extent 0 is for this
LEAST = 16 * EXTENT  # bytes of a backing
MACHINE = "/etc/machine-id"
BOOT = "/proc/sys/kernel/random/boot_id"

_GRANULE = 16  # bytes, in which records are counted, as long as 32 bits hold the number
_FIELDS = struct.Struct("<16sIIQ16s16s16sQI64s")
_SUM = struct.Struct("<I")
_HAS_STATE = 1
_NONE = "0" * 32


class Superblock(NamedTuple):
    """Whose blocks are on a backing; ids are 32 hexadecimal digits, '' if there is none."""

    granule: int  # bytes
    size: int  # bytes that are used of the backing, whole extents
    data_id: str  # of the data whose blocks are on it, as Device.data_id
    name: str  # of the device
    machine: str
    boot: str
    claimed: int  # when that was written, in seconds since 1970
    has_state: bool  # whether that data may still be there after its server has ended

    def is_needed(self) -> bool:
        """Say whether the data that it names may exist still: a boot ends what a state holds."""
        is_ours = bool(self.machine) and self.machine == machine_id()
        return self.has_state and not (is_ours and self.boot and self.boot != (boot_id() or self.boot))


def new(size: int, granule: int, *, data_id: str = "", name: str = "", has_state: bool = False) -> Superblock:
    """Return the superblock that this machine writes now; without data_id, of a backing that is free."""
    return Superblock(granule, size, data_id, name, machine_id(), boot_id(), int(time.time()), has_state)


def granule_of(size: int) -> int:
    """Return the bytes of a granule on a backing of `size` bytes: 32 bits must hold the last one's number."""
    granule = _GRANULE
    while size > granule << 32:
        granule *= 2
    return granule


def usable(size: int) -> int:
    """Return the bytes of whole extents."""
    return size // EXTENT * EXTENT


def pack(superblock: Superblock) -> bytes:
    """Return the 4096 bytes."""
    body = _FIELDS.pack(
        MAGIC,
        VERSION,
        superblock.granule,
        superblock.size,
        *(bytes.fromhex(text or _NONE) for text in (superblock.data_id, superblock.machine, superblock.boot)),
        superblock.claimed,
        _HAS_STATE * superblock.has_state,
        superblock.name.encode(),
    ).ljust(BYTES - _SUM.size, b"\0")
    return body + _SUM.pack(zlib.crc32(body))


def unpack(data: bytes, path: str) -> Superblock | None:
    """Return what the first 4096 bytes of a backing say, None if they are no superblock.

    Raises BackingError for one that is damaged, or of a later version.
    """
    magic, version, granule, size, *ids, claimed, flags, name = _FIELDS.unpack_from(data)
    if magic != MAGIC:
        return None
    body, (checksum,) = data[: BYTES - _SUM.size], _SUM.unpack_from(data, BYTES - _SUM.size)
    is_sound = zlib.crc32(body) == checksum
    # A later version's checksum may be elsewhere; damage would mostly make a large number of the version.
    if version != VERSION and (is_sound or VERSION < version < 1000):
        raise BackingError(
            f"backing '{path}' has version {version}, this zramd knows {VERSION}: use the zramd that made "
            f"it, or, if nobody needs what is on it, run 'zramd backing format --force {path}'"
        )
    if not is_sound or not _is_possible(size, granule):
        raise BackingError(
            f"backing '{path}' has a damaged superblock (its checksum differs): if nobody needs what is on "
            f"it, run 'zramd backing format --force {path}'"
        )
    data_id, machine, boot = ("" if raw.hex() == _NONE else raw.hex() for raw in ids)
    shown = name.rstrip(b"\0").decode(errors="replace")
    return Superblock(granule, size, data_id, shown, machine, boot, claimed, bool(flags & _HAS_STATE))


def _is_possible(size: int, granule: int) -> bool:
    """Say whether a sound superblock can be used: nobody is to divide by what a tool has made up."""
    return size >= LEAST and size == usable(size) and granule == granule_of(size)


def machine_id() -> str:
    """Return this machine's id, '' if it has none."""
    return _id(MACHINE)


def boot_id() -> str:
    """Return the id that this machine has until it is booted again, '' if it has none."""
    return _id(BOOT)


def _id(path: str) -> str:
    with suppress(OSError, ValueError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            text = os.read(fd, 64).strip().replace(b"-", b"").decode()
        finally:
            os.close(fd)
        if len(bytes.fromhex(text)) == 16 and text != _NONE:
            return text.lower()
    return ""
