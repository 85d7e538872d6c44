"""The checksum of objects: the same with and without the processor's help, and what it is sure to find."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zramd.core.device import checksum

KNOWN = [0x6BBD701A, 0x981DE309, 0x26BA192D, 0xDCEB12FD, 0x91BCBB8E, 0xF396D54B, 0x7BBE66A3]


@given(st.binary(max_size=4096), st.integers(0, (1 << 64) - 1))
def test_the_portable_one_gives_the_same(data: bytes, seed: int) -> None:
    assert checksum.of(data, seed) == checksum.of(data, seed, portable=True)


def test_known_values() -> None:
    """They are stored in states: they must not change."""
    data = random.Random(1).randbytes(4096)
    found = [checksum.of(data[:size], 7) for size in (0, 1, 8, 31, 32, 100, 4096)]
    assert found == KNOWN


@pytest.mark.parametrize("size", [1, 7, 8, 9, 31, 32, 33, 64, 100, 700])
def test_every_single_bit_counts(size: int) -> None:
    data = bytearray(random.Random(size).randbytes(size))
    right = checksum.of(data, 5)
    for bit in range(size * 8):
        data[bit // 8] ^= 1 << bit % 8
        assert checksum.of(data, 5) != right
        data[bit // 8] ^= 1 << bit % 8


def test_the_same_change_twice_counts() -> None:
    """A stuck bit line changes the same bit of several words: their lanes must not cancel each other out."""
    data = bytearray(random.Random(3).randbytes(512))
    right = checksum.of(data, 5)
    for distance in range(1, 65):
        for at in range(0, 256, 3):
            for bit in (1, 8, 128):
                data[at] ^= bit
                data[at + distance] ^= bit
                assert checksum.of(data, 5) != right, (at, distance)
                data[at] ^= bit
                data[at + distance] ^= bit


def test_the_seed_and_the_length_count() -> None:
    data = bytes(100)
    values = {checksum.of(data, seed) for seed in range(1000)} | {
        checksum.of(data[:n]) for n in range(1, 100)
    }
    assert len(values) == 1099


def test_an_unaligned_start_is_no_matter() -> None:
    data = random.Random(2).randbytes(1000)
    for at in range(8):
        assert checksum.of(memoryview(bytes(at) + data)[at:]) == checksum.of(data)
