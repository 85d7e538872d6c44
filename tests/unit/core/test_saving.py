"""Saved devices: the format by a reader of its own, what comes back, what is refused."""

import contextlib
import fcntl
import io
import os
import random
import signal
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import hypothesis.strategies as st
import lz4.block
import pytest
from hypothesis import given, settings
from support.run import SCALE

from zramd import Device, PoolFullError
from zramd.core.device import checksum, saving
from zramd.errors import CorruptObjectError, SaveError
from zramd.server import statefile

BLOCK = 4096
SIZE = 4 << 20
LOST, SAME = 0x4000, 0x2000


# The reference reader: docs/save-format.md in code, with nothing of zramd in it.

TABLE = []
for n in range(256):
    for _ in range(8):
        n = n >> 1 ^ (0x82F63B78 if n & 1 else 0)
    TABLE.append(n)


def crc32c(data: bytes, crc: int = 0) -> int:
    crc ^= 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def read_saved(data: bytes) -> tuple[int, int, dict[int, tuple[str, bytes]]]:
    """Return disksize, changes, and kind and content of each block that is there."""
    file = io.BytesIO(data)
    head = file.read(36)
    magic, version, block_size, disksize, _saved_at, crc = struct.unpack("<8sIIQQI", head)
    assert (magic, version, block_size) == (b"\x89ZRAMD\r\n", 1, BLOCK)
    assert crc == crc32c(head[:32])
    total = crc32c(head[32:])
    blocks: dict[int, tuple[str, bytes]] = {}
    payload_bytes = 0
    while True:
        start = file.read(16)
        kind, records, length, crc = struct.unpack("<IIII", start)
        body = file.read(length)
        assert len(body) == length <= 131072
        assert crc == crc32c(start[:12] + body)
        if kind == 2:
            break
        assert kind == 1
        total = crc32c(start[12:], total)
        for _ in range(records):
            (word,) = struct.unpack_from("<Q", body)
            block, what = word >> 16, word & 0xFFFF
            assert max(blocks, default=-1) < block < disksize // BLOCK
            size = {LOST: 0, SAME: 8}.get(what, what)
            content, body = body[8 : 8 + size], body[8 + size :]
            if what == LOST:
                blocks[block] = "lost", b""
            elif what == SAME:
                blocks[block] = "same", content * 512
            elif what == BLOCK:
                blocks[block] = "raw", content
            else:
                blocks[block] = "lz4", lz4.block.decompress(content, uncompressed_size=BLOCK)
            payload_bytes += size if what <= BLOCK else 0
        assert not body
    count, payload, changes, whole = struct.unpack("<QQQI", body)
    assert (count, payload, whole) == (len(blocks), payload_bytes, total)
    assert not file.read()
    return disksize, changes, blocks


# What the tests do.


def fill(device: Device, seed: int = 1, fraction: float = 0.7) -> None:
    dice = random.Random(seed)
    for block in range(device.disksize // BLOCK):
        if dice.random() > fraction:
            continue
        data = {
            0: bytes(BLOCK),
            1: dice.randbytes(8) * 512,
            2: dice.randbytes(BLOCK),
        }.get(dice.randrange(8), dice.randbytes(dice.randrange(10, 3900)).ljust(BLOCK, b"\1"))
        if data == bytes(BLOCK):
            device.zero(block * BLOCK, BLOCK, may_trim=False)
        else:
            device.write(data, block * BLOCK)


def save(device: Device, *, live: bool = False) -> bytes:
    fd = os.memfd_create("saved")
    try:
        saving.save(device, fd, live=live)
        return os.pread(fd, 1 << 30, 0)
    finally:
        os.close(fd)


def blocks_of(data: bytes) -> bytes:
    """A save without its time and the checksums that it is in."""
    return data[36:-32]


def opened(data: bytes) -> int:
    fd = os.memfd_create("saved")
    os.write(fd, data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def load(device: Device, data: bytes, **more: object) -> dict[str, int]:
    fd = opened(data)
    try:
        return saving.load(device, fd, **more)  # type: ignore[arg-type]
    finally:
        os.close(fd)


def check(data: bytes) -> dict[str, int]:
    fd = opened(data)
    try:
        return saving.verify_stream(fd)
    finally:
        os.close(fd)


def content(device: Device) -> bytes:
    buf = bytearray(device.disksize)
    device.read(buf, 0)
    return bytes(buf)


def filled(**more: object) -> Device:
    device = Device(SIZE, **more)  # type: ignore[arg-type]
    fill(device)
    return device


@pytest.mark.parametrize("portable", [False, True])
def test_crc32c(portable: bool) -> None:
    assert checksum.crc32c(b"123456789", portable=portable) == 0xE3069283
    data = random.Random(1).randbytes(1000)
    for size in (0, 1, 7, 8, 9, 64, 1000):
        assert checksum.crc32c(data[:size], portable=portable) == crc32c(data[:size])
        rest = checksum.crc32c(data[size:], checksum.crc32c(data[:size]), portable)
        assert rest == crc32c(data)


def test_the_format() -> None:
    device = filled()
    disksize, changes, blocks = read_saved(save(device))
    assert (disksize, changes) == (SIZE, 0)
    whole = content(device)
    kinds = set()
    for block in range(SIZE // BLOCK):
        kind, data = blocks.get(block, ("hole", bytes(BLOCK)))
        kinds.add(kind)
        assert device.block(block)["kind"] == kind
        assert whole[block * BLOCK : (block + 1) * BLOCK] == data
    assert kinds == {"hole", "same", "lz4", "raw"}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("larger", [0, 1 << 20])
def test_what_comes_back(verify: bool, larger: int) -> None:
    device = filled(verify=not verify)
    data = save(device)
    other = Device(SIZE + larger, verify=verify)
    name = other.data_id
    found = load(other, data)
    assert content(other)[:SIZE] == content(device)
    other.check()
    before, after = device.counters(), other.counters()
    for key in ("pages_stored", "compr_data_size", "same_pages", "huge_pages"):
        assert after[key] == before[key] > 0
    assert found["blocks"] == before["pages_stored"]
    assert found["payload_bytes"] == before["compr_data_size"]
    assert found["bytes"] == len(data)
    assert other.data_id != name
    for block in range(SIZE // BLOCK):
        assert device.block(block)["kind"] == other.block(block)["kind"]
    # Nothing was compressed again: what is saved from it is the same, but for the size and the time.
    if not larger:
        assert blocks_of(save(other)) == blocks_of(data)


def test_an_empty_device() -> None:
    device = Device(SIZE)
    load(device, save(Device(SIZE)))
    assert device.counters()["pages_stored"] == 0
    assert content(device) == bytes(SIZE)


def test_lost_blocks(memory_folder: Path) -> None:
    """A block that was changed in memory is lost, and stays so; the others are there."""
    path = memory_folder / "state"
    fd = statefile.open_state(str(path), SIZE, True)
    device = Device(SIZE, state=fd, verify=True)
    os.close(fd)
    data = random.Random(3).randbytes(BLOCK)
    device.write(data, 0)
    device.write(data[::-1], BLOCK)
    with path.open("r+b") as file:
        place = end = 0
        found = -1
        while found < 0:  # of gigabytes of holes
            place = os.lseek(file.fileno(), end, os.SEEK_DATA)
            end = os.lseek(file.fileno(), place, os.SEEK_HOLE)
            found = os.pread(file.fileno(), end - place, place).find(data[100:200])
        os.pwrite(file.fileno(), b"XYZ", place + found)
    saved = save(device)
    _, _, blocks = read_saved(saved)
    assert blocks == {0: ("lost", b""), 1: ("raw", data[::-1])}
    for verify in (False, True):
        other = Device(SIZE, verify=verify)
        assert load(other, saved)["lost"] == 1
        assert other.block(0)["kind"] == "lost"
        with pytest.raises(CorruptObjectError):
            other.read(bytearray(BLOCK), 0)
        buf = bytearray(BLOCK)
        other.read(buf, BLOCK)
        assert buf == data[::-1]
        other.check()
        assert read_saved(save(other))[2] == blocks
        other.write(data, 0)
        other.read(buf, 0)
        assert buf == data
        other.check()


def test_a_device_that_changes() -> None:
    device = filled()
    reader, writer = os.pipe()
    raised: list[SaveError] = []

    def work() -> None:
        try:
            saving.save(device, writer)
        except SaveError as error:
            raised.append(error)
        os.close(writer)

    thread = threading.Thread(target=work)
    thread.start()
    begun = os.read(reader, 100)
    device.write(b"x" * BLOCK, 0)  # the pipe is full: the save is at a chunk of long before the end
    with open(reader, "rb") as file:
        data = begun + file.read()
    thread.join()
    assert [str(error) for error in raised] == ["a client changed the device while it was saved"]
    with pytest.raises(SaveError, match=r"^a client changed the device while it was saved$") as caught:
        check(data)
    assert caught.value.cause == raised[0].cause == "changed"


@pytest.mark.parametrize("what", ["write", "reset"])
def test_a_live_save(what: str) -> None:
    device = filled()
    reader, writer = os.pipe()
    found: list[object] = []

    def work() -> None:
        try:
            found.append(saving.save(device, writer, live=True))
        except SaveError as error:
            found.append(str(error))
        os.close(writer)

    thread = threading.Thread(target=work)
    thread.start()
    begun = os.read(reader, 100)
    device.write(b"new" + bytes(BLOCK - 3), SIZE - BLOCK)
    if what == "reset":
        device.reset()
    with open(reader, "rb") as file:
        data = begun + file.read()
    thread.join()
    if what == "reset":
        assert found == ["the device was reset or loaded while it was saved"]
        return
    assert isinstance(found[0], dict)
    assert found[0]["changes"] == 1
    _, changes, blocks = read_saved(data)
    assert changes == 1
    assert blocks[SIZE // BLOCK - 1][1] == b"new" + bytes(BLOCK - 3)


def damaged() -> Iterator[tuple[str, bytes, str]]:
    data = save(filled())
    small = save(Device(SIZE))
    yield "empty", b"", "^it is not a saved device$"
    yield "foreign", b"#!/bin/sh\n" * 1000, "^it is not a saved device$"
    yield "head", data[:20], "^it was cut off$"
    yield "size", data[:17] + b"\xff" + data[18:], "^its header is damaged$"
    head = data[:8] + struct.pack("<I", 7) + data[12:32]
    yield (
        "version",
        head + struct.pack("<I", crc32c(head)) + data[36:],
        "^it has another format .* 7, not 1 or 2$",
    )
    for at in (36, 40, 52, 60000, len(data) - 1):
        yield f"cut {at}", data[:at], rf"^it was cut off \(at byte {at}\)$"
    yield (
        "flip",
        data[:50000] + bytes([data[50000] ^ 1]) + data[50001:],
        r"^a chunk is damaged \(at byte 36\)$",
    )
    yield "more", data + b"x", rf"^something follows its end \(at byte {len(data)}\)$"
    yield "swapped end", data[:36] + small[36:], ""
    first = 36 + 16 + struct.unpack_from("<I", data, 44)[0]
    yield "missing", data[:36] + data[first:], r"^chunks are missing, or not its own \(at byte"
    yield "twice", data[:first] + data[36:], r"^a block is out of order \(at byte"
    wrong = struct.pack("<Q", 5 << 16 | 100) + bytes(100)
    start = struct.pack("<III", 1, 1, len(wrong))
    bad = start + struct.pack("<I", crc32c(start + wrong)) + wrong
    yield "payload", data[:36] + bad, "^a block does not decompress: block 5, in the chunk at byte 36$"
    for wrong in (
        struct.pack("<Q", 5 << 16),
        struct.pack("<Q", 5 << 16 | 4097) + bytes(4097),
        struct.pack("<Q", 5 << 16 | SAME) + bytes(7),
        struct.pack("<Q", 5 << 16 | LOST) + bytes(1),
        bytes(3),
    ):
        start = struct.pack("<III", 1, 1, len(wrong))
        bad = start + struct.pack("<I", crc32c(start + wrong)) + wrong
        yield f"record {wrong[:8]!r}", data[:36] + bad, r"^a chunk contradicts itself \(at byte 36\)$"


DAMAGED = [case for case in damaged() if case[2]]


@pytest.mark.parametrize(
    ("data", "message"), [case[1:] for case in DAMAGED], ids=[case[0] for case in DAMAGED]
)
def test_refused(data: bytes, message: str) -> None:
    with pytest.raises(SaveError, match=message) as caught:
        check(data)
    assert caught.value.cause == ("cut off" if "cut off" in message else "other")
    device = Device(SIZE)
    with pytest.raises(SaveError, match=message):
        load(device, data)
    assert device.counters()["pages_stored"] == device.counters()["mem_used_total"] == 0
    device.check()


def test_does_not_fit() -> None:
    data = save(filled())
    with pytest.raises(SaveError, match=r"^it is larger than the device$"):
        load(Device(SIZE - BLOCK), data)
    device = Device(SIZE, mem_limit=1 << 20)
    with pytest.raises(PoolFullError, match="mem_limit or the budget leaves no room"):
        load(device, data)
    assert device.counters()["pages_stored"] == 0
    device.check()
    device = filled()
    before = content(device)
    with pytest.raises(SaveError, match="not empty"):
        load(device, data)
    assert content(device) == before


def test_begun_and_length() -> None:
    """A part may have been read already, and the stream may go on behind it."""
    data = save(filled())
    for begun in (1, 36, 100, 4096):
        reader, writer = os.pipe()
        threading.Thread(target=_write_and_close, args=(writer, data[begun:] + b"more")).start()
        device = Device(SIZE)
        saving.load(device, reader, begun=data[:begun], length=len(data), patience=10)
        assert os.read(reader, 10) == b"more"
        os.close(reader)
        assert blocks_of(save(device)) == blocks_of(data)


def _write_and_close(fd: int, data: bytes) -> None:
    with open(fd, "wb") as file:
        file.write(data)


def test_patience() -> None:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    with pytest.raises(SaveError, match="cannot be read at byte 0: connection timed out") as caught:
        saving.load(Device(SIZE), reader, patience=0.05)
    assert caught.value.cause == "cut off"
    os.set_blocking(writer, False)
    with pytest.raises(TimeoutError):
        saving.save(filled(), writer, patience=0.05)
    os.close(reader)
    with pytest.raises(BrokenPipeError):
        saving.save(filled(), writer)
    os.close(writer)


def test_a_load_that_a_crash_ended(memory_folder: Path) -> None:
    """Whoever takes the state over does not take a half of it for all of it."""
    path = str(memory_folder / "state")
    data = save(filled())
    child = os.fork()
    if child == 0:
        device = Device(SIZE, state=statefile.open_state(path, SIZE, False))
        reader, writer = os.pipe()
        fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, 1 << 20)
        os.write(writer, data[: 300 << 10])
        threading.Thread(target=_die_with_a_part, args=(device,)).start()
        saving.load(device, reader)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 9
    fd = statefile.open_state(path, SIZE, False)
    device = Device(SIZE, state=fd)
    assert device.dropped
    assert device.counters()["pages_stored"] == 0
    load(device, data)
    del device
    device = Device(SIZE, state=fd)
    assert not device.dropped
    assert blocks_of(save(device)) == blocks_of(data)
    os.close(fd)


def _die_with_a_part(device: Device) -> None:
    while not device.counters()["pages_stored"]:
        time.sleep(0.001)
    os.kill(os.getpid(), 9)


SAVED = save(filled())
SMALL = Device(1 << 20)
fill(SMALL, 7, 0.4)
SAVED_SMALL = save(SMALL)


@settings(max_examples=int(300 * max(SCALE, 1)), deadline=None)
@given(st.data())
def test_fuzz(data: st.DataObject) -> None:
    """Whatever happens to a file: it is refused, or it is what it was."""
    right = SAVED_SMALL
    wrong = bytearray(right)
    places = st.integers(0, len(right) - 1)
    for _ in range(data.draw(st.integers(1, 3))):
        match data.draw(st.sampled_from(["flip", "cut", "splice", "word", "mend"])):
            case "flip":
                at = data.draw(places) % (len(wrong) or 1)
                wrong[at : at + 1] = bytes([(wrong[at] if wrong else 0) ^ 1 << data.draw(st.integers(0, 7))])
            case "cut":
                del wrong[data.draw(places) :]
            case "splice":
                source = data.draw(st.sampled_from([right, SAVED]))
                at, start = data.draw(places), data.draw(places)
                length = data.draw(st.integers(0, 300000))
                wrong[at : at + data.draw(st.integers(0, 300000))] = source[start : start + length]
            case "word":
                at = data.draw(st.integers(0, 200))
                wrong[at : at + 4] = struct.pack("<I", data.draw(st.integers(0, 0xFFFFFFFF)))
            case "mend":  # the checksums are right, so that what is behind them is tried
                wrong = mended(wrong)
    device = Device(1 << 20)
    try:
        load(device, bytes(wrong))
    except SaveError:
        assert device.counters()["pages_stored"] == 0
    else:
        if wrong != right:
            check(bytes(wrong))
            assert read_saved(bytes(wrong))[0] <= 1 << 20
        else:
            assert content(device) == content(SMALL)
    device.check()


def mended(data: bytearray) -> bytearray:
    """All checksums made right, as far as the frames can be followed."""
    data = bytearray(data)
    if len(data) < 36:
        return data
    data[32:36] = struct.pack("<I", checksum.crc32c(data[:32]))
    total = checksum.crc32c(data[32:36])
    at = 36
    while at + 16 <= len(data):
        kind, _, length = struct.unpack_from("<III", data, at)
        if at + 16 + length > len(data):
            break
        if kind == 2 and length == 28:
            data[at + 40 : at + 44] = struct.pack("<I", total)
        crc = checksum.crc32c(data[at + 16 : at + 16 + length], checksum.crc32c(data[at : at + 12]))
        data[at + 12 : at + 16] = struct.pack("<I", crc)
        total = checksum.crc32c(data[at + 12 : at + 16], total)
        at += 16 + length
    return data


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1 << 30), st.floats(0, 1), st.booleans(), st.booleans())
def test_any_device(seed: int, fraction: float, verify: bool, other_verify: bool) -> None:
    device = Device(1 << 20, verify=verify)
    fill(device, seed, fraction)
    other = Device(1 << 20, verify=other_verify)
    load(other, save(device))
    assert content(other) == content(device)
    assert other.counters()["compr_data_size"] == device.counters()["compr_data_size"]
    other.check()


def test_a_signal_that_comes_before_the_wait_ends_it() -> None:
    """Another thread takes the signal, so that no call of ours is interrupted: as if it came just before."""

    class EndedError(Exception):
        pass

    def end(_number: int, _frame: object) -> None:
        raise EndedError

    source = os.memfd_create("saved")
    saving.save(Device(SIZE), source)
    os.lseek(source, 0, os.SEEK_SET)
    reader, writer = os.pipe2(os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        while os.write(writer, bytes(BLOCK)):
            pass
    before = signal.signal(signal.SIGUSR1, end)
    done, late = threading.Event(), threading.Event()

    def other() -> None:
        time.sleep(0.2)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)
        if not done.wait(10):
            late.set()
            with contextlib.suppress(BlockingIOError):
                while os.read(reader, 1 << 20):  # then it ends without having seen the signal
                    pass

    thread = threading.Thread(target=other)
    thread.start()
    try:
        with pytest.raises(EndedError):
            saving.verify_stream(source, copy=writer)
        assert not late.is_set()
    finally:
        done.set()
        thread.join()
        signal.signal(signal.SIGUSR1, before)
        for fd in (source, reader, writer):
            os.close(fd)
