"""/proc/swaps and its kin."""

import os
from pathlib import Path

import pytest

from zramd.errors import AttachError
from zramd.kernel import swap

SWAPS = """Filename\tType\tSize\tUsed\tPriority
/dev/vda2                               partition\t1000\t\t0\t\t-2
/swap\\040file                           file\t2048\t1024\t-3
/dev/nbd0                               partition\t1048572\t524288\t100
"""


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that stands for /proc, with programs in bin."""
    for name, text in (
        ("SWAPS", SWAPS),
        ("MEMINFO", "MemFree:  1 kB\nMemAvailable:     600000 kB\n"),
        ("MOUNTS", "/dev/nbd0p1 /a\\040b ext4 rw 0 0\n/dev/nbd01 /c ext4 rw 0 0\n/dev/nbd1 /d ext4 rw 0 0\n"),
    ):
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(swap, name, str(tmp_path / name))
    return tmp_path


def test_swaps(system: Path) -> None:
    assert swap.swaps() == [
        swap.Swap("/dev/vda2", 1024000, 0, -2),
        swap.Swap("/swap file", 2 << 20, 1 << 20, -3),
        swap.Swap("/dev/nbd0", 1048572 << 10, 512 << 20, 100),
    ]
    found = swap.find("/dev/nbd0")
    assert found is not None
    assert found.used == 512 << 20
    assert swap.find("/dev/nbd1") is None


AREAS = """Filename\tType\tSize\tUsed\tPriority
/dev/nbd0p2 partition 1000 300 99
/dev/nbd0p1 partition 1000 200 100
/dev/nbd01 partition 1000 50 7
/dev/nbd1p10 partition 1000 1 -2
"""


def test_a_device_is_all_of_its_areas(system: Path) -> None:
    (system / "SWAPS").write_text(AREAS)
    assert [area.path for area in swap.areas("/dev/nbd0")] == ["/dev/nbd0p1", "/dev/nbd0p2"]
    assert swap.find("/dev/nbd0") == swap.Swap("/dev/nbd0", 2000 << 10, 500 << 10, 100)
    assert swap.find("/dev/nbd0p1") is None
    assert swap.uses("/dev/nbd0") == [swap.SWAP, "/a b"]
    assert swap.uses("/dev/nbd1") == [swap.SWAP, "/d"]
    assert [swap.device_of(path) for path in ("/dev/nbd12p3", "/dev/nbd12", "/dev/vda2", "/swap p1")] == [
        *("/dev/nbd12", "/dev/nbd12", "/dev/vda2", "/swap p1")
    ]


def test_what_swaps_off(system: Path) -> None:
    """swapoff of the device itself would fail where its areas are swapped to."""
    (system / "SWAPS").write_text(AREAS)
    assert swap.swapoff_command(["/dev/nbd01"], "a") == "swapoff /dev/nbd01"
    assert swap.swapoff_command(["/dev/nbd0"], "a") == "zramd detach --swapoff a"
    assert swap.swapoff_command(["/dev/nbd01", "/dev/nbd1"], "a") == "zramd detach --swapoff a"


def test_this_machine() -> None:
    """The kernel that runs this test has the same format."""
    assert all(area.size > 0 and area.path.startswith("/") for area in swap.swaps())
    assert 1 << 20 < swap.available() < 1 << 50


def test_mounts(system: Path) -> None:
    assert swap.mounts("/dev/nbd0") == ["/a b"]
    assert swap.mounts("/dev/nbd1") == ["/d"]
    assert swap.mounts("/dev/nbd2") == []


def test_queue_that_is_not_there() -> None:
    with pytest.raises(AttachError, match=r"^'/sys/block/nope/queue/rotational' cannot be set to 0: no such"):
        swap.settle_queue("/dev/nope")


def test_memory_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    meminfo, setting = tmp_path / "meminfo", tmp_path / "min_free_kbytes"
    monkeypatch.setattr(swap, "MEMINFO", str(meminfo))
    monkeypatch.setattr(swap, "MIN_FREE_KBYTES", str(setting))
    meminfo.write_text("MemTotal:        1000000 kB\n")
    setting.write_text("8000\n")
    assert swap.set_memory_aside() == "vm.min_free_kbytes is 30000 now, it was 8000"
    setting.write_text("30000\n")
    assert swap.set_memory_aside() == ""
    assert setting.read_text() == "30000\n"
    setting.unlink()
    with pytest.raises(AttachError, match=r"min_free_kbytes' cannot be set to 30000: no such file"):
        swap.set_memory_aside()


def test_paths_may_have_any_byte(system: Path) -> None:
    """Any user may mount something by FUSE, on a folder of any name; the kernel escapes four characters."""
    odd = b"/\xff\xfe \xc2\xa0\r\x0b\\"
    escaped = odd.replace(b"\\", b"\\134").replace(b" ", b"\\040")
    (system / "MOUNTS").write_bytes(b"none " + odd[:3] + b" x\n/dev/nbd0 " + escaped + b" ext4 rw 0 0\n")
    assert [os.fsencode(place) for place in swap.mounts("/dev/nbd0")] == [odd]
    (system / "SWAPS").write_bytes(SWAPS.encode() + escaped + b"  file\t8\t4\t-2\n")
    assert os.fsencode(swap.swaps()[-1].path) == odd


def test_a_swap_is_not_overlooked(system: Path) -> None:
    (system / "SWAPS").write_text(SWAPS + "/dev/nbd1 partition\n")
    with pytest.raises(AttachError, match="'/dev/nbd1 partition' is not understood"):
        swap.find("/dev/nbd1")


def test_the_nbd_devices_of_a_size(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text(
        "Filename\tType\tSize\tUsed\tPriority\n"
        "/dev/vda2 partition 1000 0 -2\n/dev/nbd0p1 partition 4 0 100\n/dev/nbd0p2 partition 4 0 99\n"
        "/dev/nbd1 partition 4 0 100\n"
    )
    monkeypatch.setattr(swap, "SWAPS", str(swaps))
    monkeypatch.setattr(swap, "_size", {"/dev/nbd0": 1 << 30, "/dev/nbd1": 8192}.get)
    assert swap.nbd_devices(1 << 30) == ["/dev/nbd0"]
    assert swap.nbd_devices(4096) == []
