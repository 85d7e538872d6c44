"""`zramd attach` and `detach` as far as no kernel device is needed: what is refused, and what is recorded."""

import os
import select
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import zramd
from zramd import attached, devices, keeper, kernelswap, rundir
from zramd.commands import attach as command
from zramd.commands import main
from zramd.errors import AttachError


def test_job_survives_the_command_line() -> None:
    job = keeper.Job("zram 0", "/run/a b/nbd.sock", "/run/a b", -1, 0, "", 3, 0.25, 120)
    assert keeper.job(job.words()) == job


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user, which only root can")
@pytest.mark.parametrize("verb", ["attach", "detach"])
def test_only_root_may(verb: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-P", "-c", f"from zramd.commands import main; exit(main(['{verb}', 'zram0']))"],
        env={**os.environ, "PYTHONPATH": str(Path(zramd.__file__).parent.parent)},
        preexec_fn=lambda: os.setuid(65534),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.stderr == f"zramd: only root may {verb} kernel devices: run 'sudo zramd {verb} zram0'\n"
    assert ran.returncode == 1


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--device", "/dev/sda"], "argument --device: '/dev/sda' is not an NBD device, such as /dev/nbd0"),
        (["--priority", "-2"], "argument --priority: '-2' is not a priority from -1 to 32767"),
        (["--connections", "17"], "argument --connections: '17' is not a number of connections from 1 to 16"),
        (["--timeout", "1e3"], "argument --timeout: '1e3' is not a number of seconds, such as 0.5 or 30"),
        (["--dead-conn-timeout", "1.5"], "'1.5' is not a number of seconds from 0 to 1000000"),
        ([], "the following arguments are required: NAME"),
    ],
)
def test_bad_words(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["attach", *(["zram0"] if words else []), *words])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert sentence in text
    assert text.count("\n") == 1


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(attached, "FOLDER", str(tmp_path))
    monkeypatch.setattr(attached, "is_connected", lambda device: device == "/dev/nbd7")
    monkeypatch.setattr(attached, "LOCK_TIMEOUT", 0.05)
    return tmp_path


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
    attached.remove("zram0")
    attached.remove("zram0")
    other = attached.Record("zram0")  # the removed file's lock is nobody's concern
    other.close()
    record.close()


def test_record_of_a_device_that_is_another_s(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = attached.Record("zram0")
    record.write("/dev/nbd7", "abc", keeper=1)
    for backend, there in (("zramd/zram1", False), ("zramd/zram0", True), ("", True)):
        monkeypatch.setattr(attached, "read_sys", lambda device, name, backend=backend: backend)
        assert (attached.find("zram0") is not None) is there
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
    swap = kernelswap.Swap("/dev/nbd7", 1 << 20, 0, 100)
    device = SimpleNamespace(attached=configured != "no")
    there = attached.Attached("zram0", "/dev/nbd7", 0, "data")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(devices, "find", lambda name: device)
    monkeypatch.setattr(attached, "find", lambda name: there)
    monkeypatch.setattr(attached, "unobserved", lambda device: nullcontext(lambda: done.append("emptied")))
    monkeypatch.setattr(kernelswap, "find", lambda device: swap if swapped else None)
    monkeypatch.setattr(kernelswap, "off", lambda device, **_: done.append("swapoff"))
    monkeypatch.setattr(command, "_must_be_free", lambda device: None)
    monkeypatch.setattr(command, "_disconnect", lambda device, there: done.append("detach"))
    monkeypatch.setattr(command, "_forget", lambda name, device: None)
    assert main(["detach", "--config", "--swapoff", "zram0"]) == 0
    assert done == ["swapoff"] * swapped + ["detach"] * detached + ["emptied"] * swapped


@pytest.mark.parametrize("still", [True, False])
def test_only_the_keeper_is_ended(monkeypatch: pytest.MonkeyPatch, still: bool) -> None:
    """The number of a keeper that has ended may be another process's by now."""
    child = os.fork()
    if child == 0:
        signal.pause()
        os._exit(0)
    there = attached.Attached("a", "/dev/nbd0", child, "data")
    monkeypatch.setattr(attached, "find", lambda name: there if still else there._replace(keeper=0))

    class Kernel:
        def disconnect(self, index: int) -> None:
            assert index == 0

        def close(self) -> None: ...

    monkeypatch.setattr("zramd.netlink.Kernel", Kernel)
    command._disconnect("/dev/nbd0", there)
    ended = select.poll()
    ended.register(os.pidfd_open(child), select.POLLIN)
    assert bool(ended.poll(5000 if still else 100)) is still
    if not still:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
