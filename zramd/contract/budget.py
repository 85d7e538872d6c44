"""The file of a budget: the memory that the devices whose run folders lie in one folder share.

    | head | budget, slots in use, granted and floor of each slot | who has slot 0 | who has slot 1 | …
    0      64K                                                    128K

The words in the middle are the core's (zramd.core.memory.budget), which maps them. A server has its slot as
long as it holds the lock of the slot's first byte, and the kernel drops that when it ends, however it ends. A
slot that nobody holds still counts while the state is there that the server has left: its memory is taken.
Byte 0 is the lock of whoever looks for a slot, or frees one.
"""

import os
import struct
from typing import NamedTuple

from zramd import lockfile
from zramd.contract import rundir
from zramd.contract.handover import SYSTEMD
from zramd.errors import BudgetError

NAME = rundir.BUDGET
path = rundir.budget_file
MAGIC = b"zramd budget\0\x1a\xff\x00"
VERSION = 1
SLOTS = 1024
PAGE = 4096  # bytes: what the words count

TABLE_AT = 1 << 16
_FIXED = 64  # bytes of the table before the first slot
_SLOT = struct.Struct("<QQ")  # pages granted, and kept
TABLE_BYTES = _FIXED + SLOTS * _SLOT.size
_OWNERS_AT = 1 << 17
_OWNER_BYTES = 1024
BYTES = _OWNERS_AT + SLOTS * _OWNER_BYTES
_HEAD = struct.Struct("<16sQQ")
_OWNER = struct.Struct("<64sQQQH")  # name, state's device and inode, mount namespace, bytes of its path
MOST_PATH = _OWNER_BYTES - _OWNER.size

_MOST = 1 << 52  # pages of a slot, as the core has it
_REMEDY = "once no device has a part in it, remove the file"


class State(NamedTuple):
    """A state file, as it can be found again. path: SYSTEMD for one that the service manager keeps."""

    path: str
    device: int
    inode: int

    def is_that_of(self, other: "State | None") -> bool:
        """Say whether it is the same file."""
        return other is not None and (self.device, self.inode) == (other.device, other.inode)


class Owner(NamedTuple):
    """Who has a slot, or has left it. namespace: of the mounts in which the path is to be read."""

    name: str
    state: State | None
    namespace: int


class Slot(NamedTuple):
    """A slot that counts; sizes in bytes."""

    number: int
    granted: int
    floor: int

    @property
    def taken(self) -> int:
        """What it takes of the budget."""
        return max(self.granted, self.floor)


class Shown(NamedTuple):
    """What a budget's file says: bytes for all, and taken; devices that are served, bytes of others."""

    budget: int
    used: int
    devices: int
    left_behind: int


def needed(found: list[Slot]) -> int:
    """Return how many bytes of the file one uses who looks through these slots and takes one more."""
    return _OWNERS_AT + min(SLOTS, max((slot.number for slot in found), default=0) + 2) * _OWNER_BYTES


def lock_of(number: int) -> int:
    """Return the byte of the file whose lock says that a slot is held."""
    return TABLE_AT + _FIXED + number * _SLOT.size


def head() -> bytes:
    """Return what the file begins with."""
    return _HEAD.pack(MAGIC, VERSION, SLOTS)


def check(fd: int, shown: str) -> bool:
    """Say whether the file has its head, False for a new one. Raises BudgetError for what is no budget."""
    found = os.pread(fd, _HEAD.size, 0)
    if not found.strip(b"\0"):
        return False
    if len(found) < _HEAD.size or found[: len(MAGIC)] != MAGIC:
        raise BudgetError(f"'{shown}' is damaged, or no budget of zramd: {_REMEDY}")
    _, version, slots = _HEAD.unpack(found)
    if version != VERSION:
        raise BudgetError(f"budget '{shown}' has version {version}, this zramd knows {VERSION}: {_REMEDY}")
    if slots != SLOTS or os.fstat(fd).st_size != BYTES:
        raise BudgetError(f"budget '{shown}' is damaged (its size is not that of {SLOTS} slots): {_REMEDY}")
    return True


def slots(fd: int, *, empty: bool = False) -> list[Slot]:
    """Return the slots that count, held or not; `empty`: those too that take nothing. Raises OSError."""
    table = os.pread(fd, TABLE_BYTES - _FIXED, TABLE_AT + _FIXED)
    found = []
    for number, (granted, floor) in enumerate(_SLOT.iter_unpack(table)):
        if granted or floor or empty:
            found.append(Slot(number, granted * PAGE, floor * PAGE))
    return found


def check_slots(found: list[Slot], shown: str) -> None:
    """Raise BudgetError for a slot that takes what no machine has: something has written to the file."""
    if any(slot.taken >= _MOST * PAGE for slot in found):
        raise BudgetError(f"budget '{shown}' is damaged (a slot has more than any machine): {_REMEDY}")


def limit(fd: int) -> int:
    """Return the bytes for all. Raises OSError."""
    return int.from_bytes(os.pread(fd, 8, TABLE_AT), "little") * PAGE


def owner(fd: int, number: int) -> Owner:
    """Return who has a slot, or has left it. Raises OSError."""
    data = os.pread(fd, _OWNER_BYTES, _OWNERS_AT + number * _OWNER_BYTES).ljust(_OWNER_BYTES, b"\0")
    name, device, inode, namespace, length = _OWNER.unpack_from(data)
    where = os.fsdecode(data[_OWNER.size : _OWNER.size + length])
    state = State(where, device, inode) if inode and "\0" not in where else None  # else it is damaged
    return Owner(name.rstrip(b"\0").decode(errors="replace"), state, namespace)


def write_owner(fd: int, number: int, who: Owner) -> None:
    """Write who has a slot, which the caller holds. Raises OSError."""
    state = who.state or State("", 0, 0)
    where = os.fsencode(state.path)
    fields = (who.name.encode(), state.device, state.inode, who.namespace, len(where))
    # It lies on one page, and the kernel copies that in one go: a kill leaves the old one or the new.
    data = (_OWNER.pack(*fields) + where).ljust(_OWNER_BYTES, b"\0")
    os.pwrite(fd, data, _OWNERS_AT + number * _OWNER_BYTES)


def namespace() -> int:
    """Return the number of this process's mount namespace, 0 if it is not known."""
    try:
        return os.stat("/proc/self/ns/mnt").st_ino
    except OSError:
        return 0


def is_there(who: Owner) -> bool:
    """Say whether the state that a dead server has left is there, or may be: it cannot always be told."""
    state = who.state
    if state is None:
        return False
    if state.path == SYSTEMD:
        return _is_kept(state)
    try:
        if _is(os.stat(state.path), state):
            return True
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError:
        return True
    # A service may not see the folder, or another one in its place.
    try:
        if os.stat(os.path.dirname(state.path)).st_dev == state.device:
            return False
    except OSError:
        pass
    return who.namespace != namespace()


def _is(status: os.stat_result, state: State) -> bool:
    return (status.st_dev, status.st_ino) == (state.device, state.inode)


def _is_kept(state: State, folder: str = "/proc/1/fd") -> bool:
    """Say whether the service manager has the file; who may not look there believes it."""
    try:
        names = os.listdir(folder)
    except OSError:
        return True
    for name in names:
        try:
            if _is(os.stat(f"{folder}/{name}"), state):
                return True
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


def look(shown: str) -> Shown | None:
    """Return what a budget's file says, None if nobody has a part in one. Raises BudgetError."""
    try:
        fd = os.open(shown, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not check(fd, shown):
            return None
        top = int.from_bytes(os.pread(fd, 8, TABLE_AT + 8), "little")
        every = [
            (slot, lockfile.ofd_is_taken(fd, lock_of(slot.number))) for slot in slots(fd, empty=True)[:top]
        ]
        found = [
            (slot, held) for slot, held in every if held or (slot.taken and is_there(owner(fd, slot.number)))
        ]
        if not found:
            return None
        return Shown(
            budget=limit(fd),
            used=sum(slot.taken for slot, _ in found),
            devices=sum(held for _, held in found),
            left_behind=sum(slot.taken for slot, held in found if not held),
        )
    except OSError:
        return None
    finally:
        os.close(fd)
