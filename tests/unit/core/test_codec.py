"""The codecs, with the lz4 package as an independent oracle."""

import random

import lz4.block
import pytest

from zramd.core.device import codec
from zramd.errors import CorruptObjectError
from zramd.settings import codecs

BLOCK = 4096
LIMIT = 3844  # bytes above which a block is raw
LEVELS = [
    (name, level)
    for name, levels in {
        "lz4": (1, 9, 65537),
        "lz4hc": range(3, 10),
        "zstd": range(1, 20),
        "none": (0,),
    }.items()
    for level in levels
]


def blocks() -> list[bytes]:
    rnd = random.Random(11)
    text = b"".join(b"%d: the quick brown fox, " % rnd.randrange(1000) for _ in range(400))
    found = [text[i : i + BLOCK] for i in range(0, 4096, 512)]
    for size in (1, 40, 64, 512, 1000, 2000, 3000, 3500, 3900, 4095):
        found.append(rnd.randbytes(size) + bytes(BLOCK - size))
    found.append((b"abcdefg" * 600)[:BLOCK])
    return found


def awkward() -> list[bytes]:
    """One byte that differs, numbers, two bytes in any order, near noise: codecs differ most in those."""
    rnd = random.Random(12)
    return [
        *blocks(),
        bytes(BLOCK - 1) + b"\1",
        b"".join(number.to_bytes(8, "little") for number in range(512)),
        b"".join(rnd.choice((b"\0", b"\1")) for _ in range(BLOCK)),
        rnd.randbytes(BLOCK),
        bytes(rnd.choice(range(0, 256, 3)) for _ in range(BLOCK)),
    ]


@pytest.mark.parametrize("word", [0, 1, 0x4141414141414141, 0x0123456789ABCDEF, (1 << 64) - 1])
def test_same_filled(word: int) -> None:
    block = word.to_bytes(8, "little") * 512
    assert codec.compress(block) == word
    assert codec.decompress(word) == block


@pytest.mark.parametrize("at", [0, 8, 2048, 4088, 4095])
def test_one_byte_makes_it_not_same_filled(at: int) -> None:
    block = bytearray(BLOCK)
    block[at] = 1
    assert isinstance(codec.compress(block), bytes)


@pytest.mark.parametrize("block", blocks(), ids=range(len(blocks())))
def test_lz4_reads_what_is_stored(block: bytes) -> None:
    payload = codec.compress(block)
    assert isinstance(payload, bytes)
    assert codec.decompress(payload) == block
    if len(payload) < BLOCK:
        assert lz4.block.decompress(payload, uncompressed_size=BLOCK) == block
        # another version of lz4 may find a match more or less
        assert len(payload) <= len(lz4.block.compress(block, store_size=False)) * 1.02 + 8
        assert codec.decompress(lz4.block.compress(block, store_size=False, mode="high_compression")) == block


def test_what_lz4_cannot_shrink_below_the_limit_is_raw() -> None:
    noise = random.Random(1).randbytes(BLOCK)
    assert codec.compress(noise, limit=3628) == noise
    half = noise[:2000] + bytes(BLOCK - 2000)
    size = len(codec.compress(half, limit=3628))
    assert 2000 < size < 2100
    assert codec.compress(half, limit=size) != half
    assert codec.compress(half, limit=size - 1) == half
    assert codec.decompress(noise) == noise


def test_acceleration_trades_size_for_speed() -> None:
    block = blocks()[0]
    assert len(codec.compress(block, level=1)) < len(codec.compress(block, level=50))


@pytest.mark.parametrize("payload", [b"\x00", b"\xff" * 20, b"", bytes(100), bytes(5000)])
def test_rubbish_is_an_error(payload: bytes) -> None:
    with pytest.raises(CorruptObjectError, match=f"{len(payload)} bytes"):
        codec.decompress(payload)


def test_every_cut_and_flip_is_an_error_or_a_block() -> None:
    payload = bytearray(codec.compress(blocks()[0]))
    rnd = random.Random(2)
    for _ in range(2000):
        bad = (
            bytearray(payload[: rnd.randrange(1, len(payload))]) if rnd.random() < 0.5 else bytearray(payload)
        )
        bad[rnd.randrange(len(bad))] ^= 1 << rnd.randrange(8)
        try:
            assert len(codec.decompress(bad)) == BLOCK
        except CorruptObjectError as error:
            assert error.errno == 5  # noqa: PT017


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="4095"):
        codec.compress(bytes(4095))
    with pytest.raises(ValueError, match="limit 4096"):
        codec.compress(bytes(4096), limit=4096)


def test_the_settings_have_the_cores_codecs_and_levels() -> None:
    assert codec.LEVELS == codecs.LEVELS


@pytest.mark.parametrize(("name", "level"), LEVELS)
def test_each_codec_and_level_gives_back_what_was_stored(name: str, level: int) -> None:
    for block in awkward():
        payload = codec.compress(block, LIMIT, name, level)
        assert isinstance(payload, bytes)
        assert len(payload) <= LIMIT or payload == block
        assert codec.decompress(payload, name) == block
        if name == "lz4hc" and payload != block:
            assert lz4.block.decompress(payload, uncompressed_size=BLOCK) == block
        if name == "none":
            assert payload == block


@pytest.mark.parametrize("name", ["lz4", "lz4hc", "zstd"])
def test_a_codec_never_writes_beyond_its_limit(name: str) -> None:
    for block in awkward():
        size = len(codec.compress(block, BLOCK - 1, name))
        for limit in {0, 1, 2, 3, size - 2, size - 1, size} if size < BLOCK else {0, 1, 2, BLOCK - 1}:
            payload = codec.compress(block, limit, name)
            assert payload == block or len(payload) <= limit
            assert codec.decompress(payload, name) == block


def test_better_codecs_store_less() -> None:
    sizes = {
        (name, level): sum(len(codec.compress(block, LIMIT, name, level)) for block in blocks()[:8])
        for name, level in (("lz4", 1), ("lz4hc", 3), ("lz4hc", 9), ("zstd", 1), ("zstd", 19))
    }
    assert sizes["zstd", 19] <= sizes["zstd", 1] < sizes["lz4hc", 9] <= sizes["lz4hc", 3] < sizes["lz4", 1]


def test_a_frame_of_zstd_has_two_bytes_of_header_behind_the_codecs() -> None:
    """No magic number, no size of the content, no checksum."""
    payload = codec.compress(blocks()[0], name="zstd")
    assert isinstance(payload, bytes)
    assert payload[0] == 1
    assert payload[1] & 0b1110_0111 == 0, "the frame's descriptor: neither size nor checksum nor dictionary"


@pytest.mark.parametrize(
    "payload", [b"\1", b"\0\0", b"\1\xff" * 20, b"", bytes(100), bytes(5000), b"\1" * 4095]
)
def test_rubbish_is_an_error_for_zstd_too(payload: bytes) -> None:
    with pytest.raises(CorruptObjectError, match=f"{len(payload)} bytes"):
        codec.decompress(payload, "zstd")


def test_every_flip_in_a_frame_is_an_error_or_a_block() -> None:
    payload = codec.compress(blocks()[0], name="zstd")
    assert isinstance(payload, bytes)
    for bit in range(8 * len(payload)):
        bad = bytearray(payload)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            assert len(codec.decompress(bytes(bad), "zstd")) == BLOCK
        except CorruptObjectError as error:
            assert error.errno == 5  # noqa: PT017


@pytest.mark.parametrize(
    ("name", "level", "sentence"),
    [
        ("lzo", 0, "codec 'lzo' is none of lz4, lz4hc, zstd, none"),
        ("lz4", 65538, "level 65538 of lz4 is out of range: 1 to 65537"),
        ("lz4hc", 2, "level 2 of lz4hc is out of range: 3 to 9"),
        ("zstd", 20, "level 20 of zstd is out of range: 1 to 19"),
        ("zstd", -1, "level -1 of zstd is out of range: 1 to 19"),
        ("none", 1, "level 1 of none is out of range: 0 to 0"),
    ],
)
def test_what_is_no_codec_or_level_is_refused(name: str, level: int, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        codec.compress(bytes(BLOCK), name=name, level=level)
