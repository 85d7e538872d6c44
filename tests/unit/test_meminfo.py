"""zramd.meminfo: /proc/meminfo, read in one place."""

from pathlib import Path

from zramd import meminfo


def test_amounts_are_bytes(tmp_path: Path) -> None:
    file = tmp_path / "meminfo"
    file.write_bytes(
        b"MemTotal:       2048 kB\nHugePages_Total:   3\nOdd\xff: 1 kB\nMemTotalX: 5 kB\nBad: x kB\n"
    )
    assert meminfo.read("MemTotal", str(file)) == 2 << 20
    for name in ("HugePages_Total", "Bad", "Mem", "MemFree"):
        assert meminfo.read(name, str(file)) is None


def test_this_machine() -> None:
    total, available = meminfo.read("MemTotal"), meminfo.read("MemAvailable")
    assert total is not None
    assert available is not None
    assert 1 << 20 < available <= total
