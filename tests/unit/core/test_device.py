"""The device: any offset and length, zram's counters, limits, holes, and having no room."""

import os
import random
import threading
import time
from contextlib import suppress

import pytest
from support.content import compressible, noise
from support.pages import PAGE, UNIT

from zramd import Device, PoolFullError
from zramd.core.device.device import MAX_DISKSIZE, state_layout

BLOCK = 4096
HOLE, ZERO, DATA = 3, 2, 0
SLOTS_A_PAGE = PAGE // 8


def read(device: Device, offset: int, length: int) -> bytes:
    buf = bytearray(length)
    device.read(buf, offset)
    return bytes(buf)


def test_reads_zeros_until_written() -> None:
    device = Device(1 << 30)
    assert read(device, 12345, 100_000) == bytes(100_000)
    assert device.counters()["mem_used_total"] == 0
    device.check()


@pytest.mark.parametrize("disksize", [1, 4095, 4096, 4097, 1 << 20])
def test_disksize_is_rounded_up(disksize: int) -> None:
    device = Device(disksize)
    assert device.disksize == -(-disksize // BLOCK) * BLOCK
    device.write(b"x", device.disksize - 1)
    assert read(device, device.disksize - 1, 1) == b"x"
    device.check()


@pytest.mark.parametrize("disksize", [0, MAX_DISKSIZE + 1, (1 << 64) - 1])
def test_disksize_out_of_range(disksize: int) -> None:
    with pytest.raises(ValueError, match=str(disksize)):
        Device(disksize)


def test_the_largest_device() -> None:
    device = Device(MAX_DISKSIZE)
    device.write(noise(1), MAX_DISKSIZE - BLOCK)
    device.write(compressible(1), 0)
    assert read(device, MAX_DISKSIZE - BLOCK, BLOCK) == noise(1)
    assert read(device, MAX_DISKSIZE // 2, BLOCK) == bytes(BLOCK)
    counters = device.counters()
    assert counters["mem_used_total"] == 2 * PAGE
    device.reset()


@pytest.mark.parametrize(
    ("offset", "length"), [(1 << 20, 1), ((1 << 20) - 1, 2), (1 << 63, 1), (0, (1 << 20) + 1)]
)
def test_out_of_range_is_refused_and_counted(offset: int, length: int) -> None:
    device = Device(1 << 20)
    for use in (
        lambda: device.read(bytearray(length), offset),
        lambda: device.write(bytes(length), offset),
        lambda: device.trim(offset, length),
        lambda: device.zero(offset, length),
        lambda: device.extents(offset, length),
    ):
        with pytest.raises(ValueError, match=f"{length} bytes at {offset}"):
            use()
    assert device.counters()["invalid_io"] == 5
    device.check()


def test_read_needs_a_writable_buffer() -> None:
    with pytest.raises(BufferError):
        Device(1 << 20).read(bytes(BLOCK), 0)


@pytest.mark.parametrize(
    ("offset", "length"), [(0, 1), (4095, 2), (1, 4095), (100, 10_000), (4096, 4096), (4000, 8300)]
)
def test_unaligned_write_keeps_the_neighbours(offset: int, length: int) -> None:
    device = Device(1 << 16)
    model = bytearray(random.Random(3).randbytes(1 << 16))
    device.write(model, 0)
    data = random.Random(4).randbytes(length)
    device.write(data, offset)
    model[offset : offset + length] = data
    assert read(device, 0, 1 << 16) == model
    device.check()


def test_counters_are_zrams() -> None:
    device = Device(1 << 20)
    device.write(bytes(BLOCK), 0)  # a zero block: allocated, no memory
    device.write(b"\x55" * BLOCK, BLOCK)  # a repeated word, no memory
    device.write(noise(1), 2 * BLOCK)  # raw
    device.write(compressible(1), 3 * BLOCK)
    counters = device.counters()
    assert counters["orig_data_size"] == 4 * BLOCK
    assert counters["pages_stored"] == 4
    assert counters["same_pages"] == 2
    assert counters["huge_pages"] == counters["huge_pages_since"] == 1
    assert BLOCK + 700 < counters["compr_data_size"] < BLOCK + 760
    assert counters["mem_used_total"] == counters["mem_used_max"] == 2 * PAGE
    device.write(compressible(2), 2 * BLOCK)
    device.trim(0, 2 * BLOCK)
    counters = device.counters()
    assert counters["huge_pages"] == 0
    assert counters["huge_pages_since"] == 1
    assert counters["same_pages"] == 0
    assert counters["notify_free"] == 2
    assert counters["pages_stored"] == 2
    assert (counters["writes"], counters["trims"]) == (5, 1)
    assert counters["written_bytes"] == 5 * BLOCK
    device.check()


def test_trimming_a_whole_large_device_is_quick() -> None:
    device = Device(4 << 40)
    device.write(noise(1), (1 << 40) + 512 * BLOCK)
    device.trim(1, (4 << 40) - 1)
    assert device.counters()["notify_free"] == (1 << 30) - 1
    assert device.counters()["pages_stored"] == 0
    assert read(device, (1 << 40) + 512 * BLOCK, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize("first", [SLOTS_A_PAGE - 3, SLOTS_A_PAGE - 1, 2 * SLOTS_A_PAGE - 3])
def test_looking_ahead_makes_nothing_resident(first: int) -> None:
    """Reading a hole of the file would: behind these blocks no slot was ever written, or the device ends."""
    size = 2 * SLOTS_A_PAGE * BLOCK
    fd = os.memfd_create("zramd")
    try:
        os.ftruncate(fd, state_layout(size)["bytes"])
        device = Device(size, state=fd)
        end = SLOTS_A_PAGE if first < SLOTS_A_PAGE else 2 * SLOTS_A_PAGE
        for block in range(first, end):
            device.write(compressible(block), block * BLOCK)
        before = os.fstat(fd).st_blocks
        length = min(8 * BLOCK, size - first * BLOCK)
        found = read(device, first * BLOCK, length)
        assert found == b"".join(compressible(block) for block in range(first, end)).ljust(length, b"\0")
        assert os.fstat(fd).st_blocks == before
        device.trim(first * BLOCK, length)
        assert os.fstat(fd).st_blocks <= before
        assert device.counters()["pages_stored"] == 0
        device.check()
    finally:
        os.close(fd)


def test_trim_frees_whole_blocks_only() -> None:
    device = Device(1 << 16)
    device.write(b"\xaa" * (1 << 16), 0)
    device.trim(100, 3 * BLOCK)
    assert read(device, 0, BLOCK) == b"\xaa" * BLOCK
    assert read(device, BLOCK, 2 * BLOCK) == bytes(2 * BLOCK)
    assert read(device, 3 * BLOCK, BLOCK) == b"\xaa" * BLOCK
    device.check()


@pytest.mark.parametrize("may_trim", [True, False])
def test_zero_is_exact_to_the_byte(may_trim: bool) -> None:
    device = Device(1 << 16)
    device.write(b"\xaa" * (1 << 16), 0)
    device.zero(100, 3 * BLOCK, may_trim)
    assert read(device, 0, 1 << 16) == b"\xaa" * 100 + bytes(3 * BLOCK) + b"\xaa" * (
        (1 << 16) - 3 * BLOCK - 100
    )
    kind = HOLE if may_trim else ZERO
    assert device.extents(BLOCK, 2 * BLOCK) == [(BLOCK, 2 * BLOCK, kind)]
    device.check()


def test_zeroing_part_of_a_hole_stores_nothing() -> None:
    device = Device(1 << 16)
    device.zero(10, 100)
    assert device.extents(0, 1 << 16) == [(0, 1 << 16, HOLE)]


def test_extents() -> None:
    device = Device(16 << 20)
    device.write(noise(1), 5 * BLOCK)
    device.write(b"\x11" * BLOCK, 6 * BLOCK)  # same-filled but not zeros: data
    device.write(bytes(BLOCK), 7 * BLOCK)
    device.write(noise(2), (8 << 20) + 3)
    assert device.extents(0, 16 << 20) == [
        (0, 5 * BLOCK, HOLE),
        (5 * BLOCK, 2 * BLOCK, DATA),
        (7 * BLOCK, BLOCK, ZERO),
        (8 * BLOCK, (8 << 20) - 8 * BLOCK, HOLE),
        (8 << 20, 2 * BLOCK, DATA),
        ((8 << 20) + 2 * BLOCK, (8 << 20) - 2 * BLOCK, HOLE),
    ]
    assert device.extents(5 * BLOCK + 7, 100) == [(5 * BLOCK + 7, 100, DATA)]
    assert device.extents(100, 1 << 20, True) == [(100, 5 * BLOCK - 100, HOLE)]
    assert device.extents(0, 0) == []


def test_extents_answer_is_bounded() -> None:
    device = Device(64 << 20)
    for block in range(0, 16384, 2):
        device.write(b"x", block * BLOCK)
    first = device.extents(0, 64 << 20)
    assert len(first) == 4096
    rest = device.extents(first[-1][0] + first[-1][1], (64 << 20) - first[-1][0] - first[-1][1])
    assert first[-1][0] + first[-1][1] == rest[0][0]
    assert first[-1][2] != rest[0][2]


def test_pool_full_keeps_the_old_content() -> None:
    device = Device(16 << 20, mem_limit=1 << 20)
    written = 0
    with pytest.raises(PoolFullError, match=r"write of 4096 bytes at \d+"):
        while True:
            device.write(noise(written), written * BLOCK)
            written += 1
    assert written == 256
    assert device.counters()["failed_writes"] == 1
    assert device.counters()["mem_used_total"] == 1 << 20
    with pytest.raises(PoolFullError):
        device.write(noise(1000), 0)
    for block in range(written):
        assert read(device, block * BLOCK, BLOCK) == noise(block)
    device.check()
    # What needs no pool memory always succeeds, and what frees makes room.
    device.write(b"\x77" * BLOCK, 300 * BLOCK)
    device.write(bytes(BLOCK), 0)
    device.write(noise(1001), 301 * BLOCK)
    device.trim(BLOCK, BLOCK)
    device.zero(301 * BLOCK, BLOCK)
    device.write(noise(1002), 302 * BLOCK)
    device.check()


def test_a_request_that_fails_in_the_middle() -> None:
    device = Device(1 << 20, mem_limit=8 * BLOCK)
    data = b"".join(noise(i) for i in range(16))
    with pytest.raises(PoolFullError):
        device.write(data, 0)
    for block in range(16):
        assert read(device, block * BLOCK, BLOCK) in (noise(block), bytes(BLOCK))
    device.check()


def test_limit_can_be_changed() -> None:
    """It is counted in blocks, and what is taken below it are pages, each with as many raw blocks as fit."""
    device = Device(1 << 20, mem_limit=PAGE)
    device.write(b"".join(map(noise, range(UNIT))), 0)
    with pytest.raises(PoolFullError):
        device.write(noise(UNIT), PAGE)
    device.mem_limit = 2 * PAGE
    device.write(noise(UNIT), PAGE)
    device.mem_limit = 1
    assert device.mem_limit == BLOCK
    assert read(device, 0, BLOCK) == noise(0)
    device.mem_limit = 0
    device.write(noise(3), 2 * PAGE)


def test_reset_and_peak() -> None:
    device = Device(8 << 20, mem_limit=4 << 20)
    for block in range(500):
        device.write(noise(block), block * BLOCK)
    device.trim(0, 4 << 20)
    device.release_stock()
    assert device.counters()["mem_used_max"] == 500 * BLOCK
    device.reset_mem_used_max()
    assert device.counters()["mem_used_max"] == device.counters()["mem_used_total"] == 0
    device.write(noise(1), 0)
    device.reset()
    assert read(device, 0, 8 << 20) == bytes(8 << 20)
    counters = device.counters()
    kept = ("disksize", "mem_limit", "metadata_bytes", "reads", "read_bytes")
    assert all(value == 0 for key, value in counters.items() if key not in kept)
    assert device.mem_limit == 4 << 20
    device.check()
    device.write(noise(2), 4 << 20)
    assert read(device, 4 << 20, BLOCK) == noise(2)
    device.check()


def test_a_huge_empty_device_costs_almost_nothing() -> None:
    device = Device(100 << 30)
    for block in range(0, 256):
        device.write(noise(block), block * BLOCK)
    counters = device.counters()
    assert counters["mem_used_total"] == 1 << 20
    assert counters["metadata_bytes"] < 1 << 20


def test_latencies() -> None:
    """Every request is in one bucket, failed or not; a block status is no request."""
    device = Device(1 << 20, mem_limit=PAGE)
    device.write(b"".join(map(noise, range(UNIT))), 0)
    with pytest.raises(PoolFullError):
        device.write(noise(UNIT), PAGE)
    for _ in range(3):
        read(device, 0, BLOCK)
    device.trim(0, BLOCK)
    device.zero(100, 200)
    device.extents(0, 1 << 20)
    with pytest.raises(ValueError, match="out of range"):
        device.trim(1 << 20, 1)
    counts = {op: sum(buckets) for op, (_, buckets) in device.latencies().items()}
    assert counts == {"read": 3, "write": 2, "trim": 1, "zero": 1}
    counters = device.counters()
    assert [counters[key] for key in ("reads", "writes", "trims", "zeroes")] == [3, 2, 1, 1]
    assert device.latency_bounds == tuple(250 << i for i in range(24))
    for total, buckets in device.latencies().values():
        assert len(buckets) == 25
        # No request took more than its bucket's bound, nor less than half of it.
        most = sum(bound * count for bound, count in zip(device.latency_bounds, buckets, strict=False))
        least = sum(
            bound * count // 2 for bound, count in zip(device.latency_bounds[1:], buckets[1:], strict=False)
        )
        assert least <= total <= most
    device.reset()
    assert set(device.latencies().values()) == {(0, (0,) * 25)}


def test_latencies_tell_the_time() -> None:
    """Large requests spend nearly all the time inside: a clock that runs wrong would show."""
    device = Device(64 << 20)
    data = b"".join(noise(block) for block in range(256)) * 16
    began = time.perf_counter_ns()
    for at in range(0, 64 << 20, 16 << 20):
        device.write(data, at)
    elapsed = time.perf_counter_ns() - began
    total, _ = device.latencies()["write"]
    assert 0.97 * elapsed < total < 1.001 * elapsed


def test_latencies_add_up_over_threads() -> None:
    device = Device(1 << 20)

    def work() -> None:
        for _ in range(5000):
            device.trim(0, BLOCK)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(device.latencies()["trim"][1]) == 20000


def test_waiting_at_the_gate_counts() -> None:
    """What a check holds up is late for the client, so it is late in the histogram."""
    device = Device(64 << 20)
    for at in range(0, 64 << 20, BLOCK):
        device.write(compressible(at), at)
    stop = threading.Event()

    def check() -> None:
        while not stop.is_set():
            device.check()

    checker = threading.Thread(target=check)
    checker.start()
    # A read of its own takes a few microseconds, a check a millisecond and more.
    slow = 0
    deadline = time.monotonic() + 30
    while slow < 10 and time.monotonic() < deadline:
        read(device, 0, BLOCK)
        slow = sum(device.latencies()["read"][1][11:])  # longer than 256 us
    stop.set()
    checker.join()
    assert slow >= 10


def test_pressure() -> None:
    device = Device(16 << 20, mem_limit=8 << 20)
    for block in range(2000):
        device.write(compressible(block), block * BLOCK)
    for block in range(0, 2000, 2):
        device.trim(block * BLOCK, BLOCK)
    freeable, used, limit, done, inflight, shared = device.pressure()
    counters = device.counters()
    assert counters["freeable_pages"] >= freeable > 50
    assert used * BLOCK == counters["mem_used_total"]
    assert (limit, done, inflight, shared) == (2048, 3000, 0, 0.0)
    assert device.compact() == pytest.approx(counters["freeable_pages"], rel=0.01)
    device.check()


def test_read_during_compaction_is_whole() -> None:
    device = Device(32 << 20)
    for block in range(4000):
        device.write(compressible(block, 100 + block % 600), block * BLOCK)
    stop = threading.Event()
    wrong: list[int] = []

    def reader() -> None:
        rnd = random.Random(1)
        while not stop.is_set():
            block = rnd.randrange(0, 4000, 4)
            if read(device, block * BLOCK, BLOCK) != compressible(block, 100 + block % 600):
                wrong.append(block)

    thread = threading.Thread(target=reader)
    thread.start()
    for block in range(4000):
        if block % 4:
            device.trim(block * BLOCK, BLOCK)
        if block % 100 == 0:
            device.compact()
    time.sleep(0.05)
    stop.set()
    thread.join()
    assert not wrong
    assert device.counters()["objects_migrated"] > 0
    device.check()


def test_block() -> None:
    device = Device(1 << 20)
    device.write(compressible(1), 0)
    device.write(noise(1), BLOCK)
    device.write(b"\x01\x02\x03\x04\x05\x06\x07\x08" * 512, 2 * BLOCK)
    device.write(bytes(BLOCK), 3 * BLOCK)
    device.write(compressible(2, 701), 5 * BLOCK)
    lz4, other = device.block(0), device.block(5)
    assert lz4["kind"] == other["kind"] == "lz4"
    assert 700 < int(lz4["payload_bytes"]) < int(lz4["class_size"])
    assert lz4["handle"] != other["handle"]
    assert lz4["zspage"] == other["zspage"]
    assert lz4["zspage_inuse"] == 2 <= int(lz4["zspage_objs"])
    assert lz4["zspage_pages"] == UNIT  # all that lies on one page, and all of it
    assert {lz4["chunk"], other["chunk"]} == {0, 1}
    assert abs(int(lz4["obj"]) - int(other["obj"])) == lz4["class_size"]
    (row,) = [row for row in device.classes() if row[0] == lz4["class_index"]]
    assert row[1] == lz4["class_size"]
    raw = device.block(1)
    assert (raw["kind"], raw["payload_bytes"], raw["class_size"]) == ("raw", BLOCK, BLOCK)
    same = device.block(2)
    assert (same["kind"], same["word"]) == ("same", 0x0807060504030201)
    assert device.block(3) == {"block": 3, "kind": "same", "word": 0, "handle": 0}
    assert device.block(4) == {"block": 4, "kind": "hole"}
    with pytest.raises(ValueError, match="block 256 is not on the device, which has blocks 0 to 255"):
        device.block(256)
    assert device.counters()["invalid_io"] == 0


def test_block_follows_an_object_that_moves() -> None:
    device = Device(16 << 20)
    for block in range(2000):
        device.write(compressible(block), block * BLOCK)
    before = {block: device.block(block) for block in range(0, 2000, 3)}
    for block in range(2000):
        if block % 3:
            device.trim(block * BLOCK, BLOCK)
    device.compact()
    moved = 0
    for block, old in before.items():
        new = device.block(block)
        assert (new["handle"], new["payload_bytes"]) == (old["handle"], old["payload_bytes"])
        moved += new["obj"] != old["obj"]
        assert read(device, block * BLOCK, BLOCK) == compressible(block)
    assert moved
    device.check()


def test_what_cannot_be_freed_is_not_tried_again() -> None:
    """With a reserve objects move only where pages are resident: what they cannot free so is not freeable."""
    for seed in range(40):
        device = Device(4096 * BLOCK, mem_limit=3 << 20)
        device.reserve_start(1 << 20)
        refiller = threading.Thread(target=device.reserve_keep)
        refiller.start()
        try:
            fill_and_compact(device, random.Random(seed))
        finally:
            device.reserve_stop()
            refiller.join()
        device.check()


def fill_and_compact(device: Device, rnd: random.Random) -> None:
    low, high = rnd.choice(((900, 3800), (1, 4096), (1400, 1600), (2500, 3800)))
    for _ in range(5):
        with suppress(PoolFullError):
            for _ in range(rnd.randrange(100, 2500)):
                block = rnd.randrange(4096)
                if rnd.random() < 0.3:
                    device.trim(block * BLOCK, BLOCK)
                else:
                    device.write(rnd.randbytes(rnd.randrange(low, high)).ljust(BLOCK, b"\0"), block * BLOCK)
        for _ in range(3):
            device.compact(1 << 30)
        before = device.counters()
        assert device.compact(1 << 30) == device.pressure()[0] == 0
        assert device.counters()["objects_migrated"] == before["objects_migrated"]


@pytest.mark.parametrize("pages", [1, 7, 64, 201, 250, 255, 256, 257])
@pytest.mark.parametrize("sizes", [(4096, 4096), (1, 4096), (2500, 3800)], ids=["raw", "all", "large"])
@pytest.mark.parametrize("cold_level", [0, 3])
def test_last_pages_below_the_limit_are_ready(pages: int, sizes: tuple[int, int], cold_level: int) -> None:
    """With a reserve no write takes a page that is not resident, and all that the limit leaves are had."""
    device = Device(4096 * BLOCK, mem_limit=pages * UNIT * BLOCK, cold_level=cold_level)
    device.reserve_start(16 << 20)
    rnd = random.Random(pages)
    for _ in range(3):
        with pytest.raises(PoolFullError):
            for block in range(4096):
                device.write(rnd.randbytes(rnd.randint(*sizes)).ljust(BLOCK, b"\0"), block * BLOCK)
        counters = device.counters()
        assert counters["reserve_misses"] == 0
        most = pages * UNIT - (min(pages * UNIT // 64, 16 * UNIT) if cold_level else 0)
        assert counters["mem_used_total"] == most // UNIT * UNIT * BLOCK
        for block in rnd.sample(range(4096), 2000):
            device.trim(block * BLOCK, BLOCK)
    device.check()
