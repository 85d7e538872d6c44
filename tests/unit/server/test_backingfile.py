"""Whose backing it is: what a server may use, what it writes there, and what it leaves alone."""

import os
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from zramd import lockfile
from zramd.contract import superblock
from zramd.contract.superblock import EXTENT, Superblock
from zramd.core.device import backing as core
from zramd.errors import BackingError
from zramd.kernel import backingdevice as kernel
from zramd.kernel import blockdevices
from zramd.server import backingfile
from zramd.server.backingfile import BackingFile
from zramd.settings import config

SIZE = 4 << 20
MINE, OTHER, THIRD = "1" * 32, "2" * 32, "3" * 32  # data
ID = "5" * 32  # of a backing
NONE = "0" * 32


class Device:
    """What a backing asks a device for."""

    def __init__(self, data_id: str = MINE, backing_id: str = NONE, out: int = 0) -> None:
        self.data_id, self.backing_id, self.out = data_id, backing_id, out

    def counters(self) -> dict[str, int]:
        return {"out_pages": self.out}

    def claim_backing(self, backing_id: str) -> None:
        assert not self.out
        self.backing_id = backing_id


class Place:
    """A backing, and servers that use it one after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size(SIZE)
        self.opened: list[BackingFile] = []

    def size(self, size: int) -> None:
        fd = os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600)
        os.ftruncate(fd, size)
        os.posix_fallocate(fd, 0, size)
        os.close(fd)

    def settings(self, **settings: str) -> config.Config:
        pairs = {"size": "1M", "rundir": "/run/x", "backing": str(self.path), **settings}
        return config.parse(pairs.items())

    def open(self, **settings: str) -> BackingFile:
        """The backing of a server; the one before has ended."""
        self.close()
        before = self.superblock()
        made = backingfile.open_for(self.settings(**settings))
        self.opened.append(made)
        assert self.superblock() == before
        return made

    def close(self) -> None:
        while self.opened:
            made = self.opened.pop()
            os.close(made._opened.fd)
            del made.core  # it has a descriptor of its own

    def superblock(self) -> Superblock | None:
        return superblock.unpack(self.path.read_bytes()[: superblock.BYTES], str(self.path))

    def write(self, **changes: object) -> Superblock:
        """Have it be another server's, one with a state."""
        made = superblock.new(SIZE, 16, data_id=OTHER, name="other", has_state=True)
        made = made._replace(**{"id": ID, **changes})
        with self.path.open("r+b") as file:
            file.write(superblock.pack(made))
        return made

    def refusal(self, **settings: str) -> str:
        """Why a server refuses it; the same when it only looks, and what is on it stays."""
        self.close()
        before = self.path.read_bytes()
        with pytest.raises(BackingError) as caught:
            backingfile.open_for(self.settings(**settings))
        with pytest.raises(BackingError) as looked:
            backingfile.look(self.settings(**settings))
        assert str(caught.value) == str(looked.value)
        assert self.path.read_bytes() == before
        return str(caught.value).removeprefix(f"backing '{self.path}' ")


STATE = {"state": "/dev/shm/x.state", "name": "swap0"}


@pytest.fixture
def place(disk_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    machine = tmp_path / "machine-id"  # a bare Debian has none
    machine.write_text("a" * 32 + "\n")
    monkeypatch.setattr(superblock, "MACHINE", str(machine))
    made = Place(disk_folder / "backing")
    yield made
    made.close()


def test_the_core_and_the_superblock_agree():
    assert core.EXTENT == EXTENT
    for size in (1 << 20, 64 << 30, (64 << 30) + EXTENT, 1 << 40, superblock.MOST):
        granule = superblock.granule_of(size)
        assert granule == 16 or size > core.MAX_PLACES * (granule // 2)
        assert size <= core.MAX_PLACES * granule


def test_a_blank_one_becomes_ours(place):
    made = place.open(**STATE)
    assert (made.id, made.core.size, made.core.granule) == ("", SIZE, 16)
    device = Device()
    made.take_over(device)
    found = place.superblock()
    assert found is not None
    assert (found.data_id, found.name, found.has_state, found.size) == (MINE, "swap0", True, SIZE)
    assert device.backing_id == found.id == made.id != MINE
    assert kernel.look(made._opened) == found


def test_the_next_server_with_the_state(place):
    device = Device()
    place.open(**STATE).take_over(device)
    before = place.superblock()
    again = place.open(**STATE)
    assert again.id == device.backing_id == before.id
    device.out = 5
    again.take_over(device)
    device.out = 0
    again.take_over(device)
    assert place.superblock() == before  # nothing is written where nothing is new


def test_a_server_without_a_state_leaves_nothing_that_is_needed(place):
    place.open(name="tmp0").take_over(Device())
    place.open(name="tmp1").take_over(Device(data_id=OTHER))
    assert place.superblock().name == "tmp1"
    place.open(**STATE).take_over(Device(data_id=THIRD))
    assert place.superblock().data_id == THIRD


@pytest.mark.parametrize("settings", [{}, STATE])
def test_that_of_another_device(place, settings):
    before = place.write()
    sentence = f"may hold blocks of other (data {OTHER}): start it with the state that has that data, or, if"
    if settings:  # it may be ours: our state says
        made = place.open(**settings)
        for device in (Device(), Device(backing_id="7" * 32)):
            with pytest.raises(BackingError) as caught:
                made.take_over(device)
            assert str(caught.value).startswith(f"backing '{place.path}' {sentence}")
            assert device.backing_id != ID
    else:
        assert place.refusal(**settings).startswith(sentence)
    assert place.superblock() == before


def test_that_of_another_machine(place):
    before = place.write(machine="9" * 32, boot="8" * 32)
    assert place.refusal().startswith("may hold blocks of other of another machine (data 2222")
    made = place.open(**STATE)
    with pytest.raises(BackingError, match="of another machine"):
        made.take_over(Device())
    assert place.superblock() == before
    made.take_over(Device(data_id=THIRD, backing_id=ID, out=1))  # the state came along
    assert place.superblock().machine == superblock.machine_id()
    assert place.superblock().data_id == OTHER


def test_what_went_with_the_memory(place):
    place.write(boot="8" * 32)
    place.open().take_over(Device())
    assert place.superblock().data_id == MINE
    place.write(boot="8" * 32)
    place.open(**STATE).take_over(Device())
    assert place.superblock().data_id == MINE


def test_a_state_that_outlived_a_boot(place):
    """Somebody has copied it to a disk and back: from now on nobody else may have its backing."""
    place.write(boot="8" * 32)
    place.open(**STATE).take_over(Device(data_id=THIRD, backing_id=ID, out=3))
    found = place.superblock()
    assert (found.id, found.boot, found.is_needed()) == (ID, superblock.boot_id(), True)


def test_a_device_that_moved_to_another_one(place, disk_folder):
    """What was left on the first is of no use, though the data has the same name."""
    device = Device()
    place.open(**STATE).take_over(device)
    first = place.superblock()
    other = Place(disk_folder / "other")
    other.open(**STATE).take_over(device)
    other.close()
    second = other.superblock()
    assert first.data_id == second.data_id == MINE
    assert device.backing_id == second.id != first.id
    made = place.open(**STATE)
    assert made.id == first.id != device.backing_id  # so the device refuses it if anything is out
    made.take_over(device)
    assert device.backing_id == place.superblock().id not in (first.id, second.id)


def test_a_reset(place):
    """State and superblock agree at each moment at which a server may die."""
    made = place.open(**STATE)
    device = Device()
    made.take_over(device)
    first = place.superblock()
    device.data_id = OTHER  # a reset; killed here, the next one starts as ours
    made = place.open(**STATE)
    made.take_over(device)
    assert place.superblock() == first
    device.out = 1
    made.renew(device)
    assert place.superblock() == first  # what is out needs that
    device.out = 0
    made.renew(device)
    second = place.superblock()
    assert second.data_id == OTHER
    assert device.backing_id == second.id != first.id  # a copy of the old state does not take it for its own
    made.renew(device)
    assert place.superblock() == second


def test_killed_between_superblock_and_state(place, monkeypatch):
    made = place.open(**STATE)
    device = Device()
    monkeypatch.setattr(device, "claim_backing", lambda backing_id: None)
    made.take_over(device)
    assert place.superblock().data_id == MINE
    assert device.backing_id == NONE
    monkeypatch.undo()
    place.open(**STATE).take_over(device)
    assert device.backing_id == place.superblock().id


def test_a_disk_that_takes_no_superblock(place, monkeypatch):
    made = place.open(**STATE)
    device = Device()
    made.take_over(device)
    device.data_id = OTHER

    def fail(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(kernel.os, "pwritev", fail)
    with pytest.raises(BackingError, match="cannot be written: input/output error"):
        made.renew(device)
    assert device.backing_id == place.superblock().id


def test_a_smaller_one(place):
    place.write(size=2 * SIZE)
    sentence = place.refusal(**STATE)
    assert sentence.startswith(f"has shrunk from {2 * SIZE} to {SIZE} bytes: make it as large as it was, or")
    assert place.refusal() == sentence
    place.write(size=2 * SIZE, has_state=False)
    made = place.open(**STATE)
    assert (made.core.size, made.id) == (SIZE, "")  # nothing on it can be ours


def test_a_larger_one(place, monkeypatch):
    """All of it is used, and its superblock says so; what may be ours lies as it was all the same."""
    before = place.write()
    place.close()
    place.size(2 * SIZE)
    made = place.open(**STATE)
    assert (made.core.size, made.core.granule) == (2 * SIZE, 16)
    made.take_over(Device(backing_id=ID, out=1))
    found = place.superblock()
    assert (found.size, found.granule, found.id, found.data_id) == (2 * SIZE, 16, ID, OTHER)
    assert found.claimed == before.claimed
    place.close()
    place.size(SIZE)
    assert place.refusal(**STATE).startswith(f"has shrunk from {2 * SIZE} to {SIZE} bytes")


def test_a_larger_one_with_another_granule(place, monkeypatch):
    """Where records begin would be told otherwise: nothing of it changes, until it is formatted."""
    before = place.write(boot="8" * 32)
    place.close()
    place.size(2 * SIZE)
    granule_of = superblock.granule_of
    monkeypatch.setattr(superblock, "granule_of", lambda size: 32 if size > SIZE else granule_of(size))
    made = place.open(**STATE)
    assert (made.core.size, made.core.granule) == (SIZE, 16)
    made.take_over(Device(backing_id=ID, out=1))
    assert (place.superblock().size, place.superblock().granule) == (SIZE, before.granule)


@pytest.mark.parametrize("data", [b"something else", superblock.MAGIC + b"\1" * 100])
def test_other_content(place, data):
    with place.path.open("r+b") as file:
        file.write(data)
    assert "run 'zramd backing format --force " in place.refusal(**STATE)


def test_the_device_itself(place, monkeypatch):
    monkeypatch.setattr(blockdevices, "own", lambda number, name: {"zram0": "nbd0"}.get(name, ""))
    assert place.refusal() == "lies on nbd0, which is zram0 itself: use a disk, or a part of one"
    place.open(name="zram1")


class TestSwapLocal:
    """This machine swaps to the device: nothing may need memory to take what is swapped out."""

    @pytest.fixture
    def disk(self, place: Place, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
        """What the kernel says of a block device; our file plays one."""
        found = SimpleNamespace(memory="", swap="")
        look_at = kernel._look_at
        monkeypatch.setattr(
            kernel, "_look_at", lambda path, fd: look_at(path, fd)._replace(is_block=True, sector=4096)
        )
        monkeypatch.setattr(blockdevices, "takes_memory", lambda number: found.memory)
        monkeypatch.setattr(blockdevices, "swapped_to", lambda number: found.swap)
        return found

    def test_a_file(self, place):
        assert place.refusal(swap="local").startswith("is a file, and with swap=local a file system would")

    def test_a_partition(self, place, disk):
        made = place.open(swap="local")
        assert made.core.size == SIZE

    def test_what_takes_memory(self, place, disk):
        disk.memory = "loop0"
        assert place.refusal(swap="local").startswith("is on loop0, for which the kernel would need memory")
        place.open()

    def test_what_is_swapped_to(self, place, disk):
        disk.swap = "sda2"
        assert place.refusal(swap="local") == "is on sda2, which is used as swap: use another one"

    def test_a_loop_device(self, place, loop_device):
        settings = {"size": "1M", "rundir": "/run/x", "backing": loop_device}
        backingfile.look(config.parse(settings.items()))
        with pytest.raises(BackingError) as caught:
            backingfile.look(config.parse({**settings, "swap": "local"}.items()))
        name = os.path.basename(loop_device)
        assert str(caught.value) == (
            f"backing '{loop_device}' is on {name}, for which the kernel would need memory when there is "
            "none: with swap=local use a partition of a disk of this machine"
        )


class TestReattach:
    """The disk had vanished, or has failed, and is there again; perhaps under another name."""

    @pytest.fixture
    def made(self, place: Place) -> BackingFile:
        made = place.open(**STATE)
        made.take_over(Device())
        return made

    @pytest.fixture
    def other(self, place: Place, made: BackingFile) -> Path:
        """What is on it under another name."""
        path = place.path.with_name("other")
        path.write_bytes(place.path.read_bytes())
        path.chmod(0o600)
        return path

    def descriptors(self, path: Path) -> int:
        """How many of ours lead to it."""
        found = 0
        for fd in os.listdir("/proc/self/fd"):
            with suppress(OSError):
                found += os.readlink(f"/proc/self/fd/{fd}") == str(path)
        return found

    def is_alone(self, path: Path) -> bool:
        with path.open("rb") as file:
            return lockfile.is_taken(file.fileno())

    def refusal(self, made: BackingFile, path: Path) -> str:
        """Why it is refused; all is as it was, and both can be used by others as before."""
        before, was = path.read_bytes() if path.is_file() else b"", made.path
        with pytest.raises(BackingError) as caught:
            made.reattach(str(path))
        assert made.path == was
        assert self.descriptors(Path(was)) == 2
        assert self.is_alone(Path(was)) is not made._opened.is_block  # ours plays one, without a lock
        if path.is_file():
            assert path.read_bytes() == before
            if str(path) != was:
                assert self.descriptors(path) == 0
                assert not self.is_alone(path)
        assert str(caught.value).count("\n") == 0
        return str(caught.value).removeprefix(f"backing '{path}' ")

    def test_under_another_name(self, place, made, other):
        made.reattach(str(other))
        assert made.path == str(other)
        assert (self.descriptors(place.path), self.descriptors(other)) == (0, 2)
        assert not self.is_alone(place.path)
        assert self.is_alone(other)
        assert kernel.look(made._opened).id == made.id
        device = Device(data_id=OTHER, backing_id=made.id)
        made.renew(device)  # what is written from now on is there
        assert superblock.unpack(other.read_bytes()[:4096], "").data_id == OTHER
        assert place.superblock().data_id == MINE
        os.unlink(place.path)
        place.path = other  # of the next server

    def test_a_name_that_the_next_server_would_refuse(self, place, made):
        """Also of what is ours already: a restart is to find it, too."""
        hard = place.path.with_name("hard")
        os.link(place.path, hard)
        for path in (hard, place.path):
            with pytest.raises(BackingError, match=f"'{path}' has another name elsewhere, a hard link"):
                made.reattach(str(path))
        hard.unlink()
        place.path.chmod(0o666)
        assert self.refusal(made, place.path).startswith("is not used: other users may write to ")
        place.path.chmod(0o600)
        made.reattach(str(place.path))

    def test_the_same_path(self, place, made):
        """It cannot be opened twice, and need not be: it works again."""
        for _ in range(3):
            made.reattach(str(place.path))
        link = place.path.with_name("link")
        link.symlink_to(place.path)
        made.reattach(str(link))
        assert made.path == str(link)
        assert self.descriptors(place.path) == 2
        assert self.is_alone(place.path)

    def test_another_disk(self, place, made, other):
        sentence = (
            "is not the one that the device has: 'zramd backing show PATH' says whose blocks are on one"
        )
        for content in (
            b"",
            b"something else",
            superblock.pack(superblock.new(SIZE, 16)),
            superblock.pack(place.superblock()._replace(id=ID)),
        ):
            other.write_bytes(content.ljust(SIZE, b"\0"))
            assert self.refusal(made, other) == sentence

    def test_the_same_data_on_another_backing(self, place, made, other):
        """The data's name alone says nothing: its blocks are on one of both."""
        other.write_bytes(superblock.pack(place.superblock()._replace(id=THIRD)).ljust(SIZE, b"\0"))
        assert self.refusal(made, other).startswith("is not the one that the device has")

    def test_a_damaged_one(self, made, other):
        data = bytearray(other.read_bytes())
        data[50] ^= 1
        other.write_bytes(data)
        assert self.refusal(made, other).startswith("has a damaged superblock")

    def test_a_smaller_one(self, made, other):
        os.truncate(other, SIZE - EXTENT)
        assert self.refusal(made, other) == (
            f"has {SIZE - EXTENT} bytes, and the device needs {SIZE}: make it as large as it was"
        )

    def test_a_larger_one(self, place, made, other):
        """The server that is started next uses all of it."""
        fd = os.open(other, os.O_RDWR)
        os.posix_fallocate(fd, SIZE, SIZE)
        os.close(fd)
        made.reattach(str(other))
        assert made.core.size == SIZE

    def test_larger_sectors(self, place, disk_folder, monkeypatch):
        """What is read would not begin with one; smaller ones are fine, and do not change what is."""
        sectors = {"a": 512, "b": 4096, "c": 512}
        look_at = kernel._look_at
        monkeypatch.setattr(
            kernel,
            "_look_at",
            lambda path, fd: look_at(path, fd)._replace(sector=sectors.get(path[-1], 4096)),
        )
        made = place.open(**STATE)
        made.take_over(Device())
        for name in sectors:
            path = disk_folder / name
            path.write_bytes(place.path.read_bytes())
            path.chmod(0o600)
            made.reattach(str(path))  # read in sectors of 4096 throughout
        assert made.core.sector == 4096
        place.path = disk_folder / "a"
        small = place.open(**STATE)
        assert small.core.sector == 512
        small.take_over(Device(backing_id=small.id))
        assert self.refusal(small, disk_folder / "b") == (
            "is read in sectors of 4096 bytes, and the server in ones of 512: give it by "
            f"'zramd restart swap0 backing={disk_folder}/b'"
        )

    def test_what_is_none(self, made, other, disk_folder):
        assert self.refusal(made, disk_folder / "none").startswith("cannot be opened: no such file")
        assert self.refusal(made, disk_folder).startswith("is a folder")
        opened = kernel.open_alone(str(other))
        with pytest.raises(BackingError, match="is in use by another server"):
            made.reattach(str(other))
        os.close(opened.fd)

    def test_one_that_still_fails(self, place, made, other, monkeypatch):
        def fail(*arguments: object) -> None:
            raise OSError(5, "Input/output error")

        monkeypatch.setattr(kernel.os, "preadv", fail)
        for path in (other, place.path):
            assert self.refusal(made, path).startswith("cannot be read: input/output error")

    def test_as_strict_as_at_the_start(self, place, made, other, monkeypatch):
        monkeypatch.setattr(blockdevices, "own", lambda number, name: {"swap0": "nbd0"}.get(name, ""))
        assert (
            self.refusal(made, other) == "lies on nbd0, which is swap0 itself: use a disk, or a part of one"
        )

    def test_swap_local(self, place, other, made, monkeypatch):
        look_at = kernel._look_at
        monkeypatch.setattr(
            kernel, "_look_at", lambda path, fd: look_at(path, fd)._replace(is_block=path != str(other))
        )
        swapped = place.open(**STATE, swap="local")
        swapped.take_over(Device(backing_id=swapped.id))
        monkeypatch.setattr(kernel, "_look_at", look_at)
        assert self.refusal(swapped, other).startswith("is a file, and with swap=local")
        monkeypatch.setattr(kernel, "_look_at", lambda path, fd: look_at(path, fd)._replace(is_block=True))
        monkeypatch.setattr(blockdevices, "takes_memory", lambda number: "loop7")
        assert self.refusal(swapped, other).startswith("is on loop7, for which the kernel would need memory")
        monkeypatch.setattr(blockdevices, "takes_memory", lambda number: "")
        monkeypatch.setattr(blockdevices, "swapped_to", lambda number: "sdb2")
        assert self.refusal(swapped, other).startswith("is on sdb2, which is used as swap")

    def test_while_the_superblock_is_written(self, place, made, other, monkeypatch):
        """Its name changes: which disk has it is known afterwards."""
        monkeypatch.setattr(backingfile, "NAMING", 0.01)
        writes, may_go_on = threading.Event(), threading.Event()
        put = kernel.put

        def hang(opened: kernel.Opened, found: Superblock) -> None:
            writes.set()
            assert may_go_on.wait(30)
            put(opened, found)

        monkeypatch.setattr(kernel, "put", hang)
        thread = threading.Thread(target=made.renew, args=(Device(data_id=OTHER, backing_id=made.id),))
        thread.start()
        assert writes.wait(30)
        sentence = (
            f"backing '{place.path}' does not answer, and its superblock is being written: try again later"
        )
        assert self.refusal(made, other) == sentence
        may_go_on.set()
        thread.join()
        assert self.refusal(made, other).startswith("is not the one that the device has")
        made.reattach(str(place.path))
