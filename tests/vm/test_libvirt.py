"""What docs/guests.md and docs/network.md tell users of libvirt, held against libvirt's own schema and virsh.

A guest that swaps to such a disk is in test_vm_swap.py.
"""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm import libvirt

SOCKET = Path("/run/zramd/guest0/nbd.sock")
NAME = "guest0"


def options(words: list[str]) -> dict[str, list[Any]]:
    """qemu's options of a kind, as objects where they are JSON."""
    found: dict[str, list[Any]] = {}
    for option, value in itertools.pairwise(words):
        if option in ("-blockdev", "-device"):
            found.setdefault(option, []).append(json.loads(value) if value.startswith("{") else value)
    return found


@pytest.fixture(scope="module")
def described() -> dict[str, str]:
    return libvirt.domains(SOCKET, NAME)


def test_the_words_for_qemu(described: dict[str, str]) -> None:
    assert libvirt.faults(described["commandline"]) == ""
    made = options(libvirt.qemu_words(described["commandline"]))
    assert (
        f"driver=nbd,node-name=zram0,server.type=unix,server.path={SOCKET},export={NAME},"
        "discard=unmap,reconnect-delay=30"
    ) in made["-blockdev"]
    assert f"virtio-blk-pci,drive=zram0,serial=zramd-{NAME}" in made["-device"]


def test_the_disk(described: dict[str, str]) -> None:
    """All that a libvirt before reconnect has against it is reconnect."""
    knows = libvirt.faults(described["disk"]) == ""
    before = described["disk"].replace("<reconnect delay='30'/>", "")
    assert before != described["disk"]
    assert libvirt.faults(before) == ""
    made = options(libvirt.qemu_words(described["disk"]))
    (disk,) = (each for each in made["-blockdev"] if each["driver"] == "nbd")
    assert disk["server"] == {"type": "unix", "path": str(SOCKET)}
    assert (disk["export"], disk["discard"]) == (NAME, "unmap")
    assert disk.get("reconnect-delay") == (30 if knows else None)
    (device,) = (each for each in made["-device"] if each["driver"] == "virtio-blk-pci")
    assert device["serial"] == f"zramd-{NAME}"


def test_the_disk_of_another_machine() -> None:
    """libvirt makes the same of it, but with TCP and the guests' certificate."""
    disk = libvirt.disk_in((libvirt.PAGE.parent / "network.md").read_text())
    description = libvirt.DOMAIN.format(space="", disk=disk, more="")
    assert libvirt.faults(description.replace("    <reconnect delay='120'/>\n", "")) == ""
    words = libvirt.qemu_words(description)
    (made,) = (each for each in options(words)["-blockdev"] if each["driver"] == "nbd")
    assert made["server"] == {"type": "inet", "host": "memory1", "port": "10809"}
    assert (made["export"], made["discard"]) == ("guest1@235d721d459fd7389bd28d6881a094e9", "unmap")
    (secret,) = (json.loads(word) for word in words if '"tls-creds' in word and '"qom-type"' in word)
    assert (secret["qom-type"], secret["id"]) == ("tls-creds-x509", made["tls-creds"])
    assert (secret["endpoint"], secret["verify-peer"]) == ("client", True)


def test_a_wrong_description_is_found(described: dict[str, str]) -> None:
    """The check can fail."""
    assert "disk" in libvirt.faults(described["commandline"].replace("<vcpu>", "<disk/><vcpu>"))


def test_words_for_a_guest_here(described: dict[str, str]) -> None:
    words = libvirt.disk_words(SOCKET, NAME)
    made = options(words)
    assert set(made) == {"-blockdev", "-device"}
    assert len(made["-device"]) == 1
    assert "addr" not in str(made["-device"])
    assert len(words) == 2 * sum(map(len, made.values()))
