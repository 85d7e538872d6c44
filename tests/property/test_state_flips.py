"""Bits that change by themselves in a state with verify=on: what is read is right, or an error; no crash."""

import os
import random
from collections.abc import Iterator
from contextlib import suppress

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from support.pages import UNIT, whole_pages

from zramd import Device, PoolFullError
from zramd.core.device.device import state_layout
from zramd.errors import CorruptionError, CorruptObjectError, StateError
from zramd.server import statefile

BLOCK = 4096
BLOCKS = 256
SIZE = BLOCKS * BLOCK


def extents(fd: int) -> list[tuple[int, int]]:
    """Start and end of what the file has that is no hole."""
    found = []
    at = 0
    while True:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return found
        end = os.lseek(fd, at, os.SEEK_HOLE)
        found.append((at, end))
        at = end


class Content(bytes):
    """The content of a device; too long to be shown with a failure."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


class Memory:
    """A state in memory, whose bits can be changed behind the device's back."""

    def __init__(self) -> None:
        self.fd = os.memfd_create("zramd")
        self.path = f"/proc/self/fd/{self.fd}"

    def take_over(self) -> Device:
        fd = statefile.open_state(self.path, SIZE, True)
        try:
            return Device(SIZE, state=fd, verify=True, cold_level=1, mark_cold=statefile.mark_cold)
        finally:
            os.close(fd)

    def copy(self) -> "Memory":
        copy = Memory()
        os.ftruncate(copy.fd, os.fstat(self.fd).st_size)
        for start, end in extents(self.fd):
            os.pwrite(copy.fd, os.pread(self.fd, end - start, start), start)
        return copy

    def flip(self, rnd: random.Random, count: int, live: bool) -> None:
        """Change bits: half of them anywhere in use, half in the tables, which are small but lead on."""
        cells, arena = table_ends()
        tables = [(start, min(end, arena)) for start, end in extents(self.fd) if start < arena]
        for _ in range(count):
            start, end = rnd.choice(rnd.choice((tables, extents(self.fd))))
            at, bit = rnd.randrange(start, end), rnd.randrange(8)
            if live and (at < 1 << 16 or (cells <= at < arena and at % 8 == bit == 0)):
                continue  # the counters and the limit; the pin, for which all would wait
            byte = os.pread(self.fd, 1, at)[0]
            if byte or rnd.random() < 0.1:
                os.pwrite(self.fd, bytes([byte ^ 1 << bit]), at)


def table_ends() -> tuple[int, int]:
    """Where the cells begin and end."""
    layout = state_layout(SIZE)
    arena = layout["bytes"] - layout["spans"] * layout["span_size"]
    return arena - whole_pages(8 * layout["cells"]), arena


def blocks(rnd: random.Random) -> Iterator[bytes]:
    """Content of every kind."""
    while True:
        yield rnd.randbytes(8) * 512
        yield rnd.randbytes(BLOCK)
        yield bytes(BLOCK)
        for _ in range(6):
            yield rnd.randbytes(size := rnd.randrange(8, 3500)) + bytes(BLOCK - size)
        yield rnd.randbytes(BLOCK // 2).hex().encode()
        yield rnd.randbytes(size := rnd.randrange(8, 1700)).hex().encode() + bytes(BLOCK - 2 * size)


@pytest.fixture(scope="module")
def saved() -> tuple[Memory, bytes]:
    memory = Memory()
    device = memory.take_over()
    rnd = random.Random(1)
    source = blocks(rnd)
    for block in [*range(BLOCKS), *rnd.sample(range(BLOCKS), BLOCKS)]:
        device.write(next(source), block * BLOCK)
    for block in rnd.sample(range(BLOCKS), BLOCKS // 4):
        device.trim(block * BLOCK, BLOCK)
    assert device.cool(0, BLOCKS * 3 // 4)[0] > 10
    content = bytearray(SIZE)
    device.read(content, 0)
    return memory, Content(content)


def read_all(device: Device, model: bytearray) -> int:
    """Compare every block that can be read; how many cannot."""
    lost = 0
    buf = bytearray(BLOCK)
    for offset in range(0, SIZE, BLOCK):
        error = None
        try:
            device.read(buf, offset)
        except CorruptObjectError as caught:
            error = str(caught)
        if error is None:
            if buf != model[offset : offset + BLOCK]:
                pytest.fail(f"block {offset // BLOCK} is wrong")
        else:
            assert f"block {offset // BLOCK}" in error
            lost += 1
    assert device.counters()["checksum_errors"] >= lost
    return lost


def use(device: Device, model: bytearray, rnd: random.Random, memory: Memory | None = None) -> None:
    """Write, trim and compact as if nothing was wrong, while more goes wrong if memory is given."""
    source = blocks(rnd)
    for _ in range(150):
        block = rnd.randrange(BLOCKS)
        span = slice(block * BLOCK, (block + 1) * BLOCK)
        action = rnd.randrange(10)
        if memory is not None and rnd.random() < 0.1:
            memory.flip(rnd, rnd.choice((1, 1, 5)), True)
        if action < 6:
            data = next(source)
            with suppress(PoolFullError, MemoryError):
                device.write(data, span.start)
                model[span] = data
        elif action < 8:
            device.trim(span.start, BLOCK)
            model[span] = bytes(BLOCK)
        elif action == 8:
            with suppress(CorruptObjectError, PoolFullError, MemoryError):
                device.write(b"part", span.start + 100)
                model[span.start + 100 : span.start + 104] = b"part"
        else:
            device.compact()
            device.release_stock()
            device.cool(rnd.randrange(BLOCKS), 50)
    read_all(device, model)
    with suppress(CorruptionError):
        device.check()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), count=st.sampled_from([1, 1, 3, 20, 200]))
def test_flips_in_a_saved_state(saved: tuple[Memory, bytes], seed: int, count: int) -> None:
    rnd = random.Random(seed)
    memory, model = saved[0].copy(), bytearray(saved[1])
    memory.flip(rnd, count, False)
    try:
        device = memory.take_over()
    except (StateError, CorruptionError):
        pass
    else:
        read_all(device, model)
        use(device, model, rnd)
    finally:
        os.close(memory.fd)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), count=st.sampled_from([1, 1, 3, 20, 200]))
def test_flips_in_a_live_state(saved: tuple[Memory, bytes], seed: int, count: int) -> None:
    rnd = random.Random(seed)
    memory, model = saved[0].copy(), bytearray(saved[1])
    device = memory.take_over()
    memory.flip(rnd, count, True)
    read_all(device, model)
    use(device, model, rnd, memory)
    os.close(memory.fd)


def test_flips_are_found(saved: tuple[Memory, bytes]) -> None:
    """The two tests above would pass if nothing ever came to harm."""
    rnd = random.Random(3)
    lost = taken = 0
    for _ in range(60):
        memory, model = saved[0].copy(), bytearray(saved[1])
        memory.flip(rnd, 3 * UNIT, False)  # (the larger the pages, the more of them is empty)
        with suppress(StateError, CorruptionError):
            device = memory.take_over()
            lost += read_all(device, model)
            taken += device.counters()["lost_blocks"]
            del device
        os.close(memory.fd)
    assert lost > 20
    assert taken > 3


def test_a_slot_that_leads_nowhere_loses_its_block_only(saved: tuple[Memory, bytes]) -> None:
    memory, model = saved[0].copy(), bytearray(saved[1])
    block = next(b for b in range(BLOCKS) if any(model[b * BLOCK : (b + 1) * BLOCK]))
    at = (1 << 16) + 8 * block + 5
    os.pwrite(memory.fd, bytes([os.pread(memory.fd, 1, at)[0] ^ 0x20]), at)  # of the handle
    for _ in range(2):
        device = memory.take_over()
        device.check()
        assert read_all(device, model) == device.counters()["lost_blocks"] == 1
        del device
    device = memory.take_over()
    device.write(b"new" + bytes(BLOCK - 3), block * BLOCK)
    model[block * BLOCK : (block + 1) * BLOCK] = b"new" + bytes(BLOCK - 3)
    device.check()
    assert read_all(device, model) == 0
    del device
    device = memory.take_over()
    device.check()
    assert device.counters()["lost_blocks"] == 0
    os.close(memory.fd)


@pytest.mark.parametrize("table", ["slots", "cells"])
def test_any_bit_of_a_slot_or_a_cell_loses_one_block(table: str) -> None:
    """Also where it then leads to another block's object or word: that block is the rightful one."""
    rnd = random.Random(1)
    kinds = (
        lambda: rnd.randbytes(8) * 512,
        lambda: rnd.randbytes(600).ljust(BLOCK, b"\0"),
        lambda: rnd.randbytes(2500).ljust(BLOCK, b"\0"),
        lambda: rnd.randbytes(BLOCK),
        lambda: rnd.randbytes(BLOCK // 2).hex().encode(),
    )
    sound = Memory()
    device = sound.take_over()
    model = bytearray(b"".join(kinds[block % 5]() for block in range(BLOCKS)))
    device.write(model, 0)
    assert device.cool(0, BLOCKS, threshold=BLOCK)[0] == BLOCKS // 5
    del device
    cells, _ = table_ends()
    for block in (0, 101, 122, 253, 254):
        at = (1 << 16) + 8 * block
        if table == "cells":
            at = cells + 8 * int.from_bytes(os.pread(sound.fd, 4, at + 2), "little")
        for bit in range(64):
            memory = sound.copy()
            byte = at + bit // 8
            os.pwrite(memory.fd, bytes([os.pread(memory.fd, 1, byte)[0] ^ 1 << bit % 8]), byte)
            device = memory.take_over()
            lost = read_all(device, bytearray(model))
            assert lost <= 1, (block, bit)
            if device.counters()["lost_blocks"]:
                device.check()
            device.write(model[block * BLOCK : (block + 1) * BLOCK], block * BLOCK)
            del device
            device = memory.take_over()
            assert read_all(device, bytearray(model)) == 0, (block, bit)
            assert device.counters()["lost_blocks"] == 0
            device.check()
            device.trim(0, SIZE)
            device.check()
            assert device.counters()["objs_used"] == 0
            del device
            os.close(memory.fd)
    os.close(sound.fd)


def test_a_cell_that_leads_to_a_span_of_a_reserve() -> None:
    """Such spans have pages, but never had a class: what is in them is nobody's object."""
    uses = (
        lambda device: device.write(b"new" + bytes(BLOCK - 3), 0),
        lambda device: device.trim(0, BLOCK),
        lambda device: device.block(0),
        lambda device: device.check(),
        lambda device: device.compact(),
        lambda device: device.read(bytearray(BLOCK), 0),
    )
    cells, _ = table_ends()
    classes = (1 << 16) + whole_pages(8 * BLOCKS)
    for use_it in uses:
        memory = Memory()
        device = memory.take_over()
        device.reserve_start(2 << 20)
        for block in range(64):
            device.write(random.Random(block).randbytes(3000).ljust(BLOCK, b"\0"), block * BLOCK)
        del device
        spans = os.pread(memory.fd, 1 << 12, classes)
        unused = [span for span in range(max(i for i in range(1 << 12) if spans[i])) if not spans[span]]
        assert unused
        for span in (unused[0], unused[-1]):
            handle = int.from_bytes(os.pread(memory.fd, 4, (1 << 16) + 2), "little")
            at = cells + 8 * handle
            cell = int.from_bytes(os.pread(memory.fd, 8, at), "little")
            device = memory.take_over()
            wrong = cell & ~(((1 << 32) - 1) << 16) | span << 16
            os.pwrite(memory.fd, wrong.to_bytes(8, "little"), at)
            with suppress(CorruptObjectError, CorruptionError):
                use_it(device)
            buf = bytearray(BLOCK)
            device.read(buf, 5 * BLOCK)
            assert buf == random.Random(5).randbytes(3000).ljust(BLOCK, b"\0")
            os.pwrite(memory.fd, cell.to_bytes(8, "little"), at)
            del device
        os.close(memory.fd)


@pytest.mark.slow
def test_a_pin_that_nobody_holds(saved: tuple[Memory, bytes]) -> None:
    """Who waits for it gives up."""
    memory, model = saved[0].copy(), saved[1]
    device = memory.take_over()
    cells, _ = table_ends()
    slots = 1 << 16
    block = next(
        block
        for block in range(BLOCKS)
        if any(model[block * BLOCK : (block + 1) * BLOCK])
        and not os.pread(memory.fd, 8, slots + 8 * block)[1] & 0x20  # SLOT_SAME
    )
    handle = int.from_bytes(os.pread(memory.fd, 4, slots + 8 * block + 2), "little")
    at = cells + 8 * handle
    os.pwrite(memory.fd, bytes([os.pread(memory.fd, 1, at)[0] | 1]), at)
    with pytest.raises(CorruptObjectError, match=f"block {block}"):
        device.read(bytearray(BLOCK), block * BLOCK)
    os.close(memory.fd)
