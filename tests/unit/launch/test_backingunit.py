"""The drop-in that lets a service use its backing: what is in it, and when it goes."""

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from zramd.errors import ConfigError, UnitsError
from zramd.launch import backingunit

DROP_IN = "etc/systemd/system/zramd@zram0.service.d/zramd-backing.conf"
SERVICE = Path(__file__).parents[3] / "systemd/zramd@.service"


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZRAMD_ROOT", str(tmp_path))
    (tmp_path / "etc").mkdir()
    configure(tmp_path, "writeback-device = /dev/disk/by-partuuid/2d54ffa0-01")
    return tmp_path


def configure(root: Path, line: str) -> None:
    (root / "etc/zramd.conf").write_text(f"[zram0]\nzram-size = 64\nattach = no\n{line}\n")


def test_a_device(root):
    assert backingunit.allow("zram0") == [f"wrote {root}/{DROP_IN}", "next: systemctl restart zramd@zram0"]
    lines = (root / DROP_IN).read_text().splitlines()
    assert lines[0].startswith("# Written by 'zramd backing allow'.")
    assert lines[1:] == [
        "[Unit]",
        "Requires=dev-disk-by\\x2dpartuuid-2d54ffa0\\x2d01.device",
        "After=dev-disk-by\\x2dpartuuid-2d54ffa0\\x2d01.device "
        "blockdev@dev-disk-by\\x2dpartuuid-2d54ffa0\\x2d01.target",
        "[Service]",
        "PrivateDevices=no",
        "DevicePolicy=closed",
        "DeviceAllow=/dev/disk/by-partuuid/2d54ffa0-01 rw",
    ]
    assert (root / DROP_IN).stat().st_mode & 0o777 == 0o644


def test_what_was_allowed_before_is_not_any_more(root):
    backingunit.allow("zram0")
    configure(root, "backing = /srv/zram0.backing")
    backingunit.allow("zram0")
    text = (root / DROP_IN).read_text()
    assert text.splitlines()[1:] == [
        "[Unit]",
        "RequiresMountsFor=/srv/zram0.backing",
        "[Service]",
        "ReadWritePaths=/srv/zram0.backing",
    ]
    configure(root, "")
    assert backingunit.allow("zram0") == [f"removed {root}/{DROP_IN}: zram0 has no backing"]
    assert not (root / DROP_IN).parent.exists()
    assert backingunit.allow("zram0") == ["zram0 has no backing: there is nothing to allow"]


def test_two_slashes_are_one(root):
    configure(root, "backing = //dev//sdb1")
    backingunit.allow("zram0")
    assert "DeviceAllow=/dev/sdb1 rw\n" in (root / DROP_IN).read_text()


def test_a_link_to_a_device(loop_device, tmp_path):
    """A unit knows it by its name in /dev, of which that one is kept that the next boot has, too."""
    (tmp_path / "disk").symlink_to(loop_device)
    (tmp_path / "folder").symlink_to("/dev")
    (tmp_path / "again").symlink_to("./folder/../dev/" + os.path.basename(loop_device))
    for name in ("disk", f"folder/{os.path.basename(loop_device)}", "again"):
        assert backingunit.in_dev(f"{tmp_path}/{name}") == loop_device
    stable = next(
        (link for link in Path("/dev/block").glob("*") if link.resolve() == Path(loop_device)), None
    )
    if stable is not None:
        (tmp_path / "stable").symlink_to(stable)
        assert backingunit.in_dev(f"{tmp_path}/stable") == str(stable)
    (tmp_path / "file").write_text("")
    for path in (f"{tmp_path}/file", f"{tmp_path}/none", "/dev/none", loop_device):
        assert backingunit.in_dev(path) == path
    os.mknod(tmp_path / "node", 0o600 | stat.S_IFBLK, os.stat(loop_device).st_rdev)
    with pytest.raises(UnitsError, match=r"node' is a block device outside of /dev: give the backing by its"):
        backingunit.in_dev(f"{tmp_path}/node")


@pytest.mark.parametrize(
    "path", ["/dev/x y", "/dev/a%b", "/srv/a\tb", "/dev/disk/by-label/a\\x20b", "/srv/é"]
)
def test_a_path_that_a_unit_would_read_otherwise(root, path):
    configure(root, f"backing = {path}")
    with pytest.raises(UnitsError, match="has characters that a unit cannot have in a path"):
        backingunit.allow("zram0")
    assert not (root / DROP_IN).exists()


def test_a_device_that_is_not_configured(root):
    with pytest.raises(ConfigError, match="there is no device 'zram1'"):
        backingunit.allow("zram1")


def test_what_lies_in_the_way(root):
    (root / "etc/systemd").write_text("no folder")
    with pytest.raises(UnitsError, match=r"zramd-backing\.conf' cannot be written: "):
        backingunit.allow("zram0")


@pytest.mark.skipif(shutil.which("systemd-escape") is None, reason="systemd is not installed")
@pytest.mark.parametrize(
    "path", ["/dev/sdb1", "/dev/disk/by-id/wwn-0x5000c500a1-part1", "/dev/mapper/vg-swap", "/dev//x_y:z+@=.w"]
)
def test_systemd_calls_the_device_so(path):
    done = subprocess.run(["systemd-escape", "--path", path], capture_output=True, text=True, check=True)
    assert backingunit.unit_name(path) == done.stdout.strip()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("path", ["/dev/sdb1", "/srv/backing"])
def test_systemd_understands_it(tmp_path, path):
    """It has no word against the unit with the drop-in that it has not against the unit alone."""
    said = []
    for text in ("", backingunit.drop_in_for(path)):
        folder = tmp_path / (f"with{len(said)}")
        (folder / "zramd@x.service.d").mkdir(parents=True)
        unit = folder / "zramd@x.service"
        unit.write_text(SERVICE.read_text().replace("/usr/local/bin/zramd", "/bin/true").replace("%i", "x"))
        (folder / "zramd@x.service.d/zramd-backing.conf").write_text(text)
        words = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        said.append((done.stdout + done.stderr).replace(str(folder), ""))
    assert said[0] == said[1]
