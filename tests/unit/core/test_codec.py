"""The codec, with the lz4 package as an independent oracle."""

import random

import lz4.block
import pytest

from zramd.core.device import codec
from zramd.errors import CorruptObjectError

BLOCK = 4096


def blocks() -> list[bytes]:
    rnd = random.Random(11)
    text = b"".join(b"%d: the quick brown fox, " % rnd.randrange(1000) for _ in range(400))
    found = [text[i : i + BLOCK] for i in range(0, 4096, 512)]
    for size in (1, 40, 64, 512, 1000, 2000, 3000, 3500, 3900, 4095):
        found.append(rnd.randbytes(size) + bytes(BLOCK - size))
    found.append((b"abcdefg" * 600)[:BLOCK])
    return found


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
    assert len(codec.compress(block, acceleration=1)) < len(codec.compress(block, acceleration=50))


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
