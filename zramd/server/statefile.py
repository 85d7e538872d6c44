"""The state file: all data of a device, so that it outlives the server. Who may have it, and what is refused.

    | header page | kept counters … | slots | classes of spans | cells | pages of the pool |

The header is written when the file is new, and says what the rest was laid out for; it ends with its
checksum. Later only its format is raised (mark_cold, mark_out). What is in the rest,
zramd.core.device.recovery finds. The file is locked while a server has it mapped.
"""

import errno
import os
import struct
import time
import zlib
from contextlib import suppress
from typing import NamedTuple

from zramd import lockfile, trusted
from zramd.contract import handover
from zramd.contract.handover import KEPT_FD, SYSTEMD
from zramd.contract.rundir import LOCK_TIMEOUT
from zramd.core.device.device import kept_out, state_layout
from zramd.core.memory.region import filesystem, page_size
from zramd.core.pool.size_classes import layout_sum
from zramd.errors import StateError, UntrustedError, reason

MAGIC = b"zramd state\n\0\x1a\xff\x00"
# Of the file as a whole: the least format that a zramd must know to read all that may be in it. It is raised
# before something is stored that means nothing to those before; a file of an older format is used as it is.
FIRST = 1
COLD = 2  # slots may have COLD
OUT = 3  # slots may lead to a backing
NEWEST = OUT

_TMPFS = 0x01021994
_FIELDS = ("disksize", "verify", "slots", "cells", "spans", "span_size", "size_classes", "bytes")
_HEADER = struct.Struct(f"<16sQ{len(_FIELDS)}QQ")  # magic, version, fields, checksum of all before

_REMOVE = "or remove the file to start empty"


class Kept(NamedTuple):
    """What a state says of its blocks that are out; ids are 32 hexadecimal digits, zeros if there is none."""

    out_pages: int
    backing_id: str  # of the backing's superblock
    data_id: str


NOTHING_KEPT = Kept(0, "", "")


def look(path: str, disksize: int, verify: bool) -> Kept:
    """Return what the state says, which a server may be using now.

    Raises StateError if it is not one for this device.
    """
    fd = _open(path, os.O_RDONLY)
    try:
        _accept(fd, path, _layout(disksize, verify))
        return Kept(*kept_out(fd))
    finally:
        os.close(fd)


def _layout(disksize: int, verify: bool) -> dict[str, int]:
    return state_layout(disksize) | {"verify": int(verify)}


def open_state(path: str, disksize: int, verify: bool) -> int:
    """Return the descriptor of the state file, locked; a new one is laid out for the device.

    Raises StateError, one sentence, for a file that cannot be had or trusted; it is then as it was.
    """
    fd = _open(path, os.O_RDWR | os.O_CREAT)
    try:
        _lock(fd, path)
        if filesystem(fd) != _TMPFS:
            raise StateError(
                f"state '{path}' is not on a tmpfs: use a path such as /dev/shm/NAME or /run/NAME, "
                "because a disk would be written to, and waited for, all the time"
            )
        layout = _layout(disksize, verify)
        is_new = _is_empty(fd)
        if not is_new:
            _accept(fd, path, layout)
        try:
            trusted.close_to_others(fd, path)
        except UntrustedError as error:
            raise _refused(path, error) from None
        if is_new:
            _create(fd, path, layout)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _open(path: str, flags: int) -> int:
    """Return the descriptor of the file, which nobody else can read or change; a new one for O_CREAT."""
    try:
        if path == SYSTEMD:
            return _kept()
        with trusted.place(path) as place:
            if flags & os.O_CREAT:
                return place.open_or_create(flags & ~os.O_CREAT)
            return place.open(flags, private=True)
    except UntrustedError as error:
        raise _refused(path, error) from None
    except OSError as error:
        raise StateError(
            f"state '{path}' cannot be opened: {reason(error)}: {_remedy(error.errno)}"
        ) from None


def _refused(path: str, error: UntrustedError) -> StateError:
    return StateError(f"state '{path}' is not used: {error}: use another path, in a folder such as /dev/shm")


def _kept() -> int:
    """Return the file that the service manager keeps, opened once more, for its lock is ours alone."""
    if KEPT_FD not in os.environ:
        raise StateError(f"state={SYSTEMD} is for 'zramd serve' as a service: use it there, or use a file")
    return os.open(f"/proc/self/fd/{os.environ[KEPT_FD]}", os.O_RDWR | os.O_CLOEXEC)


def _remedy(number: int | None) -> str:
    if number == errno.ENOENT:
        return "make its folder, or use another path"
    if number in (errno.EACCES, errno.EPERM):
        return "run zramd as the user who owns it, or use another path"
    if number == errno.EROFS:
        return "use /dev/shm/NAME, which services may write to, or let this one: docs/systemd.md, 'Paths'"
    return "use another path"


def _lock(fd: int, path: str) -> None:
    """Take the lock that says that a server uses the file; a fork shares it, and a kill drops it."""
    # Of a server that has ended this instant, the kernel may still have a file open for its io_uring.
    end = time.monotonic() + (LOCK_TIMEOUT if handover.takes_over() else 0)
    while not lockfile.take(fd):
        if time.monotonic() < end:
            time.sleep(0.001)
            continue
        raise StateError(
            f"state '{path}' is in use by a running server: stop that first, or use another path"
        )


def _is_empty(fd: int) -> bool:
    """Say whether nothing was ever written to the file: it is empty, or all of it is a hole."""
    try:
        os.lseek(fd, 0, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return True
        raise
    return False


def _create(fd: int, path: str, layout: dict[str, int]) -> None:
    size = os.fstat(fd).st_size
    try:
        os.ftruncate(fd, layout["bytes"])
        trusted.write_at_start(fd, _pack(layout, FIRST))
    except OSError as error:
        with suppress(OSError):
            os.ftruncate(fd, size)  # nobody is to take it for a large one
        raise StateError(
            f"state '{path}' cannot be made: {reason(error)}: make room there (its size is that of the data, "
            "though it looks larger), or use another path"
        ) from None


def mark_cold(fd: int) -> None:
    """Raise the format of an accepted state so that only a zramd that knows cold blocks takes it over."""
    _raise_format(fd, COLD)


def mark_out(fd: int) -> None:
    """Raise it so that only a zramd that knows blocks on a backing takes it over."""
    _raise_format(fd, OUT)


def _raise_format(fd: int, least: int) -> None:
    """Have the header say that format `least` must be known, or a later one that it says already.

    A kill leaves the old header or the new one: the kernel copies what lies on one page in one go.
    """
    _, version, *values, _ = _HEADER.unpack(os.pread(fd, _HEADER.size, 0))
    if version < least:
        trusted.write_at_start(fd, _pack(dict(zip(_FIELDS, values, strict=True)), least))


def _pack(layout: dict[str, int], version: int) -> bytes:
    body = struct.pack(f"<16sQ{len(_FIELDS)}Q", MAGIC, version, *(layout[name] for name in _FIELDS))
    return body + struct.pack("<Q", zlib.crc32(body))


def _accept(fd: int, path: str, layout: dict[str, int]) -> None:
    """Raise StateError unless the file was laid out as this server would do it."""
    header = os.pread(fd, _HEADER.size, 0)
    if header[: len(MAGIC)] != MAGIC:
        raise StateError(f"'{path}' is not a state of zramd: use another path, {_REMOVE}")
    if len(header) < _HEADER.size:
        raise StateError(f"state '{path}' was cut off in its header: restore a copy, {_REMOVE}")
    _, version, *values, checksum = _HEADER.unpack(header)
    is_sound = zlib.crc32(header[:-8]) == checksum
    # A later format's checksum may be elsewhere; damage would mostly make a large number of the format.
    if not FIRST <= version <= NEWEST and (is_sound or NEWEST < version < 1000):
        raise StateError(
            f"state '{path}' has format {version}, this zramd knows {FIRST} to {NEWEST}: "
            f"use the zramd that made it, {_REMOVE}"
        )
    if not is_sound:
        raise StateError(
            f"state '{path}' has a damaged header (its checksum differs): restore a copy, {_REMOVE}"
        )
    found = dict(zip(_FIELDS, values, strict=True))
    if found["disksize"] != layout["disksize"]:
        size = found["disksize"]
        raise StateError(
            f"state '{path}' is of a device of {size} bytes, not {layout['disksize']}: "
            f"use disksize={size}, {_REMOVE}"
        )
    if found["verify"] != layout["verify"]:
        word = "on" if found["verify"] else "off"
        raise StateError(f"state '{path}' was made with verify={word}: use verify={word}, {_REMOVE}")
    for unit in (1, 2, 4, 8, 16):
        if found["size_classes"] == layout_sum(unit) != layout["size_classes"]:
            raise StateError(
                f"state '{path}' was made on a kernel with pages of {unit * 4096} bytes, this one has "
                f"{page_size()}: use such a kernel, {_REMOVE}"
            )
    for name in _FIELDS:
        if found[name] != layout[name]:
            raise StateError(
                f"state '{path}' has another layout ({name} is {found[name]}, not {layout[name]}): "
                f"use the zramd that made it, {_REMOVE}"
            )
    size = os.fstat(fd).st_size
    if size != layout["bytes"]:
        done = "cut off" if size < layout["bytes"] else "added to"
        raise StateError(
            f"state '{path}' was {done}: it has {size} bytes, not {layout['bytes']}: "
            f"restore a copy, {_REMOVE}"
        )
