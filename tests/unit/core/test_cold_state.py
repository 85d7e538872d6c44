"""Cold blocks in a state: its format, what check() says of faults, flipped bits, and a reserve's half."""

import errno
import os
import random
import resource
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.content import digits, of_each_kind
from support.run import wait_until
from test_cold_saving import filled as filled_elsewhere
from test_saving import content, load, save
from test_state_refused import fingerprint, refused, with_field

from zramd import Device
from zramd.core.device.device import state_layout
from zramd.core.device.tier import Tier
from zramd.errors import CorruptionError, CorruptObjectError
from zramd.server import statefile

BLOCK = 4096
SIZE = 4 << 20
BLOCKS = SIZE // BLOCK
SLOTS = 1 << 16  # where they are in a state
HEADER = 4  # bytes before a payload in the pool
COLD, TRIED, SAME = 0x8000, 0x4000, 0x2000


def format_of(path: Path) -> int:
    with path.open("rb") as file:
        return int(struct.unpack_from("<Q", file.read(24), 16)[0])


def open_device(path: Path, *, verify: bool = False, size: int = SIZE, cold_level: int = 3) -> Device:
    """As the server does it."""
    fd = statefile.open_state(str(path), size, verify)
    try:
        return Device(size, state=fd, verify=verify, cold_level=cold_level, mark_cold=statefile.mark_cold)
    finally:
        os.close(fd)


def fill(device: Device, seed: int = 1) -> bytes:
    """Blocks of every kind, half of those that zstd can shrink cold; what the device holds."""
    dice = random.Random(seed)
    for block in range(0, BLOCKS, 2):
        device.write(of_each_kind(dice)[block // 2 % 5], block * BLOCK)
    return content(device)


# The format of a state


def test_the_format_is_raised_before_the_first_cold_block(memory_folder: Path) -> None:
    path = memory_folder / "state"
    device = open_device(path)
    fill(device)
    device.sweep()
    assert device.cool(0, BLOCKS, age=2) == (0, 0)
    del device
    path.unlink()
    device = open_device(path)
    model = fill(device)
    assert format_of(path) == 1  # a zramd of before takes it over
    assert device.cool(0, BLOCKS // 2)[0] > 50
    assert format_of(path) == 2
    cold = device.counters()["cold_pages"]
    del device
    for level in (3, 0):
        device = open_device(path, cold_level=level)
        assert content(device) == model
        assert device.counters()["cold_pages"] == cold
        device.check()
        del device
    assert format_of(path) == 2


def test_a_load_of_cold_blocks_raises_it(memory_folder: Path) -> None:
    saved = save(filled_elsewhere())
    hot = Device(SIZE)
    hot.write(b"hot", 0)
    path = memory_folder / "state"
    device = open_device(path, cold_level=0)
    load(device, save(hot))
    assert format_of(path) == 1
    device.reset()
    load(device, saved)
    assert format_of(path) == 2
    assert device.counters()["cold_pages"] > 0


def test_nothing_is_cold_where_the_format_cannot_be_raised(memory_folder: Path) -> None:
    def fail(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    path = memory_folder / "state"
    fd = statefile.open_state(str(path), SIZE, False)
    device = Device(SIZE, state=fd, cold_level=3, mark_cold=fail)
    os.close(fd)
    fill(device)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            device.cool(0, BLOCKS)
    assert device.counters()["cold_pages"] == 0
    assert format_of(path) == 1


@pytest.mark.parametrize("number", [0, 4, 999, 1000, 1 << 40])
def test_a_state_that_knows_more(memory_folder: Path, number: int) -> None:
    path = memory_folder / "state"
    device = open_device(path)
    fill(device)
    device.cool(0, BLOCKS)
    del device
    with_field(path, "version", number)
    refused(path, rf"has format {number}, this zramd knows 1 to 3: use the zramd that made it", SIZE)


# Slots and payloads that are not as they should be


class State:
    """A device in a memfd, whose bits can be changed below it."""

    def __init__(self, *, verify: bool, cold_level: int = 3) -> None:
        self.fd = os.memfd_create("zramd")
        os.ftruncate(self.fd, state_layout(SIZE)["bytes"])
        self.verify = verify
        self.device = Device(SIZE, state=self.fd, verify=verify, cold_level=cold_level)
        self.model = fill(self.device)
        assert self.device.cool(0, BLOCKS // 2)[0] > 50
        self.device.check()

    def again(self) -> Device:
        return Device(SIZE, state=self.fd, verify=self.verify)

    def slot(self, block: int) -> int:
        return int(struct.unpack("<Q", os.pread(self.fd, 8, SLOTS + 8 * block))[0])

    def set_slot(self, block: int, slot: int) -> None:
        os.pwrite(self.fd, struct.pack("<Q", slot), SLOTS + 8 * block)

    def first(self, kind: str) -> int:
        """The first block of a kind; "tried": an object that the cold codec could not shrink."""
        for block in range(BLOCKS):
            found = self.device.block(block)["kind"]
            if (kind == "tried" and found in ("lz4", "raw") and self.slot(block) & TRIED) or found == kind:
                return block
        raise AssertionError(f"there is no {kind} block")

    def payload(self, block: int) -> tuple[int, int]:
        """Where the payload of a block is in the file, and how long it is."""
        layout = state_layout(SIZE)
        there = self.device.block(block)
        arena = layout["bytes"] - layout["spans"] * layout["span_size"]
        return arena + int(there["obj"]) + HEADER, int(there["payload_bytes"])

    def flip(self, at: int, bit: int) -> None:
        os.pwrite(self.fd, bytes([os.pread(self.fd, 1, at)[0] ^ 1 << bit]), at)


@pytest.fixture(params=[False, True], ids=["", "verify"])
def state(request: pytest.FixtureRequest) -> Iterator[State]:
    made = State(verify=request.param)
    yield made
    os.close(made.fd)


def test_what_was_tried_is_no_fault(state: State) -> None:
    block = state.first("tried")
    state.device.check()
    state.set_slot(block, state.slot(block) & ~TRIED)
    state.device.check()
    assert state.device.cool(0, BLOCKS)[0] >= 0
    assert state.slot(block) & TRIED


@pytest.mark.parametrize(
    ("kind", "flags", "match"),
    [
        ("same", COLD, "a slot leads beyond the backing"),
        ("same", TRIED, "a slot is of no kind"),
        ("same", COLD | TRIED, "a slot leads beyond the backing"),
        ("raw", COLD, "a slot is of no kind"),
        ("lz4", COLD, "a cold payload does not begin as one"),
        ("zstd", SAME, "a slot leads beyond the backing"),
        ("hole", COLD, "a slot's handle is not live"),
        ("hole", COLD | TRIED, "a slot's handle is not live"),
    ],
)
def test_check_finds_slots_of_no_kind(state: State, kind: str, flags: int, match: str) -> None:
    block = state.first(kind)
    slot = state.slot(block)
    if kind == "hole":
        block = next(number for number in range(BLOCKS) if not state.slot(number))
    state.set_slot(block, slot | flags)
    with pytest.raises(CorruptionError, match=match):
        state.device.check()
    if state.verify or (not slot & SAME and flags != SAME):  # else it reads as some word
        with pytest.raises(CorruptObjectError, match=f"block {block}"):
            state.device.read(bytearray(BLOCK), block * BLOCK)
    state.set_slot(block, slot)
    state.device.check()


@pytest.mark.parametrize("kind", ["same", "raw"])
def test_a_state_with_a_slot_of_no_kind(state: State, kind: str) -> None:
    block = state.first(kind)
    state.set_slot(block, state.slot(block) | COLD)
    path = Path(f"/proc/self/fd/{state.fd}")
    before = fingerprint(path)
    if state.verify:
        device = state.again()
        assert device.block(block)["kind"] == "lost"
        assert device.counters()["lost_blocks"] == 1
        device.check()
    else:
        with pytest.raises(
            CorruptionError, match=rf"block {block}: its slot is of no kind that this zramd knows"
        ):
            state.again()
        assert fingerprint(path) == before


def test_check_finds_a_payload_of_another_codec(state: State) -> None:
    at, _ = state.payload(state.first("zstd"))
    state.flip(at, 1)
    match = "checksum differs" if state.verify else "does not begin as one"
    with pytest.raises(CorruptionError, match=match):
        state.device.check()


def test_what_cannot_be_read_is_not_made_hot_again_and_again(state: State) -> None:
    block, device, tier = state.first("zstd"), state.device, Tier(state.device)
    at, _ = state.payload(block)
    tier.sweep(False, True, 300)
    device.read(bytearray(BLOCK), block * BLOCK)
    state.flip(at, 1)
    assert tier.promote(0, BLOCKS)[1:] == (1, 0, 0)
    assert tier.promote(0, BLOCKS)[1:] == (0, 0, 0)
    assert device.ages()[255] == 0
    assert device.counters()["checksum_errors"] == 1


@pytest.mark.parametrize("which", [0, 1])
def test_check_compares_the_counters(state: State, which: int) -> None:
    """cold_pages and cold_data_size, which are neighbours among the words that are kept."""
    counters = state.device.counters()
    words = struct.pack("<QQ", counters["cold_pages"], counters["cold_data_size"])
    at = os.pread(state.fd, SLOTS, 0).index(words)
    state.flip(at + 8 * which, 0)
    with pytest.raises(CorruptionError, match="the counters of the cold blocks differ from the slots"):
        state.device.check()
    state.flip(at + 8 * which, 0)
    state.device.check()


def test_check_counts_what_is_cold(state: State) -> None:
    block = state.first("zstd")
    state.set_slot(block, state.slot(block) & ~COLD)
    with pytest.raises(CorruptionError, match="the counters of the cold blocks differ from the slots"):
        state.device.check()


def test_every_flipped_bit_of_a_cold_payload(state: State) -> None:
    """With verify an error that is counted and names the block; without it, that or other content."""
    device = state.device
    cold = [block for block in range(BLOCKS) if device.block(block)["kind"] == "zstd"]
    cold.sort(key=lambda block: int(device.block(block)["payload_bytes"]))
    guard = b"\xa5" * 64
    buffer = bytearray(guard + bytes(BLOCK) + guard)
    errors = 0
    for block in cold[:: len(cold) // 10]:
        at, size = state.payload(block)
        for byte in range(size):
            for bit in range(8):
                state.flip(at + byte, bit)
                said = ""
                try:
                    device.read(memoryview(buffer)[64:-64], block * BLOCK)
                except CorruptObjectError as error:
                    said = str(error)
                    errors += 1
                assert f"block {block}" in said if said else not state.verify, f"byte {byte}, bit {bit}"
                assert buffer[:64] == buffer[-64:] == guard
                state.flip(at + byte, bit)
    assert errors == device.counters()["checksum_errors"] > 0
    device.check()
    assert content(device) == state.model


def test_random_payloads(state: State) -> None:
    """What stands where a cold payload was is decompressed or refused; the sizes may be wrong, too."""
    device, dice = state.device, random.Random(5)
    block = state.first("zstd")
    at, size = state.payload(block)
    slot, whole = state.slot(block), os.pread(state.fd, size, at)
    buffer = bytearray(BLOCK)
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(dice.randrange(1, 6)):
            start = dice.randrange(min(40, size)) if dice.random() < 0.5 else dice.randrange(size)
            data[start : start + dice.randrange(1, 9)] = dice.randbytes(dice.randrange(1, 9))
        os.pwrite(state.fd, bytes(data[:size]), at)
        state.set_slot(block, slot & ~0x1FFF | dice.randrange(1 << 13) if dice.random() < 0.3 else slot)
        try:
            device.read(buffer, block * BLOCK)
        except CorruptObjectError:
            pass
        else:
            assert not state.verify
    os.pwrite(state.fd, whole, at)
    state.set_slot(block, slot)
    device.check()
    assert content(device) == state.model


def test_a_block_that_cannot_be_read_is_tried_once(state: State) -> None:
    """And does not look as if it were being made cold for ever."""
    block = next(
        number for number in range(BLOCKS // 2, BLOCKS) if state.device.block(number)["kind"] == "lz4"
    )
    at, _ = state.payload(block)
    os.pwrite(state.fd, bytes(16), at)
    for _ in range(3):
        state.device.cool(block, 1)
        assert state.device.counters()["checksum_errors"] == 1
        assert state.device.ages()[255] == 0
    with pytest.raises(CorruptObjectError, match=f"block {block}"):
        state.device.read(bytearray(BLOCK), block * BLOCK)
    assert state.device.block(block)["kind"] == "lz4"


# Ages


def test_ages_stay_and_go() -> None:
    device = Device(SIZE, cold_level=3)
    dice = random.Random(1)
    for block in range(10):
        device.write(digits(dice) if block < 5 else dice.randbytes(BLOCK), block * BLOCK)
    for _ in range(3):
        device.sweep()
    assert device.ages()[3] == 10
    assert device.cool(0, BLOCKS, age=4) == (0, 0)
    assert device.cool(0, BLOCKS, age=3)[0] == 5
    assert device.ages()[3] == 10, "neither what became cold nor what was tried got younger or older"
    device.mem_limit = 1
    for block in range(5):
        device.trim(block * BLOCK, BLOCK)
    device.reset()
    device.mem_limit = 0
    device.write(digits(dice), 0)
    device.write(b"x", 9 * BLOCK)
    assert device.ages()[0] == 2, "a reset has left ages"


@pytest.mark.parametrize("count", [0, 1, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize("first", [0, BLOCKS - 1, BLOCKS, 1 << 40, (1 << 64) - 1])
def test_any_range(first: int, count: int) -> None:
    device = Device(SIZE, cold_level=3)
    device.write(digits(random.Random(1)), SIZE - BLOCK)
    done, _ = device.cool(first, count)
    assert done == (first < BLOCKS and first + count >= BLOCKS)


def test_the_smallest_objects() -> None:
    """Where no chunk is smaller there is nothing to gain."""
    device = Device(SIZE, cold_level=3)
    blocks = [(bytes(range(1, size + 1)) * BLOCK)[:BLOCK] for size in range(1, 60)]
    device.write(b"".join(blocks), 0)
    before = [device.block(block) for block in range(len(blocks))]
    assert any(each.get("class_index") == 0 for each in before)
    for block, old in enumerate(before):
        done, saved = device.cool(block, 1)
        new = device.block(block)
        assert done == (new["kind"] == "zstd")
        if done:
            assert saved == int(old["payload_bytes"]) - int(new["payload_bytes"]) > 0
            assert int(new["class_size"]) < int(old["class_size"])
    device.check()
    assert content(device)[: len(blocks) * BLOCK] == b"".join(blocks)


# A reserve


@contextmanager
def refilled(device: Device, size: int) -> Iterator[None]:
    """Have the reserve of so many bytes filled meanwhile; it has more than its half in the end."""
    refiller = threading.Thread(target=device.reserve_keep)
    refiller.start()
    try:
        yield
        wait_until(lambda: device.counters()["reserve_bytes"] >= size * 5 // 8)
    finally:
        device.reserve_stop()
        refiller.join()


def with_reserve(size: int, blocks: int, *, least: int = 300) -> tuple[Device, list[bytes]]:
    """A device with a reserve, with so many blocks that zstd can shrink, and their content."""
    device = Device(16 << 20, cold_level=3)
    device.reserve_start(size)
    dice = random.Random(1)
    model = [digits(dice)[: dice.randrange(least, least + 600)].ljust(BLOCK, b"\0") for _ in range(blocks)]
    with refilled(device, size):
        for block, data in enumerate(model):
            device.write(data, block * BLOCK)
    return device, model


def as_written(device: Device, model: list[bytes]) -> bool:
    found = bytearray(BLOCK * len(model))
    device.read(found, 0)
    return found == b"".join(model)


def test_a_pass_leaves_half_of_the_reserve() -> None:
    """Nor does it take what is not resident, where many new sizes come and few pages are given back."""
    reserve = 1 << 20
    device, model = with_reserve(reserve, 900)
    # The system gives nothing any more, and requests have used what is above the half up but for some pages.
    for block in range(2000, 4000):
        if device.counters()["reserve_bytes"] <= reserve // 2 + 20 * BLOCK:
            break
        device.write(random.Random(block).randbytes(BLOCK), block * BLOCK)
    before = device.counters()
    assert before["reserve_bytes"] > reserve // 2
    done, least = 0, reserve
    for block in range(0, len(model), 3):
        done += device.cool(block, 1)[0]
        least = min(least, device.counters()["reserve_bytes"])
    after = device.counters()
    assert reserve // 2 <= least < reserve // 2 + 20 * BLOCK
    assert 0 < done < len(model) // 4, "it was never refused"
    assert after["reserve_misses"] == before["reserve_misses"]
    assert device.ages()[255] == 0
    assert as_written(device, model)
    device.check()
    # What was refused is not given up.
    with refilled(device, reserve):
        while done < len(model) * 3 // 4:
            done += device.cool(0, len(model))[0]
    assert as_written(device, model)
    device.check()


def test_a_limit_with_a_reserve() -> None:
    """Where mem_limit or the budget leaves no room, that is what is told: compaction may make some."""
    device, _ = with_reserve(4 << 20, 300)
    before = device.counters()["reserve_bytes"]
    assert before > 2 << 20
    device.mem_limit = BLOCK
    assert Tier(device).cool(0, 300, 0, 0)[5] == errno.ENOSPC
    assert device.counters()["reserve_bytes"] == before


def test_a_pass_makes_no_page_resident() -> None:
    device, model = with_reserve(4 << 20, 1500, least=2000)
    before = device.counters()
    faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    done = 0
    with refilled(device, 4 << 20):
        while done <= 100:  # how far one goes hangs on what is in the reserve by then
            done += device.cool(0, len(model))[0]
        faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults
    assert faults < 20, "Python's own, if any"
    assert device.counters()["reserve_misses"] == before["reserve_misses"]
    assert as_written(device, model)


RESIDENT = """
import random, resource
from zramd import Device
device = Device(256 << 20, cold_level=3)
device.reserve_start(2 << 20)
dice = random.Random(1)
data = [dice.randbytes(2048).hex().encode() for _ in range(65536 // 1024)]
buffer = bytearray(4096)
for block, each in enumerate(data):
    device.write(each, block * 1024 * 4096)
device.ages(), device.read(buffer, 0)
faults = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
device.sweep()
done, _ = device.cool(0, 65536)
device.read(buffer, 0)
print(done, resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - faults)
"""


def test_what_a_pass_needs_is_resident_from_the_start() -> None:
    """The ages and the codec's contexts; where memory is locked, they are, too."""
    ran = subprocess.run([sys.executable, "-P", "-c", RESIDENT], capture_output=True, text=True, check=True)
    done, faults = map(int, ran.stdout.split())
    assert done == 64
    assert faults < 10, "Python's own, if any"
