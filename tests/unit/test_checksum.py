"""The checksum of objects: the same with and without the processor's help, and what it is sure to find."""

import random

import hypothesis.strategies as st
import pytest
from hypothesis import given

from zramd.core import checksum

KNOWN = [0xC208C18B, 0x4C817861, 0x8F0FA8BC, 0x73C377E9, 0x70A959EA, 0x278B6D9A, 0x77505665]


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
