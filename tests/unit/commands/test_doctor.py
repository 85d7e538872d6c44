"""`zramd doctor`: what it finds on machines of all kinds, as files in a folder show them."""

import io
import subprocess
import sys
from pathlib import Path

import pytest

from zramd.commands import doctor, main
from zramd.contract import rundir
from zramd.control import servers
from zramd.kernel import attached, statefs, swap
from zramd.launch import installed

ROOT = Path(__file__).resolve().parents[3]


def findings(root: Path) -> dict[str, doctor.Finding]:
    looks = (doctor.kernel_nbd, doctor.local_swap, doctor.swap_settings, doctor.socket_buffers)
    return {finding.name: finding for look in looks for finding in look(str(root))}


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


GOOD = {
    "proc/sys/kernel/osrelease": "6.1.0-9-amd64\n",
    "sys/module/nbd/version": "",
    "proc/self/status": "CapEff:\t000001ffffffffff\n",
    "proc/self/limits": "Max locked memory         8388608              8388608              bytes\n",
    "proc/sys/vm/page-cluster": "0\n",
    "proc/sys/vm/swappiness": "100\n",
    "proc/sys/vm/min_free_kbytes": "65536\n",
    "proc/meminfo": "MemTotal:        2000000 kB\n",
    "proc/sys/net/core/wmem_default": "8388608\n",
    "proc/sys/net/core/wmem_max": "8388608\n",
    "sys/module/zswap/parameters/enabled": "N\n",
    "proc/swaps": "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n",
}


def test_doctor_on_a_good_machine(tmp_path: Path) -> None:
    write(tmp_path, GOOD)
    found = findings(tmp_path)
    assert {finding.level for finding in found.values()} == {"ok"}
    assert len(found) == 11


@pytest.mark.parametrize(
    ("files", "name", "text", "remedy"),
    [
        ({"proc/sys/vm/page-cluster": "3\n"}, "vm.page-cluster", "reads 8 pages", "sysctl vm.page-cluster=0"),
        (
            {"proc/sys/net/core/wmem_max": "212992\n"},
            "net.core.wmem_max",
            "212992: servers",
            "core.wmem_max=",
        ),
        (
            {"proc/sys/net/core/wmem_default": "9\n"},
            "net.core.wmem_default",
            "9: clients",
            "core.wmem_default=",
        ),
        ({"proc/sys/vm/swappiness": "10\n"}, "vm.swappiness", "10: ", "sysctl vm.swappiness=100"),
        ({"proc/sys/vm/min_free_kbytes": "9\n"}, "vm.min_free_kbytes", "9: ", "vm.min_free_kbytes=60000"),
        ({"sys/module/zswap/parameters/enabled": "Y\n"}, "zswap", "twice", "echo N"),
        ({"proc/swaps": "F\n/dev/zram0 partition 1 0 5\n"}, "other swap", "/dev/zram0", "swapoff /dev/zram0"),
        ({"proc/sys/kernel/osrelease": "5.10.0\n"}, "Linux", "5.10.0 cannot", "5.18"),
        ({"proc/self/status": "CapEff:\t0\n"}, "rights", "CAP_IPC_LOCK, CAP_SYS_NICE", "root"),
        ({"proc/self/status": "CapEff:\t0\n"}, "memlock limit", "8388608 bytes are", "LimitMEMLOCK"),
    ],
)
def test_doctor_notes(tmp_path: Path, files: dict[str, str], name: str, text: str, remedy: str) -> None:
    write(tmp_path, {**GOOD, **files})
    finding = findings(tmp_path)[name]
    assert finding.level == "note"
    assert text in finding.text
    assert remedy in finding.remedy


def test_doctor_in_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To root it does not say to be root."""
    write(tmp_path, {**GOOD, "proc/self/status": "CapEff:\t1000000\n"})
    for user, remedy in (
        (0, "start the container with --cap-add=IPC_LOCK --cap-add=SYS_NICE,"),
        (1000, "run it as root, or as a service"),
    ):
        monkeypatch.setattr("os.geteuid", lambda user=user: user)
        assert remedy in findings(tmp_path)["rights"].remedy


@pytest.mark.parametrize("encoding", ["utf-8", "iso-8859-1", "ascii"])
def test_a_mount_point_of_any_bytes_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Any user may have mounted something on such a folder. Its bytes are shown as they are."""
    place = b"/\xff\xfe" + "\N{SNOWMAN}".encode()
    (tmp_path / "mounts").write_bytes(b"/dev/nbd0 " + place + b" ext4 rw 0 0\n")
    monkeypatch.setattr(swap, "MOUNTS", str(tmp_path / "mounts"))
    monkeypatch.setattr(swap, "SWAPS", str(tmp_path / "none"))
    monkeypatch.setattr(attached, "devices", lambda name, size: ["/dev/nbd0"])
    served = servers.Served("a", str(tmp_path), 1)
    monkeypatch.setattr(servers, "every", lambda: [served])
    monkeypatch.setattr(servers.Served, "ask_json", lambda *_, **__: {"name": "a", "disksize": 4096})
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    assert main(["list", "-n", "-o", "MOUNTPOINT"]) == 0
    shown = out.buffer.getvalue()
    assert shown == (place if encoding == "utf-8" else b"/\xff\xfe?") + b"\n"


@pytest.mark.parametrize(
    ("file", "text", "level", "said"),
    [
        ("modules.dep", "kernel/drivers/block/nbd.ko:\n", "note", "is not loaded"),
        ("modules.builtin", "kernel/drivers/block/nbd.ko\n", "ok", "is built in"),
        ("modules.dep", "kernel/drivers/block/loop.ko:\n", "note", "Linux 6.1.0-9-amd64 does not have it"),
    ],
)
def test_doctor_looks_for_the_module(tmp_path: Path, file: str, text: str, level: str, said: str) -> None:
    files = {name: content for name, content in GOOD.items() if "nbd" not in name}
    write(tmp_path, {**files, f"lib/modules/6.1.0-9-amd64/{file}": text})
    finding = findings(tmp_path)["kernel's nbd"]
    assert (finding.level, finding.text) == (level, said)


def test_doctor_without_a_run_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(rundir, "base", lambda: "")
    assert [finding.level for finding in doctor.run_folder()] == ["problem"]
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(rundir, "base", lambda: f"{tmp_path}/file/zramd")
    (finding,) = doctor.run_folder()
    assert (finding.level, finding.text) == ("problem", f"{tmp_path}/file/zramd cannot be written")


@pytest.mark.parametrize(("version", "level"), [("1.26.1", "problem"), ("1.32.5", "ok"), ("1.48.1", "ok")])
def test_doctor_looks_at_nbdkits_version(monkeypatch: pytest.MonkeyPatch, version: str, level: str) -> None:
    monkeypatch.setattr(installed, "nbdkit_version", lambda: version)
    assert next(doctor.nbdkit()).level == level


DEBIAN = "run 'apt-get install --no-install-recommends nbdkit nbdkit-plugin-python' as root"
FEDORA = "run 'dnf install nbdkit nbdkit-python-plugin' as root"
SUSE = "run 'zypper install nbdkit nbdkit-python-plugin' as root"
ARCH = "build the package nbdkit of the AUR, with python installed"


@pytest.mark.parametrize(
    ("release", "remedy"),
    [
        ('PRETTY_NAME="Debian GNU/Linux 13 (trixie)"\nID=debian\n', DEBIAN),
        ("ID=ubuntu\nID_LIKE=debian\n", DEBIAN),
        ("ID=linuxmint\nID_LIKE='ubuntu debian'\n", DEBIAN),
        ('NAME="Fedora Linux"\nID=fedora\nVERSION_ID=43\n', FEDORA),
        ('ID="rocky"\nID_LIKE="rhel centos fedora"\n', FEDORA),
        ("ID=arch\nBUILD_ID=rolling\n", ARCH),
        ("ID=manjaro\nID_LIKE=arch\n", ARCH),
        ('ID="opensuse-leap"\nID_LIKE="suse opensuse"\n', SUSE),
        ('ID="opensuse-tumbleweed"\nID_LIKE="opensuse suse"\n', SUSE),
        (
            "ID=alpine\n",
            "build nbdkit from its source, with python3-dev installed, because Alpine has no package of it",
        ),
        ("ID=nixos\n", "install nbdkit and its Python plugin"),
        ("no equals sign\nID=\n", "install nbdkit and its Python plugin"),
    ],
)
@pytest.mark.parametrize("place", ["etc/os-release", "usr/lib/os-release"])
def test_doctor_names_the_packages_of_this_system(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str, release: str, remedy: str
) -> None:
    write(tmp_path, {place: release})
    monkeypatch.setattr(installed, "nbdkit_version", lambda: "")
    (finding,) = doctor.nbdkit(str(tmp_path))
    assert (finding.level, finding.text, finding.remedy) == ("problem", "is not installed", remedy)
    monkeypatch.setattr(installed, "nbdkit_version", lambda: "1.44.1")
    monkeypatch.setattr(doctor, "_run", lambda *words: (1, "", "cannot open plugin"))
    found, plugin = doctor.nbdkit(str(tmp_path))
    assert found.level == "ok"
    assert (plugin.level, plugin.name, plugin.remedy) == ("problem", "nbdkit's python plugin", remedy)


def test_doctor_on_a_system_without_a_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installed, "nbdkit_version", lambda: "")
    (finding,) = doctor.nbdkit(str(tmp_path))
    assert finding.remedy == "install nbdkit and its Python plugin"


# The man page agrees with the parser.


# Backings.


def configure(root: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    write(root, {"etc/zramd.conf": text, "proc/meminfo": "MemTotal: 8388608 kB\n"})
    monkeypatch.setenv("ZRAMD_ROOT", str(root))


def test_doctor_looks_at_backings(disk_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = disk_folder / "good"
    subprocess.run(["fallocate", "--length", "4M", good], check=True)
    good.chmod(0o600)
    text = f"[a]\nattach = no\nbacking = {good}\n[b]\nattach = no\nbacking = {disk_folder}/none\n[c]\n"
    configure(tmp_path, monkeypatch, text)
    found = [finding.as_dict() for finding in doctor.backings()]
    assert found == [
        {"name": "backing of a", "level": "ok", "text": f"{good} is free", "remedy": ""},
        {
            "name": "backing of b",
            "level": "problem",
            "text": f"{disk_folder}/none cannot be opened: no such file or directory",
            "remedy": "make it, a partition, or a file made by 'fallocate -l 8G'",
        },
    ]
    configure(tmp_path, monkeypatch, f"[a]\nbacking = {good}\n")
    (finding,) = doctor.backings()
    assert finding.text.startswith(f"{good} is a file, and with swap=local a file system would need memory")


@pytest.mark.parametrize("swappable", [True, False])
def test_doctor_looks_where_states_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swappable: bool
) -> None:
    """Those of devices that this machine swaps to."""
    monkeypatch.setattr(statefs, "is_swappable", lambda path: swappable)
    configure(tmp_path, monkeypatch, "[a]\nstate = /x/a\n[b]\nstate = /x/b\nattach = no\n[c]\n")
    (finding,) = doctor.states()
    assert (finding.name, finding.level) == ("state of a", "note" if swappable else "ok")
    assert finding.text.startswith("/x/a may be swapped out itself" if swappable else "/x/a is not swapped")
    assert ("-o noswap" in finding.remedy) is swappable


def test_doctor_with_a_configuration_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configure(tmp_path, monkeypatch, "[a]\nbacking = /x\n[b\n")
    assert list(doctor.backings()) == []
    assert list(doctor.states()) == []
    (tmp_path / "etc/zramd.conf").unlink()
    assert list(doctor.backings()) == []


def test_doctor_looks_at_networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tmp_path / "keys.psk"
    ways = {"a": f"psk:{keys}", "b": "off", "c": "x509:%d"}
    common = "disksize = 1M\nattach = no\nlisten = :{}\ntls = {}\n"
    text = "".join(f"[{name}]\n{common.format(ord(name), way)}" for name, way in ways.items())
    text += "[d]\nattach = no\n"
    write(tmp_path, {"etc/zramd.conf": text})
    (tmp_path / "etc/zramd.conf").chmod(0o644)
    monkeypatch.setenv("ZRAMD_ROOT", str(tmp_path))
    found = [(each.name, each.level, each.text) for each in doctor.networks()]
    assert found == [
        ("network of a", "problem", f"tls: there is no file '{keys}'"),
        ("network of c", "ok", "x509:%d is looked at when the service starts"),
    ]
    keys.touch(0o600)
    keys.write_text("guest:" + "00" * 32 + "\n")
    assert next(each.text for each in doctor.networks()) == f"psk:{keys} can be used"
    monkeypatch.setattr(doctor, "_run", lambda *words: (0, "name=nbdkit\ntls=no\n", ""))
    assert {(each.level, each.text, each.remedy) for each in doctor.networks()} == {
        ("problem", "this nbdkit has no TLS", "install one with GnuTLS, or use tls = off")
    }
