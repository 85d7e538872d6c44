"""What `zramd attach` refuses where a server is reached by ublk, and what `zramd doctor` says of that."""

import os
from pathlib import Path

import pytest

from zramd.commands import doctor
from zramd.errors import AttachError, UsageError
from zramd.kernel import attached, swap, ublk
from zramd.launch import attaching, crashes, nbdkit, ublkserver, ublkway
from zramd.launch.wishes import Wanted
from zramd.settings import config


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (Wanted(device="/dev/nbd0"), "'/dev/nbd0' is not a ublk device: give one such as /dev/ublkb0"),
        (Wanted(connections=2), "where --connections means nothing: leave it out"),
        (Wanted(timeout=1.0), "where --timeout means nothing"),
        (Wanted(dead_conn_timeout=0), "where --dead-conn-timeout means nothing"),
        (Wanted(nbd_client=True), "where --nbd-client means nothing"),
    ],
)
def test_options_of_the_other_way(wanted: Wanted, sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        ublkway.refuse_options("a", wanted)


def test_options_that_suit(monkeypatch: pytest.MonkeyPatch) -> None:
    ublkway.refuse_options("a", Wanted())
    ublkway.refuse_options("a", Wanted(device="/dev/ublkb3"))
    ublkway.refuse_options("a", Wanted(connections=1, timeout=1.0, configured=True))  # of zramd.conf


def test_a_kernel_that_hangs_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ublk, "broken", lambda release: True)
    with pytest.raises(AttachError, match="hangs when it is asked for a ublk device: use another kernel"):
        ublkway.load_driver()


def test_swap_whose_server_is_gone_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """swapoff would wait for ever; with --force it is given up."""
    there = attached.Attached("a", "/dev/ublkb0", 0, "data", attached.STARTED, str(tmp_path))
    assert not attaching._is_reachable(there)
    assert attaching._is_reachable(attached.Attached("a", "/dev/nbd0", 0, "data"))
    done: list[str] = []
    monkeypatch.setattr(ublkway, "give_up", lambda there: done.append("given up") or (lambda: True))
    monkeypatch.setattr(attaching, "_forget", lambda there, gone: done.append("forgotten"))
    with pytest.raises(AttachError, match="or give up what is out by 'zramd detach --swapoff --force a'"):
        attaching._give_up(there, force=False)
    assert done == []
    attaching._give_up(there, force=True)
    assert done == ["given up", "forgotten"]


def findings(root: Path) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.kernel_ublk(str(root))}


def test_doctor_looks_for_the_driver(tmp_path: Path) -> None:
    release = tmp_path / "proc/sys/kernel/osrelease"
    release.parent.mkdir(parents=True)
    release.write_text("6.12.1\n")
    assert findings(tmp_path)["kernel's ublk"].text == "Linux 6.12.1 does not have it"
    modules = tmp_path / "lib/modules/6.12.1"
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text("kernel/drivers/block/ublk_drv.ko.xz:\n")
    assert "modprobe ublk_drv" in findings(tmp_path)["kernel's ublk"].remedy
    (tmp_path / "sys/module/ublk_drv").mkdir(parents=True)
    (release.parent / "io_uring_disabled").write_text("2\n")
    found = findings(tmp_path)
    assert (found["kernel's ublk"].level, found["kernel.io_uring_disabled"].level) == ("ok", "note")
    release.write_text("6.18.4\n")
    assert "hangs" in findings(tmp_path)["kernel's ublk"].text


def test_where_the_driver_is(tmp_path: Path) -> None:
    release = tmp_path / "proc/sys/kernel/osrelease"
    release.parent.mkdir(parents=True)
    release.write_text("6.12.1\n")
    assert ublk.absent(str(tmp_path)) == "Linux 6.12.1 has no ublk: use front=nbd, or a kernel that has it"
    modules = tmp_path / "lib/modules/6.12.1"
    modules.mkdir(parents=True)
    (modules / "modules.dep").write_text("kernel/drivers/block/ublk_drv.ko.xz:\n")
    assert ublk.absent(str(tmp_path)).endswith("is not loaded: run 'modprobe ublk_drv' as root")
    (tmp_path / "sys/module/ublk_drv").mkdir(parents=True)
    assert ublk.absent(str(tmp_path)) == ""


@pytest.mark.parametrize(
    ("why", "said"),
    [
        ("Linux 6.12.1 has no ublk: use front=nbd, or a kernel that has it", "Linux 6.12.1 has no ublk"),
        ("it is not loaded: run 'modprobe ublk_drv' as root",) * 2,
    ],
)
def test_front_auto_says_what_to_do_for_ublk(
    why: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(ublkway, "unavailable", lambda: why)
    settings = config.parse([("size", "1M"), ("front", "auto")])
    assert ublkserver.choose(settings, nbdkit.read_options([])) == "nbd"
    assert capsys.readouterr().err == f"zramd: front=auto: nbd, because {said}\n"
    monkeypatch.setattr(ublkway, "unavailable", lambda: "")
    assert ublkserver.choose(settings, nbdkit.read_options([])) == "ublk"
    assert ublkserver.choose(settings, nbdkit.read_options([]), for_others=True) == "nbd"


def test_a_service_sees_no_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is its attachment, another service, that opens /dev/ublk-control."""
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr(ublkway, "unavailable", lambda: "there is no '/dev/ublk-control'")
    monkeypatch.setattr(ublkway, "never", lambda: "")
    monkeypatch.setattr(ublk, "absent", lambda: "")
    settings = config.parse([("size", "1M"), ("front", "auto")])
    assert ublkserver.choose(settings, nbdkit.read_options([])) == "nbd"
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/none")
    assert ublkserver.choose(settings, nbdkit.read_options([])) == "ublk"


class TestCrash:
    """What a crash of the server means for its attachment, which systemd restarts with it."""

    @pytest.fixture
    def there(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> attached.Attached:
        (tmp_path / "etc").mkdir()
        (tmp_path / "etc/zramd.conf").write_text("[a]\nzram-size = 16\nstate = systemd\n")
        monkeypatch.setenv("ZRAMD_ROOT", str(tmp_path))
        monkeypatch.setattr(ublk, "has_disk", lambda number: True)
        self.systemd(monkeypatch, "auto-restart-queued", "903 zramd@a.service        start waiting")
        return attached.Attached("a", "/dev/ublkb0", 7, "data", attached.STARTED, str(tmp_path))

    def systemd(self, monkeypatch: pytest.MonkeyPatch, state: str, job: str) -> None:
        monkeypatch.setattr(crashes, "_systemctl", lambda verb, *_: state if verb == "show" else job)

    def test_it_waits(self, there: attached.Attached) -> None:
        assert crashes.waits(there)

    @pytest.mark.parametrize(
        ("state", "job"),
        [
            ("running", "12 zramd@a.service restart running"),  # 'systemctl restart'
            ("auto-restart", "903 zramd@a.service        stop waiting"),
            ("dead", ""),
            ("", ""),
        ],
    )
    def test_a_stop_takes_it_away(
        self, there: attached.Attached, state: str, job: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.systemd(monkeypatch, state, job)
        assert not crashes.waits(there)

    def test_what_could_not_go_on_does_not_wait(self, there: attached.Attached, tmp_path: Path) -> None:
        assert not crashes.waits(there._replace(device="/dev/nbd0"))
        assert not crashes.waits(there._replace(keeper=0))
        assert not crashes.waits(there._replace(stage=attached.LOST))
        (tmp_path / "etc/zramd.conf").write_text("[a]\nzram-size = 16\n")
        assert not crashes.waits(there)  # without a state the data has gone with the server


def test_doctor_names_devices_that_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = attached.Attached("a", "/dev/ublkb0", 1, "data", attached.STARTED, str(tmp_path))
    monkeypatch.setattr(attached, "names", lambda: ["a"])
    monkeypatch.setattr(attached, "find", lambda name: there)
    (gone,) = doctor.attached_devices()
    assert (gone.level, gone.name) == ("problem", "/dev/ublkb0")
    assert "the server of a is gone" in gone.text
    there = there._replace(stage=attached.LOST)
    (lost,) = doctor.attached_devices()
    assert "no server can take it over" in lost.text
    assert swap.device_of("/dev/ublkb0p1") == "/dev/ublkb0"
    assert os.path.basename(there.device) == "ublkb0"
