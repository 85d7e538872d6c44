"""Where a state lies that may be swapped out."""

import os
from pathlib import Path

import pytest

from zramd.kernel import statefs


@pytest.mark.parametrize(
    ("kind", "options", "swappable"),
    [
        ("tmpfs", "rw,size=100k", True),
        ("tmpfs", "rw,noswap,size=100k", False),
        ("tmpfs", "rw,size=100k,noswap", False),
        ("ext4", "rw", False),
    ],
)
def test_tmpfs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: str, swappable: bool
) -> None:
    device = os.stat(tmp_path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 28 0:21 / /sys rw,nosuid - tmpfs sysfs rw\n"
        f"30 28 {number} / /a\\040b rw,nodev shared:3 master:1 - {kind} none {options}\n"
    )
    monkeypatch.setattr(statefs, "MOUNTS", str(mounts))
    assert statefs.is_swappable(str(tmp_path)) is swappable
    assert statefs.is_swappable(str(tmp_path / "to be")) is swappable
    assert not statefs.is_swappable(str(tmp_path / "nothing" / "at all"))


def test_this_machine() -> None:
    """Its /dev/shm may be swapped out, unless somebody has seen to that."""
    mounts = Path(statefs.MOUNTS).read_text()
    shm = next((line for line in mounts.splitlines() if line.split()[4] == "/dev/shm"), "")
    assert statefs.is_swappable("/dev/shm") is ("- tmpfs " in shm and "noswap" not in shm)
