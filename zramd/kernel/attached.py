"""Which kernel device belongs to which zramd: for each one attached, a file /run/zramd/NAME.attached.

Its keeper (zramd.kernel.keeper, ublkkeeper) holds a lock on it for as long as it lives, so that no stale
process number can be mistaken for one. The kernel has the last word: a device that it no longer has is not
attached. Of an NBD device it says whose it is; of a ublk device the file says which one was meant, so that
another program's of the same number is none of ours.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from zramd import lockfile, resident, trusted
from zramd.contract import rundir
from zramd.errors import AttachError, UntrustedError
from zramd.kernel import ublk

FOLDER = "/run/zramd"  # attaching is root's business, so this is root's folder
SYS_BLOCK = "/sys/block"
LOCK_TIMEOUT = 1.0  # seconds; a process that only looks holds the lock for microseconds
TURN_TIMEOUT = 10.0  # seconds, for which a command waits for another one
_TURN, _WISH = 0, 1  # the bytes of a record whose locks a command has, and one that waits
_NBD_CLEAR_SOCK = 0xAB04  # linux/nbd.h

# How far a ublk device has come: ADDED and STARTED when it is made. When its server has ended: RECOVERING
# (the driver is told to begin a recovery, and may have), OFFERED (it has begun, and a server is given the
# device), FETCHED (its queues wait for requests), and STARTED again. LOST: no server can take it over now.
ADDED, STARTED = "added", "started"
RECOVERING, OFFERED, FETCHED, LOST = "recovering", "offered", "fetched", "lost"
_RECORD_BYTES = 8192
_STAGES = (ADDED, STARTED, RECOVERING, OFFERED, FETCHED, LOST)


class Attached(NamedTuple):
    """A zramd that is attached; `keeper` is 0 when no keeper lives, `data` as in `data_of`.

    Of a ublk device it has the stage, see above, and its server's run folder; '' of an NBD device.
    """

    name: str
    device: str
    keeper: int
    data: str
    stage: str = ""
    folder: str = ""

    @property
    def number(self) -> int | None:
        """The N of /dev/ublkbN, None for a device of another kind."""
        return ublk.number_of(self.device)

    @property
    def is_half(self) -> bool:
        """Whether it is of a keeper that was killed before it had noted the device, and its data."""
        if self.stage:
            return not self.keeper and self.stage == ADDED
        return not self.keeper and not self.data and read_sys(self.device, "backend") == backend(self.name)


def backend(name: str) -> str:
    """Return the owner that the kernel is given for a device, and shows (since Linux 5.14)."""
    return f"zramd/{name}"


def find(name: str) -> Attached | None:
    """Return how zramd `name` is attached, None if it is not (yet). Raises OSError, AttachError.

    A keeper that was killed before it had noted its device leaves one that the kernel alone knows of.
    """
    try:
        with trusted.place(_path(name)) as place:
            fd = place.open()
    except (FileNotFoundError, NotADirectoryError):
        return _unnoted(name)
    except UntrustedError as error:
        raise AttachError(f"cannot find out what is attached: {error}") from None
    try:
        kept = lockfile.is_taken(fd)  # by a keeper that lives
        noted = (
            os.pread(fd, _RECORD_BYTES, 0).decode(errors="surrogateescape").removesuffix("\n").split(" ", 5)
        )
    except ValueError:
        noted = []
    finally:
        os.close(fd)
    return _parsed(name, noted, kept=kept) or (None if kept else _unnoted(name))


def _parsed(name: str, noted: list[str], *, kept: bool) -> Attached | None:
    """Return what stands in a record, None if that is nothing, or no longer so."""
    try:
        keeper, device, data, *more = noted
        number = int(keeper) if kept else 0
    except ValueError:  # a keeper that is only starting, or was killed then
        return None
    if (disk := ublk.number_of(device)) is not None:
        if len(more) != 3 or more[0] not in _STAGES or more[1] != ublk.connection(disk):
            return None
        return Attached(name, device, number, data, more[0], more[2])
    if more or not device.removeprefix("/dev/nbd").isdecimal():
        return None
    if not is_connected(device) or read_sys(device, "backend") not in ("", backend(name)):
        return None
    return Attached(name, device, number, data.strip())


def _unnoted(name: str) -> Attached | None:
    """Return the device that the kernel has of a keeper that ended before it could note it, or None."""
    for block in sorted(os.listdir(SYS_BLOCK)) if os.path.isdir(SYS_BLOCK) else []:
        device = f"/dev/{block}"
        if block.startswith("nbd") and is_connected(device) and read_sys(device, "backend") == backend(name):
            return Attached(name, device, 0, "")
    return None


def names() -> list[str]:
    """Return the zramds that are attached."""
    try:
        files = sorted(os.listdir(FOLDER))
    except OSError:
        return []
    found = []
    for name in (file.removesuffix(".attached") for file in files if file.endswith(".attached")):
        with suppress(OSError):
            if find(name):
                found.append(name)
    return found


def name_of(device: str) -> str:
    """Return the zramd that is attached as `device`, such as /dev/nbd0; '' if none is."""
    for name in names():
        with suppress(OSError):
            there = find(name)
            if there and there.device == device:
                return name
    return ""


def devices(name: str, disksize: int) -> list[str]:
    """Return the kernel's devices, such as /dev/nbd0, that are connected to `name`, of `disksize` bytes.

    `zramd attach` tells the kernel whose an NBD device is. Of what other programs attach nothing but the size
    is known: a device of that size may belong to another server. A ublk device is the record's; who may not
    read that goes by the size too.
    """
    try:
        blocks = sorted(os.listdir(SYS_BLOCK))
    except OSError:
        return []
    found = []
    for device in (f"/dev/{block}" for block in blocks if block.startswith(("nbd", "ublkb"))):
        if is_connected(device) and is_of(device, name, disksize):
            found.append(device)
    return found


def is_of(device: str, name: str, disksize: int) -> bool:
    """Say whether a device is that of `name`, of `disksize` bytes, as far as that is known: see above."""
    if ublk.number_of(device) is not None:
        with suppress(AttachError, PermissionError):
            there = find(name)
            return there is not None and there.device == device
    owner, size = read_sys(device, "backend"), read_sys(device, "size")
    return owner == backend(name) or (not owner and size.isdigit() and int(size) * 512 == disksize)


def is_connected(device: str) -> bool:
    """Say whether the kernel has a connection for /dev/nbdN, or a device /dev/ublkcN, dead or alive."""
    if (number := ublk.number_of(device)) is not None:
        return ublk.exists(number)
    return os.path.exists(f"{SYS_BLOCK}/{os.path.basename(device)}/pid")


def connection(device: str) -> str:
    """Return what distinguishes one connection of a device from the next, '' if there is none.

    Of an NBD device that is the process that made it.
    """
    if (number := ublk.number_of(device)) is not None:
        return ublk.connection(number)
    return read_sys(device, "pid")


@contextmanager
def unobserved(device: str) -> Iterator[Callable[[], None]]:
    """Keep udev from looking into a device that swap is taken from and that is then disconnected.

    udev reads a block device once a writer such as the swap has closed it, and what it reads while the
    connection goes away are I/O errors in the kernel's log. It leaves a locked device alone until the lock
    is gone (systemd's "Locking Block Device Access"). Once the kernel has been told to disconnect, call what
    this yields: it takes the device's size away, so that udev then finds nothing to read. Not before: it
    cuts off a device that is connected. The server must be alive: an open may read. Raises OSError.
    A ublk disk is gone when it is stopped.
    """

    def disconnected() -> None:
        # A device that keeps its size is read in vain, no more.
        with suppress(OSError):
            if ublk.number_of(device) is None:
                fcntl.ioctl(fd, _NBD_CLEAR_SOCK)

    fd = os.open(device, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + LOCK_TIMEOUT
        while time.monotonic() < end and not lockfile.take(fd):
            time.sleep(0.02)  # udev itself has it, while it looks: not for long
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
    """Return what stands for the data that a server holds, from its run folder; '' if it does not say.

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
        self._held: resident.Held = None
        try:
            os.close(trusted.open_folder(FOLDER, make=True))
        except UntrustedError as error:
            raise AttachError(f"{name} cannot be attached: {error}") from None
        end = time.monotonic() + LOCK_TIMEOUT
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        while True:
            self._fd = os.open(_path(name), flags, 0o600)
            if lockfile.take(self._fd) and self._is_there():
                return
            os.close(self._fd)
            if time.monotonic() > end:
                raise AttachError(f"{name} is being attached, or is attached already")
            time.sleep(0.02)

    def write(self, device: str, data: str, *, keeper: int, stage: str = "", folder: str = "") -> None:
        """Say what is attached; `stage` and `folder` are a ublk device's."""
        words = [str(keeper), device, data, *([stage, connection(device), folder] if stage else [])]
        text = os.fsencode(f"{' '.join(words)}\n")
        rundir.write_whole(self._fd, text)
        if self._held is None or len(self._held) < len(text):
            self._held = resident.hold(self._fd)

    def remove(self) -> None:
        """Remove the file, unless somebody has."""
        if self._is_there():
            os.unlink(_path(self._name))

    def close(self) -> None:
        """Let go of it; the file stays."""
        os.close(self._fd)

    def _is_there(self) -> bool:
        """Say whether the file has not been removed since it was opened: then it would hold nothing."""
        return lockfile.stands_at(self._fd, _path(self._name))


@contextmanager
def turn(name: str, timeout: float | None = None) -> Iterator[None]:
    """Wait until no other command uses the device of `name` for swap or takes it away, and keep others off.

    The keeper's lock on the record is of another kind: it lasts as long as the keeper. What has no record is
    nobody's. A command that waits is `wanted`, and those that can give their turn up do so. Raises
    AttachError when it takes longer than `timeout` seconds (None: TURN_TIMEOUT).
    """
    fd = _take_turn(name, TURN_TIMEOUT if timeout is None else timeout)
    try:
        yield
    finally:
        if fd >= 0:
            os.close(fd)


def is_busy(name: str) -> bool:
    """Say whether a command has its turn with the device of `name`. Only root can tell: False to others."""
    return _is_taken(name, _TURN)


def is_wanted(name: str) -> bool:
    """Say whether a command waits for its turn with the device of `name`; as is_busy."""
    return _is_taken(name, _WISH)


def _is_taken(name: str, at: int) -> bool:
    try:
        fd = os.open(_path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return lockfile.ofd_is_taken(fd, at)
    finally:
        os.close(fd)


def _take_turn(name: str, timeout: float) -> int:
    """Return a descriptor that holds the turn, -1 if there is no record."""
    end = time.monotonic() + timeout
    while True:
        try:
            fd = os.open(_path(name), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return -1
        try:
            if lockfile.ofd_take(fd, _TURN) and lockfile.stands_at(fd, _path(name)):
                return fd
            if time.monotonic() > end:
                raise AttachError(
                    f"{name} is being attached or detached by another command: try again when that is done"
                )
            lockfile.ofd_take(fd, _WISH)  # or another waits, too
            time.sleep(0.02)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def remove(name: str) -> None:
    """Remove the file of what is no longer attached; a keeper that lives removes its own."""
    end = time.monotonic() + LOCK_TIMEOUT
    with suppress(FileNotFoundError):
        while not _remove(_path(name)) and time.monotonic() < end:
            time.sleep(0.02)


def _remove(path: str) -> bool:
    """Remove a file unless somebody holds its lock; say whether it is gone. Raises FileNotFoundError."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if not lockfile.take(fd):  # a keeper has it, or a process that only looks for one
            return False
        if lockfile.stands_at(fd, path):
            os.unlink(path)
        return True
    finally:
        os.close(fd)


def _path(name: str) -> str:
    """Return the file's path. Raises AttachError for what would lead out of the folder."""
    if "/" in name or "\0" in name:
        raise AttachError(f"'{name}' is not a device's name: 'zramd list' shows those that there are")
    return f"{FOLDER}/{name}.attached"
