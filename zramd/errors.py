"""What can go wrong, as exceptions.

    Exception
    └── ZramdError                  anything zramd raises on purpose
        ├── ConfigError             a setting that cannot be used     (also a ValueError)
        ├── PoolFullError           no room: mem_limit, budget, the state's file system    (also an OSError)
        ├── CorruptObjectError      an object does not decompress     (also an OSError: EIO)
        ├── HandleError             a handle is not live              (also a LookupError)
        ├── CorruptionError         a structure contradicts itself
        ├── SwapError               a measure of swap=local cannot be had
        ├── StateError              the state file cannot be had or trusted
        ├── BackingError            the backing cannot be had or trusted, or is not the state's
        ├── BudgetError             the host's budget cannot be had, or leaves no room for what is to be kept
        ├── SaveError               a saved device is damaged, cut off, foreign, or does not fit
        ├── UblkError               the kernel's ublk cannot be had, or refuses
        ├── AttachError             a kernel device cannot be attached, detached, swapped to
        ├── UnitsError              systemd's units cannot be installed or removed
        ├── RundirError             the run folder cannot be used
        ├── UntrustedError          another user has made, owns, or may replace what is to be used
        ├── DeviceError             a device is not there, or its server does not do what is asked
        └── UsageError              a command cannot be used as it was written

Each message is one sentence that quotes the value at fault. `exit_code` is what a command ends with.
"""

import errno
import os
import sys
from contextlib import suppress

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Literal


class ZramdError(Exception):
    """Base of every exception that zramd raises on purpose."""

    exit_code = 1


class ConfigError(ZramdError, ValueError):
    """A setting is unknown, given twice, or its value cannot be used."""

    exit_code = 2


class PoolFullError(ZramdError, OSError):
    """A write found no room, even after compaction; `errno` is ENOSPC, and the message says which room."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.ENOSPC, message)


class CorruptObjectError(ZramdError, OSError):
    """A stored object does not decompress to a block; `errno` is EIO, the message names the block."""

    def __init__(self, message: str) -> None:
        super().__init__(errno.EIO, message)


class HandleError(ZramdError, LookupError):
    """A handle that was freed or never given out."""


class CorruptionError(ZramdError):
    """`check()` found a structure that contradicts another; the message names both."""


class SwapError(ZramdError):
    """A measure that swap=local asks for cannot be had; the message says which, and the remedy.

    missing: the message for a process that takes the measures without such a setting.
    """

    def __init__(self, missing: str) -> None:
        super().__init__(f"swap=local: {missing}")
        self.missing = missing


class StateError(ZramdError):
    """The state file cannot be opened, is in use, or is not what it should be; the message has the remedy."""


class BackingError(ZramdError):
    """The backing cannot be opened, is in use, or is not what it should be; the message has the remedy."""


class BudgetError(ZramdError):
    """The host's budget cannot be had, or is too small for all floors; the message has the remedy."""


class SaveError(ZramdError):
    """A saved device is damaged, cut off, foreign, or does not fit; the message says where and what.

    cause: "changed" while it was saved, "cut off" where the stream ends early or cannot be read, or "other".
    """

    def __init__(self, message: str, cause: "Literal['changed', 'cut off', 'other']" = "other") -> None:
        super().__init__(message)
        self.cause = cause


class UblkError(ZramdError):
    """The kernel's ublk cannot be used, or refuses; the message says why, `errno` is the system's."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class AttachError(ZramdError):
    """A kernel device cannot be attached, detached, swapped to or off; the message says why."""


class UnitsError(ZramdError):
    """systemd's units cannot be installed or removed as asked; the message says why."""


class RundirError(ZramdError):
    """The run folder cannot be created or written, or a live server holds it."""


class UntrustedError(ZramdError):
    """Another user has made, owns, or may replace what is to be used; the message says what, and who."""


class DeviceError(ZramdError):
    """There is no such device, its server has died, does not answer, or refuses."""


class UsageError(ZramdError):
    """What was written on the command line cannot be used."""

    exit_code = 2


def error_from(code: int, what: str) -> Exception:
    """Return the exception for a negative errno from the core; `what` names the operation.

    EDQUOT is the core's word for the state's file system, which clients know as ENOSPC too; EREMOTEIO and
    EBADMSG are for the backing, and EIO for clients.
    """
    if code == -errno.ENOSPC:
        return PoolFullError(f"{what}: mem_limit or the budget leaves no room")
    if code == -errno.EDQUOT:
        return PoolFullError(f"{what}: the file system of the state is full")
    if code == -errno.EIO:
        return CorruptObjectError(f"{what}: an object does not decompress")
    if code == -errno.EREMOTEIO:
        return OSError(errno.EIO, f"{what}: it is out, and the backing cannot be read there")
    if code == -errno.EBADMSG:
        return OSError(errno.EIO, f"{what}: it is out, and the backing does not have it as it was written")
    if code == -errno.ENOENT:
        return HandleError(f"{what}: the handle is not live")
    if code == -errno.EINVAL:
        return ValueError(f"{what}: out of range")
    if code == -errno.ENOMEM:
        return MemoryError(f"{what}: the system refuses memory")
    return OSError(-code, what)


# What a call fails with while something is short: it may succeed later, and says nothing about the place.
_SHORTAGES = frozenset(
    (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENOMEM,
        errno.ENOBUFS,
        errno.EMFILE,
        errno.ENFILE,
        errno.EAGAIN,
        errno.EINTR,
        errno.EIO,
    )
)


def is_shortage(error: BaseException) -> bool:
    """Say whether the same call may succeed once there is more of something."""
    if isinstance(error, RundirError) and error.__cause__ is not None:
        error = error.__cause__
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _SHORTAGES)


def reason(error: OSError) -> str:
    """Return what the system says of an error, to stand inside a sentence."""
    return (error.strerror or str(error)).lower()


def sentence(error: BaseException) -> str:
    """Return what a user is told of an exception that one has to expect, '' for any other."""
    if isinstance(error, MemoryError):
        return f"{str(error) or 'no memory'}: {_more_memory()}"
    if isinstance(error, RuntimeError) and "new thread" in str(error):
        return "no more threads can be started: raise ulimit -u, or TasksMax= of the service"
    if isinstance(error, ZramdError):
        return (error.strerror or "") if isinstance(error, OSError) else str(error)
    if isinstance(error, OSError):
        place = f"'{error.filename}': " if error.filename else ""
        return f"{place}{reason(error)}{_REMEDIES.get(error.errno or 0, '')}"
    return ""


_REMEDIES = {
    errno.EMFILE: ": raise ulimit -n, or LimitNOFILE= of the service",
    errno.ENFILE: ": raise the sysctl fs.file-max",
}


def _more_memory() -> str:
    """Return where memory is to come from."""
    for name, option, limit in (("address space", "-v", "LimitAS"), ("data size", "-d", "LimitDATA")):
        most = _resource_limit(f"Max {name}")
        if most is not None:
            return (
                f"the {name} is limited to {most} bytes: use 'ulimit {option} unlimited', or {limit}=infinity"
            )
    with suppress(OSError, MemoryError), open("/proc/sys/vm/overcommit_memory") as file:
        if file.read().strip() == "2":
            return "the sysctl vm.overcommit_memory is 2: set it to 0, or raise vm.overcommit_ratio"
    return "free some memory"


def _resource_limit(name: str) -> int | None:
    """Return this process's soft limit, None if there is none."""
    with suppress(OSError, MemoryError), open("/proc/self/limits") as file:
        for line in file:
            if line.startswith(name):
                most = line[len(name) :].split()[0]
                return int(most) if most.isdigit() else None
    return None


def tell(line: str) -> None:
    """Write a line to standard error. Whether that takes it changes nothing of what becomes of a command."""
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        drop(2)


def say(sentence: str) -> None:
    """Tell the user something beside what a command prints, on standard error."""
    tell(f"zramd: {printable(sentence)}")


def drop(fd: int) -> None:
    """Let what a standard descriptor has not taken yet go nowhere: Python would try it again at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, fd)
    os.close(null)


def printable(text: str) -> str:
    """Return a sentence as a terminal may show it: what is quoted in it may be of anybody's making."""
    return "".join(letter if letter.isprintable() else _escaped(ord(letter)) for letter in text)


def _escaped(code: int) -> str:
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is no text, as Python keeps it
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"
