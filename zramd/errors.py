"""What can go wrong, as exceptions.

    Exception
    └── ZramdError                  anything zramd raises on purpose
        ├── ConfigError             a setting that cannot be used     (also a ValueError)
        ├── PoolFullError           no room: mem_limit, or the state's file system   (also an OSError: ENOSPC)
        ├── CorruptObjectError      an object does not decompress     (also an OSError: EIO)
        ├── HandleError             a handle is not live              (also a LookupError)
        ├── CorruptionError         a structure contradicts itself
        ├── SwapError               a measure of swap=local cannot be had
        ├── StateError              the state file cannot be had or trusted
        ├── SaveError               a saved device is damaged, cut off, foreign, or does not fit
        ├── AttachError             a kernel device cannot be attached, detached, swapped to
        ├── UnitsError              systemd's units cannot be installed or removed
        ├── RundirError             the run folder cannot be used
        ├── DeviceError             a device is not there, or its server does not do what is asked
        └── UsageError              a command cannot be used as it was written

Each message is one sentence that quotes the value at fault. `exit_code` is what a command ends with.
"""

import errno


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
    """A measure that swap=local asks for cannot be had; the message says which, and the remedy."""


class StateError(ZramdError):
    """The state file cannot be opened, is in use, or is not what it should be; the message has the remedy."""


class SaveError(ZramdError):
    """A saved device is damaged, cut off, foreign, or does not fit; the message says where and what."""


class AttachError(ZramdError):
    """A kernel device cannot be attached, detached, swapped to or off; the message says why."""


class UnitsError(ZramdError):
    """systemd's units cannot be installed or removed as asked; the message says why."""


class RundirError(ZramdError):
    """The run folder cannot be created or written, or a live server holds it."""


class DeviceError(ZramdError):
    """There is no such device, its server has died, does not answer, or refuses."""


class UsageError(ZramdError):
    """What was written on the command line cannot be used."""

    exit_code = 2


def error_from(code: int, what: str) -> Exception:
    """Return the exception for a negative errno from the core; `what` names the operation.

    EDQUOT is the core's word for the state's file system, which clients know as ENOSPC too.
    """
    if code == -errno.ENOSPC:
        return PoolFullError(f"{what}: mem_limit leaves no room")
    if code == -errno.EDQUOT:
        return PoolFullError(f"{what}: the file system of the state is full")
    if code == -errno.EIO:
        return CorruptObjectError(f"{what}: an object does not decompress")
    if code == -errno.ENOENT:
        return HandleError(f"{what}: the handle is not live")
    if code == -errno.EINVAL:
        return ValueError(f"{what}: out of range")
    if code == -errno.ENOMEM:
        return MemoryError(f"{what}: the system refuses memory")
    return OSError(-code, what)
