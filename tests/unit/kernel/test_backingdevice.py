"""The file or device of a backing: what is refused, in which words, and that it is as it was then."""

import errno
import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from zramd.contract import superblock
from zramd.errors import BackingError
from zramd.kernel import backingdevice, blockdevices
from zramd.kernel.backingdevice import Opened

MIB = 1 << 20
SIZE = 4 * MIB


def allocate(path: Path, size: int = SIZE) -> str:
    """A preallocated file of ours."""
    fd = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    os.posix_fallocate(fd, 0, size)
    os.close(fd)
    return str(path)


@pytest.fixture
def backing(disk_folder: Path) -> str:
    return allocate(disk_folder / "backing")


@contextmanager
def alone(path: str) -> Iterator[Opened]:
    opened = backingdevice.open_alone(path)
    try:
        yield opened
    finally:
        os.close(opened.fd)


def refusal(path: str | Path) -> str:
    """Why a backing is refused."""
    with pytest.raises(BackingError) as caught, alone(str(path)) as opened:
        backingdevice.look(opened)
    sentence = str(caught.value)
    assert sentence.startswith(f"backing '{path}' ")
    assert "\n" not in sentence
    return sentence.removeprefix(f"backing '{path}' ")


def claimed(path: str, **changes: object) -> superblock.Superblock:
    """Write the superblock of a server that has a state."""
    with alone(path) as opened:
        made = superblock.new(opened.size, 16, data_id="ab" * 16, name="swap0", has_state=True)
        made = made._replace(**changes)
        backingdevice.put(opened, made)
    return made


def test_a_blank_one(backing):
    with alone(backing) as opened:
        assert opened.size == opened.end == SIZE
        assert opened.sector == 4096
        assert backingdevice.look(opened) is None


def test_only_whole_extents_are_used(disk_folder):
    with alone(allocate(disk_folder / "odd", SIZE + 65535)) as opened:
        assert (opened.size, opened.end) == (SIZE, SIZE + 15 * 4096)


def test_what_is_written_comes_back(backing):
    made = claimed(backing)
    before = Path(backing).read_bytes()
    with alone(backing) as opened:
        assert backingdevice.look(opened) == made
    assert before[4096:] == bytes(SIZE - 4096)


@pytest.mark.parametrize(
    "at", [0, 4096, MIB - 1, SIZE - MIB, SIZE - 1], ids=["first", "second", "MiB", "last MiB", "last"]
)
def test_other_content(backing, at):
    with open(backing, "r+b") as file:
        file.seek(at)
        file.write(b"\1")
    before = Path(backing).read_bytes()
    assert refusal(backing) == (
        "holds something else (its first or last MiB is not empty): use another one, or, if nobody needs "
        f"that, run 'zramd backing format --force {backing}'"
    )
    with pytest.raises(BackingError, match="holds something else"):
        backingdevice.make_free(backing, force=False)
    assert Path(backing).read_bytes() == before


def test_what_lies_between_may_be_anything(backing):
    with open(backing, "r+b") as file:
        file.seek(MIB)
        file.write(b"\1" * (SIZE - 2 * MIB))
    with alone(backing) as opened:
        assert backingdevice.look(opened) is None


def test_a_folder_or_a_device_of_another_kind(disk_folder):
    assert refusal(disk_folder) == ("is a folder: use a partition, or a file made by 'fallocate -l 8G' in it")
    os.mkfifo(disk_folder / "fifo", 0o600)
    for path in (disk_folder / "fifo", Path("/dev/null")):
        assert refusal(path).startswith("is neither a block device nor a file: use a partition, or a file")


def test_nothing_is_there(disk_folder):
    assert refusal(disk_folder / "none") == (
        "cannot be opened: no such file or directory: make it, a partition, or a file made by "
        "'fallocate -l 8G'"
    )
    assert not (disk_folder / "none").exists()


def test_a_service_that_cannot_see_a_device(monkeypatch):
    path = "/dev/zramd-test-none"
    assert refusal(path).endswith(": attach that disk, or use one that is there")
    monkeypatch.setenv("INVOCATION_ID", "1" * 32)
    monkeypatch.setattr(backingdevice.os.path, "isdir", lambda path: False)
    assert refusal(path).endswith(
        "the service may not have it yet: run 'zramd backing allow' with the device's name as root "
        "(docs/systemd.md, 'Backing')"
    )


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EACCES, "run zramd as a user who may write to it, such as root"),
        (
            errno.EROFS,
            "a service may not write there yet: run 'zramd backing allow' with the device's name as root "
            "(docs/systemd.md, 'Backing')",
        ),
        (errno.ENXIO, "there is no disk behind it: use another one"),
        (errno.ENOMEDIUM, "there is no disk behind it: use another one"),
        (errno.EIO, "use another one"),
    ],
)
def test_what_cannot_be_opened(backing, monkeypatch, number, remedy):
    def refuse(*arguments: object, **more: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(backingdevice.trusted.Place, "open", refuse)
    assert refusal(backing) == f"cannot be opened: {os.strerror(number).lower()}: {remedy}"


def test_without_direct_io(backing, monkeypatch):
    def refuse(*arguments: object, **more: object) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(backingdevice.os, "preadv", refuse)  # a few open, and refuse to read
    assert "a file system without direct I/O (O_DIRECT)" in refusal(backing)
    monkeypatch.setattr(backingdevice.trusted.Place, "open", refuse)
    assert "a file system without direct I/O (O_DIRECT)" in refusal(backing)


def test_a_file_with_holes(disk_folder):
    path = disk_folder / "holes"
    with path.open("wb") as file:
        file.truncate(SIZE)
    assert refusal(path) == (
        f"has holes, for which the disk may have no room later: fill them by 'fallocate -l {SIZE} {path}'"
    )
    subprocess.run(["fallocate", "-l", str(SIZE), path], check=True)
    path.chmod(0o600)
    with alone(str(path)) as opened:
        assert opened.size == SIZE


def test_a_file_in_memory(memory_folder):
    path = allocate(memory_folder / "backing")
    assert refusal(path) == "is on a tmpfs, which is memory: use a path on a disk, or a block device"


@pytest.mark.parametrize("size", [0, 1, 65536, MIB - 1])
def test_a_small_one(disk_folder, size):
    path = disk_folder / "small"
    path.touch(0o600)
    if size:
        allocate(path, size)
    assert refusal(path) == f"has {size} bytes: use one of 1 MiB or more, and rather of gigabytes"
    with alone(allocate(path, MIB)) as opened:
        assert opened.size == MIB


def test_two_servers(backing):
    with alone(backing):
        assert refusal(backing) == "is in use by another server: stop that first, or use another one"
        with pytest.raises(BackingError, match="is in use by another server"):
            backingdevice.make_free(backing, force=True)
        looked = backingdevice.open_to_look(backing)  # as a successor does
        assert backingdevice.used_by(looked) == "another program"
        assert backingdevice.look(looked) is None
    assert backingdevice.used_by(looked) == ""
    os.close(looked.fd)


def test_what_others_may_change_or_read(backing):
    os.chmod(backing, 0o666)
    assert refusal(backing).startswith(f"is not used: other users may write to '{backing}': use another one")
    os.chmod(backing, 0o644)
    with alone(backing):
        assert os.stat(backing).st_mode & 0o777 == 0o600


def test_no_descriptor_is_left(backing, disk_folder, memory_folder):
    before = os.listdir("/proc/self/fd")
    for path in (disk_folder, allocate(memory_folder / "x"), disk_folder / "none"):
        refusal(path)
    with pytest.raises(BackingError):
        claimed(backing)
        backingdevice.make_free(backing, force=False)
    assert os.listdir("/proc/self/fd") == before


class TestFormat:
    """`zramd backing format`: whatever somebody may need stays, unless it is forced."""

    def test_blank(self, backing):
        made = backingdevice.make_free(backing, force=False)
        assert (made.data_id, made.has_state, made.size, made.granule) == ("", False, SIZE, 16)
        with alone(backing) as opened:
            assert backingdevice.look(opened) == made

    def test_other_content_is_gone_when_forced(self, backing):
        with open(backing, "r+b") as file:
            for at in (1080, SIZE - 512):
                file.seek(at)
                file.write(b"\x53\xef")
        backingdevice.make_free(backing, force=True)
        assert Path(backing).read_bytes()[4096:] == bytes(SIZE - 4096)

    def test_what_a_state_may_need(self, backing):
        made = claimed(backing)
        with pytest.raises(BackingError, match="may hold blocks of swap0, whose state would be of no use"):
            backingdevice.make_free(backing, force=False)
        with alone(backing) as opened:
            assert backingdevice.look(opened) == made
        backingdevice.make_free(backing, force=True)

    @pytest.mark.parametrize("changes", [{"has_state": False}, {"boot": "b" * 32}])
    def test_what_has_gone(self, backing, changes):
        if not superblock.machine_id():
            pytest.skip("this machine has no /etc/machine-id")
        claimed(backing, **changes)
        assert backingdevice.make_free(backing, force=False).data_id == ""

    def test_damage(self, backing):
        claimed(backing)
        with open(backing, "r+b") as file:
            file.seek(100)
            file.write(b"\1")
        with pytest.raises(BackingError, match="has a damaged superblock"):
            backingdevice.make_free(backing, force=False)
        backingdevice.make_free(backing, force=True)

    def test_a_disk_that_fails(self, backing, monkeypatch):
        def fail(*arguments: object) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(backingdevice.os, "fdatasync", fail)
        with pytest.raises(BackingError, match="cannot be written: input/output error: the kernel's log"):
            backingdevice.make_free(backing, force=False)


def test_a_block_device(loop_device):
    number = os.stat(loop_device).st_rdev
    with alone(loop_device) as opened:
        assert opened == Opened(loop_device, opened.fd, 16 * MIB, 16 * MIB, opened.sector, number, True)
        assert opened.sector in (512, 4096)
        assert backingdevice.look(opened) is None
        assert refusal(loop_device) == (
            "is in use: another program has it, perhaps another zramd: stop that first, or use another one"
        )
        looked = backingdevice.open_to_look(loop_device)
        assert backingdevice.used_by(looked) == "another program"
    assert backingdevice.used_by(looked) == ""
    os.close(looked.fd)
    assert backingdevice.make_free(loop_device, force=False).size == 16 * MIB
    assert blockdevices.takes_memory(number) == os.path.basename(loop_device)


def used_by(path: str | Path) -> str:
    looked = backingdevice.open_to_look(str(path))
    try:
        return backingdevice.used_by(looked)
    finally:
        os.close(looked.fd)


@contextmanager
def loop_over(path: str | Path) -> Iterator[str]:
    """A loop device over a file or another one; `loop_device` has seen that there are some."""
    done = subprocess.run(["losetup", "--find", "--show", path], capture_output=True, text=True, check=True)
    try:
        yield done.stdout.strip()
    finally:
        subprocess.run(["losetup", "--detach", done.stdout.strip()], check=True)


def test_a_file_under_a_loop_device(loop_device, disk_folder):
    """Whoever uses the device, or mounts what is on it, does not ask for the file's lock."""
    file = disk_folder / "loop"
    os.chmod(file, 0o600)
    subprocess.run(["mkfs.ext4", "-q", "-E", "nodiscard", loop_device], check=True)  # no holes
    subprocess.run(["sync", loop_device], check=True)
    before = file.read_bytes()
    assert refusal(file) == f"is in use by {loop_device}: stop that first, or use another one"
    with pytest.raises(BackingError, match=f"is in use by {loop_device}: stop that"):
        backingdevice.make_free(str(file), force=True)
    assert file.read_bytes() == before
    file.write_bytes(bytes(len(before)))
    os.sync()
    assert used_by(file) == loop_device
    with alone(loop_device):  # the device itself can be one
        assert used_by(loop_device) == "another program"
    assert used_by(loop_device) == ""


def test_a_loop_device_over_a_file_in_use(loop_device, backing, disk_folder):
    with alone(backing), loop_over(backing) as loop:
        user = f"another program, as '{backing}'"
        assert refusal(loop) == f"is in use by {user}: stop that first, or use another one"
        assert used_by(loop) == user
        with loop_over(loop) as upper:
            assert used_by(upper) == user
            assert refusal(loop) == f"is in use by {upper}: stop that first, or use another one"
    with alone(backing):
        pass
    # Over a block device, too.
    with alone(loop_device), loop_over(loop_device) as upper:
        assert refusal(upper).startswith(f"is in use by another program, as '{loop_device}'")


def test_a_file_whose_name_looks_removed(loop_device, disk_folder):
    """What a loop device lies on, and was removed, is not what has its name now."""
    file = allocate(disk_folder / "file (deleted)")
    with loop_over(file) as loop:
        assert used_by(file) == loop
    gone = allocate(disk_folder / "gone")
    with loop_over(gone):
        os.unlink(gone)
        assert used_by(allocate(disk_folder / "gone")) == ""
        assert used_by(file) == ""


@pytest.mark.parametrize("asked", [0x125E, 0x1268])  # BLKROGET, BLKSSZGET
def test_a_block_device_that_does_not_answer(loop_device, monkeypatch, asked):
    """What it is asked by ioctl fails: one sentence, no descriptor is left, and it can be used again."""
    real = fcntl.ioctl

    def ioctl(fd, request, *more):
        if request == asked:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, request, *more)

    before = os.listdir("/proc/self/fd")
    monkeypatch.setattr(fcntl, "ioctl", ioctl)
    assert refusal(loop_device) == "cannot be read: input/output error: use another one"
    monkeypatch.undo()
    assert os.listdir("/proc/self/fd") == before
    with alone(loop_device):
        pass


def test_a_block_device_with_a_file_system(loop_device, tmp_path):
    subprocess.run(["mkfs.ext4", "-q", loop_device], check=True)
    assert refusal(loop_device).startswith("holds something else")
    (tmp_path / "there").mkdir()
    subprocess.run(["mount", loop_device, tmp_path / "there"], check=True)
    try:
        name = os.path.basename(loop_device)
        for force in (True, False):
            with pytest.raises(BackingError) as caught:
                backingdevice.make_free(loop_device, force=force)
            assert str(caught.value) == (
                f"backing '{loop_device}' is in use: {name} is mounted on '{tmp_path}/there': stop that "
                "first, or use another one"
            )
    finally:
        subprocess.run(["umount", tmp_path / "there"], check=True)
    backingdevice.make_free(loop_device, force=True)
    found = subprocess.run(["blkid", "-p", loop_device], capture_output=True, text=True, check=False)
    assert found.stdout == ""  # nothing of it is left to be taken for a file system


def test_a_read_only_block_device(loop_device):
    subprocess.run(["blockdev", "--setro", loop_device], check=True)
    try:
        assert "read-only" in refusal(loop_device) or "permission" in refusal(loop_device)
    finally:
        subprocess.run(["blockdev", "--setrw", loop_device], check=True)
