"""The run folder: closed, held by one server, replaced after a crash, removed at the end."""

import errno
import fcntl
import os
import shutil
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zramd.contract import handover, rundir
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
    folder.mkdir(mode=0o700, parents=True)
    held = rundir.Rundir(str(folder))
    held.publish("log", "x")
    held.remove()
    assert os.listdir(folder) == []
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("mode", [0o755, 0o750, 0o711])
def test_an_open_folder_stays_open(folder: Path, mode: int) -> None:
    """It may be one of the system's, such as /mnt or /srv. What is in there is closed."""
    folder.mkdir(parents=True)
    folder.chmod(mode)
    held = rundir.Rundir(str(folder))
    held.publish("mm_stat", "x")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    held.remove()
    assert stat.S_IMODE(folder.stat().st_mode) == mode
    assert os.listdir(folder) == []


def test_a_folder_that_others_may_write_to(folder: Path) -> None:
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(RundirError, match=f"not used: other users may write to folder '{folder}'"):
        rundir.Rundir(str(folder))
    assert os.listdir(folder) == []


@pytest.mark.parametrize(
    "names",
    [
        {"log": "my diary"},
        {"classes": "my school", "log": ""},
        {"stats.json": "{}"},
        {"metrics.prom.new": "x"},
        {"data_id": "mine"},
        {"pid": "not a number"},
        {"pid": "1\n", "log": "of another daemon"},
        {"pid": "1\n", "stats.json": "{}", "classes": ""},
        {"pid": "none", "mm_stat": ""},
    ],
)
def test_files_of_the_users_own_stay(folder: Path, names: dict[str, str]) -> None:
    folder.mkdir(mode=0o700, parents=True)
    for name, text in names.items():
        (folder / name).write_text(text)
    with pytest.raises(
        RundirError, match=r"has a file '[a-z_.]+' that zramd would replace, and no server has"
    ):
        rundir.Rundir(str(folder))
    assert {path.name: path.read_text() for path in folder.iterdir()} == names


@pytest.mark.parametrize("published", ["", "state_path.new", "state_path", "data_id.new", "data_id"])
def test_a_server_that_was_killed_at_once(folder: Path, published: str) -> None:
    folder.mkdir(mode=0o700, parents=True)
    for text in ("12\n",) if published else ("", "12\n"):
        (folder / "pid").write_text(text)
        if published:
            (folder / published).write_text("")
        rundir.Rundir(str(folder)).remove()
        assert os.listdir(folder) == []


def test_a_living_server_is_named_whatever_it_has_there(folder: Path) -> None:
    """It has published nothing yet, or has just taken back what it had, which is how a reset begins."""
    held = rundir.Rundir(str(folder))
    (folder / "log").write_text("")
    with pytest.raises(RundirError, match=rf"is in use by a running server \(pid {os.getpid()}\)"):
        rundir.Rundir(str(folder))
    held.remove()


def test_a_file_that_goes_while_the_folder_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that starts replaces its files meanwhile, and who comes second is to hear of that server."""
    held = rundir.Rundir(str(folder))
    held.publish("mm_stat", "x")
    names = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: [*names(path), "mm_stat.new"])
    assert not rundir.make(str(folder))
    held.remove()


def test_a_folder_that_goes_while_it_is_made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that stops removes its own."""
    folder.mkdir(parents=True)
    mkdir = os.mkdir

    def late(name: str, *rest: Any, **more: Any) -> None:
        try:
            mkdir(name, *rest, **more)
        finally:
            if name == "run":
                monkeypatch.setattr(os, "mkdir", mkdir)
                folder.rmdir()

    monkeypatch.setattr(os, "mkdir", late)
    assert rundir.make(str(folder))
    assert folder.is_dir()


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
def test_a_server_that_goes_while_its_folder_is_looked_at(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has just removed, its number last, was not somebody else's."""
    folder.mkdir(mode=0o700, parents=True)
    held = rundir.Rundir(str(folder))
    held.publish("mm_stat", "x")
    head = rundir.head

    def late(*words: Any) -> str:
        held.remove()
        return head(*words)

    monkeypatch.setattr(rundir, "head", late)
    assert not rundir.make(str(folder))


def test_a_folder_that_goes_before_it_is_taken(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(mode=0o700, parents=True)
    make = rundir._make

    def late(path: str) -> bool:
        monkeypatch.setattr(rundir, "_make", make)
        made = make(path)
        folder.rmdir()
        return made

    monkeypatch.setattr(rundir, "_make", late)
    rundir.Rundir(str(folder)).remove()
    assert not folder.exists()


@pytest.mark.parametrize("ends", [False, True])
def test_a_server_that_is_killed_while_it_clears_the_folder(folder: Path, ends: bool) -> None:
    """Whatever is left then, the next one knows it for a server's."""

    def crashed() -> None:
        folder.mkdir(mode=0o700, parents=True)
        for name in ("log", "log.1", "data_id", "state_path", *rundir.STATS_FILES):
            (folder / name).write_text("x")
        (folder / "pid").write_text("1234567\n")

    def killed_at(last: int) -> bool:
        """Whether so many files were removed before it was killed."""
        child = os.fork()
        if child == 0:
            try:
                unlink, left = os.unlink, iter(range(last))

                def counted(*words: Any, **more: Any) -> None:
                    unlink(*words, **more)
                    if next(left, None) is None:
                        os._exit(1)

                held = None if not ends else rundir.Rundir(str(folder))
                os.unlink = counted
                held = held or rundir.Rundir(str(folder))
                if ends:
                    held.remove()
                os._exit(0)
            finally:
                os._exit(2)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

    crashed()
    last = 0
    while killed_at(last):
        rundir.Rundir(str(folder)).remove()
        assert os.listdir(folder) == []
        folder.rmdir()
        crashed()
        last += 1
    assert last > 1


def clear_soon(folder: Path, pid: int) -> None:
    """Clear the folder; fails the test if that waits for anything."""
    clearing = threading.Thread(target=rundir.clear, args=(str(folder), pid), daemon=True)
    clearing.start()
    clearing.join(10)
    assert not clearing.is_alive()


def test_what_is_cleared_is_what_was_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner, another user, may put a link to a folder of root's in its place meanwhile."""
    folder.mkdir(parents=True)
    others = folder.parent / "others"
    others.mkdir()
    for place in (folder, others):
        for name in ("pid", "nbd.sock", "log"):
            (place / name).write_text("12\n")
    holder = rundir.holder

    def swap(path: str) -> int | None:
        found = holder(path)
        folder.rename(folder.parent / "away")
        folder.symlink_to(others)
        return found

    monkeypatch.setattr(rundir, "holder", swap)
    clear_soon(folder, 12)
    assert sorted(os.listdir(others)) == ["log", "nbd.sock", "pid"]
    assert os.listdir(folder.parent / "away") == []


@pytest.mark.parametrize("there", ["nothing", "a pipe", "another's number"])
def test_what_the_process_has_not_left_is_not_cleared(folder: Path, there: str) -> None:
    folder.mkdir(parents=True)
    (folder / "log").write_text("my diary")
    if there == "a pipe":  # nor is it waited for
        os.mkfifo(folder / "pid")
    elif there == "another's number":
        (folder / "pid").write_text("13\n")
    before = os.listdir(folder)
    clear_soon(folder, 12)
    assert os.listdir(folder) == before


def test_the_log_is_that_of_its_own_folder(folder: Path) -> None:
    """Another server may have made a folder of that name since, and has its own log there."""
    held = rundir.Rundir(str(folder))
    for text in (b"one\n", b"two\n"):
        fd = held.open_log()
        os.write(fd, text)
        os.close(fd)
    assert (folder / "log").read_text() == "one\ntwo\n"
    shutil.rmtree(folder)
    other = rundir.Rundir(str(folder))
    with pytest.raises(RundirError, match="another one is in its place"):
        held.open_log()
    other.remove()
    held.remove()


def test_a_folder_that_another_user_owns(folder: Path) -> None:
    """He could put his sockets in place of ours."""
    folder.parent.mkdir()
    (folder.parent / "his").mkdir(mode=0o700)
    os.chown(folder.parent / "his", 65534, 65534)
    for path in (folder.parent / "his", folder.parent / "his/run"):
        with pytest.raises(
            RundirError, match=f"rundir '{path}' is not used: '{folder.parent}/his' belongs to user"
        ):
            rundir.Rundir(str(path))
    folder.symlink_to(folder.parent)
    os.chown(folder, 65534, 65534, follow_symlinks=False)
    with pytest.raises(RundirError, match=f"'{folder}' is a link that user .* has made"):
        rundir.Rundir(str(folder / "x"))
    assert os.listdir(folder.parent / "his") == []


def test_a_folder_that_others_may_replace(folder: Path) -> None:
    folder.parent.mkdir()
    folder.parent.chmod(0o777)
    with pytest.raises(RundirError, match=f"other users may write to folder '{folder.parent}'"):
        rundir.Rundir(str(folder))
    folder.parent.chmod(0o1777)
    rundir.Rundir(str(folder)).remove()


def test_in_use(folder: Path) -> None:
    assert rundir.holder(str(folder)) is None
    held = rundir.Rundir(str(folder))
    assert rundir.holder(str(folder)) == os.getpid()
    with pytest.raises(RundirError, match=rf"'{folder}' is in use by a running server \(pid {os.getpid()}\)"):
        rundir.Rundir(str(folder))
    assert (folder / "pid").exists()
    held.remove()
    assert rundir.holder(str(folder)) is None


@pytest.mark.parametrize("text", ["9" * 25, "-1", "", "one", "1 2", "\xb2"])
def test_a_number_that_is_none(folder: Path, text: str) -> None:
    """Whoever owns the folder can write anything; that somebody serves there is true all the same."""
    held = rundir.Rundir(str(folder))
    (folder / "pid").write_text(text)
    assert rundir.holder(str(folder)) == 0
    held.remove()


def test_who_looks_takes_no_lock(folder: Path) -> None:
    """However many look all the time, whether a server lives, a server can start."""
    held = rundir.Rundir(str(folder))
    again = os.open(folder / "pid", os.O_RDWR)
    fcntl.flock(held._lock, fcntl.LOCK_UN)  # what is left is the lock that needs no trial
    assert rundir.holder(str(folder)) == os.getpid()
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)
    held.remove()


def test_server_of_before(folder: Path) -> None:
    """It holds a lock of another kind alone: who looks sees it, and nobody takes its place."""
    folder.mkdir(mode=0o700, parents=True)
    (folder / "pid").write_text("4711\n")
    with (folder / "pid").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert rundir.holder(str(folder)) == 4711
        with pytest.raises(RundirError, match=r"in use by a running server \(pid 4711\)"):
            rundir.Rundir(str(folder))
    assert rundir.holder(str(folder)) is None


def test_folder_that_another_has_taken(folder: Path) -> None:
    """Nothing is written to it, and nothing removed."""
    first = rundir.Rundir(str(folder))
    first.publish("mm_stat", "first\n")
    shutil.rmtree(folder)
    with pytest.raises(RundirError, match=f"'{folder}' was removed, or another one is in its place"):
        first.publish("mm_stat", "first\n")
    second = rundir.Rundir(str(folder))
    second.publish("mm_stat", "second\n")
    with pytest.raises(RundirError, match="was removed, or another one is in its place"):
        first.publish("mm_stat", "first\n")
    first.remove()
    assert (folder / "mm_stat").read_text() == "second\n"
    assert rundir.holder(str(folder)) == os.getpid()
    second.remove()
    assert not folder.exists()


def test_left_to_a_successor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on if the server before has left, or has died, but not if that was stopped."""
    monkeypatch.setenv(handover.TAKES_OVER, handover.order(8, 9, leaves_pid=True))
    monkeypatch.setenv(handover.MADE, "1")
    for end in ("leave", "crash", "remove"):
        monkeypatch.delenv(handover.TAKES_OVER)
        first = rundir.Rundir(str(folder))
        monkeypatch.setenv(handover.TAKES_OVER, handover.order(8, 9, leaves_pid=True))
        first.publish("mm_stat", "1\n")
        if end != "crash":
            getattr(first, end)()
        os.close(first._lock)
        if end == "remove":
            with pytest.raises(RundirError, match="it was stopped meanwhile"):
                rundir.Rundir(str(folder))
        else:
            second = rundir.Rundir(str(folder))
            assert os.listdir(folder) == ["pid"]
            second.remove()
        assert not folder.exists()


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


def test_a_number_is_written_whole_however_little_is_taken_at_a_time(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part of it, or what an earlier server has left behind it, is the number of another process."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[: max(len(data) // 2, 1)], at))
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    (folder / "pid").write_text("1234567\n")
    held = rundir.Rundir(str(folder))
    assert (folder / "pid").read_text() == f"{os.getpid()}\n"
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

    def refuse(path: str, *more: object, dir_fd: int | None = None) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", refuse)
        held.withdraw(rundir.DATA_ID)
        assert name.read_text() == "", "a name that is empty is none"
        held_text = f"'{name}' cannot be removed: input/output error"
        patch.setattr(os, "open", refuse)
        with pytest.raises(RundirError) as caught:
            held.withdraw(rundir.DATA_ID)
        assert str(caught.value) == held_text
    held.remove()


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: object, **__: object) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


def test_a_folder_that_cannot_be_looked_at_is_not_said_to_be_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = rundir.Rundir(str(folder))
    with monkeypatch.context() as short:
        short.setattr(os, "stat", failing(errno.ENOMEM))
        with pytest.raises(RundirError, match="cannot be written: cannot allocate memory"):
            held.publish("mm_stat", "1\n")
    held.remove()


def test_no_descriptor_to_look_with_does_not_mean_that_nobody_serves(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = rundir.Rundir(str(folder))
    with monkeypatch.context() as short:
        short.setattr(os, "open", failing(errno.EMFILE))
        with pytest.raises(RundirError, match="cannot find out which process serves: too many open files"):
            rundir.holder(str(folder))
        short.setattr(os, "open", failing(errno.EACCES))
        assert rundir.holder(str(folder)) is None
    held.remove()


def test_a_file_that_cannot_be_removed_keeps_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = rundir.Rundir(str(folder))
    for name in rundir.STATS_FILES:
        held.publish(name, "x")
    unlink = os.unlink

    def but_one(path: str, **rest: Any) -> None:
        if path == "classes":
            raise OSError(errno.EACCES, "no")
        unlink(path, **rest)

    with monkeypatch.context() as short:
        short.setattr(os, "unlink", but_one)
        held.remove()
    # The number stays with it: so the next server knows that a server has left it.
    assert sorted(os.listdir(folder)) == ["classes", "pid"]
    held.remove()
    assert not folder.exists()


def test_what_fails_once_is_removed_all_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = rundir.Rundir(str(folder))
    held.publish("classes", "x")
    unlink, failed = os.unlink, set()

    def at_first(path: str, **rest: Any) -> None:
        if path not in failed:
            failed.add(path)
            raise OSError(errno.ENOMEM, "no")
        unlink(path, **rest)

    monkeypatch.setattr(os, "unlink", at_first)
    held.remove()
    assert not folder.exists()


@pytest.mark.parametrize("call", ["fcntl.fcntl", "fcntl.flock", "os.listdir"])
def test_a_folder_that_could_not_be_taken_has_no_pid_file(
    folder: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    folder.mkdir(parents=True, mode=0o700)
    module, _, name = call.partition(".")
    real = getattr({"os": os, "fcntl": fcntl}[module], name)

    def fail(first: Any, *rest: Any) -> Any:
        if name == "listdir" and first != "/proc/self/fd":
            return real(first, *rest)
        raise OSError(errno.ENOLCK, "no locks")

    with monkeypatch.context() as short:
        short.setattr({"os": os, "fcntl": fcntl}[module], name, fail)
        with pytest.raises(RundirError, match="no locks"):
            rundir.Rundir(str(folder))
    assert os.listdir(folder) == []


def test_the_place_of_the_state_shows_whose_folder_it_is(folder: Path) -> None:
    """All that a server leaves which took over and failed, as its data is in its state."""
    folder.mkdir(parents=True, mode=0o700)
    for name, text in (("pid", "1234567\n"), ("state_path", "/dev/shm/x\n"), ("log", "")):
        (folder / name).write_text(text)
    rundir.Rundir(str(folder)).remove()
    assert not list(folder.iterdir())
