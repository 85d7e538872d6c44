"""A disk for what leaves memory: a file of this host, for the server here or, as a disk, for the guest."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from vm.errors import VmError
from vm.guest import Guest

SECTOR = 512
IN_GUEST = "/dev/vdb"  # beside a device that is none of qemu's disks


class Disk:
    """A preallocated file of `size` bytes in `folder`; `iops`: most requests a second to it, 0: any number.

    `name` is its own among the guest's disks: udev has it as /dev/disk/by-id/virtio-NAME. Raises VmError when
    there is no room for it.
    """

    def __init__(self, folder: Path, size: int, iops: int = 0, name: str = "backing") -> None:
        self.size = size
        self.name = name
        self._iops = iops
        fd, path = tempfile.mkstemp(prefix="backing-", suffix=".img", dir=folder)
        self.path = Path(path)
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            self.remove()
            raise VmError(
                f"there is no room for a disk of {size} bytes in {folder}: {error.strerror}"
            ) from None
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)

    def qemu_options(self) -> list[str]:
        """Return what qemu is told of it as a disk of the guest's."""
        node = self.name
        file = f"driver=raw,node-name={node},discard=unmap,file.driver=file,file.filename={self.path}"
        words = ["-blockdev", file]
        if self._iops:
            words += ["-object", f"throttle-group,id={node}-iops,x-iops-total={self._iops}"]
            slow = f"driver=throttle,node-name={node}-slow,throttle-group={node}-iops,file={node}"
            words += ["-blockdev", slow]
            node += "-slow"
        return [*words, "-device", f"virtio-blk-pci,drive={node},serial={self.name}"]


def traffic(guest: Guest, device: str = IN_GUEST) -> tuple[int, int]:
    """Return the bytes that a disk of the guest's was asked to read and to write so far."""
    words = guest.run(f"cat /sys/class/block/{Path(device).name}/stat").split()
    return int(words[2]) * SECTOR, int(words[6]) * SECTOR


class Mapped:
    """A disk of the guest's behind the kernel's device mapper, which can make it fail, or slow."""

    name = "mapped"
    device = "/dev/dm-0"  # there is nobody who makes /dev/mapper

    def __init__(self, guest: Guest, disk: str = IN_GUEST) -> None:
        self._guest = guest
        self._disk = disk
        for path in guest.machine.images.dm_modules:
            guest.run(f"insmod {path}")
        self._sectors = int(guest.run(f"cat /sys/class/block/{Path(disk).name}/size"))
        self._setup(f"create {self.name} --table '{self._linear()}'")

    def heal(self) -> None:
        """Let it be the disk again, as it is."""
        self._load(self._linear())

    def fail(self) -> None:
        """Let all requests fail."""
        self._load("error")

    def fail_writes(self) -> None:
        """Let writes fail."""
        self.lie("error_writes")

    def lie(self, how: str) -> None:
        """Let it do something that the kernel's flakey target can, such as drop_writes."""
        self._load(f"flakey {self._disk} 0 0 3600 {len(how.split())} {how}")

    def delay(self, milliseconds: int) -> None:
        """Let each request take so much longer."""
        self._load(f"delay {self._disk} 0 {milliseconds}")

    def _linear(self) -> str:
        return f"0 {self._sectors} linear {self._disk} 0"

    def _load(self, target: str) -> None:
        table = target if target.startswith("0 ") else f"0 {self._sectors} {target}"
        self._setup(f"reload {self.name} --table '{table}'")
        # This suspends and resumes in one: nothing that the command needs can wait for the disk meanwhile.
        self._setup(f"resume {self.name} --noflush --nolockfs")

    def _setup(self, words: str) -> None:
        self._guest.run(f"/usr/sbin/dmsetup {words} --noudevsync --noudevrules", 60)
