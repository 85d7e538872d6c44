"""A device with each codec for what is written: what it stores, and what becomes of it later."""

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.content import compressible, noise
from support.run import SANITIZED, preloaded, run_threads

from zramd import Device, PoolFullError
from zramd.core.device import codec, saving
from zramd.core.device.device import state_layout
from zramd.core.device.tier import Tier

BLOCK = 4096
BLOCKS = 256
SIZE = BLOCKS * BLOCK
NAMES = ("lz4", "lz4hc", "zstd", "none")


def contents(seed: int = 1) -> bytes:
    """Blocks of every kind: holes' zeros, a word, noise, and what compresses more or less."""
    rnd = random.Random(seed)
    found = b""
    for block in range(BLOCKS):
        found += (
            bytes(BLOCK),
            rnd.randbytes(8) * 512,
            noise(block),
            compressible(block, rnd.randrange(20, 3500)),
            b"".join(b"%d: quick brown foxes, " % rnd.randrange(1000) for _ in range(300))[:BLOCK],
        )[block % 5]
    return found


def read(device: Device) -> bytes:
    buf = bytearray(device.disksize)
    device.read(buf, 0)
    return bytes(buf)


def memory_file() -> int:
    fd = os.memfd_create("zramd")
    os.ftruncate(fd, state_layout(SIZE)["bytes"])
    return fd


def kinds(device: Device) -> set[object]:
    return {device.block(number)["kind"] for number in range(BLOCKS)}


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_whole_and_part_blocks_come_back(name: str, verify: bool) -> None:
    device = Device(SIZE, codec=name, verify=verify)
    assert (device.codec, device.level) == (name, codec.LEVELS[name][2])
    model = bytearray(contents())
    device.write(model, 0)
    rnd = random.Random(2)
    for _ in range(300):
        offset = rnd.randrange(SIZE - 9000)
        part = rnd.choice((rnd.randbytes, bytes))(rnd.randrange(9000))
        device.write(part, offset)
        model[offset : offset + len(part)] = part
    assert read(device) == model
    device.check()
    stored = {"lz4hc": "lz4", "none": "raw"}.get(name, name)
    assert kinds(device) == {"hole", "same", "raw", stored} - (
        {"hole"} if "hole" not in kinds(device) else set()
    )
    assert device.counters()["cold_pages"] == 0


def test_none_stores_blocks_as_they_are_but_finds_words() -> None:
    device = Device(SIZE, codec="none")
    device.write(contents(), 0)
    counters = device.counters()
    assert counters["same_pages"] == sum(n % 5 < 2 for n in range(BLOCKS))
    assert counters["huge_pages"] == counters["huge_pages_since"] == BLOCKS - counters["same_pages"]
    assert counters["compr_data_size"] == counters["huge_pages"] * BLOCK


def test_better_codecs_take_less_of_the_pool() -> None:
    used = {}
    for name in NAMES:
        device = Device(SIZE, codec=name)
        device.write(contents(), 0)
        used[name] = device.counters()["compr_data_size"]
    assert used["zstd"] < used["lz4hc"] < used["lz4"] < used["none"]


@pytest.mark.parametrize("before", NAMES)
@pytest.mark.parametrize("after", NAMES)
def test_a_state_of_one_codec_is_taken_over_with_another(before: str, after: str) -> None:
    fd = memory_file()
    data = contents()
    first = Device(SIZE, codec=before, state=fd, verify=True, cold_level=5)
    first.write(data, 0)
    first.cool(0, BLOCKS // 2)
    counters = first.counters()
    del first
    second = Device(SIZE, codec=after, state=fd, verify=True, cold_level=9)
    second.check()
    for name in (
        "pages_stored",
        "compr_data_size",
        "huge_pages",
        "same_pages",
        "cold_pages",
        "cold_data_size",
    ):
        assert second.counters()[name] == counters[name], name
    assert read(second) == data
    second.write(data[: SIZE // 2], SIZE // 4)
    second.cool(0, BLOCKS)
    second.check()
    assert read(second) == data[: SIZE // 4] + data[: SIZE // 2] + data[SIZE // 4 * 3 :]
    os.close(fd)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_that_may_have_zstd_says_so(name: str) -> None:
    """Before the first such block: an older zramd would take it for another kind."""
    fd = memory_file()
    marked = []
    device = Device(SIZE, codec=name, state=fd, cold_level=5, mark_cold=marked.append)
    assert len(marked) == (name == "zstd")
    device.write(contents(), 0)
    Tier(device).cool(0, BLOCKS, 0, 0)
    assert len(marked) == 1
    os.close(fd)


def test_what_zstd_wrote_becomes_cold_at_a_higher_level() -> None:
    device = Device(SIZE, codec="zstd", level=1, cold_level=19)
    data = contents()
    device.write(data, 0)
    before = device.counters()
    done, saved = device.cool(0, BLOCKS)
    after = device.counters()
    zstd = sum(device.block(number)["kind"] == "zstd" for number in range(BLOCKS))
    assert 0 < done < zstd, "some shrink, and some do not"
    assert saved > 0
    assert after["cold_pages"] == zstd, "what did not shrink is cold as it is"
    assert after["compr_data_size"] == before["compr_data_size"] - saved
    assert after["pages_stored"] == before["pages_stored"]
    assert after["huge_pages_since"] == before["huge_pages_since"]
    device.check()
    assert read(device) == data
    handles = [device.block(number).get("handle") for number in range(BLOCKS)]
    assert device.cool(0, BLOCKS) == (0, 0), "nothing is tried again"
    assert [device.block(number).get("handle") for number in range(BLOCKS)] == handles


def test_the_cold_codec_at_the_level_of_what_was_written_moves_nothing() -> None:
    device = Device(SIZE, codec="zstd", level=5, cold_level=5)
    device.write(contents(), 0)
    before = device.counters()
    assert device.cool(0, BLOCKS) == (0, 0)
    after = device.counters()
    assert before["cold_pages"] == 0 < after["cold_pages"]
    assert after["compr_data_size"] == before["compr_data_size"]
    device.check()


def test_small_payloads_of_zstd_are_left_to_themselves() -> None:
    device = Device(SIZE, codec="zstd", level=1, cold_level=19)
    device.write(contents(), 0)
    device.cool(0, BLOCKS, 1000)
    small = [
        number
        for number in range(BLOCKS)
        if device.block(number)["kind"] == "zstd" and device.block(number)["payload_bytes"] < 1000
    ]
    assert device.counters()["cold_pages"] <= BLOCKS - len(small)
    device.cool(0, BLOCKS)
    assert device.counters()["cold_pages"] >= len(small) > 0


@pytest.mark.parametrize(
    ("name", "better"), [("lz4", True), ("lz4hc", True), ("zstd", False), ("none", False)]
)
def test_only_what_is_read_faster_hot_becomes_hot_again(name: str, better: bool) -> None:
    device = Device(SIZE, codec=name, level=1 if name == "zstd" else 0, cold_level=19)
    tier = Tier(device)
    data = contents()
    device.write(data, 0)
    device.cool(0, BLOCKS)
    for _ in range(3):
        tier.sweep(coarse=False, keep=True, threshold=0)
        assert read(device) == data
    cold = device.counters()["cold_pages"]
    _, tried, done, _ = tier.promote(0, BLOCKS)
    assert cold > 0
    assert (tried == cold, 0 < done <= tried) == (better, better)
    assert device.counters()["cold_pages"] == cold - done
    assert read(device) == data
    device.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_full_pool_leaves_what_was(name: str) -> None:
    device = Device(SIZE, codec=name, mem_limit=SIZE // 8)
    model = bytearray(SIZE)
    refused = 0
    for number in range(BLOCKS):
        data = compressible(number, 2500)
        try:
            device.write(data, number * BLOCK)
        except PoolFullError:
            refused += 1
        else:
            model[number * BLOCK :][:BLOCK] = data
            model[number * BLOCK : (number + 1) * BLOCK] = data
    assert refused
    assert read(device) == model
    device.check()


@pytest.mark.parametrize("name", NAMES)
def test_threads_have_states_of_their_own(name: str) -> None:
    device = Device(4 * SIZE, codec=name, cold_level=3)
    data = contents()

    def work(at: int) -> None:
        for _ in range(3):
            device.write(data, at * SIZE)
            buf = bytearray(SIZE)
            device.read(buf, at * SIZE)
            assert buf == data

    run_threads([lambda at=at: work(at) for at in range(4)])
    device.check()


@pytest.mark.parametrize("name", NAMES)
def test_a_codecs_memory_is_counted(name: str) -> None:
    device = Device(SIZE, codec=name)
    plain = Device(SIZE, codec="none")
    # The state of one request; with zstd perhaps more decoders.
    least = {"lz4": 16 << 10, "lz4hc": 256 << 10, "zstd": 64 << 10, "none": 0}[name]
    more = device.counters()["metadata_bytes"] - plain.counters()["metadata_bytes"]
    assert least <= more <= least + (7 * 100 << 10)
    before = device.counters()["metadata_bytes"]
    device.reserve_start(1 << 20)
    assert device.counters()["metadata_bytes"] >= before + 5 * least, "made ahead of the requests"


@pytest.mark.parametrize("before", NAMES)
def test_a_save_is_loaded_with_another_codec(before: str, tmp_path: Path) -> None:
    data = contents()
    first = Device(SIZE, codec=before, verify=True, cold_level=5)
    first.write(data, 0)
    first.cool(0, BLOCKS // 4)
    with (tmp_path / "saved").open("w+b", buffering=0) as file:
        saved = saving.save(first, file.fileno())
        assert saved["blocks"] == BLOCKS
        for after in NAMES:
            file.seek(0)
            second = Device(SIZE, codec=after)
            saving.load(second, file.fileno())
            assert read(second) == data
            second.write(data[BLOCK:], 0)
            second.check()
            assert read(second)[: SIZE - BLOCK] == data[BLOCK:]


def child(shim: Path, code: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *words],
        env=os.environ | preloaded(shim),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


COUNTING = """
import ctypes, random, sys
from zramd import Device
shim = ctypes.CDLL(None)
name, level = sys.argv[1], int(sys.argv[2])
rnd = random.Random(1)
BLOCKS = 512
data = b"".join((rnd.randbytes(n % 9 * 500) + b"%d brown foxes" % n * 400)[:4096] for n in range(BLOCKS))
"""


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
@pytest.mark.parametrize(
    ("name", "level"), [("lz4", 1), ("lz4hc", 3), ("lz4hc", 9), ("zstd", 1), ("zstd", 19)]
)
def test_requests_never_allocate(malloc_shim: Path, name: str, level: int) -> None:
    """Whole blocks and parts, also of what is cold; 400 bytes and more, as Python itself has small ones."""
    code = (
        COUNTING
        + """
device = Device(BLOCKS * 4096, codec=name, level=level, cold_level=19)
device.reserve_start(4 << 20)
buf = bytearray(len(data))
device.write(data, 0)
shim.shim_count(400)
device.write(data, 0)
device.write(data[:8000], 100)
device.read(buf, 0)
device.cool(0, BLOCKS)
device.read(buf, 0)
device.write(memoryview(data)[:9000], 100)
print(shim.shim_count(400) - 1)     # data[:8000] is one: the shim counts
"""
    )
    assert child(malloc_shim, code, name, str(level)) == "0\n"


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
@pytest.mark.parametrize(
    ("name", "nth", "sentence"),
    [
        # The third is not a codec's.
        ("lz4", 1, "no memory to decompress by zstd"),
        ("lz4", 2, "no memory to recompress by zstd(level=19)"),
        ("lz4", 4, "no memory to compress by lz4"),
        ("lz4hc", 4, "no memory to compress by lz4hc"),
        ("zstd", 4, "no memory to compress by zstd"),
    ],
)
def test_no_memory_for_a_codec_is_said_when_the_device_is_made(
    malloc_shim: Path, name: str, nth: int, sentence: str
) -> None:
    code = (
        COUNTING
        + """
shim.shim_count(20000)
shim.shim_fail(int(sys.argv[3]))
try:
    Device(BLOCKS * 4096, codec=name, cold_level=19)
except MemoryError as error:
    shim.shim_fail(0)
    print(error)
"""
    )
    said = child(malloc_shim, code, name, "0", str(nth))
    assert re.fullmatch(re.escape(sentence) + ": [0-9]{5,6} bytes\n", said), said
