"""/proc/swaps and its kin, and the programs that change them, as far as no swap device is needed."""

import os
import threading
import time
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
    (tmp_path / "bin").mkdir()
    monkeypatch.setattr(swap, "PATH", f"{tmp_path}/bin")
    return tmp_path


def program(system: Path, name: str, script: str) -> None:
    path = system / "bin" / name
    path.write_text(f"#!/bin/bash\n{script}\n")
    path.chmod(0o755)


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


def test_this_machine() -> None:
    """The kernel that runs this test has the same format."""
    assert all(area.size > 0 and area.path.startswith("/") for area in swap.swaps())
    assert 1 << 20 < swap.available() < 1 << 50


def test_mounts(system: Path) -> None:
    assert swap.mounts("/dev/nbd0") == ["/a b"]
    assert swap.mounts("/dev/nbd1") == ["/d"]
    assert swap.mounts("/dev/nbd2") == []


def test_swapoff_is_refused_without_memory(system: Path) -> None:
    program(system, "swapoff", "exit 0")
    swap.off("/dev/nbd0")
    (system / "MEMINFO").write_text("MemAvailable: 500000 kB\n")
    with pytest.raises(
        AttachError,
        match=r"^512 MiB are swapped out to /dev/nbd0 and only 488 MiB of memory are available: end ",
    ):
        swap.off("/dev/nbd0")
    swap.off("/dev/nbd0", force=True)


def test_swapoff_of_what_is_off(system: Path) -> None:
    swap.off("/dev/nbd1")  # there is no program that could be run


def test_swapoff_tells_how_far_it_is(system: Path) -> None:
    steps = "".join(
        f"sed -i '/nbd0/s/524288/{left}/;/nbd0/s/{left * 2}/{left}/' {system}/SWAPS; sleep 0.5; "
        for left in (262144, 131072)
    )
    program(system, "swapoff", f"PATH=/usr/bin:/bin; {steps}")
    seen: list[tuple[int, int]] = []
    swap.off("/dev/nbd0", progress=lambda left, total: seen.append((left >> 20, total >> 20)))
    assert {(256, 512), (128, 512)} < set(seen)
    assert seen[-1] == (0, 512)


def test_swapoff_fails(system: Path) -> None:
    program(
        system, "swapoff", "echo 'swapoff: /dev/nbd0: swapoff failed: Cannot allocate memory' >&2; exit 255"
    )
    with pytest.raises(AttachError, match=r"^swapoff /dev/nbd0 failed: swapoff: .*: Cannot allocate memory$"):
        swap.off("/dev/nbd0")


def test_swapoff_is_ended_when_interrupted(system: Path) -> None:
    program(system, "swapoff", f"echo $$ >{system}/pid; exec /bin/sleep 60")

    def interrupt(left: int, total: int) -> None:
        if (system / "pid").exists():
            raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        swap.off("/dev/nbd0", progress=interrupt)
    assert time.monotonic() - started < 10
    assert not Path(f"/proc/{(system / 'pid').read_text().strip()}").exists()
    assert threading.active_count() == 1


def test_programs_that_fail_or_are_missing(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap, "settle_queue", lambda device: None)
    with pytest.raises(
        AttachError, match=r"^mkswap is not installed: run 'apt-get install util-linux' as root$"
    ):
        swap.on("/dev/nbd0", 1)
    program(system, "mkswap", "exit 0")
    program(
        system, "swapon", f'echo "$@" >>{system}/arguments; [ $2 != pri=5 ] || {{ echo no >&2; exit 255; }}'
    )
    swap.on("/dev/nbd0", -1)
    with pytest.raises(AttachError, match=r"^swapon /dev/nbd0 failed: no$"):
        swap.on("/dev/nbd0", 5, options="")
    assert (system / "arguments").read_text() == "-o pri=-1,discard /dev/nbd0\n-o pri=5 /dev/nbd0\n"


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
        "/dev/vda2 partition 1000 0 -2\n/dev/nbd0 partition 1048572 0 100\n/dev/nbd1 partition 4 0 100\n"
    )
    monkeypatch.setattr(swap, "SWAPS", str(swaps))
    monkeypatch.setattr(swap, "_size", {"/dev/nbd0": 1 << 30, "/dev/nbd1": 8192}.get)
    assert swap.nbd_devices(1 << 30) == ["/dev/nbd0"]
    assert swap.nbd_devices(4096) == []
