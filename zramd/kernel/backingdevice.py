"""The file or block device of a backing: opened past the page cache, by one process alone, and looked at.

All is read and written by O_DIRECT, in whole sectors, from memory that begins with a page.
"""

import errno
import fcntl
import mmap
import os
import stat
import struct
from contextlib import suppress
from typing import NamedTuple

from zramd import lockfile, trusted
from zramd.contract import superblock
from zramd.contract.superblock import Superblock
from zramd.errors import BackingError, UntrustedError, reason
from zramd.kernel import blockdevices

SECTOR = 4096  # of a file: more than any file system's own
EDGE = 1 << 20  # bytes at the beginning and at the end by which something else is known

_IN_MEMORY = ("tmpfs", "ramfs", "rootfs")
_BLKROGET, _BLKSSZGET = 0x125E, 0x1268  # linux/fs.h
_INT = struct.Struct("i")
_ALLOW = "run 'zramd backing allow' with the device's name as root (docs/systemd.md, 'Backing')"
_PREPARE = "a partition, or a file made by 'fallocate -l 8G'"


class Opened(NamedTuple):
    """A backing, whatever is on it; sizes in bytes."""

    path: str
    fd: int
    size: int  # whole extents
    end: int  # whole sectors
    sector: int  # in which it is read and written
    number: int  # of the block device that it is, or on which it lies
    is_block: bool


def open_alone(path: str) -> Opened:
    """Return the backing, to write to, which nobody else may use as long as the descriptor is open.

    Raises BackingError, one sentence, for what cannot serve as one; nothing is changed then.
    """
    opened = _open(path, os.O_RDWR | os.O_EXCL)
    try:
        if not opened.is_block and not lockfile.take(opened.fd):
            raise BackingError(f"backing '{path}' is in use by another server: {_ANOTHER}")
        # Only now: who makes a loop device after this look finds the lock.
        if user := _other_view(opened):
            raise BackingError(f"backing '{path}' is in use by {user}: {_ANOTHER}")
        if not opened.is_block:
            trusted.close_to_others(opened.fd, path)
    except UntrustedError as error:
        os.close(opened.fd)
        raise _untrusted(path, error) from None
    except BaseException:
        os.close(opened.fd)
        raise
    return opened


def open_to_look(path: str) -> Opened:
    """Return the backing, to read, whoever uses it now. Raises BackingError."""
    return _open(path, os.O_RDONLY)


def open_again(path: str, now: Opened) -> Opened:
    """Return the backing at `path` as open_alone does; `now` is ours already, and may be what is there.

    Raises BackingError.
    """
    there = open_to_look(path)  # the next server is to find the path as good as we do
    try:
        is_ours = _is_same(there, now)
    finally:
        os.close(there.fd)
    # Nobody can have that alone twice.
    return _looked_at(path, os.dup(now.fd)) if is_ours else open_alone(path)


def _is_same(one: Opened, other: Opened) -> bool:
    """Say whether both are one device of the kernel, or one file."""
    if one.is_block:
        return other.is_block and one.number == other.number
    return os.path.sameopenfile(one.fd, other.fd)


def used_by(opened: Opened) -> str:
    """Return who else has it, a program or a device that shows it once more, '' if nobody. Raises OSError."""
    if _is_taken(opened.fd):
        return "another program"
    return _other_view(opened)


def _is_taken(fd: int) -> bool:
    """Say whether another process has a file or block device alone. Raises OSError."""
    if not stat.S_ISBLK(os.fstat(fd).st_mode):
        return lockfile.is_taken(fd)
    try:
        os.close(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        raise
    return False


def _other_view(opened: Opened) -> str:
    """Return by what other name its bytes are in use, '/dev/loop0' or that of what it lies on; '' if by none.

    A file and a loop device over it know nothing of each other's locks. Whether a program uses that device
    cannot be told for sure, so it counts as used as long as it is there.
    """
    if loop := blockdevices.loop_over(os.fstat(opened.fd)):
        return f"/dev/{loop}"
    for path in blockdevices.loop_files(opened.number) if opened.is_block else ():
        with suppress(OSError):  # what we may not look at, or is removed
            fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if _is_taken(fd):
                    return f"another program, as '{path}'"
            finally:
                os.close(fd)
    return ""


_ANOTHER = "stop that first, or use another one"


def _open(path: str, flags: int) -> Opened:
    try:
        with trusted.place(path) as place:
            there = os.stat(place.name, dir_fd=place.folder, follow_symlinks=place.magic)
            _check_kind(path, there)  # before: to open a tape, say, winds it
            fd = place.open(flags | os.O_DIRECT, private=True, any_kind=True)
    except UntrustedError as error:
        raise _untrusted(path, error) from None
    except OSError as error:
        raise _cannot_be_opened(path, error) from None
    return _looked_at(path, fd)


def _looked_at(path: str, fd: int) -> Opened:
    """Return what has been opened; the descriptor is closed if that fails. Raises BackingError."""
    try:
        return _look_at(path, fd)
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError):
            raise BackingError(f"backing '{path}' cannot be read: {reason(error)}: use another one") from None
        raise


def _look_at(path: str, fd: int) -> Opened:
    """Return what has been opened. Raises BackingError, OSError."""
    status = os.fstat(fd)
    _check_kind(path, status)
    is_block = stat.S_ISBLK(status.st_mode)
    if is_block and _ioctl(fd, _BLKROGET):
        raise BackingError(f"backing '{path}' is read-only: use 'blockdev --setrw {path}', or another one")
    size = os.lseek(fd, 0, os.SEEK_END)
    if size < superblock.LEAST:
        raise BackingError(
            f"backing '{path}' has {size} bytes: use one of {superblock.LEAST >> 20} MiB or more, and rather "
            "of gigabytes"
        )
    if not is_block:
        _check_file(path, status)
    sector = _ioctl(fd, _BLKSSZGET) if is_block else SECTOR
    if sector > SECTOR:
        raise BackingError(f"backing '{path}' has sectors of {sector} bytes: use one of 4096 or less")
    number = status.st_rdev if is_block else status.st_dev
    end = size // sector * sector
    opened = Opened(path, fd, superblock.usable(size), end, sector, number, is_block)
    try:
        read(opened, 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise _without_direct(path) from None
        raise
    return opened


def _check_kind(path: str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise BackingError(f"backing '{path}' is a folder: use {_PREPARE} in it")
    if not stat.S_ISBLK(status.st_mode) and not stat.S_ISREG(status.st_mode):
        raise BackingError(f"backing '{path}' is neither a block device nor a file: use {_PREPARE}")


def _check_file(path: str, status: os.stat_result) -> None:
    kind = blockdevices.filesystem(status.st_dev)
    if kind in _IN_MEMORY:
        raise BackingError(
            f"backing '{path}' is on a {kind}, which is memory: use a path on a disk, or a block device"
        )
    if status.st_blocks * 512 < status.st_size:
        raise BackingError(
            f"backing '{path}' has holes, for which the disk may have no room later: fill them by "
            f"'fallocate -l {status.st_size} {path}'"
        )


def _ioctl(fd: int, request: int) -> int:
    number: int = _INT.unpack(fcntl.ioctl(fd, request, bytes(_INT.size)))[0]
    return number


def _untrusted(path: str, error: UntrustedError) -> BackingError:
    return BackingError(f"backing '{path}' is not used: {error}: use another one")


def _without_direct(path: str) -> BackingError:
    return BackingError(
        f"backing '{path}' lies on a file system without direct I/O (O_DIRECT), so what leaves memory would "
        "take memory in the page cache: use a file on ext4 or xfs, or a block device"
    )


def _cannot_be_opened(path: str, error: OSError) -> BackingError:
    number = error.errno
    if number == errno.EINVAL:
        return _without_direct(path)
    if number == errno.EBUSY:
        with suppress(OSError):
            return BackingError(
                f"backing '{path}' is in use: {blockdevices.used_for(os.stat(path).st_rdev)}: {_ANOTHER}"
            )
    remedy = "use another one"
    if _is_hidden(path, error):
        remedy = f"the service may not have it yet: {_ALLOW}"
    elif number in (errno.ENOENT, errno.ENOTDIR):
        is_disk = path.startswith("/dev/")
        remedy = "attach that disk, or use one that is there" if is_disk else f"make it, {_PREPARE}"
    elif number in (errno.EACCES, errno.EPERM):
        remedy = "run zramd as a user who may write to it, such as root"
    elif number == errno.EROFS:
        remedy = f"a service may not write there yet: {_ALLOW}"
    elif number in (errno.ENXIO, errno.ENODEV, errno.ENOMEDIUM):
        remedy = "there is no disk behind it: use another one"
    return BackingError(f"backing '{path}' cannot be opened: {reason(error)}: {remedy}")


def _is_hidden(path: str, error: OSError) -> bool:
    """Say whether it is the service's unit, as far as that is known, that keeps a device from us."""
    is_missing = error.errno in (errno.ENOENT, errno.ENOTDIR) and not os.path.isdir("/dev/block")
    return (
        path.startswith("/dev/")
        and "INVOCATION_ID" in os.environ  # systemd's
        and (is_missing or error.errno == errno.EPERM)
    )


def refuse_for_swap(opened: Opened) -> None:
    """Raise BackingError for what may need memory to take what this machine swaps out. Raises OSError."""
    path = opened.path
    if not opened.is_block:
        raise BackingError(
            f"backing '{path}' is a file, and with swap=local a file system would need memory when there is "
            "none: use a partition, or another block device"
        )
    if name := blockdevices.takes_memory(opened.number):
        raise BackingError(
            f"backing '{path}' is on {name}, for which the kernel would need memory when there is none: with "
            "swap=local use a partition of a disk of this machine"
        )
    if name := blockdevices.swapped_to(opened.number):
        raise BackingError(f"backing '{path}' is on {name}, which is used as swap: use another one")


def read(opened: Opened, at: int, length: int = superblock.BYTES) -> bytes:
    """Return `length` bytes of what is on a backing; it and the place in whole sectors. Raises OSError."""
    memory = mmap.mmap(-1, length)
    done = 0
    while done < length:
        count = os.preadv(opened.fd, [memoryview(memory)[done:]], at + done)
        if not count:
            raise OSError(errno.EIO, "it ends too early")
        done += count
    return memory[:]


def write(opened: Opened, at: int, data: bytes) -> None:
    """Write to a backing; the place and the length in whole sectors. Raises OSError."""
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    done = 0
    while done < len(data):
        done += os.pwritev(opened.fd, [memoryview(memory)[done:]], at + done)


def look(opened: Opened) -> Superblock | None:
    """Return what the superblock says, None for a backing that is blank. Raises BackingError."""
    path = opened.path
    try:
        found = named(opened)
        if found is None and not _is_blank(opened):
            raise BackingError(
                f"backing '{path}' holds something else (its first or last MiB is not empty): use another "
                f"one, or, if nobody needs that, run 'zramd backing format --force {path}'"
            )
    except OSError as error:
        raise BackingError(f"backing '{path}' cannot be read: {reason(error)}: use another one") from None
    return found


def named(opened: Opened) -> Superblock | None:
    """Return what the superblock says, None if there is none. Raises BackingError, OSError."""
    return superblock.unpack(read(opened, 0), opened.path)


def _is_blank(opened: Opened) -> bool:
    return all(read(opened, at, length) == bytes(length) for at, length in _edges(opened))


def _edges(opened: Opened) -> list[tuple[int, int]]:
    """Return the pieces, place and length, of the first and the last MiB."""
    step = superblock.EXTENT
    starts = [*range(0, EDGE, step), *range(max(EDGE, opened.end - EDGE), opened.end, step)]
    return [(at, min(step, opened.end - at)) for at in starts]


def put(opened: Opened, found: Superblock) -> None:
    """Write the superblock, and have it on the disk. Raises BackingError."""
    try:
        write(opened, 0, superblock.pack(found))
        os.fdatasync(opened.fd)
    except OSError as error:
        raise BackingError(
            f"backing '{opened.path}' cannot be written: {reason(error)}: the kernel's log may say more"
        ) from None


def erase(opened: Opened) -> None:
    """Overwrite what shows others that something is on it. Raises BackingError."""
    try:
        for at, length in _edges(opened):
            write(opened, at, bytes(length))
    except OSError as error:
        raise BackingError(
            f"backing '{opened.path}' cannot be written: {reason(error)}: use another one"
        ) from None


def make_free(path: str, *, force: bool) -> Superblock:
    """Make a backing that any device may use; return what is on it then.

    Raises BackingError when it is in use; without `force` also when it holds what somebody may need.
    """
    opened = open_alone(path)
    try:
        if not force and (found := look(opened)) and found.is_needed():
            raise BackingError(
                f"backing '{path}' may hold blocks of {found.name}, whose state would be of no use without "
                f"them: if it is gone, run 'zramd backing format --force {path}'"
            )
        erase(opened)
        made = superblock.new(opened.size, superblock.granule_of(opened.size))
        put(opened, made)
        return made
    finally:
        os.close(opened.fd)
