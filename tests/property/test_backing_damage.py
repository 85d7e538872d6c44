"""A backing of which any bits have changed: what a request reads is right, or it says which block is not.

Requests of any offset and length, on blocks that are out beside each other, apart, or not at all. And so it
is with a save, which is whole or none.
"""

import os
import random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from support.backings import Disk, write_out
from support.run import SCALE

from zramd import Device
from zramd.core.device import saving
from zramd.core.device.writeback import Writeback
from zramd.errors import SaveError

BLOCK = 4096
BLOCKS = 48
SIZE = BLOCKS * BLOCK
HEAD = 12  # bytes of a record before its payload

# Text, noise, one word, or a hole: what is beside each other is drawn together, as most is out then.
KINDS = st.text("tnwh", min_size=1, max_size=8).map(lambda kinds: (kinds * BLOCKS)[:BLOCKS])
RUNS = st.lists(st.tuples(st.integers(0, BLOCKS - 1), st.integers(1, 20)), max_size=6)
RANGES = st.lists(
    st.one_of(
        st.tuples(st.integers(0, SIZE), st.integers(0, SIZE)),
        st.tuples(st.integers(0, BLOCKS), st.integers(0, BLOCKS)).map(
            lambda pair: (pair[0] * BLOCK, pair[1] * BLOCK)
        ),
    ).map(lambda pair: (min(pair), max(pair))),
    min_size=1,
    max_size=8,
)


def content(number: int, kind: str) -> bytes:
    return {
        "t": (b"block %d of text " % number * 300)[:BLOCK],
        "n": random.Random(number).randbytes(BLOCK),
        "w": b"%08d" % number * 512,
        "h": bytes(BLOCK),
    }[kind]


@settings(deadline=None, max_examples=int(200 * max(SCALE, 1)))
@given(
    kinds=KINDS,
    runs=RUNS,
    granule=st.sampled_from((16, 64, 4096)),
    sector=st.sampled_from((512, 4096)),
    flips=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 7)), max_size=4),
    ranges=RANGES,
)
def test_what_is_read(
    kinds: str,
    runs: list[tuple[int, int]],
    granule: int,
    sector: int,
    flips: list[tuple[int, int]],
    ranges: list[tuple[int, int]],
) -> None:
    disk = Disk(16, granule=granule, sector=sector)
    device = disk.device(SIZE)
    for number, kind in enumerate(kinds):
        device.write(content(number, kind), number * BLOCK)
    whole = b"".join(map(content, range(BLOCKS), kinds))
    hands = Writeback(device)
    for first, count in runs:
        write_out(device, first, first + count, hands=hands)

    blocks = [device.block(number) for number in range(BLOCKS)]
    out = {
        number: range(block["place"], block["place"] + HEAD + block["payload_bytes"])
        for number, block in enumerate(blocks)
        if block["kind"] == "out"
    }
    places = [at for place in out.values() for at in place]
    flipped = {(places[at % len(places)], bit) for at, bit in flips} if places else set()
    for at, bit in flipped:
        disk.flip(at, bit)
    damaged = {number for number, place in out.items() if any(at in place for at, _ in flipped)}

    for offset, end in ranges:
        found = bytearray(end - offset)
        wrong = min(
            (number for number in damaged if number * BLOCK < end and (number + 1) * BLOCK > offset),
            default=None,
        )
        if wrong is None or not found:
            device.read(found, offset)
            assert found == whole[offset:end]
        else:
            errors = device.counters()["bd_read_errors"]
            with pytest.raises(OSError, match=rf"block {wrong}\b"):
                device.read(found, offset)
            right = max(0, wrong * BLOCK - offset)
            assert found[:right] == whole[offset : offset + right]
            assert not any(found[right:])
            assert device.counters()["bd_read_errors"] == errors + 1
    device.check()
    assert [device.block(number)["kind"] for number in range(BLOCKS)] == [block["kind"] for block in blocks]

    fd = os.memfd_create("saved")
    if damaged:
        with pytest.raises(SaveError, match=rf"^block {min(damaged)} is out and its disk has other data"):
            saving.save(device, fd)
    else:
        assert saving.save(device, fd)["lost"] == 0
        os.lseek(fd, 0, os.SEEK_SET)
        copy, loaded = Device(SIZE), bytearray(SIZE)
        saving.load(copy, fd)
        copy.read(loaded, 0)
        assert loaded == whole
    os.close(fd)
