"""Block devices as the kernel sees them (/sys/dev/block): what one lies on, and what it is used for."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

from zramd.kernel import attached, swap

SYS = "/sys/dev/block"
LOOPS = "/sys/block"
MOUNTS = "/proc/self/mountinfo"
# To write to these, the kernel takes memory: they are in memory, lie in a file, or are behind a network.
_TAKE_MEMORY = re.compile(r"(loop|nbd|zram|ram|rbd|drbd|zd|ublkb|nullb)[0-9]")


class Block(NamedTuple):
    """A block device: its number, and the name that the kernel gives it, such as sda1 or dm-0."""

    number: int
    name: str


def find(number: int) -> Block:
    """Return the block device of this number (st_rdev, or st_dev of what lies on it)."""
    folder = _folder(number)
    return Block(number, os.path.basename(os.path.realpath(folder)) if os.path.exists(folder) else "")


def below(number: int) -> Iterator[Block]:
    """Yield a block device and all that it lies on: devices of a mapping, and the disk of a partition."""
    seen: set[int] = set()
    wanted = [number]
    while wanted:
        number = wanted.pop()
        if number in seen:
            continue
        seen.add(number)
        yield find(number)
        folder = _folder(number)
        with suppress(OSError):
            wanted += [_number(f"{folder}/slaves/{name}") for name in sorted(os.listdir(f"{folder}/slaves"))]
        if _is_partition(folder):
            with suppress(OSError):
                wanted.append(_number(os.path.dirname(os.path.realpath(folder))))


def own(number: int, name: str) -> str:
    """Return which device below is that of zramd `name` itself, such as nbd0, '' if none is."""
    for block in below(number):
        disk = f"/dev/{re.sub(r'p[0-9]+$', '', block.name)}"
        if disk.startswith("/dev/nbd") and attached.read_sys(disk, "backend") == attached.backend(name):
            return block.name
        if disk.startswith("/dev/ublkb") and attached.is_of(disk, name, 0):
            return block.name
    return ""


def takes_memory(number: int) -> str:
    """Return which device below makes the kernel take memory for what is written to it, '' if none does."""
    return next((block.name for block in below(number) if _TAKE_MEMORY.match(block.name)), "")


def swapped_to(number: int) -> str:
    """Return which device below, the disk of a partition apart, is used as swap, '' if none is.

    Raises OSError, AttachError when the kernel's list cannot be read.
    """
    # The path may be one of another view of the file system: the name at its end is the kernel's.
    areas = {os.path.basename(area.path) for area in swap.swaps()}
    numbers = set()
    for area in swap.swaps():
        with suppress(OSError):
            numbers.add(os.stat(area.path).st_rdev)
    for block in below(number):
        if block.name and (block.name in areas or block.number in numbers):
            return block.name
    return ""


def used_for(number: int) -> str:
    """Return what keeps a block device, or a partition of it, from others, as far as the kernel shows it."""
    for block in (find(number), *_partitions(number)):
        if place := _mounted(block.number):
            return f"{block.name} is mounted on '{place}'"
        with suppress(OSError):
            if block.name in {os.path.basename(area.path) for area in swap.swaps()}:
                return f"{block.name} is used as swap"
        with suppress(OSError):
            for holder in sorted(os.listdir(f"{_folder(block.number)}/holders")):
                return f"{block.name} is part of {_mapping(block.number, holder)}"
    return "another program has it, perhaps another zramd"


def loop_over(status: os.stat_result) -> str:
    """Return which loop device shows this file or block device once more, such as loop0, '' if none does."""
    with suppress(OSError):
        for name in sorted(os.listdir(LOOPS)):
            if name.startswith("loop") and (path := _loop_file(f"{LOOPS}/{name}")):
                with suppress(OSError):
                    if _is_one(os.stat(path), status):
                        return name
    return ""


def loop_files(number: int) -> Iterator[str]:
    """Yield the paths of what the loop devices among `below` lie on: files, and block devices and theirs."""
    for block in below(number):
        if path := _loop_file(_folder(block.number)):
            yield path
            with suppress(OSError):
                status = os.stat(path)
                if stat.S_ISBLK(status.st_mode):
                    yield from loop_files(status.st_rdev)


def _loop_file(folder: str) -> str:
    """Return the path of what a loop device lies on, '' for one without, and for another device.

    One that was removed is called by a path that leads nowhere, or to a file that is really called so.
    """
    try:
        with open(f"{folder}/loop/backing_file", errors="surrogateescape") as file:
            return file.read().removesuffix("\n")
    except OSError:
        return ""


def _is_one(one: os.stat_result, other: os.stat_result) -> bool:
    """Say whether both are one file, or one block device by whatever name."""
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return os.path.samestat(one, other)


def filesystem(number: int) -> str:
    """Return the kind of file system whose files have this st_dev, such as ext4, '' if it is not known."""
    return next((words[words.index("-") + 1] for words in _mounts() if words[2] == _text(number)), "")


def _mounted(number: int) -> str:
    """Return where a block device is mounted, '' if it is not, as far as its file system shows that."""
    return next((words[4] for words in _mounts() if words[2] == _text(number)), "")


def _mounts() -> Iterator[list[str]]:
    with suppress(OSError), open(MOUNTS, errors="surrogateescape") as file:
        for line in file:
            yield line.split()


def _partitions(number: int) -> Iterator[Block]:
    folder = os.path.realpath(_folder(number))
    with suppress(OSError):
        for name in sorted(os.listdir(folder)):
            if _is_partition(f"{folder}/{name}"):
                yield find(_number(f"{folder}/{name}"))


def _mapping(number: int, holder: str) -> str:
    """Return a device above as a user knows it: that of the device mapper has a name."""
    with suppress(OSError), open(f"{_folder(number)}/holders/{holder}/dm/name") as file:
        return f"/dev/mapper/{file.read().strip()}"
    return f"/dev/{holder}"


def _is_partition(folder: str) -> bool:
    return os.path.exists(f"{folder}/partition")


def _folder(number: int) -> str:
    return f"{SYS}/{_text(number)}"


def _text(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def _number(folder: str) -> int:
    """Return the number of the device that a folder of /sys describes. Raises OSError."""
    with open(f"{folder}/dev") as file:
        major, minor = file.read().split(":")
    return os.makedev(int(major), int(minor))
