"""libvirt's part of a guest: the disk as docs/guests.md describes it, and what virsh makes of it for qemu.

No daemon is needed: virsh has the driver of qemu within itself, and as a user who is not root that driver
touches nothing but a folder of its own.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
import subprocess
import tempfile
from pathlib import Path

from vm.errors import VmError

PAGE = Path(__file__).parents[3] / "docs/guests.md"
NOBODY = 65534
DOMAIN = """<domain type='qemu'{space}>
  <name>guest</name>
  <memory unit='MiB'>256</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='pc'>hvm</type></os>
  <devices>
    <emulator>/usr/bin/qemu-system-x86_64</emulator>
{disk}
  </devices>
{more}
</domain>
"""
_SOCKET = "/run/zramd-guests/swap0.sock"  # the documented one, and the name of its device
_NAME = "swap0"


def documented() -> tuple[str, str]:
    """Return two pieces of XML of docs/guests.md: the disk, and the words for qemu of an older libvirt."""
    text = PAGE.read_text()
    words = re.search(r"^ *<qemu:commandline>.*?</qemu:commandline>$", text, re.MULTILINE | re.DOTALL)
    if not words:
        raise VmError(f"{PAGE} has no words for an older libvirt")
    return disk_in(text), words[0]


def disk_in(page: str) -> str:
    """Return the XML of the disk that a page's text has; raises VmError."""
    disk = re.search(r"^<disk .*?^</disk>$", page, re.MULTILINE | re.DOTALL)
    if not disk:
        raise VmError("the page has no disk for libvirt")
    return disk[0]


def domains(socket: Path, name: str) -> dict[str, str]:
    """Return the descriptions of a guest with the disk `name` at `socket`: as a disk, and by qemu's words."""
    disk, words = documented()
    space = " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'"
    found = {
        "disk": DOMAIN.format(space="", disk=disk, more=""),
        "commandline": DOMAIN.format(space=space, disk="", more=words),
    }
    for way, text in found.items():
        found[way] = str(socket).join(part.replace(_NAME, name) for part in text.split(_SOCKET))
    return found


def faults(description: str) -> str:
    """Return what libvirt's schema has against the description of a guest, '' if nothing. Raises VmError."""
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(description)
        file.flush()
        done = _run(["virt-xml-validate", file.name, "domain"])
    return "" if done.returncode == 0 else done.stderr.strip() or done.stdout.strip()


def qemu_words(description: str) -> list[str]:
    """Return the command line that virsh makes of a description, from qemu's name on. Raises VmError."""
    with tempfile.TemporaryDirectory(prefix="zramd-libvirt-") as folder:
        file = Path(folder, "guest.xml")
        file.write_text(description)
        os.chmod(folder, 0o755)
        own = Path(folder, "own")
        own.mkdir()
        words = ["virsh", "-c", f"qemu:///embed?root={own}", "domxml-to-native", "qemu-argv", str(file)]
        if os.geteuid() == 0:
            os.chown(own, NOBODY, NOBODY)
            words = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *words]
        homes = dict.fromkeys(("HOME", "XDG_RUNTIME_DIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME"), str(own))
        done = _run(words, homes)
    if done.returncode:
        raise VmError(f"virsh cannot make a command line of it: {done.stderr.strip()}")
    made = shlex.split(done.stdout)
    return made[next(at for at, word in enumerate(made) if word.endswith("/qemu-system-x86_64")) :]


def disk_words(socket: Path, name: str) -> list[str]:
    """Return qemu's -blockdev and -device for the disk `name` at `socket`, as virsh makes them here.

    Where its schema does not know the disk as documented (Debian 12 has no reconnect), it is the other way.
    """
    ways = domains(socket, name)
    words = qemu_words(ways["commandline" if faults(ways["disk"]) else "disk"])
    options = list(itertools.pairwise(words))
    nodes = [[option, value] for option, value in options if option == "-blockdev"]
    devices = [[option, _elsewhere(value)] for option, value in options if "virtio-blk-pci" in value]
    return [word for pair in (*nodes, *devices) for word in pair]


def _elsewhere(device: str) -> str:
    """Return a device without its place on the bus, which is that of another one in the guests here."""
    return re.sub(r'"(bus|addr|bootindex)":("[^"]*"|\d+),', "", device)


def _run(words: list[str], more: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C", **(more or {})}
    try:
        return subprocess.run(
            words,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    except FileNotFoundError:
        raise VmError(f"{words[0]} is not installed: scripts/test --vm installs it") from None
