"""zramd.core.device.tier: blocks of a real device become cold and hot again, step by step."""

import errno
from collections.abc import Callable

import pytest
from support.content import noise

from zramd.core.device.device import Device
from zramd.core.device.tier import Tier
from zramd.errors import PoolFullError

BLOCK = 4096
WANTED, IDLE = 253, 254


def text(seed: int) -> bytes:
    """Half a block that lz4 brings to some 2000 bytes, and zstd to less."""
    return b"".join(b"%d %d\n" % (seed, number * number * (seed + 7)) for number in range(1000))[:BLOCK]


def hexadecimal(seed: int) -> bytes:
    """What lz4 cannot make smaller, and zstd can."""
    return noise(seed)[: BLOCK // 2].hex().encode()


def made(*contents: bytes, level: int = 5, **given: int | bool) -> tuple[Device, Tier]:
    device = Device(4 << 20, cold_level=level, **given)  # type: ignore[arg-type]
    for number, content in enumerate(contents):
        device.write(content, number * BLOCK)
    return device, Tier(device)


def fill(device: Device, content: Callable[[int], bytes], number: int) -> int:
    """Write blocks from this one on until there is no room; the block that had none."""
    while True:
        try:
            device.write(content(number), number * BLOCK)
        except PoolFullError:
            return number
        number += 1


def cool_all(device: Device, tier: Tier) -> int:
    """As the server does it: what finds no room has some made and is tried again: how many."""
    done, gains = 0, True
    while gains:
        at, gains = 0, False
        while at < device.disksize // BLOCK:
            at, _, _, now, _, stopped = tier.cool(at, 64, 0, 0)
            done += now
            gains = gains or now > 0
            if stopped:
                device.compact()
    return done


def read(device: Device, number: int) -> bytes:
    content = bytearray(BLOCK)
    device.read(content, number * BLOCK)
    return bytes(content)


def kinds(device: Device, count: int) -> str:
    return " ".join(str(device.block(number)["kind"]) for number in range(count))


def ages(tier: Tier, coarse: bool = False, keep: bool = True) -> dict[int, int]:
    stored, *_ = tier.sweep(coarse, keep, 300)
    return {age: count for age, count in enumerate(stored) if count}


class TestSweep:
    def test_counts(self) -> None:
        device, tier = made(text(1), hexadecimal(2), noise(3), bytes(BLOCK), b"x" * 4000 + noise(4)[:96])
        stored, raw, others, tried, *_ = tier.sweep(False, True, 300)
        assert (stored[1], raw[1], others[1], tried) == (5, 2, 1, 0)
        assert sum(stored) == device.counters()["pages_stored"]
        assert tier.cool(0, 64, 300, 1)[3] == 2
        stored, raw, others, tried, *_ = tier.sweep(False, True, 300)
        assert (stored[2], sum(raw), sum(others), tried) == (5, 0, 0, 1)

    def test_ages(self) -> None:
        device, tier = made(text(1), text(2))
        for age in range(1, 129):
            assert ages(tier) == {age: 2}
        assert ages(tier) == {128: 2}
        read(device, 1)
        assert ages(tier, coarse=True) == {1: 1, 129: 1}
        for _ in range(130):
            ages(tier, coarse=True)
        assert set(ages(tier, coarse=True)) <= {129, 130, 131, 132, 251}
        for _ in range(130):
            ages(tier, coarse=True)
        assert ages(tier, coarse=True) == {251: 2}


class TestCool:
    def test_the_age_is_put_back(self) -> None:
        """Also of what does not become smaller: the block is as old as before."""
        device, tier = made(text(1), noise(2))
        for _ in range(7):
            ages(tier)
        assert tier.cool(0, 64, 0, 0)[1:4:2] == (2, 1)
        assert ages(tier) == {8: 2}
        assert kinds(device, 2) == "zstd raw"

    def test_steps(self) -> None:
        contents = [text(number) for number in range(100)]
        device, tier = made(*contents)
        at, tried, looked, done, saved, stopped = tier.cool(0, 64, 0, 0)
        assert (at, tried, done, stopped) == (64, 64, 64, 0)
        before = sum(int(device.block(number)["payload_bytes"]) for number in range(64, 100))
        assert tier.cool(at, 64, 0, 0)[:4] == (1024, 36, before, 36)
        after = device.counters()
        assert after["cold_pages"] == after["recompressed"] == 100
        assert after["recompress_saved"] > saved > 0
        assert looked - saved == sum(int(device.block(number)["payload_bytes"]) for number in range(64))
        assert [read(device, number) for number in range(100)] == contents
        device.check()

    def test_which(self) -> None:
        device, tier = made(text(1), hexadecimal(2), text(3), hexadecimal(4), b"x" * 3800 + noise(4)[:296])
        ages(tier)
        for number in (0, 1):
            read(device, number)  # young
        assert tier.cool(0, 64, 0, 1, raw=True)[1] == 1
        assert kinds(device, 5) == "lz4 raw lz4 zstd lz4"
        tier.mark_idle(1)
        read(device, 2)
        assert tier.cool(0, 64, 0, IDLE, idle=True)[1] == 1  # (the last one)
        assert kinds(device, 3) == "lz4 raw lz4"
        assert tier.cool(0, 64, 4000, 0)[1] == 1
        assert kinds(device, 3) == "lz4 zstd lz4"

    def test_useless(self) -> None:
        device, tier = made(noise(1), noise(2))
        assert tier.cool(0, 64, 0, 0)[1:5] == (2, 2 * BLOCK, 0, 0)
        assert device.counters()["recompress_useless"] == 2
        assert tier.cool(0, 64, 0, 0)[1] == 0
        device.write(noise(3), 0)
        assert tier.cool(0, 64, 0, 0)[1] == 1

    def test_no_room(self) -> None:
        contents = [text(number) for number in range(300)]
        device, tier = made(*contents)
        device.release_stock()
        device.mem_limit = BLOCK
        at, tried, _, done, _, stopped = tier.cool(0, 64, 0, 0)
        assert (at, done, stopped) == (tried, tried - 1, errno.ENOSPC)
        assert [read(device, number) for number in range(300)] == contents
        device.check()

    @pytest.mark.parametrize(
        "content", [hexadecimal, lambda seed: hexadecimal(seed)[:1800].ljust(BLOCK, b"\0")]
    )
    def test_a_full_pool(self, content: Callable[[int], bytes]) -> None:
        """Pages that are all full, so that compaction finds none: the last ones of mem_limit are for this."""
        device, tier = made(mem_limit=256 * BLOCK)
        number = fill(device, content, 0)
        used = device.counters()["mem_used_total"]
        assert used == device.mem_limit - 256 * BLOCK // 64
        done = cool_all(device, tier)
        assert done == number
        after = device.counters()
        assert after["mem_used_total"] < used
        assert after["mem_used_max"] <= device.mem_limit
        assert fill(device, content, number) > number + number // 4
        assert [read(device, block) for block in range(number)] == [content(block) for block in range(number)]
        device.check()

    def test_a_writer_that_tries_again_and_again(self) -> None:
        """It is refused until a block has become cold, and does not take the page that the next one needs."""
        device, tier = made(mem_limit=256 * BLOCK)
        first = number = fill(device, hexadecimal, 0)
        at, cold = 0, 0
        while cold < first:
            number = fill(device, hexadecimal, number)
            at, _, _, done, _, stopped = tier.cool(at, 1, 0, 0)
            assert (done, stopped) == (1, 0)
            cold += done
        assert number > first + first // 3
        assert device.counters()["mem_used_max"] <= device.mem_limit
        device.check()

    def test_without_recompression_the_limit_is_for_requests(self) -> None:
        device, tier = made(mem_limit=256 * BLOCK)
        tier.level = 0
        number = fill(device, hexadecimal, 0)
        assert device.counters()["mem_used_total"] == device.mem_limit
        tier.level = 5
        with pytest.raises(PoolFullError):
            device.write(hexadecimal(number), number * BLOCK)
        device.mem_limit += BLOCK
        assert fill(device, hexadecimal, number) == number

    def test_the_device_ends(self) -> None:
        _, tier = made(text(1))
        assert tier.cool(1 << 40, 64, 0, 0)[0] == 1 << 40
        assert tier.cool(0, 0, 0, 0)[:2] == (0, 0)


class TestPromote:
    def cold(self, *contents: bytes, **given: int | bool) -> tuple[Device, Tier]:
        device, tier = made(*contents, **given)
        for _ in range(5):
            ages(tier)
        tier.cool(0, 1000, 0, 0)
        return device, tier

    def test_read_again_and_again(self) -> None:
        """In two sweeps within 30 seconds; neither once, nor twice in one, nor later than that."""
        contents = [text(number) for number in range(5)]
        device, tier = self.cold(*contents)
        for number in range(1, 5):
            read(device, number)
        read(device, 1)
        ages(tier)
        read(device, 2)
        for _ in range(2):
            ages(tier)
        read(device, 3)
        assert ages(tier)[WANTED] == 2
        read(device, 4)
        read(device, 2)  # that takes nothing away
        assert tier.promote(0, 64) == (1024, 2, 2, 0)
        assert kinds(device, 5) == "zstd zstd lz4 lz4 zstd"
        assert [read(device, number) for number in range(5)] == contents
        counters = device.counters()
        assert (counters["promoted"], counters["cold_pages"]) == (2, 3)
        device.check()

    def test_only_what_is_cold(self) -> None:
        device, tier = made(text(1))
        for _ in range(3):
            ages(tier)
            read(device, 0)
        assert ages(tier) == {1: 1}
        assert tier.promote(0, 64)[1:3] == (0, 0)

    def test_written_meanwhile(self) -> None:
        device, tier = self.cold(text(1))
        for _ in range(2):
            read(device, 0)
            ages(tier)
        device.write(text(2), 0)
        assert ages(tier) == {1: 1}
        assert tier.promote(0, 64)[1:3] == (0, 0)
        assert read(device, 0) == text(2)

    def test_forgotten(self) -> None:
        device, tier = self.cold(text(1))
        for _ in range(2):
            read(device, 0)
            ages(tier)
        assert ages(tier, keep=True) == {WANTED: 1}
        assert ages(tier, keep=False) == {1: 1}

    def test_what_would_be_raw_stays(self) -> None:
        device, tier = self.cold(hexadecimal(1))
        for _ in range(2):
            read(device, 0)
            ages(tier)
        assert tier.promote(0, 64)[1:] == (1, 0, 0)
        assert kinds(device, 1) == "zstd"
        device.check()

    def test_no_room(self) -> None:
        device, tier = self.cold(*(text(number) for number in range(20)))
        for _ in range(2):
            for number in range(20):
                read(device, number)
            ages(tier)
        device.release_stock()
        device.mem_limit = BLOCK
        assert tier.promote(0, 64)[3] == errno.ENOSPC
        assert [read(device, number) for number in range(20)] == [text(number) for number in range(20)]
        device.check()

    @pytest.mark.parametrize("verify", [False, True])
    def test_verified(self, verify: bool) -> None:
        device, tier = self.cold(text(1), verify=verify)
        for _ in range(2):
            read(device, 0)
            ages(tier)
        assert tier.promote(0, 64)[2] == 1
        assert read(device, 0) == text(1)
        device.check()


class TestIdle:
    def test_marks(self) -> None:
        device, tier = made(text(1), text(2), bytes(BLOCK))
        ages(tier)
        read(device, 0)
        assert tier.mark_idle(1) == 1
        assert ages(tier) == {1: 1, 2: 1, IDLE: 1}  # one word repeated takes no memory: nothing to mark
        assert tier.mark_idle(0) == 2
        read(device, 1)
        assert ages(tier, coarse=True) == {1: 1, 3: 1, IDLE: 1}

    def test_a_mark_outlasts_recompression(self) -> None:
        _, tier = made(text(1))
        tier.mark_idle(0)
        assert tier.cool(0, 1, 0, IDLE, idle=True)[3] == 1
        assert ages(tier) == {IDLE: 1}


class TestLevel:
    def test_change(self) -> None:
        contents = [text(number) for number in range(40)]
        device, tier = made(*contents)
        tier.cool(0, 20, 0, 0)
        tier.level = 19
        assert tier.level == 19
        assert tier.cool(20, 20, 0, 0)[3] == 20
        assert [read(device, number) for number in range(40)] == contents

    def test_off(self) -> None:
        """What is cold can be read all the same."""
        device, tier = made(text(1), text(2))
        tier.cool(0, 1, 0, 0)
        before = device.counters()["metadata_bytes"]
        tier.level = 0
        assert device.counters()["metadata_bytes"] < before  # the encoder's memory
        assert tier.cool(0, 64, 0, 0) == (1024, 0, 0, 0, 0, 0)
        assert read(device, 0) == text(1)
        tier.level = 1
        assert tier.cool(0, 64, 0, 0)[3] == 1

    @pytest.mark.parametrize("level", [-1, 20])
    def test_bad(self, level: int) -> None:
        _, tier = made()
        with pytest.raises(ValueError, match="out of range"):
            tier.level = level
        assert tier.level == 5
