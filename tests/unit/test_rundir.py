"""The run folder: closed, held by one server, replaced after a crash, removed at the end."""

import errno
import os
import socket
import stat
from pathlib import Path

import pytest

from zramd import rundir
from zramd.errors import RundirError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "run"


def test_life(folder: Path) -> None:
    held = rundir.Rundir(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert (folder / "pid").read_text() == f"{os.getpid()}\n"
    held.publish("mm_stat", "1\n")
    held.publish("mm_stat", "2\n")
    assert (folder / "mm_stat").read_text() == "2\n"
    assert stat.S_IMODE((folder / "mm_stat").stat().st_mode) == 0o600
    assert sorted(os.listdir(folder)) == ["mm_stat", "pid"]
    held.remove()
    assert not folder.exists()
    assert folder.parent.exists()


def test_foreign_files_stay(folder: Path) -> None:
    held = rundir.Rundir(str(folder))
    (folder / "notes").write_text("mine")
    held.publish("classes", "x")
    held.remove()
    assert os.listdir(folder) == ["notes"]


def test_existing_folder_stays(folder: Path) -> None:
    folder.mkdir(mode=0o755, parents=True)
    held = rundir.Rundir(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    held.remove()
    assert os.listdir(folder) == []


def test_in_use(folder: Path) -> None:
    assert rundir.holder(str(folder)) is None
    held = rundir.Rundir(str(folder))
    assert rundir.holder(str(folder)) == os.getpid()
    with pytest.raises(RundirError, match=rf"'{folder}' is in use by a running server \(pid {os.getpid()}\)"):
        rundir.Rundir(str(folder))
    assert (folder / "pid").exists()
    held.remove()
    assert rundir.holder(str(folder)) is None


def test_crashed_server_is_replaced(folder: Path) -> None:
    folder.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stale:
        stale.bind(str(folder / "nbd.sock"))
    for name in ("mm_stat", "stats.json.new", "control.sock"):
        (folder / name).write_text("old")
    (folder / "pid").write_text("1\n")  # a process that lives, but holds nothing
    held = rundir.Rundir(str(folder))
    assert os.listdir(folder) == ["pid"]
    held.remove()


def test_lock_outlives_a_fork(folder: Path) -> None:
    held = rundir.Rundir(str(folder))
    child = os.fork()
    if child == 0:
        held.write_pid()
        os._exit(0)
    os.waitpid(child, 0)
    assert (folder / "pid").read_text() == f"{child}\n"
    assert rundir.holder(str(folder)) == child  # held by us, who share the lock with the child
    held.remove()


def test_passed_socket_stays(folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as passed:
        passed.bind(str(folder / "nbd.sock"))
        passed.listen()
        held = rundir.Rundir(str(folder))
        assert (folder / "nbd.sock").exists()
        held.remove()
        assert os.listdir(folder) == ["nbd.sock"]


def test_open_folder_with_other_files_is_refused(folder: Path) -> None:
    folder.mkdir(mode=0o755, parents=True)
    (folder / "notes").write_text("mine")
    with pytest.raises(RundirError, match=f"'{folder}' is open to other users"):
        rundir.Rundir(str(folder))
    assert os.listdir(folder) == ["notes"]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


def test_shared_folder_is_refused(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o1777)
    with pytest.raises(RundirError, match="is open to other users"):
        rundir.Rundir(str(folder))
    assert stat.S_IMODE(folder.stat().st_mode) == 0o1777


@pytest.mark.parametrize("below", ["/proc", "/dev/null"])
def test_folder_that_cannot_be_made(below: str) -> None:
    with pytest.raises(RundirError, match=f"rundir '{below}/x' cannot be used: ") as caught:
        rundir.Rundir(f"{below}/x")
    assert "\n" not in str(caught.value)


def test_file_in_its_place(folder: Path) -> None:
    folder.parent.mkdir(parents=True)
    folder.write_text("a file")
    with pytest.raises(RundirError, match="is not a folder"):
        rundir.Rundir(str(folder))


def test_symlinked_pid_is_not_followed(folder: Path, tmp_path: Path) -> None:
    folder.mkdir(mode=0o700, parents=True)
    (tmp_path / "target").write_text("keep")
    (folder / "pid").symlink_to(tmp_path / "target")
    with pytest.raises(RundirError, match="cannot be used"):
        rundir.Rundir(str(folder))
    assert (tmp_path / "target").read_text() == "keep"


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_folder_of_another_user(folder: Path) -> None:
    folder.parent.mkdir()
    os.seteuid(65534)
    try:
        with pytest.raises(RundirError, match=f"rundir '{folder}' cannot be used: permission denied"):
            rundir.Rundir(str(folder))
    finally:
        os.seteuid(0)


def test_withdrawn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = rundir.Rundir(str(folder))
    name = folder / rundir.DATA_ID
    held.withdraw(rundir.DATA_ID)  # there is none yet
    held.publish(rundir.DATA_ID, "x")
    held.withdraw(rundir.DATA_ID)
    assert not name.exists()
    held.publish(rundir.DATA_ID, "x")

    def refuse(path: str, *more: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        held.withdraw(rundir.DATA_ID)
        assert name.read_text() == "", "a name that is empty is none"
        held_text = f"'{name}' cannot be removed: input/output error"
        patch.setattr(os, "truncate", refuse)
        with pytest.raises(RundirError) as caught:
            held.withdraw(rundir.DATA_ID)
        assert str(caught.value) == held_text
    held.remove()
