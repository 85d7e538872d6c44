"""The superblock of a backing: what it says comes back, and what is damaged or unknown is refused."""

import struct
import zlib

import pytest

from zramd.contract import superblock
from zramd.contract.superblock import BYTES, EXTENT, Superblock
from zramd.errors import BackingError

HERE, THERE = "1" * 32, "2" * 32
NOW, BEFORE = "a" * 32, "b" * 32
DATA = "0123456789abcdef" * 2
GIB = 1 << 30


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """A machine with these ids."""
    (tmp_path / "machine-id").write_text(f"{HERE}\n")
    (tmp_path / "boot").write_text("aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa\n")
    monkeypatch.setattr(superblock, "MACHINE", str(tmp_path / "machine-id"))
    monkeypatch.setattr(superblock, "BOOT", str(tmp_path / "boot"))
    return tmp_path


def made(**changes: object) -> Superblock:
    return superblock.new(GIB, 16, data_id=DATA, name="swap0", has_state=True)._replace(**changes)


def with_version(version: int, *, sound: bool) -> bytes:
    data = bytearray(superblock.pack(made()))
    data[16:20] = struct.pack("<I", version)
    if sound:
        data[-4:] = struct.pack("<I", zlib.crc32(data[:-4]))
    return bytes(data)


def test_what_is_packed_comes_back():
    for block in (made(), made(has_state=False), made(name="x" * 64), superblock.new(GIB, 16)):
        data = superblock.pack(block)
        assert len(data) == BYTES
        assert superblock.unpack(data, "/x") == block
    assert (made().machine, made().boot) == (HERE, NOW)
    assert superblock.new(GIB, 16).data_id == ""


def test_what_is_no_superblock():
    assert superblock.unpack(bytes(BYTES), "/x") is None
    assert superblock.unpack(b"\xeb\x3c" * (BYTES // 2), "/x") is None


def test_each_byte_counts():
    data = superblock.pack(made())
    for place in range(16, BYTES):  # those before are the magic
        broken = bytearray(data)
        broken[place] ^= 0x80
        with pytest.raises(BackingError) as caught:
            superblock.unpack(bytes(broken), "/dev/x")
        assert str(caught.value).endswith("run 'zramd backing format --force /dev/x'")


@pytest.mark.parametrize("version", [2, 3, 999])
@pytest.mark.parametrize("sound", [True, False])
def test_a_later_version_is_not_called_damaged(version, sound):
    with pytest.raises(BackingError, match=f"has version {version}, this zramd knows 1: use the zramd that"):
        superblock.unpack(with_version(version, sound=sound), "/dev/x")


@pytest.mark.parametrize("version", [0, 1000, 1 << 31])
def test_a_version_that_damage_has_made(version):
    with pytest.raises(BackingError, match="has a damaged superblock"):
        superblock.unpack(with_version(version, sound=False), "/dev/x")


@pytest.mark.parametrize(
    ("size", "granule"), [(GIB, 0), (GIB, 24), (GIB, 32), (0, 16), (EXTENT, 16), (GIB + 1, 16), (1 << 40, 16)]
)
def test_a_sound_superblock_with_impossible_numbers(size, granule):
    with pytest.raises(BackingError, match="has a damaged superblock"):
        superblock.unpack(superblock.pack(made(size=size, granule=granule)), "/dev/x")


def test_a_granule_for_each_size():
    for size, granule in (
        (1 << 20, 16),
        (64 * GIB, 16),
        (64 * GIB + EXTENT, 32),
        (128 * GIB, 32),
        (1 << 40, 256),
    ):
        assert superblock.granule_of(size) == granule
        assert (size - 1) // granule < 1 << 32


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, True),
        ({"has_state": False}, False),
        ({"boot": BEFORE}, False),  # what the state held went with the memory
        ({"boot": ""}, True),
        ({"machine": THERE}, True),
        ({"machine": THERE, "boot": BEFORE}, True),  # that machine may run still
        ({"machine": "", "boot": BEFORE}, True),
    ],
)
def test_whose_data_may_exist_still(changes, needed):
    assert made(**changes).is_needed() is needed


@pytest.mark.parametrize(("name", "text"), [("machine-id", "uninitialized\n"), ("boot", ""), ("boot", None)])
def test_without_an_id_nothing_is_given_up(machine, name, text):
    (machine / name).unlink()
    if text is not None:
        (machine / name).write_text(text)
    assert made(machine=HERE, boot=NOW).is_needed()
