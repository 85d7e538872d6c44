"""The kernel's ublk devices as sysfs shows them: nothing here asks the driver, so anybody may look.

Number N has two names: the disk /dev/ublkbN, which is there while the device is started, and /dev/ublkcN, by
which its server serves. The second is there from ADD_DEV to DEL_DEV, also when the server has died.
"""

import os
import re
from contextlib import suppress

from zramd.errors import AttachError, reason

CONTROL = "/dev/ublk-control"
CHARS = "/sys/class/ublk-char"
BLOCKS = "/sys/block"
MODULE = "ublk_drv"
IO_TIMEOUT = 500  # ms; see `settle`
_DEVICE = re.compile(r"(?:/dev/)?ublkb([0-9]{1,7})")
# Kernels in which making a device hangs the process that asks for it beyond SIGKILL.
_BROKEN = re.compile(r"6\.17\.[0-9.-]+-aws|6\.18\.4([^0-9.].*)?")


def number_of(device: str) -> int | None:
    """Return the N of /dev/ublkbN or ublkbN, None for what is no ublk device."""
    match = _DEVICE.fullmatch(device)
    return int(match[1]) if match else None


def device_of(number: int) -> str:
    """Return the name of a device's disk."""
    return f"/dev/ublkb{number}"


def char_of(number: int) -> str:
    """Return the name of what its server opens."""
    return f"/dev/ublkc{number}"


def numbers() -> list[int]:
    """Return the numbers of all devices, whoever's they are."""
    with suppress(OSError):
        names = (name.removeprefix("ublkc") for name in os.listdir(CHARS))
        return sorted(int(name) for name in names if name.isdecimal())
    return []


def exists(number: int) -> bool:
    """Say whether the kernel has a device of this number, started or not."""
    return os.path.exists(f"{CHARS}/ublkc{number}")


def has_disk(number: int) -> bool:
    """Say whether its disk is there: without recovery the kernel takes it away when the server dies."""
    return os.path.exists(f"{BLOCKS}/ublkb{number}")


def connection(number: int) -> str:
    """Return what distinguishes a device from the next one of its number, '' if there is none."""
    try:
        return str(os.stat(f"{CHARS}/ublkc{number}").st_ino)
    except OSError:
        return ""


def mark(name: str) -> int:
    """Return the number that the kernel keeps for the devices of zramd `name`, and shows to who asks.

    It keeps 64 bits for a server's own use. This is FNV-1a.
    """
    found = 0xCBF29CE484222325
    for byte in f"zramd/{name}".encode():
        found = (found ^ byte) * 0x100000001B3 & (1 << 64) - 1
    return found


def broken(release: str) -> bool:
    """Say whether a kernel of this release hangs for good who asks it for a device."""
    return _BROKEN.fullmatch(release) is not None


def absent(root: str = "") -> str:
    """Return why this kernel has no ublk now, with a remedy, '' if its driver is there.

    One that is built in has a folder in /sys as well.
    """
    if os.path.isdir(f"{root}/sys/module/{MODULE}"):
        return ""
    release = _read(f"{root}/proc/sys/kernel/osrelease")
    if can_be_loaded(release, root):
        return f"the kernel's module {MODULE} is not loaded: run 'modprobe {MODULE}' as root"
    return f"Linux {release} has no ublk: use front=nbd, or a kernel that has it"


def can_be_loaded(release: str, root: str = "") -> bool:
    """Say whether the driver is among the modules of the kernel of this release."""
    return f"/{MODULE}.ko" in _read(f"{root}/lib/modules/{release}/modules.dep")


def _read(path: str) -> str:
    with suppress(OSError), open(path, errors="replace") as file:
        return file.read().strip()
    return ""


def settle(number: int, *, recovers: bool) -> None:
    """Set what the kernel's defaults have wrong for a disk. Raises AttachError.

    wbt_lat_usec 0: writeback throttling, made for disks, has kswapd wait. io_timeout: with every tag in
    flight when a server dies, the kernel finds that out only when a request times out, after 30 s unless
    told otherwise (before Linux 6.16). A server that is only slow is not harmed by it.
    """
    _set(number, "wbt_lat_usec", 0, optional=True)
    if recovers:
        _set(number, "io_timeout", IO_TIMEOUT)


def _set(number: int, name: str, value: int, *, optional: bool = False) -> None:
    path = f"{BLOCKS}/ublkb{number}/queue/{name}"
    try:
        with open(path, "r+") as file:
            file.write(str(value))
            file.flush()
            file.seek(0)
            found = file.read().strip()
    except OSError as error:
        if optional and (isinstance(error, FileNotFoundError) or not error.errno or error.errno == 22):
            return  # this kernel does not throttle, or not with this scheduler
        raise AttachError(f"'{path}' cannot be set to {value}: {reason(error)}") from None
    if not found.isdecimal() or abs(int(found) - value) > value // 10:  # it counts in ticks
        raise AttachError(f"'{path}' cannot be set to {value}: the kernel says {found}")
