"""Saves with cold blocks: their payloads are in it as they are, and come back so; what is refused."""

import os
import random
import struct
import threading

import pytest
from support.content import digits, of_each_kind
from test_saving import BLOCK, SIZE, check, content, crc32c, load, opened, save

from zramd import Device, PoolFullError
from zramd.core.device import saving
from zramd.errors import SaveError

COLD, TRIED, SAME, LOST = 0x8000, 0x4000, 0x2000, 0x4000
HEAD, FRAME = 36, 16


def filled(**more: object) -> Device:
    """A device with blocks of every kind, some of them cold, some tried in vain."""
    device = Device(SIZE, cold_level=3, **more)  # type: ignore[arg-type]
    dice = random.Random(1)
    for block in range(0, SIZE // BLOCK, 2):
        device.write(of_each_kind(dice)[dice.randrange(5)], block * BLOCK)
    done, _ = device.cool(0, SIZE // BLOCK // 2)
    assert done > 100
    return device


def version(data: bytes) -> int:
    return int(struct.unpack_from("<I", data, 8)[0])


def records(data: bytes) -> dict[int, tuple[int, bytes]]:
    """What stands for each block in a save, and its payload; each checksum is looked at."""
    found, at, kind = {}, HEAD, 1
    while kind == 1:
        kind, count, length, crc = struct.unpack_from("<IIII", data, at)
        body = data[at + FRAME : at + FRAME + length]
        assert crc == crc32c(data[at : at + 12] + body)
        at += FRAME + length
        while kind == 1 and count:
            (word,) = struct.unpack_from("<Q", body)
            what = word & 0xFFFF
            size = {LOST: 0, SAME: 8}.get(what, what & 0x1FFF)
            found[word >> 16] = what, body[8 : 8 + size]
            body = body[8 + size :]
            count -= 1
    assert (kind, at) == (2, len(data))
    return found


def with_records(*each: tuple[int, bytes], number: int = 2) -> bytes:
    """A save of that format whose first blocks are these; nothing but these may be wrong with it."""
    head = b"\x89ZRAMD\r\n" + struct.pack("<IIQQ", number, BLOCK, SIZE, 0)
    head += struct.pack("<I", crc32c(head))
    body = b"".join(struct.pack("<Q", block << 16 | what) + data for block, (what, data) in enumerate(each))
    data, total = head, crc32c(head[32:])
    payload = sum(len(payload) for what, payload in each if what not in (SAME, LOST))
    for kind, count, part in ((1, len(each), body), (2, 0, b"")):
        if kind == 2:
            part = struct.pack("<QQQI", len(each), payload, 0, total)
        start = struct.pack("<III", kind, count, len(part))
        crc = struct.pack("<I", crc32c(start + part))
        total = crc32c(crc, total)
        data += start + crc + part
    return data


def frame(size: int) -> bytes:
    """A cold payload of our own making: one frame of zstd, without its magic number, of `size` times x."""
    return b"\1" + bytes([0, 2 << 3]) + (size << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"x"


@pytest.mark.parametrize("verify", [False, True])
def test_what_comes_back(verify: bool) -> None:
    device = filled(verify=not verify)
    data = save(device)
    assert version(data) == 2
    before = device.counters()
    kinds = [device.block(block)["kind"] for block in range(SIZE // BLOCK)]
    found = check(data)
    assert found["cold"] == before["cold_pages"] == kinds.count("zstd")
    for block, (what, payload) in records(data).items():
        assert (what & COLD != 0) is (kinds[block] == "zstd")
        if what & COLD:
            assert len(payload) == device.block(block)["payload_bytes"] == what & 0x1FFF
            assert payload[0] == 1
    assert len(data) < before["compr_data_size"] + 40 * before["pages_stored"]
    other = Device(SIZE, verify=verify)  # which makes nothing cold itself
    load(other, data)
    assert content(other) == content(device)
    other.check()
    after = other.counters()
    for key in (
        "pages_stored",
        "compr_data_size",
        "same_pages",
        "huge_pages",
        "cold_pages",
        "cold_data_size",
    ):
        assert after[key] == before[key] > 0, key
    assert [other.block(block)["kind"] for block in range(SIZE // BLOCK)] == kinds
    assert records(save(other)) == records(data)


def test_without_a_cold_block_it_is_as_before() -> None:
    """So that a zramd that knows no cold blocks reads it."""
    device = filled()
    for block in range(SIZE // BLOCK):
        if device.block(block)["kind"] == "zstd":
            device.write(b"hot".ljust(BLOCK, b"\0"), block * BLOCK)
    data = save(device)
    assert version(data) == 1
    assert not any(what & COLD for what, _ in records(data).values())
    other = Device(SIZE)
    load(other, data)
    assert content(other) == content(device)


def test_what_becomes_cold_after_the_head_is_written() -> None:
    device = Device(SIZE, cold_level=3)
    dice = random.Random(1)
    for block in range(SIZE // BLOCK):
        device.write(digits(dice), block * BLOCK)
    reader, writer = os.pipe()
    thread = threading.Thread(target=lambda: (saving.save(device, writer), os.close(writer)))
    thread.start()
    begun = os.read(reader, 100)  # the rest waits for room in the pipe
    assert device.cool(0, SIZE // BLOCK)[0] > 900
    with open(reader, "rb") as file:
        data = begun + file.read()
    thread.join()
    assert version(data) == 1
    assert {what for what, _ in records(data).values()} == {BLOCK}
    other = Device(SIZE)
    load(other, data)
    assert content(other) == content(device)


def test_a_frame_of_anybodys_making() -> None:
    data = with_records(
        (COLD | len(frame(BLOCK)), frame(BLOCK)), (COLD | TRIED | len(frame(BLOCK)), frame(BLOCK))
    )
    device = Device(SIZE, verify=True)
    assert load(device, data)["cold"] == 2
    assert content(device)[: 2 * BLOCK] == b"x" * 2 * BLOCK
    device.check()


@pytest.mark.parametrize(
    ("what", "payload"),
    [
        (COLD, frame(BLOCK - 1)),
        (COLD, frame(BLOCK + 1)),
        (COLD, frame(BLOCK)[:-1]),
        (COLD, frame(BLOCK) + b"x"),
        (COLD, b"\2" + frame(BLOCK)[1:]),
        (COLD, b"\0" + frame(BLOCK)[1:]),
        (COLD, b"\1"),
        (COLD, b"x"),
        (COLD, bytes(range(256)) * 15),
        (COLD, (frame(BLOCK) * BLOCK)[:BLOCK]),
        (COLD | TRIED, b"\1" * 4095),
    ],
)
@pytest.mark.parametrize("verify", [False, True])
def test_what_does_not_decompress_is_not_stored(what: int, payload: bytes, verify: bool) -> None:
    data = with_records((COLD | len(frame(BLOCK)), frame(BLOCK)), (what | len(payload), payload))
    match = r"^a block does not decompress: block 1, in the chunk at byte 36$"
    with pytest.raises(SaveError, match=match):
        check(data)
    device = Device(SIZE, verify=verify)
    with pytest.raises(SaveError, match=match):
        load(device, data)
    assert device.counters()["pages_stored"] == device.counters()["cold_pages"] == 0
    device.check()


@pytest.mark.parametrize(
    ("number", "what", "payload"),
    [
        (1, COLD | len(frame(BLOCK)), frame(BLOCK)),
        (2, COLD | SAME, bytes(8)),
        (2, COLD | SAME | 8, bytes(8)),
        (2, SAME | TRIED, bytes(8)),
        (2, TRIED | 100, bytes(100)),
        (2, COLD | 4097, bytes(4097)),
        (2, COLD | 100, bytes(99)),
    ],
)
def test_records_that_the_format_does_not_have(number: int, what: int, payload: bytes) -> None:
    data = with_records((what, payload), number=number)
    for work in (check, lambda data: load(Device(SIZE), data)):
        with pytest.raises(SaveError, match=r"^a (chunk contradicts itself|block does not decompress)"):
            work(data)


def test_one_that_knows_more() -> None:
    for work in (check, lambda data: load(Device(SIZE), data)):
        with pytest.raises(SaveError) as caught:
            work(with_records((COLD | 4, b"\2xyz"), number=3))
        assert str(caught.value) == "it has another format than this zramd reads: format 3, not 1 or 2"


def test_each_flipped_bit_is_found() -> None:
    dice = random.Random(2)
    device = Device(SIZE, cold_level=3)
    for block in range(2):
        device.write((digits(dice)[:200] + bytes(BLOCK))[:BLOCK], block * BLOCK)
    device.write(digits(dice), 2 * BLOCK)
    assert device.cool(0, 3)[0] >= 1
    data = save(device)
    for at in range(len(data)):
        for bit in range(8) if at < 600 else (dice.randrange(8),):
            damaged = data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :]
            with pytest.raises(SaveError):
                check(damaged)


def test_mem_limit() -> None:
    data = save(filled())
    device = Device(SIZE, mem_limit=256 << 10)
    with pytest.raises(PoolFullError, match="mem_limit or the budget leaves no room"):
        load(device, data)
    assert device.counters()["pages_stored"] == device.counters()["cold_pages"] == 0
    assert device.counters()["mem_used_max"] <= 256 << 10
    device.check()


def test_a_cut_save_leaves_nothing() -> None:
    data = save(filled())
    fd = opened(data[: len(data) // 2])
    device = Device(SIZE)
    with pytest.raises(SaveError, match=r"^it was cut off"):
        saving.load(device, fd)
    os.close(fd)
    assert device.counters()["cold_pages"] == 0
    device.check()
