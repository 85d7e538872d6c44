"""`zramd attach` and `detach` as far as no kernel device is needed: what is refused, and what is recorded."""

import fcntl
import gc
import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import zramd
from zramd.commands import main
from zramd.contract import rundir
from zramd.control import servers
from zramd.errors import AttachError, ConfigError
from zramd.kernel import attached, keeper, swap, swapareas
from zramd.launch import attaching, nbdway
from zramd.launch.wishes import Wanted
from zramd.settings import devices


def test_job_survives_the_command_line() -> None:
    job = keeper.Job("zram 0", "zram 0", "/run/a b/nbd.sock", "/run/a b", -1, 0, "", 3, 0.25, 120)
    assert keeper.job(job.words()) == job


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
@pytest.mark.parametrize("verb", ["attach", "detach"])
def test_only_root_may(verb: str) -> None:
    # Loaded before, as root: the other user may not be able to read this checkout.
    code = (
        "import os; from zramd.commands import attach, main; os.setuid(65534); "
        f"exit(main(['{verb}', 'zram0']))"
    )
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(Path(zramd.__file__).parent.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == f"zramd: only root may {verb} kernel devices: run 'sudo zramd {verb} zram0'\n"
    assert ran.returncode == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--device", "/dev/sda"],
            "'/dev/sda' is not an NBD device, such as /dev/nbd0, or a ublk device, such as /dev/ublkb0",
        ),
        (["--priority", "-2"], "argument --priority: '-2' is not a priority from -1 to 32767"),
        (["--areas", "25"], "argument --areas: '25' is not a number of areas from 1 to 24"),
        (["--connections", "17"], "argument --connections: '17' is not a number of connections from 1 to 16"),
        (["--timeout", "1e3"], "argument --timeout: '1e3' is not a number of seconds, such as 0.5 or 30"),
        (["--dead-conn-timeout", "1.5"], "'1.5' is not a number of seconds from 0 to 1000000"),
    ],
)
def test_bad_words(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["attach", "zram0", *words])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert sentence in text
    assert text.count("\n") == 1


@pytest.mark.parametrize(("word", "standby"), [("--no-standby", False), ("--standby", True), ("", None)])
def test_who_is_on_standby_is_not_configured(
    word: str, standby: bool | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A unit says it, and all else is as zramd.conf has it."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/zramd.conf").write_text("[a]\nzram-size = 16\nswap-priority = 7\n")
    monkeypatch.setenv("ZRAMD_ROOT", str(tmp_path))
    wanted: list[Wanted] = []
    served = SimpleNamespace(name="a", path=str(tmp_path), look_again=lambda: None)
    monkeypatch.setattr(attaching, "_must_be_root", lambda *words: None)
    monkeypatch.setattr(attaching.servers, "look", lambda *words: served)
    monkeypatch.setattr(attaching, "_refuse_others", lambda served: None)
    monkeypatch.setattr(attaching, "_front", lambda served: "ublk")
    monkeypatch.setattr(attaching, "_refuse_network", lambda served: None)
    monkeypatch.setattr(attaching, "_stands_by", lambda served, front, wish: wanted.append(wish) or True)
    monkeypatch.setattr(attaching, "_look_at_state", lambda served: None)
    monkeypatch.setattr(attaching, "_attach", lambda *words: "/dev/ublkb0")
    monkeypatch.setattr(attaching, "_stand_by", lambda served: pytest.fail("the boot waits for it"))
    assert main(["attach", "--config", "a", *([word] if word else [])]) == 0
    assert (wanted[0].standby, wanted[0].priority, wanted[0].swap) == (standby, 7, True)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(attached, "FOLDER", str(tmp_path))
    monkeypatch.setattr(attached, "is_connected", lambda device: device == "/dev/nbd7")
    monkeypatch.setattr(attached, "LOCK_TIMEOUT", 0.05)
    return tmp_path


@pytest.mark.parametrize("priority", ["2", "-1"])
def test_a_priority_that_is_too_small_for_the_areas(
    priority: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is refused before anything is looked for, let alone attached."""
    assert main(["attach", "nobody", "--swap", "--areas", "4", "--priority", priority]) == 2
    assert capsys.readouterr().err == (
        "zramd: 4 areas need a priority of at least 3, because the first one has the highest: "
        "use --priority 100\n"
    )


def test_record(folder: Path) -> None:
    assert attached.find("zram0") is None
    record = attached.Record("zram0")
    assert attached.find("zram0") is None  # a keeper that is only starting
    record.write("/dev/nbd7", "abc", keeper=os.getpid())
    assert attached.find("zram0") == attached.Attached("zram0", "/dev/nbd7", os.getpid(), "abc")
    with pytest.raises(AttachError, match="zram0 is being attached, or is attached already"):
        attached.Record("zram0")
    record.close()
    assert attached.find("zram0") == attached.Attached("zram0", "/dev/nbd7", 0, "abc")
    record = attached.Record("zram0")
    record.write("/dev/nbd8", "", keeper=0)
    assert attached.find("zram0") is None  # the kernel has no such device
    attached.remove("zram0")  # it is a living keeper's, which removes it itself
    assert os.listdir(folder) == ["zram0.attached"]
    record.remove()
    record.remove()
    attached.remove("zram0")
    other = attached.Record("zram0")  # the removed file's lock is nobody's concern
    other.close()
    record.close()


def test_a_record_is_removed_while_others_look(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who looks whether a keeper lives has the lock for a moment; that must not leave the file for good."""
    monkeypatch.setattr(attached, "LOCK_TIMEOUT", 10.0)
    attached.Record("zram0").close()
    looks = os.open(folder / "zram0.attached", os.O_RDONLY)
    fcntl.flock(looks, fcntl.LOCK_SH)
    monkeypatch.setattr(time, "sleep", lambda seconds: os.close(looks))  # it has seen enough
    attached.remove("zram0")
    assert os.listdir(folder) == []


def test_record_of_a_device_that_is_another_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = attached.Record("zram0")
    record.write("/dev/nbd7", "abc", keeper=1)
    for backend, there in (("zramd/zram1", False), ("zramd/zram0", True), ("", True)):
        monkeypatch.setattr(attached, "read_sys", lambda device, name, backend=backend: backend)
        assert (attached.find("zram0") is not None) is there
    record.close()


def test_a_device_that_nobody_noted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper was killed between the kernel's device and its record: the kernel tells of it."""
    blocks = folder / "block"
    (blocks / "nbd7").mkdir(parents=True)
    monkeypatch.setattr(attached, "SYS_BLOCK", str(blocks))
    (blocks / "nbd7" / "backend").write_text("zramd/zram0\n")
    half = attached.Attached("zram0", "/dev/nbd7", 0, "")
    assert attached.find("zram0") == half
    assert half.is_half
    assert attached.find("zram1") is None
    record = attached.Record("zram0")
    assert attached.find("zram0") is None  # its keeper is only starting
    record.close()
    assert attached.find("zram0") == half
    assert not half._replace(data="abc").is_half


def test_one_command_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper's lock is not in the way of a command's turn, another command is."""
    monkeypatch.setattr(attached, "TURN_TIMEOUT", 0.05)
    with attached.turn("zram0"), attached.turn("zram0"):  # there is nothing to wait for
        pass
    record = attached.Record("zram0")
    with attached.turn("zram0"):
        with (
            pytest.raises(AttachError, match="being attached or detached by another"),
            attached.turn("zram0"),
        ):
            pass
        record.remove()
        again = attached.Record("zram0")  # what was removed is in nobody's way
        with attached.turn("zram0"):
            pass
    with pytest.raises(BlockingIOError), attached.turn("zram0"):
        raise BlockingIOError
    assert not attached.is_busy("zram0")
    again.close()
    record.close()


def test_a_command_that_waits_is_seen(folder: Path) -> None:
    """By the one that has the turn, which may give it up then; and no longer when it has its turn."""
    record = attached.Record("zram0")
    assert not attached.is_wanted("zram0")
    with attached.turn("zram0"):
        with pytest.raises(AttachError), attached.turn("zram0", timeout=0):  # it does not wait
            pass
        assert not attached.is_wanted("zram0")
        waits = threading.Thread(target=lambda: attached.turn("zram0").__enter__())
        waits.start()
        end = time.monotonic() + 10
        while not attached.is_wanted("zram0"):
            assert time.monotonic() < end
            time.sleep(0.01)
    waits.join()
    gc.collect()
    assert not attached.is_wanted("zram0")
    assert not attached.is_busy("zram0")
    record.close()


def test_data_id(tmp_path: Path) -> None:
    """A server's data has a name, another one for each server that starts empty."""
    assert attached.data_of(str(tmp_path)) == ""
    (tmp_path / rundir.DATA_ID).write_text("abc\n")
    assert attached.data_of(str(tmp_path)) == "abc"


@pytest.mark.parametrize(
    ("configured", "swapped", "detached"),
    [("no", False, False), ("no", True, True), ("device", False, True), ("swap", False, True)],
)
def test_the_service_leaves_what_others_attached(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    configured: str,
    swapped: bool,
    detached: bool,
) -> None:
    """With attach = no it was not the service that attached it; swap on it would lose memory."""
    done: list[str] = []
    area = swap.Swap("/dev/nbd7", 1 << 20, 0, 100)
    device = SimpleNamespace(attached=configured != "no")
    there = attached.Attached("zram0", "/dev/nbd7", 0, "data")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(devices, "find", lambda name: device)
    monkeypatch.setattr(attached, "find", lambda name: there)
    monkeypatch.setattr(attached, "unobserved", lambda device: nullcontext(lambda: done.append("emptied")))
    monkeypatch.setattr(swap, "find", lambda device: area if swapped else None)
    monkeypatch.setattr(swapareas, "off", lambda device, **_: done.append("swapoff"))
    monkeypatch.setattr(swapareas, "join", lambda device: None)
    monkeypatch.setattr(attaching, "_must_be_free", lambda device: None)
    monkeypatch.setattr(nbdway, "disconnect", lambda there: done.append("detach"))
    monkeypatch.setattr(attaching, "_forget", lambda there, gone: None)
    assert main(["detach", "--config", "--swapoff", "zram0"]) == 0
    assert done == ["swapoff"] * swapped + ["detach"] * detached + ["emptied"] * swapped


@pytest.mark.parametrize("verb", ["attach", "detach"])
def test_neither_name_nor_folder(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 2
    assert capsys.readouterr().err == (
        "zramd: which device? Give its name, as 'zramd list' shows it, or --rundir FOLDER\n"
    )


def test_the_name_that_a_server_has(tmp_path: Path) -> None:
    """A run folder may have any name; what root is told to make a file of may not."""
    served = servers.Served("folder", str(tmp_path), 1)
    assert attaching._own_name(served) == "folder"
    (tmp_path / "stats.json").write_text('{"name": "zram7"}')
    assert attaching._own_name(served) == "zram7"
    (tmp_path / "stats.json").write_text('{"name": "../../etc/x"}')
    with pytest.raises(ConfigError, match="is not a name"):
        attaching._own_name(served)


def test_a_kernel_device_stands_for_what_is_attached(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = attached.Record("a")
    record.write("/dev/nbd7", "x", keeper=1)
    monkeypatch.setattr(attached, "is_connected", lambda device: device == "/dev/nbd7")
    monkeypatch.setattr(attached, "read_sys", lambda device, name: "")
    (folder / "other").write_text("")
    assert [servers.name_of(word) for word in ("/dev/nbd7", "/dev/nbd1", "/dev/zram0", "b")] == [
        *("a", "nbd1", "zram0", "b")
    ]
    record.close()


@pytest.mark.parametrize("still", [True, False])
def test_only_the_keeper_is_ended(monkeypatch: pytest.MonkeyPatch, still: bool) -> None:
    """The number of a keeper that has ended may be another process's by now."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # what other tests ran may ignore it
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    signal.signal(signal.SIGTERM, before)
    there = attached.Attached("a", "/dev/nbd0", child, "data")
    monkeypatch.setattr(attached, "find", lambda name: there if still else there._replace(keeper=0))

    class Kernel:
        def disconnect(self, index: int) -> None:
            assert index == 0

        def close(self) -> None: ...

    monkeypatch.setattr("zramd.kernel.netlink.Kernel", Kernel)
    gone = nbdway.disconnect(there)
    ended = select.poll()
    ended.register(os.pidfd_open(child), select.POLLIN)
    assert bool(ended.poll(5000 if still else 100)) is still
    assert gone()
    if not still:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
