"""The kernel's zram as a peer."""

import errno
import fcntl
import mmap
import os
import struct
import time
from pathlib import Path
from typing import Self

from bench.results import NotMeasuredError
from bench.setup import BLOCK

BLKDISCARD = 0x1277  # linux/fs.h
SLOT_BYTES = 16  # struct zram_table_entry, one for each block of the disk
HANDLE_BYTES = 8  # one for each object
RESET_TIMEOUT = 5.0  # seconds


class KernelZram:
    """A zram device of this machine, with lz4; use it in a `with`, whose end resets it.

    Only a device without a size is taken, so none that anyone uses. Raises NotMeasuredError if there is none.
    """

    def __init__(self, disksize: int) -> None:
        self._disksize = disksize
        if os.geteuid() != 0:
            raise NotMeasuredError("the kernel's zram needs root")
        devices = sorted(Path("/sys/block").glob("zram*"))
        if not devices:
            raise NotMeasuredError("this machine has no zram device (try 'modprobe zram')")
        for device in devices:
            if self._claim(device):
                break
        else:
            raise NotMeasuredError(f"all zram devices are in use: {', '.join(d.name for d in devices)}")

    def _claim(self, device: Path) -> bool:
        if device.joinpath("disksize").read_text().strip() != "0":
            return False
        try:
            # Both are refused once a device has a size: whoever else looks at it now, only one gets it.
            device.joinpath("comp_algorithm").write_text("lz4")
            device.joinpath("disksize").write_text(str(self._disksize))
        except OSError as error:
            if device.joinpath("disksize").read_text().strip() != "0":
                return False
            raise NotMeasuredError(f"{device.name} cannot be set up with lz4: {error}") from None
        self._sys = device
        self.path = f"/dev/{device.name}"
        return True

    @property
    def device(self) -> list[str]:
        """fio's options for it."""
        return ["--ioengine=io_uring", "--direct=1", f"--filename={self.path}"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        end = time.monotonic() + RESET_TIMEOUT
        while True:
            try:
                self._sys.joinpath("reset").write_text("1")
                return
            except OSError as error:
                # Whoever watches for new disks may still be looking at it.
                if error.errno != errno.EBUSY or time.monotonic() > end:
                    raise
            time.sleep(0.05)

    def mm_stat(self) -> list[int]:
        """Return the columns of mm_stat."""
        return [int(word) for word in self._sys.joinpath("mm_stat").read_text().split()]

    def metadata_bytes(self, stored_blocks: int) -> int:
        """Return what its slots and handles take: the kernel does not say, so it is computed."""
        return self._disksize // BLOCK * SLOT_BYTES + stored_blocks * HANDLE_BYTES


class KernelBlocks:
    """The zram device block by block, past the page cache; use it in a `with`."""

    def __init__(self, zram: KernelZram) -> None:
        self.zram = zram
        self._fd = os.open(zram.path, os.O_RDWR | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, BLOCK)  # page aligned, as O_DIRECT wants it

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._fd)

    def write(self, data: bytes, offset: int) -> None:
        """Write one block."""
        self._buffer[:] = data
        os.pwritev(self._fd, [self._buffer], offset)

    def trim(self, offset: int, length: int) -> None:
        """Discard blocks."""
        fcntl.ioctl(self._fd, BLKDISCARD, struct.pack("QQ", offset, length))

    def compact(self) -> None:
        """Compact until nothing is left to do."""
        Path(f"/sys/block/{self.zram.path[5:]}/compact").write_text("1")
