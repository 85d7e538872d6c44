"""The image of a Debian with systemd: made from packages, with what speaks to the host, and without zramd.

It is made once and kept by a digest of its ingredients.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from vm import image, packages
from vm.kernel import Kernel

PACKAGES = (
    "systemd",
    "systemd-sysv",  # /sbin/init, and `poweroff`
    "udev",
    "dmsetup",  # makes a disk when it is told to
    "kmod",
    "dbus",
    "nbdkit",
    "nbdkit-plugin-python",
    "python3-venv",  # an environment to install the wheel into, and its pip
    "liblz4-1",
    "util-linux",
    "procps",  # sysctl
    "libnbd-bin",  # clients of devices for other machines
    "gnutls-bin",  # makes their keys
)
MODULES = [*image.BOOT_MODULES, *image.LATER_MODULES, "dm_mod"]
VENV = "/opt/zramd"  # an empty environment, which takes a minute to make under emulation
GUEST = Path(__file__).parent / "guest_debian"
# Not shown by any test, and slow under emulation or at boot.
NEVER_STARTED = (
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "serial-getty@ttyS0.service",
)
MIB = 1 << 20


def prepare(folder: Path, suite: str, kernel: Kernel, small: image.Images) -> image.Images:
    """Return the images, made in `folder` unless they are there from the same ingredients; raises VmError.

    `suite` is Debian's name of the release, `kernel` its kernel. `small` is the small guest's with that
    kernel: its initramfs boots a Debian as well.
    """
    sources = [*sorted(GUEST.iterdir()), *sorted(image.GUEST.glob("*.[ch]")), Path(__file__)]
    digest = hashlib.sha256(f"{suite} {kernel.release}".encode())
    for path in sources:
        digest.update(f"{path.name}\0".encode() + path.read_bytes())
    root = folder / f"debian-{digest.hexdigest()[:16]}.img"
    with packages.locked(folder):
        if not root.exists():
            _build(root, suite, kernel)
        root.touch()
    return replace(small, root=root)


def _build(target: Path, suite: str, kernel: Kernel) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as name:
        stage = Path(name) / "root"
        image.output("mmdebstrap", *_options(), suite, str(stage))
        _add_modules(stage, kernel)
        image.compile_tool(stage / "bin/guest_tool")
        _add_agent(stage)
        size = sum(path.lstat().st_size + 4096 for path in stage.rglob("*"))
        partial = target.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        options = ["-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", str(stage)]
        # Room for what is installed and logged; it is a hole until then.
        image.output("mke2fs", *options, str(partial), f"{(size * 5 // 4 + 256 * MIB) // 1024}k")
        partial.rename(target)


def _options() -> Iterable[str]:
    """Yield mmdebstrap's options. Its hooks run on this machine, with the new root in $1."""
    yield from ("--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}")
    yield "--dpkgopt=path-exclude=/usr/share/doc/*"
    yield "--dpkgopt=path-exclude=/usr/share/man/*"
    yield "--dpkgopt=path-exclude=/usr/share/locale/*"
    # nbdkit's Python plugin wants boto3, for a plugin of its own that nobody here uses: 80 MB of tables.
    yield '--customize-hook=rm -rf "$1"/usr/lib/python3/dist-packages/botocore/data'
    yield '--customize-hook=rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/*'
    yield f'--customize-hook=chroot "$1" python3 -m venv {VENV}'
    yield '--customize-hook=echo zramd-test > "$1"/etc/hostname'
    # No machine id yet would mean a first boot, with presets that enable what nobody asked for.
    yield '--customize-hook=echo 5ec0ffee5ec0ffee5ec0ffee5ec0ffee > "$1"/etc/machine-id'
    yield '--customize-hook=echo "/dev/vda / ext4 noatime 0 0" > "$1"/etc/fstab'
    yield f'--customize-hook=chroot "$1" systemctl mask {" ".join(NEVER_STARTED)}'


def _add_modules(stage: Path, kernel: Kernel) -> None:
    """Add the modules that the guest loads by their names, with the tables that modprobe reads."""
    place = stage / "lib/modules" / kernel.release
    place.mkdir(parents=True)
    ublk = image.UBLK_MODULES if kernel.has(image.UBLK_MODULES) else []
    for path in kernel.module_files([*MODULES, *ublk]):
        inside = place / path.relative_to(kernel.modules)
        inside.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, inside)
    for path in kernel.modules.glob("modules.*"):
        shutil.copy2(path, place)
    image.output("chroot", str(stage), "depmod", kernel.release)


def _add_agent(stage: Path) -> None:
    shutil.copy(GUEST / "agent.sh", stage / "usr/local/lib/agent.sh")
    for unit in GUEST.glob("*.service"):
        shutil.copy(unit, stage / "etc/systemd/system")
    units = [unit.name for unit in GUEST.glob("*.service")]
    image.output("chroot", str(stage), "systemctl", "enable", *units)
