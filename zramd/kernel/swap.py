"""What the kernel uses a device for (/proc/swaps, /proc/mounts), and the programs that change it.

Swap may be on a device itself or on partitions of it, its areas; what is asked of a device means all of them.
zramd.kernel.swapareas swaps to them and off.
"""

import os
import re
import stat
from typing import NamedTuple

from zramd import meminfo
from zramd.errors import AttachError, is_shortage, reason

SWAPS = "/proc/swaps"
MOUNTS = "/proc/mounts"
MEMINFO = meminfo.PATH
MIN_FREE_KBYTES = "/proc/sys/vm/min_free_kbytes"
MIN_FREE = 0.03  # of memory: docs/swapping.md says what for
PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"  # ordinary users lack the first ones
SWAP = "[SWAP]"  # what zramctl shows where the device is not mounted but swapped to
_PART = re.compile(r"(/dev/(?:nbd|ublkb)[0-9]+)p[0-9]+")
_OCTAL = re.compile(rb"\\([0-3][0-7]{2})")
_SWAP = re.compile(rb"([^ \t]+)[ \t]+[^ \t]+[ \t]+([0-9]{1,15})[ \t]+([0-9]{1,15})[ \t]+(-?[0-9]{1,6})")


class Swap(NamedTuple):
    """What the kernel swaps to: sizes in bytes."""

    path: str
    size: int
    used: int
    priority: int


def swaps() -> list[Swap]:
    """Return all that the kernel swaps to now, as /proc/swaps says. Raises OSError, AttachError."""
    try:
        with open(SWAPS, "rb") as file:
            return parse_swaps(file.read())
    except FileNotFoundError:  # a kernel without swap
        return []


def parse_swaps(data: bytes) -> list[Swap]:
    """Return what stands in /proc/swaps. Raises AttachError: a swap that is overlooked would be lost."""
    found = []
    for line in data.split(b"\n")[1:]:
        match = _SWAP.fullmatch(line)
        if match:
            found.append(Swap(_path(match[1]), int(match[2]) << 10, int(match[3]) << 10, int(match[4])))
        elif line.strip():
            raise AttachError(f"{SWAPS}: '{os.fsdecode(line)}' is not understood: which kernel is this?")
    return found


def _path(escaped: bytes) -> str:
    """Return a path in which the kernel has written spaces and the like as \\040; any byte may be in it."""
    return os.fsdecode(_OCTAL.sub(lambda octal: bytes([int(octal[1], 8)]), escaped))


def device_of(path: str) -> str:
    """Return /dev/nbd0 of /dev/nbd0p3, its partition, and so with ublkb; any other path as it is."""
    match = _PART.fullmatch(path)
    return match[1] if match else path


def areas(device: str) -> list[Swap]:
    """Return what the kernel swaps to on `device`: itself or its partitions, in the order of filling."""
    there = [area for area in swaps() if device_of(area.path) == device]
    return sorted(there, key=lambda area: -area.priority)


def find(device: str) -> Swap | None:
    """Return how the kernel swaps to `device`, all of its areas taken together, None if it does not."""
    there = areas(device)
    if not there:
        return None
    size, used = sum(area.size for area in there), sum(area.used for area in there)
    return Swap(device, size, used, there[0].priority)


def swapoff_command(devices: list[str], name: str) -> str:
    """Return what an administrator runs to swap off `devices`, which are those of zramd `name`."""
    divided = any(area.path != device for device in devices for area in areas(device))
    return f"zramd detach --swapoff {name}" if divided else f"swapoff {' '.join(devices)}"


def mounts(device: str) -> list[str]:
    """Return where `device` or one of its partitions is mounted."""
    with open(MOUNTS, "rb") as file:
        return parse_mounts(file.read(), device)


def parse_mounts(data: bytes, device: str) -> list[str]:
    """Return where `device` or one of its partitions is mounted, of what stands in /proc/mounts."""
    found = []
    for line in data.split(b"\n"):
        source, _, rest = line.partition(b" ")
        place = rest.partition(b" ")[0]
        if place and re.fullmatch(f"{re.escape(device)}(p[0-9]+)?", _path(source)):
            found.append(_path(place))
    return found


def nbd_devices(disksize: int) -> list[str]:
    """Return the kernel's NBD and ublk devices of `disksize` bytes that are swapped to now."""
    names = dict.fromkeys(device_of(area.path) for area in swaps())
    return [name for name in names if name.startswith(("/dev/nbd", "/dev/ublkb")) and _size(name) == disksize]


def _size(name: str) -> int:
    try:
        with open(f"/sys/block/{os.path.basename(name)}/size") as size:
            return int(size.read()) * 512
    except OSError:
        return 0


def uses(device: str) -> list[str]:
    """Return what `device` is used for: [SWAP], and the folders where it is mounted."""
    return [*([SWAP] if find(device) else []), *mounts(device)]


def available() -> int:
    """Return the bytes that programs can still get without swapping (MemAvailable)."""
    return _memory("MemAvailable")


def set_memory_aside() -> str:
    """Raise what the kernel sets aside to what a server needs that it swaps to itself (vm.min_free_kbytes).

    Return a sentence that says what was changed, '' if nothing was. Raises AttachError.
    """
    wanted = round(_memory("MemTotal") * MIN_FREE) >> 10
    try:
        with open(MIN_FREE_KBYTES, "r+") as file:
            before = int(file.read())
            if before >= wanted:
                return ""
            file.seek(0)
            file.write(str(wanted))
            file.flush()
            file.seek(0)
            if int(file.read()) < wanted:
                raise OSError(0, "the kernel does not take it")
    except OSError as error:
        raise AttachError(f"'{MIN_FREE_KBYTES}' cannot be set to {wanted}: {reason(error)}") from None
    return f"vm.min_free_kbytes is {wanted} now, it was {before}"


def _memory(name: str) -> int:
    found = meminfo.read(name, MEMINFO)
    if found is None:
        raise AttachError(f"{MEMINFO} does not contain {name}")
    return found


def settle_queue(device: str) -> None:
    """Tell the kernel that a device does not rotate: to one that does, it sends no discards.

    Raises AttachError.
    """
    path = f"/sys/block/{os.path.basename(device)}/queue/rotational"
    try:
        with open(path, "r+") as file:
            if file.read().strip() != "0":
                file.seek(0)
                file.write("0")
    except OSError as error:
        raise AttachError(f"'{path}' cannot be set to 0: {reason(error)}") from None


def find_program(name: str, path: str | None = None) -> str:
    """Return where a program is in the folders of `path`, by default $PATH, '' if it is in none.

    Raises OSError when that is not known for lack of something: then it may exist.
    """
    for folder in os.get_exec_path({"PATH": path} if path else None):
        place = os.path.join(folder, name)
        try:
            status = os.stat(place)
        except OSError as error:
            if is_shortage(error):
                raise
        else:
            if stat.S_ISREG(status.st_mode) and os.access(place, os.X_OK):
                return place
    return ""


def program(name: str) -> str:
    """Return where a system program is. Raises AttachError."""
    found = find_program(name, PATH)
    if not found:
        package = {"nbd-client": "nbd-client", "mkswap": "util-linux"}.get(name, "mount")
        raise AttachError(f"{name} is not installed: run 'apt-get install {package}' as root")
    return found


def run(name: str, *arguments: str) -> None:
    """Run a system program, wherever it is. Raises AttachError with what it says when it fails."""
    import subprocess

    done = subprocess.run(
        [program(name), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        raise AttachError(f"{name} {arguments[-1]} failed: {sentence(done.stderr)}")


def sentence(words: bytes) -> str:
    """Return what a program said, on one line."""
    return " ".join(words.decode(errors="replace").split()) or "no reason given"
