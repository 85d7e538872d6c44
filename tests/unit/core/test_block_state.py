"""zram's block_state: a line for each block that is stored, in the kernel's format."""

import random
import re
import threading
from collections.abc import Iterator

import pytest
from support.backings import Disk
from support.run import run_threads

from zramd.core.device.device import Device
from zramd.core.device.tier import Tier
from zramd.core.device.writeback import Writeback

BLOCK = 4096
NOW, SWEEP = 1_000_000, 10
# As a script would take it apart that was written for the kernel's "%12zd %12u.%06d %c%c%c%c%c%c\n".
KERNELS = re.compile(r" {0,11}(\d+) {1,12}(\d+)\.(\d{6}) ([s.])([w.])([h.])([i.])([r.])([n.])")

ZSTD_ONLY = bytes(random.Random(1).choices(range(64), k=BLOCK))  # six bits a byte: lz4 leaves it raw
NOISE = random.Random(2).randbytes(BLOCK)
TEXT = b"".join(b"%d bottles of beer on the wall, " % n for n in range(200))[:BLOCK]
WORD = b"zramzram" * (BLOCK // 8)


def pieces(device: Device, room: int = 64 << 10) -> Iterator[bytes]:
    """What the endpoint sends: each piece as it was filled in."""
    buffer = bytearray(room)
    block = 0
    while block < device.disksize // BLOCK:
        before = block
        written, block = device.block_state(buffer, block, NOW, SWEEP)
        assert block > before
        yield bytes(buffer[:written])


def state(device: Device, room: int = 64 << 10) -> dict[int, tuple[int, str]]:
    """Block → (access time, flags)."""
    text = b"".join(pieces(device, room)).decode()
    found = [re.fullmatch(KERNELS, line) for line in text.splitlines()]
    assert all(found), text
    assert text.count("\n") == len(found)
    return {int(one[1]): (int(one[2]), "".join(one.groups()[3:])) for one in found if one}


def put(device: Device, block: int, content: bytes) -> None:
    device.write(content, block * BLOCK)


@pytest.fixture
def device() -> Device:
    return Device(64 << 20, cold_level=3)


def test_the_line_is_the_kernels_own_to_the_byte(device: Device) -> None:
    put(device, 3, WORD)
    put(device, 12345, NOISE)
    text = b"".join(pieces(device)).decode()
    assert text == "".join(
        f"{block:12} {NOW:12}.{0:06} {flags}\n" for block, flags in ((3, "s....."), (12345, "..h..."))
    )


def test_only_what_is_stored_has_a_line(device: Device) -> None:
    assert state(device) == {}
    for block in (0, 1, 511, 512, 16383):
        put(device, block, TEXT)
    device.trim(BLOCK, BLOCK)
    assert list(state(device)) == [0, 511, 512, 16383]


def test_flags(device: Device) -> None:
    for block, content in enumerate((WORD, TEXT, ZSTD_ONLY, NOISE)):
        put(device, block, content)
    assert [flags for _, flags in state(device).values()] == ["s.....", "......", "..h...", "..h..."]
    assert device.cool(0, 4)[0] >= 2
    assert [flags for _, flags in state(device).values()] == ["s.....", "....r.", "....r.", "..h..n"]
    put(device, 1, TEXT)
    put(device, 3, NOISE)
    assert [flags for _, flags in state(device).values()] == ["s.....", "......", "....r.", "..h..."]


def test_a_block_that_was_compressed_in_vain_is_incompressible_and_not_huge(device: Device) -> None:
    """lz4 shrank it, and zstd does not gain a size class on that."""
    half = NOISE[: BLOCK // 2] + bytes(BLOCK // 2)
    put(device, 0, half)
    assert device.cool(0, 1) == (0, 0)
    assert state(device)[0][1] == ".....n"


def test_what_zstd_compressed_when_it_was_written_is_not_recompressed() -> None:
    device = Device(64 << 20, codec="zstd", level=1, cold_level=19)
    put(device, 0, TEXT)
    assert state(device)[0][1] == "......"
    device.cool(0, 1)
    assert state(device)[0][1] == "....r.", "shrunk or not: the cold codec has had it"


@pytest.fixture
def backed() -> Device:
    """A device that can write blocks out."""
    return Disk().device(64 << 20)


def write_out(device: Device) -> None:
    hands = Writeback(device)
    hands.gather(0, device.disksize // BLOCK, 0)
    assert hands.flush()[-1] == 0


def test_what_is_out_is_written_back(backed: Device) -> None:
    """It is still huge, or recompressed, as in zram, but not idle."""
    for block, content in enumerate((WORD, TEXT, ZSTD_ONLY, NOISE)):
        put(backed, block, content)
    backed.cool(2, 1)
    Tier(backed).mark_idle(0)
    before = state(backed)
    assert [flags for _, flags in before.values()] == ["s.....", "...i..", "...ir.", "..hi.."]
    write_out(backed)
    assert [flags for _, flags in state(backed).values()] == ["s.....", ".w....", ".w..r.", ".wh..."]
    backed.read(bytearray(BLOCK), BLOCK)
    assert state(backed)[1] == (NOW, ".w...."), "nothing comes back for one read"
    put(backed, 3, TEXT)
    assert state(backed)[3] == (NOW, "......")


def test_what_goes_out_again_comes_back(backed: Device) -> None:
    put(backed, 7, TEXT)
    write_out(backed)
    Writeback(backed).bring_back(0, backed.disksize // BLOCK, wanted=False)
    assert state(backed)[7][1] == "......"


def test_the_access_time_goes_by_sweeps(device: Device) -> None:
    put(device, 0, TEXT)
    put(device, 1, TEXT)
    for _ in range(6):
        device.sweep()
    device.read(bytearray(BLOCK), BLOCK)
    assert state(device) == {0: (NOW - 60, "......"), 1: (NOW, "......")}


def test_old_ages_are_coarse_and_end_before_the_clock_began(device: Device) -> None:
    put(device, 0, TEXT)
    for _ in range(128):
        device.sweep()
    assert state(device)[0][0] == NOW - 128 * SWEEP
    device.sweep()
    assert state(device)[0][0] == NOW - 128 * SWEEP, "only a coarse sweep makes it older"
    device.sweep(True)
    assert state(device)[0][0] == NOW - 144 * SWEEP
    buffer = bytearray(40)
    assert device.block_state(buffer, 0, 100, SWEEP) == (40, 1)
    assert buffer == b"%12d %12d.000000 ......\n" % (0, 0)


@pytest.mark.parametrize("room", [40, 79, 80, 4096])
def test_any_buffer_gets_the_same_lines(device: Device, room: int) -> None:
    for block in random.Random(3).sample(range(16384), 200):
        put(device, block, TEXT)
    assert state(device, room) == state(device)
    assert all(len(piece) <= room and len(piece) % 40 == 0 for piece in pieces(device, room))


def test_a_buffer_that_is_too_small_gets_nothing(device: Device) -> None:
    put(device, 0, TEXT)
    assert device.block_state(bytearray(39), 0, NOW, SWEEP) == (0, 0)


def test_holes_of_a_huge_device_are_gone_over_in_few_pieces() -> None:
    device = Device(4 << 40)
    put(device, (1 << 30) - 1, TEXT)
    made = list(pieces(device))
    assert len(made) < 64
    assert b"".join(made) == b"%12d %12d.000000 ......\n" % ((1 << 30) - 1, NOW)


def test_beyond_the_end_is_nothing(device: Device) -> None:
    assert device.block_state(bytearray(40), 1 << 40, NOW, SWEEP) == (0, 16384)


def test_lines_are_whole_while_everything_changes(device: Device) -> None:
    """Blocks are written, trimmed, made cold, and dropped as a whole meanwhile."""
    done = threading.Event()

    def change() -> None:
        dice = random.Random(4)
        try:
            for turn in range(3000):
                block = dice.randrange(2000)
                put(device, block, dice.choice((WORD, TEXT, ZSTD_ONLY, NOISE)))
                if turn % 3 == 0:
                    device.trim(dice.randrange(2000) * BLOCK, 8 * BLOCK)
                if turn % 50 == 0:
                    device.sweep()
                    device.cool(block, 20)
                if turn % 1000 == 999:
                    device.reset()
        finally:
            done.set()

    lists = 0

    def look() -> None:
        nonlocal lists
        while not done.is_set():
            found = state(device, 4096)
            assert all(block < 16384 for block in found)
            assert {flags for _, flags in found.values()} <= {
                *("s.....", "......", "..h...", "....r.", "..h..n", ".....n"),
            }
            lists += 1

    run_threads([change, look])
    assert lists > 2
    device.check()
