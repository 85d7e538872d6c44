"""Which kernel device belongs to which zramd: for each one attached, a file /run/zramd/NAME.attached.

Its keeper (zramd.keeper) holds a lock on it for as long as it lives, so that no stale process number can be
mistaken for one. The kernel has the last word: a device that it no longer has is not attached.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from zramd import rundir, trusted
from zramd.errors import AttachError, UntrustedError

FOLDER = "/run/zramd"  # attaching is root's business, so this is root's folder
SYS_BLOCK = "/sys/block"
LOCK_TIMEOUT = 1.0  # seconds; who only looks holds the lock for microseconds
_NBD_CLEAR_SOCK = 0xAB04  # linux/nbd.h


class Attached(NamedTuple):
    """A zramd that is attached; `keeper` is 0 when no keeper lives, `data` as in `data_of`."""

    name: str
    device: str
    keeper: int
    data: str


def backend(name: str) -> str:
    """Return what the kernel is told that a device belongs to (it tells since Linux 5.14)."""
    return f"zramd/{name}"


def find(name: str) -> Attached | None:
    """Return how zramd `name` is attached, None if it is not. Raises OSError."""
    try:
        with trusted.place(_path(name)) as place:
            fd = place.open()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except UntrustedError as error:
        raise AttachError(f"what is attached is not known: {error}") from None
    try:
        keeper, device, data = os.pread(fd, 256, 0).decode().split(" ")
        if not device.removeprefix("/dev/nbd").isdecimal():
            raise ValueError
        number = int(keeper)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            number = 0
        except BlockingIOError:
            pass
    except ValueError:  # a keeper that is only starting
        return None
    finally:
        os.close(fd)
    if not is_connected(device) or read_sys(device, "backend") not in ("", backend(name)):
        return None
    return Attached(name, device, number, data.strip())


def name_of(device: str) -> str:
    """Return the zramd that is attached as `device`, such as /dev/nbd0; '' if none is."""
    try:
        files = os.listdir(FOLDER)
    except OSError:
        return ""
    for file in files:
        name = file.removesuffix(".attached")
        if name != file:
            with suppress(OSError):
                there = find(name)
                if there and there.device == device:
                    return name
    return ""


def devices(name: str, disksize: int) -> list[str]:
    """Return the kernel's devices, such as /dev/nbd0, that are connected to `name`, of `disksize` bytes.

    `zramd attach` tells the kernel whose they are. Of what other programs attach nothing but the size is
    known: a device of that size may belong to another server.
    """
    try:
        blocks = sorted(os.listdir(SYS_BLOCK))
    except OSError:
        return []
    found = []
    for device in (f"/dev/{block}" for block in blocks if block.startswith("nbd")):
        if is_connected(device):
            owner, size = read_sys(device, "backend"), read_sys(device, "size")
            same_size = size.isdigit() and int(size) * 512 == disksize
            if owner == backend(name) or (not owner and same_size):
                found.append(device)
    return found


def is_connected(device: str) -> bool:
    """Say whether the kernel has a connection for /dev/nbdN, dead or alive."""
    return os.path.exists(f"{SYS_BLOCK}/{os.path.basename(device)}/pid")


@contextmanager
def unobserved(device: str) -> Iterator[Callable[[], None]]:
    """Keep udev from looking into a device that swap is taken from and that is then disconnected.

    udev reads a block device once a writer such as the swap has closed it, and what it reads while the
    connection goes away are I/O errors in the kernel's log. It leaves a locked device alone until the lock
    is gone (systemd's "Locking Block Device Access"). Once the kernel has been told to disconnect, call what
    this yields: it takes the device's size away, so that udev then finds nothing to read. Not before: it
    cuts off a device that is connected. The server must be alive: an open may read. Raises OSError.
    """

    def disconnected() -> None:
        with suppress(OSError):  # a device that keeps its size is read in vain, no more
            fcntl.ioctl(fd, _NBD_CLEAR_SOCK)

    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + LOCK_TIMEOUT
        while time.monotonic() < end:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # udev itself, while it looks: not for long
                time.sleep(0.02)
        yield disconnected
    finally:
        os.close(fd)


def read_sys(device: str, name: str) -> str:
    """Return what sysfs says of a device, '' if it does not."""
    try:
        with open(f"{SYS_BLOCK}/{os.path.basename(device)}/{name}", errors="surrogateescape") as file:
            return file.read().strip()
    except OSError:
        return ""


def data_of(folder: str) -> str:
    """Return what stands for the data that a server holds, from its run folder; '' if it does not tell.

    Two servers with the same answer hold the same data, one after the other.
    """
    try:
        fd = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return ""
    try:
        return rundir.head(rundir.DATA_ID, fd).strip()
    finally:
        os.close(fd)


class Record:
    """The file of one attached zramd, locked by this process."""

    def __init__(self, name: str) -> None:
        """Take the lock. Raises AttachError when a keeper has it, OSError."""
        self._name = name
        try:
            os.close(trusted.open_folder(FOLDER, make=True))
        except UntrustedError as error:
            raise AttachError(f"{name} cannot be attached: {error}") from None
        end = time.monotonic() + LOCK_TIMEOUT
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            self._fd = os.open(_path(name), flags, 0o600)
            with suppress(BlockingIOError, FileNotFoundError):
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # One that was removed since we opened it holds nothing.
                if os.path.samestat(os.fstat(self._fd), os.stat(_path(name))):
                    return
            os.close(self._fd)
            if time.monotonic() > end:
                raise AttachError(f"{name} is being attached, or is attached already")
            time.sleep(0.02)

    def write(self, device: str, data: str, *, keeper: int) -> None:
        """Say what is attached."""
        text = f"{keeper} {device} {data}\n".encode()
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))

    def close(self) -> None:
        """Let go of it; the file stays."""
        os.close(self._fd)


def remove(name: str) -> None:
    """Remove the file of what is no longer attached."""
    with suppress(FileNotFoundError):
        os.unlink(_path(name))


def _path(name: str) -> str:
    """Return the file's path. Raises AttachError for what would lead out of the folder."""
    if "/" in name or "\0" in name:
        raise AttachError(f"'{name}' is not a device's name: 'zramd list' shows those that there are")
    return f"{FOLDER}/{name}.attached"
