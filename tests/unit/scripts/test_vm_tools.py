"""The parts of the virtual machine's harness that need no virtual machine."""

import lzma
import platform
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "lib"))

from vm import attach, buddy, image, kernel, packages, plan, probe, report, requests
from vm.errors import VmError
from vm.guest import Guest, Machine

MIB = 1 << 20


def test_cpio_is_read_by_others(tmp_path: Path) -> None:
    entries = image.initramfs_entries(b"busybox", b"#!/bin/sh\n", [("a.ko", b"module a"), ("b.ko", b"b")])
    regular = [entry for entry in entries if not entry.device[0]]
    (tmp_path / "archive").write_bytes(image.cpio(regular))
    listed = subprocess.run(["file", "-b", tmp_path / "archive"], capture_output=True, text=True, check=True)
    assert "cpio archive" in listed.stdout
    archive = image.cpio(entries)
    assert archive.startswith(b"070701")
    assert len(archive) % 4 == 0
    assert archive.index(b"modules/a.ko") < archive.index(b"modules/b.ko") < archive.index(b"TRAILER!!!")
    assert b"a.ko\nb.ko\n" in archive


def test_modules_are_loaded_after_what_they_need() -> None:
    needs = {"blk": ["virtio", "ring"], "virtio": ["ring"], "ring": []}
    assert kernel.load_order(["blk", "virtio"], needs.__getitem__) == ["ring", "virtio", "blk"]
    assert kernel.module_depends(b"x\0depends=a,b-c\0y") == ["a", "b-c"]
    assert kernel.module_depends(b"x\0depends=\0y") == []


def test_guests_here_have_the_disk_that_the_page_describes() -> None:
    """Every word, but for the name of the device and its socket."""
    page = (Path(__file__).resolve().parents[3] / "docs/guests.md").read_text()
    written = re.findall(r"^ +-(blockdev|device) (\S+)", page, re.MULTILINE)
    words = attach.disk_words(Path("/run/zramd/swap0/nbd.sock"), "swap0")
    assert written == [("blockdev", words[1]), ("device", words[3])]
    assert (words[0], words[2]) == ("-blockdev", "-device")


def test_kernel_package() -> None:
    depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-50-cloud-amd64\n"
    assert kernel.image_package(depends) == "linux-image-6.1.0-50-cloud-amd64"
    depends = "linux-image-arm64-16k\n  Depends: linux-image-6.12.117+deb13-arm64-16k\n"
    assert kernel.image_package(depends) == "linux-image-6.12.117+deb13-arm64-16k"
    assert kernel.image_package("nothing\n") is None


@pytest.mark.parametrize("architecture", ["", "arm64"])
def test_qemu_is_the_one_of_the_architecture(architecture: str, tmp_path: Path) -> None:
    """Each has the kernel's console, and three ports more that the guest knows by the same names."""
    booted = kernel.Kernel("6.12", tmp_path, tmp_path, kernel.Flavour(architecture=architecture))
    images = image.Images(tmp_path, tmp_path, [], [])
    command = Machine(booted, images, 256 * MIB, 1, "tcg").command(tmp_path, [10, 11, 12, 13])
    assert command[0] == ("qemu-system-aarch64" if architecture else "qemu-system-x86_64")
    assert (
        f"console={'ttyAMA0' if architecture else 'ttyS0'}" in command[command.index("-append") + 1].split()
    )
    ports = command.count("-serial") - 1 or command[command.index("-device") + 1].count("=tty") - 1
    assert ports == 3


def test_packages_of_another_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of this machine's suite, too, they have lists of their own."""
    monkeypatch.setattr(packages, "run", lambda *command, cwd: "Debian http://mirror.invalid/debian/\n")
    suite = platform.freedesktop_os_release()["VERSION_CODENAME"]
    other = packages.source(suite, tmp_path, "arm64")
    assert other.own_lists
    lists = f"Dir::State::lists={tmp_path}/apt-{suite}-arm64/lists"
    assert {"APT::Architecture=arm64", "APT::Architectures=arm64", lists} < {*other.options}


def test_missing_module(tmp_path: Path) -> None:
    with pytest.raises(VmError, match="has no module 'nbd'"):
        kernel.Kernel("6.1", tmp_path, tmp_path).module_files(["nbd"])


def test_modules_of_a_kernel_that_packs_some_and_has_others_built_in(tmp_path: Path) -> None:
    """As Debian 13's has them."""
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    (tmp_path / "nbd.ko.xz").write_bytes(lzma.compress(b"\0depends=net-failover\0nbd"))
    (tmp_path / "net_failover.ko").write_bytes(b"\0depends=\0failover")
    files = kernel.Kernel("6.12", tmp_path, tmp_path).module_files(["virtio_pci", "nbd"])
    assert files == [tmp_path / "net_failover.ko", tmp_path / "nbd.ko"]
    assert files[1].read_bytes().endswith(b"nbd")
    assert kernel.Kernel("6.12", tmp_path, tmp_path).module_files(["nbd"]) == files


def test_modules_that_a_kernel_has_or_lacks(tmp_path: Path) -> None:
    """Debian 12's lacks ublk_drv, Debian 13's has it packed."""
    booted = kernel.Kernel("6.12", tmp_path, tmp_path)
    assert not booted.has(["ublk_drv"])
    (tmp_path / "ublk_drv.ko.xz").write_bytes(lzma.compress(b"\0depends=\0"))
    (tmp_path / "modules.builtin").write_text("kernel/drivers/virtio/virtio_pci.ko\n")
    assert booted.has(["ublk_drv", "virtio_pci"])
    assert not booted.has(["ublk_drv", "nbd"])


def test_packages_of_another_suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They come from the mirror that this machine's Debian comes from, and its own lists stay as they are."""
    monkeypatch.setattr(platform, "freedesktop_os_release", lambda: {"VERSION_CODENAME": "bookworm"})
    known = "Extra http://mirror.invalid/extra/\nDebian http://mirror.invalid/debian/\n"
    monkeypatch.setattr(packages, "run", lambda *command, cwd: known)
    assert packages.source("bookworm", tmp_path) is packages.source("", tmp_path) is packages.MACHINE
    other = packages.source("trixie", tmp_path)
    place = tmp_path / "apt-trixie"
    assert (place / "sources.list").read_text() == "deb http://mirror.invalid/debian/ trixie main\n"
    assert {f"Dir::Etc::sourcelist={place}/sources.list", f"Dir::State::lists={place}/lists"} < {
        *other.options
    }

    monkeypatch.setattr(packages, "run", lambda *command, cwd: "Ubuntu http://mirror.invalid/ubuntu/\n")
    with pytest.raises(VmError, match="apt knows no mirror of Debian here"):
        packages.source("trixie", tmp_path)


STRACE = """% time     seconds  usecs/call     calls    errors syscall
------ ----------- ----------- --------- --------- ----------------
 59.00    0.100000         166       602        12 futex
 41.00    0.070000         159       440           sendto
------ ----------- ----------- --------- --------- ----------------
100.00    0.170000         163      1042        12 total
"""


def test_system_calls() -> None:
    assert requests.system_calls(STRACE) == {"futex": 602, "sendto": 440}
    assert requests.system_calls("") == {}


def test_workload_is_more_than_fits() -> None:
    for mode in plan.MODES:
        this = plan.Plan(mode, plan.default_memory(mode, False))
        available = this.memory - 64 * MIB
        assert this.workload(available) * MIB > available * (0.99 if mode == "local" else 1.9)
    local = plan.Plan("local", 384 * MIB)
    assert local.zramd_settings["swap"] == "local"
    # What is compared is alike, and what is asked for is done.
    kernel_zram = plan.Plan(plan.KERNEL_ZRAM, plan.default_memory(plan.KERNEL_ZRAM, False))
    assert kernel_zram.memory == local.memory
    assert kernel_zram.workload(320 * MIB) == local.workload(320 * MIB)
    assert kernel_zram.device_size == local.device_size
    # By ublk the guest is at its limit, unless a new server has to find memory there.
    by_ublk = plan.Plan(plan.UBLK, plan.default_memory(plan.UBLK, True))
    available = by_ublk.memory - 144 * MIB
    assert by_ublk.workload(available) * MIB > 1.1 * available
    without, beside = (replace(by_ublk, kill=5, standby=standby) for standby in (False, True))
    assert without.workload(available) < beside.workload(available) == by_ublk.workload(available)
    asked = plan.Plan("local", 384 * MIB, workload_bytes=100 * MIB, size=200 * MIB)
    assert (asked.workload(320 * MIB), asked.device_size) == (100, 200 * MIB)


BUDDYINFO = """Node 0, zone      DMA      4      0      0      0      1    0    0    0    0      0      2
Node 0, zone    DMA32    100     50      0      0     10    0    0    0    0      3      1
"""


def test_free_memory_by_the_length_of_its_blocks() -> None:
    found = buddy.parse(BUDDYINFO)
    assert found.blocks == (104, 50, 0, 0, 11, 0, 0, 0, 0, 3, 3)
    pages = 104 + 100 + 11 * 16 + 3 * 512 + 3 * 1024
    assert found.free == pages * 4096
    assert found.small == round(100 * (pages - 204) / pages, 1)
    assert found.huge == round(100 * 9 * 512 / pages, 1)
    assert found.huge_pages == 9
    larger = buddy.parse(BUDDYINFO, 16384)
    # Blocks of order 9 and 10 then have 8 and 16 MiB.
    assert (larger.free, larger.huge_pages) == (4 * found.free, 3 * 4 + 3 * 8)
    full = buddy.parse("Node 0, zone    DMA32 0 0 0 0 0 0 0 0 0 0 0\n")
    assert (full.free, full.small, full.huge, full.huge_pages) == (0, 0, 0, 0)


def moment(frag_ratio: float) -> report.Moment:
    guest = buddy.parse(BUDDYINFO)
    return report.Moment(MIB, 2 * MIB, frag_ratio, 4 * MIB, 7, 3 * MIB, 9 * MIB, 5, 6, 8 * MIB, 4096, guest)


def result() -> report.Result:
    found = report.Result("qemu", settings={"kernel": "6.1", "accel": "tcg", "command": "--attach qemu"})
    found.moments = {"full": moment(98.0), "before": moment(80.0), "after": moment(97.0)}
    found.compaction = {"num_migrated": 5, "pages_freed": 3, "seconds": 0.1}
    found.add_phase({"written": 10, "verified": 20, "bad": 0, "slowest": 0.5})
    return found


def test_a_run_without_expectations_is_not_ok() -> None:
    found = result()
    assert not found.ok
    found.expect("something", True)
    assert found.ok
    found.expect("another", False, "why")
    assert not found.ok
    assert "FAILED  another (why)" in report.text(found)


def test_report() -> None:
    text = report.text(result())
    assert "20 of 10 written, 0 bad" in text
    assert "num_migrated 5, pages_freed 3" in text
    assert "4.0 MiB for 3.0 MiB, 1.33 for 1" in text
    assert "after freeing" in text
    assert " 92.4 %         9" in text


def test_markdown_replaces_its_own_place(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    found = result()
    report.write_markdown(path, found)
    once = path.read_text()
    report.write_markdown(path, found)
    assert path.read_text() == once
    found.mode = "local"
    report.write_markdown(path, found)
    assert path.read_text().startswith(once)
    assert path.read_text().count("<!-- /local -->") == 1


def test_a_server_on_standby_has_a_report_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "report.md"
    found = result()
    for more in ({}, {"standby MiB": 44}):
        found.kills = {"by": "kill", **more}
        report.write_markdown(path, found)
    assert "<!-- /qemu-kill -->" in path.read_text()
    assert "<!-- /qemu-kill-standby -->" in path.read_text()


def test_live_line() -> None:
    beat = {"SwapTotal": 8192, "SwapFree": 4096, "MemFree": 5 * MIB, "pswpout": 7, "pswpin": 1}
    assert report.live_line(beat, None, {}) == "guest: 5 MiB free, 1 pages swapped, out 0/s, in 0/s"
    stats = {"objects_migrated": 3, "pages_compacted": 2, "orig_data_size": MIB, "mem_used_total": MIB}
    stats["frag_ratio"] = 50
    last = {**beat, "pswpout": 3, "zramd": {**stats, "objects_migrated": 1}}
    line = report.live_line(beat, stats, last)
    assert "out 4/s" in line
    assert "compacting: 2 objects moved, 0 pages freed" in line


def test_pauses() -> None:
    """Only what waited while the connection was away counts, for the device that is asked for."""
    lines = [
        "[   10.500000] zramd: nbd0: connected to zram0 again after 0.200 s",
        "[   15.000000] zramd: nbd1: connected to zram1 again after 0.200 s",
        "[   20.000000] zramd: nbd0: connected to zram0 again after 0.100 s",
    ]
    slow = [[9.0, 1.2], [10.2, 0.4], [10.4, 0.3], [14.9, 3.0], [18.0, 1.5]]
    assert probe.pauses(lines, "zram0", {"slow": slow}) == [(0.2, 0.4), (0.1, 0.0)]


class Shell:
    """Stands for a machine: a shell takes the commands. `oopses` are what each boot before ends with."""

    def __init__(self, folder: Path, accel: str, *oopses: str) -> None:
        self.accel = accel
        self.patience = 1.0
        self.is_arm64 = False
        self.boots = 0
        self._folder = folder
        self._oopses = oopses

    def command(self, console: Path, channels: list[int]) -> list[str]:
        agent, monitor = channels[:2]
        boot = f"""echo '{{"time": 1}}' >&{monitor}; exec sh <&{agent} >&{agent}"""
        if self.boots < len(self._oopses):
            boot = f"echo '{self._oopses[self.boots]}'"
        self.boots += 1
        return ["bash", "-c", f"exec >{console}; {boot}"]  # sh knows no descriptor above 9


INT3 = "[ 2.8] Oops: int3: 0000 [#2] PREEMPT SMP"


@pytest.mark.parametrize(
    ("accel", "oopses", "boots"),
    [
        ("tcg", [], 1),
        ("tcg", [INT3], 2),
        ("tcg", [INT3] * 2, 3),
        ("tcg", [INT3] * 3, -3),
        ("tcg", ["Kernel panic"], -1),
        ("kvm", [INT3], -1),
    ],
)
def test_a_guest_whose_emulation_failed_boots_again(
    accel: str, oopses: list[str], boots: int, tmp_path: Path
) -> None:
    """And so it does for nothing else; `boots`: negative, it does not come up."""
    machine = Shell(tmp_path, accel, *oopses)
    with Guest(machine, tmp_path) as guest:  # type: ignore[arg-type]
        if boots > 0:
            guest.wait_for_boot()
            assert guest.run("echo here") == "here"
        else:
            with pytest.raises(VmError, match="while the guest booted"):
                guest.wait_for_boot()
    assert machine.boots == abs(boots)
