"""What may be trusted: by owner, mode and kind, along the whole path, whatever others change meanwhile."""

import errno
import os
import re
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

from zramd import trusted
from zramd.errors import UntrustedError

NOBODY = 65534
NAME = trusted.user(NOBODY)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder as /tmp is: everybody may add to it."""
    with tempfile.TemporaryDirectory(prefix="zramd-shared-") as name:
        os.chmod(name, 0o1777)
        yield Path(name)


@contextmanager
def nobody() -> Iterator[None]:
    """Be another user."""
    umask = os.umask(0)
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.umask(umask)


def open_it(path: Path, **options: bool) -> None:
    with trusted.place(str(path)) as place:
        os.close(place.open(**options))


def planted_file(path: Path) -> str:
    path.write_text("")
    return f"'{path}' belongs to {NAME}"


def planted_fifo(path: Path) -> str:
    os.mkfifo(path)
    return f"'{path}' is not a regular file"


def planted_link(path: Path) -> str:
    path.symlink_to(path.parent / "target")
    return f"'{path}' is a link that {NAME} has made"


def planted_dangling_link(path: Path) -> str:
    path.symlink_to("nowhere")
    return f"'{path}' is a link that {NAME} has made"


@needs_root
@pytest.mark.parametrize("plant", [planted_file, planted_fifo, planted_link, planted_dangling_link])
def test_what_another_user_has_planted(shared: Path, plant: Callable[[Path], str]) -> None:
    (shared / "target").write_text("keep")
    with nobody():
        sentence = plant(shared / "x")
    with pytest.raises(UntrustedError) as caught, trusted.place(str(shared / "x")) as place:
        os.close(place.open_or_create())
    assert str(caught.value) == sentence
    assert (shared / "target").read_text() == "keep"
    assert not (shared / "nowhere").exists()


@needs_root
@pytest.mark.parametrize("below", ["x", "x/deeper", "link/x", "link/deeper/x"])
def test_a_folder_of_another_user_on_the_way(shared: Path, below: str) -> None:
    with nobody():
        (shared / "his").mkdir()
        (shared / "his/deeper").mkdir()
    (shared / "link").symlink_to(shared / "his")
    with pytest.raises(UntrustedError) as caught, trusted.place(str(shared / "his" / below)):
        pass
    assert str(caught.value) == f"'{shared}/his' belongs to {NAME}"


@needs_root
def test_a_folder_of_another_user_for_what_is_no_secret(shared: Path) -> None:
    with nobody():
        (shared / "his").mkdir()
        (shared / "his/link").symlink_to("/")
    with trusted.place(str(shared / "his/x"), foreign=True) as place:
        os.close(place.create())
    assert (shared / "his/x").stat().st_uid == 0
    with (
        pytest.raises(UntrustedError, match="is a link that"),
        trusted.place(str(shared / "his/link/x"), foreign=True),
    ):
        pass


@needs_root
@pytest.mark.parametrize(
    ("mode", "group", "sentence"),
    [
        (0o755, NOBODY, ""),
        (0o700, 0, ""),
        (0o1777, NOBODY, ""),
        (0o775, NOBODY, ""),  # his alone, by convention
        (0o775, 100, "other users may write to folder '{}'"),
        (0o757, NOBODY, "other users may write to folder '{}'"),
    ],
)
def test_a_folder_that_one_other_user_owns(shared: Path, mode: int, group: int, sentence: str) -> None:
    folder = shared / "his"
    folder.mkdir()
    os.chown(folder, NOBODY, group)
    folder.chmod(mode)
    refused = re.escape(sentence.format(folder)) or None
    expected = pytest.raises(UntrustedError, match=refused) if sentence else nullcontext()
    with expected, trusted.place(str(folder / "x"), hosted=True) as place:
        fd, named = place.beside("x.new")
        place.put(fd, "x.new", named)
        os.close(fd)
        os.close(place.open())
        os.chown(folder / "x", NOBODY, NOBODY)
        os.close(place.open())
    assert sentence or (folder / "x").exists()


@needs_root
def test_what_else_is_in_a_folder_of_another_user(shared: Path) -> None:
    folder = shared / "his"
    (folder / "root").mkdir(parents=True)
    (folder / "third").mkdir()
    os.chown(folder, NOBODY, NOBODY)
    os.chown(folder / "third", 1234, 1234)
    (folder / "link").symlink_to("root")
    os.chown(folder / "link", NOBODY, NOBODY, follow_symlinks=False)
    os.mkfifo(folder / "fifo")
    os.chown(folder / "fifo", NOBODY, NOBODY)

    def look(name: str, **options: bool) -> None:
        with trusted.place(str(folder / name), hosted=True) as place:
            os.close(place.open(**options))

    for name, sentence in (
        ("third/x", f"'{folder}/third' belongs to user 1234"),
        ("link/x", f"'{folder}/link' is a link that {NAME} has made"),
        ("link", f"'{folder}/link' is a link that {NAME} has made"),
        ("fifo", f"'{folder}/fifo' belongs to {NAME}"),
    ):
        with pytest.raises(UntrustedError) as caught:
            look(name, any_kind=True)
        assert str(caught.value) == sentence
    (folder / "root/x").write_text("")
    look("root/x")


@needs_root
def test_a_mount_in_a_folder_of_another_user(shared: Path) -> None:
    """It may be a program of his, by FUSE, that tells what owner and mode he likes."""
    (shared / "his/mount").mkdir(parents=True)
    os.chown(shared / "his", NOBODY, NOBODY)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", shared / "his/mount"], check=True)
    try:
        with (
            pytest.raises(UntrustedError) as caught,
            trusted.place(str(shared / "his/mount/x"), hosted=True),
        ):
            pass
        assert str(caught.value) == f"'{shared}/his/mount' is a mount in a folder of {NAME}"
    finally:
        subprocess.run(["umount", shared / "his/mount"], check=True)


@pytest.mark.parametrize(("mode", "allowed"), [(0o777, False), (0o1777, True), (0o775, None), (0o755, True)])
def test_folders_that_others_may_write_to(tmp_path: Path, mode: int, allowed: bool | None) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder").chmod(mode)
    if allowed is None:  # a group that has our own number is ours
        allowed = os.getegid() == os.geteuid()
    sentence = f"other users may write to folder '{tmp_path}/folder'"
    expected = nullcontext() if allowed else pytest.raises(UntrustedError, match=re.escape(sentence))
    with expected, trusted.place(str(tmp_path / "folder/x")) as place:
        os.close(place.create())


@needs_root
def test_a_folder_that_another_group_may_write_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.chown(tmp_path / "folder", 0, NOBODY)
    (tmp_path / "folder").chmod(0o775)
    with pytest.raises(UntrustedError, match="other users may write to folder"):
        open_it(tmp_path / "folder/x")


@pytest.mark.parametrize(
    ("mode", "private", "sentence"),
    [
        (0o600, True, ""),
        (0o400, True, ""),
        (0o644, False, ""),
        (0o640, True, ""),
        (0o666, False, "other users may write to '{}'"),
        (0o602, True, "other users may write to '{}'"),
    ],
)
def test_modes_of_a_file(tmp_path: Path, mode: int, private: bool, sentence: str) -> None:
    path = tmp_path / "x"
    path.write_text("")
    path.chmod(mode)
    if not sentence:
        open_it(path, private=private)
        return
    with pytest.raises(UntrustedError) as caught:
        open_it(path, private=private)
    assert str(caught.value) == sentence.format(path)


def test_a_file_that_others_may_read(tmp_path: Path) -> None:
    """It is closed to them; but whoever has opened it before goes on reading."""
    path = tmp_path / "x"
    path.touch(0o644)
    path.chmod(0o644)
    with path.open("rb+") as file:
        with path.open("rb"), pytest.raises(UntrustedError) as caught:
            trusted.close_to_others(file.fileno(), "x")
        assert str(caught.value) == "other users may read 'x', and somebody has it open"
        assert stat.S_IMODE(path.stat().st_mode) == 0o644  # the next one is not taken in
        trusted.close_to_others(file.fileno(), "x")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_second_name(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch(0o600)
    os.link(path, tmp_path / "y")
    open_it(path)  # as some systems keep files that only one program writes
    with pytest.raises(UntrustedError, match="has another name elsewhere, a hard link"):
        open_it(path, private=True)


def test_our_own_links_are_followed(tmp_path: Path) -> None:
    (tmp_path / "real/deep").mkdir(parents=True)
    (tmp_path / "real/file").touch(0o600)
    (tmp_path / "link").symlink_to("real/deep/../deep")
    (tmp_path / "absolute").symlink_to(tmp_path / "link/../file")
    with trusted.place(str(tmp_path / "link/x")) as place:
        os.close(place.create())
    assert (tmp_path / "real/deep/x").exists()
    assert stat.S_IMODE((tmp_path / "real/deep/x").stat().st_mode) == 0o600
    open_it(tmp_path / "absolute", private=True)


def test_links_in_a_circle(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
        open_it(tmp_path / "a")


@pytest.mark.parametrize(
    ("path", "number"),
    [("missing/x", errno.ENOENT), ("file/x", errno.ENOTDIR), ("missing", errno.ENOENT)],
)
def test_paths_that_lead_nowhere(tmp_path: Path, path: str, number: int) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=os.strerror(number)):
        open_it(tmp_path / path)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        open_it(tmp_path / "socket")


def test_nothing_is_created_over_anything(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("y")
    with trusted.place(str(tmp_path / "x")) as place, trusted.place(str(tmp_path / "y")) as same:
        assert (place.name, same.name) == ("y", "y")
        os.close(place.create())
        with pytest.raises(FileExistsError):
            place.create()
    assert (tmp_path / "y").exists()


def test_a_link_that_comes_after_the_look(tmp_path: Path) -> None:
    with trusted.place(str(tmp_path / "x")) as place:
        (tmp_path / "x").symlink_to("y")
        with pytest.raises(OSError, match=os.strerror(errno.ELOOP)):
            place.open_or_create()
    assert not (tmp_path / "y").exists()


def test_a_folder_that_is_replaced_after_the_look(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    with trusted.place(str(tmp_path / "folder/x")) as place:
        (tmp_path / "folder").rename(tmp_path / "moved")
        (tmp_path / "folder").symlink_to("other")
        os.close(place.create())
    assert os.listdir(tmp_path / "moved") == ["x"]
    assert os.listdir(tmp_path / "other") == []


def test_folders_that_are_made(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        os.close(trusted.open_folder(str(tmp_path / "a/b"), make=True))
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o755
    with pytest.raises(FileNotFoundError):
        trusted.open_folder(str(tmp_path / "c"))
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        trusted.open_folder(str(tmp_path / "file"))


@pytest.mark.parametrize("target", ["/outside", "../../outside", "/../../outside", "/in/../../outside"])
def test_nothing_is_reached_outside_of_a_root(tmp_path: Path, target: str) -> None:
    (tmp_path / "root/in").mkdir(parents=True)
    (tmp_path / "outside").mkdir()
    (tmp_path / "root/in/link").symlink_to(target)
    with trusted.place("in/link/x", root=str(tmp_path / "root"), make=True) as place:
        os.close(place.create())
    assert os.listdir(tmp_path / "outside") == []
    assert (tmp_path / "root/outside/x").exists()


def test_a_pipe_among_our_descriptors() -> None:
    """As the shell's <(command) has it."""
    reader, writer = os.pipe()
    os.write(writer, b"x")
    with trusted.place(f"/dev/fd/{reader}") as place:
        fd = place.open()
    assert os.read(fd, 2) == b"x"
    for each in (reader, writer, fd):
        os.close(each)


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    test_our_own_links_are_followed(tmp_path)
    (tmp_path / "bad").mkdir(0o700)
    (tmp_path / "bad").chmod(0o777)
    with pytest.raises(UntrustedError):
        open_it(tmp_path / "bad/x")
    assert os.listdir("/proc/self/fd") == before
