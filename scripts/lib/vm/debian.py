"""A Debian with systemd to boot, from the image that `debian_image` makes.

A guest writes to a layer of its own over it, which outlives the guest: one that boots from it again sees what
was written, as a machine does after a reboot. A second disk brings files in: a tar archive, to be unpacked
from /dev/vdb.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vm import image
from vm.errors import VmError
from vm.guest import Guest, Machine

# In what order things happen at the end is seen on the console alone: the journal is closed before.
PARAMETERS = (
    "systemd.show_status=1 systemd.journald.forward_to_console=1 systemd.journald.max_level_console=info "
    "systemd.log_color=0"
)


@dataclass(frozen=True)
class Disks(image.Images):
    """What a Debian boots from: `root` is the image that guests share."""

    layer: Path = Path()  # what this guest has written
    payload: Path = Path()  # the archive that it finds in /dev/vdb


@dataclass(frozen=True)
class DebianMachine(Machine):
    """A machine whose root can be written to."""

    def root_disk(self) -> str:
        """Return what qemu is told of the disk that the root is on."""
        assert isinstance(self.images, Disks)
        return f"driver=qcow2,node-name=root,discard=unmap,file.driver=file,file.filename={self.images.layer}"


class Computer:
    """A machine with its disk, on or off; `guest` is it while it is on."""

    def __init__(self, machine: Machine, folder: Path, boot_timeout: float) -> None:
        """`folder` gets one for each boot, with its console; `boot_timeout` is in seconds."""
        self.machine = machine
        self.folder = folder
        self.guest: Guest
        self.boots = 0
        self._boot_timeout = boot_timeout

    @contextmanager
    def on(self) -> Iterator[Guest]:
        """Boot it, and yield it once it takes commands; its end at the latest ends it. Raises VmError."""
        self.boots += 1
        folder = self.folder / f"boot{self.boots}"
        folder.mkdir()
        with Guest(self.machine, folder) as self.guest:
            self.guest.wait_for_boot(self._boot_timeout)
            print(f"boot {self.boots} took {self.guest.booted:.1f} s", flush=True)
            yield self.guest


def machine(base: Machine, folder: Path, payload: dict[str, Path]) -> Machine:
    """Return a Debian that boots with the kernel and memory of `base`.

    `base.images.root` is from `debian_image.prepare`. `folder` is for the guest's own layer, and for the
    archive of `payload`: the files by their names in the guest's /payload.
    """
    disks = Disks(
        base.images.initramfs,
        base.images.root,
        [],
        [],
        layer=folder / "layer.qcow2",
        payload=folder / "payload.tar",
    )
    backing = ["-b", str(disks.root.absolute()), "-F", "raw"]
    image.output("qemu-img", "create", "-q", "-f", "qcow2", *backing, str(disks.layer))
    with tarfile.open(disks.payload, "w") as archive:
        for name, path in payload.items():
            archive.add(path, f"payload/{name}")
    drive = f"driver=raw,node-name=payload,read-only=on,file.driver=file,file.filename={disks.payload}"
    return DebianMachine(
        **{
            **vars(base),
            "images": disks,
            "devices": [*base.devices, "-blockdev", drive, "-device", "virtio-blk-pci,drive=payload"],
            "parameters": PARAMETERS,
        }
    )


def wheel(folder: Path) -> Path:
    """Return the one wheel in a folder; raises VmError."""
    wheels = sorted(folder.glob("zramd-*.whl"))
    if len(wheels) != 1:
        raise VmError(f"{folder} has {len(wheels)} wheels of zramd: it must have one")
    return wheels[0]
