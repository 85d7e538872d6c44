"""What this machine's kernel does with a device: which of its NBD devices are attached, and what for."""

import os

SYS_BLOCK = "/sys/block"
SWAPS = "/proc/swaps"
MOUNTS = "/proc/mounts"
SWAP = "[SWAP]"  # what zramctl shows where the device is not mounted but swapped to


def attached(name: str, disksize: int) -> list[str]:
    """Return the kernel's devices, such as /dev/nbd0, that are connected to `name`, of `disksize` bytes.

    `zramd attach` tells the kernel whose they are. Of what other programs attach nothing but the size is
    known: a device of that size may belong to another server.
    """
    found = []
    for block in sorted(_list(SYS_BLOCK)):
        folder = f"{SYS_BLOCK}/{block}"
        if block.startswith("nbd") and os.path.exists(f"{folder}/pid"):
            backend = _read(f"{folder}/backend")
            size = _read(f"{folder}/size")
            same_size = size.isdigit() and int(size) * 512 == disksize
            if backend == f"zramd/{name}" or (not backend and same_size):
                found.append(f"/dev/{block}")
    return found


def uses(device: str) -> list[str]:
    """Return what a device of the kernel's is used for: [SWAP], and the folders where it is mounted."""
    used = [SWAP for line in _read(SWAPS).splitlines()[1:] if line.split()[0] == device]
    for line in _read(MOUNTS).splitlines():
        source, place = line.split()[:2]
        if source == device:
            used.append(place.replace("\\040", " "))
    return used


def _list(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read().strip()
    except OSError:
        return ""
