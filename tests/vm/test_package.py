"""The Debian package on Debian 12 and 13 with systemd: services are served, upgraded under load, and removed.

scripts/package --check tries all that needs no systemd, on bare systems.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import zramd

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from vm import debian, debian_image, image, kernel, probe
from vm.guest import Guest, Machine, choose_accel

ROOT = Path(__file__).resolve().parents[2]
# slow: two Debians with systemd; scripts/package --check is the short one
pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]

MIB = 1 << 20
BOOT_TIMEOUT = 240.0  # seconds
SLOW = 300.0
OLDER = "0.0.1"
CONFIGURATION = "[zram0]\\nzram-size = ram * 2\\n[guest0]\\nzram-size = 64\\nattach = no\\nstate = systemd\\n"


@pytest.fixture(scope="module", params=kernel.SUITES)
def computer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A machine that is off, with the package, and an older one, on its second disk."""
    folder = tmp_path_factory.mktemp("package")
    subprocess.run([ROOT / "scripts/package"], check=True)
    (package,) = (ROOT / "build").glob("zramd_*.deb")
    cloud = kernel.prepare(ROOT / "build/vm", request.param)
    small = image.prepare(ROOT / "build/vm", cloud, Path(zramd.__file__).parent.parent)
    accel = choose_accel(Machine(cloud, small, 256 * MIB, 2, "tcg"), folder)
    images = debian_image.prepare(ROOT / "build/vm", request.param, cloud, small)
    base = Machine(cloud, images, 256 * MIB, 2, accel)
    return debian.machine(base, folder, {"zramd.deb": package, "older.deb": older(package, folder)})


def older(package: Path, folder: Path) -> Path:
    """The package as one of a version before."""
    tree = folder / "older"
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    for place, line, instead in (
        ("DEBIAN/control", r"^Version: .*", f"Version: {OLDER}"),
        ("usr/lib/python3/dist-packages/zramd/__init__.py", r"^__version__ = .*", f'__version__ = "{OLDER}"'),
    ):
        path = tree / place
        text, count = re.subn(line, instead, path.read_text(), flags=re.MULTILINE)
        assert count == 1
        path.write_text(text)
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", tree, folder / "older.deb"], check=True)
    return folder / "older.deb"


def pid(guest: Guest, name: str) -> str:
    return guest.run(f"cat /run/zramd/{name}/pid").strip()


def test_services_through_an_upgrade_and_a_removal(computer: Machine, tmp_path: Path) -> None:
    with Guest(computer, tmp_path) as guest:
        guest.wait_for_boot(BOOT_TIMEOUT)
        guest.run("tar -xf /dev/vdb -C /", SLOW)
        guest.run("dpkg -i /payload/older.deb", SLOW)
        assert guest.run("zramd --version", SLOW).strip() == f"zramd {OLDER}"
        guest.run(f"printf '{CONFIGURATION}' >/etc/zramd.conf")
        guest.run("systemctl enable --quiet --now zramd@zram0 zramd@guest0", SLOW)
        guest.run("systemctl start zramd-attach@zram0", SLOW)
        device = guest.run("zramd attach guest0", SLOW).strip()
        upgraded(guest, device)
        removed(guest, device)


def upgraded(guest: Guest, device: str) -> None:
    """What has a state is served by the new version, without an error; what is swapped to goes on."""
    swapped, kept = pid(guest, "zram0"), pid(guest, "guest0")
    swap = guest.run("cat /proc/swaps")
    assert "/dev/nbd0" in swap
    probe.start(guest, "guest0", device)
    time.sleep(1)
    said = guest.run("dpkg -i /payload/zramd.deb 2>&1", SLOW)
    assert "guest0        restarted by 'systemctl restart zramd@guest0.service'" in said
    assert "zram0         goes on as it is: it has no state" in said
    time.sleep(5)
    found = probe.stop(guest, "guest0")
    assert found["bad"] == []
    assert found["done"] > 50
    assert pid(guest, "zram0") == swapped
    assert pid(guest, "guest0") != kept
    assert (
        guest.run("systemctl is-active zramd@zram0 zramd-attach@zram0 zramd@guest0").split() == ["active"] * 3
    )
    assert f'"version": "{zramd.__version__}"' in guest.run("zramd dump guest0", SLOW)
    guest.run("zramd check guest0", SLOW)


def removed(guest: Guest, device: str) -> None:
    """Refused while something is used; then nothing is left but what the administrator wrote."""
    for use, end in (
        (
            r"this machine swaps to /dev/nbd\d+: run 'systemctl disable --now zramd@zram0'",
            "systemctl disable --now zramd@zram0",
        ),
        (f"{device} is attached: run 'zramd detach guest0' first", "zramd detach guest0"),
    ):
        status, said = guest.try_run("dpkg --remove zramd 2>&1", SLOW)
        assert status == 1
        assert re.search(f"zramd is not removed: {use}", said), said
        assert guest.run("zramd --version", SLOW).strip() == f"zramd {zramd.__version__}"
        guest.run(end, SLOW)
    guest.run("dpkg --remove zramd", SLOW)
    assert guest.run("pgrep 'zramd|nbdkit'; true") == ""
    guest.run("dpkg --purge zramd", SLOW)
    names = "-name '*zramd*' -not -path '/var/log/*' -not -path '/var/lib/systemd/*'"
    assert guest.run(f"find / -xdev -path /payload -prune -o \\( {names} \\) -print", SLOW).split() in (
        ["/etc/zramd.conf", "/opt/zramd"],
        ["/opt/zramd", "/etc/zramd.conf"],
    )
    assert guest.run("systemctl --failed -q; systemctl list-units --plain -q 'zramd*'").strip() == ""
