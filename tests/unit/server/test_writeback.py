"""What moves blocks out of memory by itself, with a clock, a device and a disk of the test's own."""

import errno

import pytest
from support.writebacks import DAY, OLD, RAW, FakeDevice, blocks, make, run, settings

from zramd.core.device.backing import EXTENT
from zramd.errors import DeviceError
from zramd.server import writebackpolicy
from zramd.server.ages import SWEEP, age_of
from zramd.server.writeback import WritePass


class TestCalm:
    def test_what_is_old_enough(self) -> None:
        device = FakeDevice(*blocks(100, age=OLD), *blocks(100, hot=True))
        run(device, make(device), 60)
        assert sorted(device.outside()) == list(range(96))

    def test_not_before(self) -> None:
        device = FakeDevice(*blocks(1000, age=OLD - 10))
        served = make(device)
        run(device, served, 90)
        assert device.log["gather"] == 0
        run(device, served, 60)
        assert device.out > 900

    def test_whole_extents_only(self) -> None:
        device = FakeDevice(*blocks(100, age=OLD))
        run(device, make(device), 600)
        assert {written for _, written in device.flushes} == {EXTENT}
        assert device.out == 96

    def test_unread_ones_first(self) -> None:
        device = FakeDevice(*blocks(64, age=OLD), *blocks(64, age=OLD, read=False))
        run(device, make(device), 60)
        assert len(device.order) == 128
        assert sorted(device.order[:64]) == list(range(64, 128))
        assert sorted(device.order[64:]) == list(range(64))

    def test_raw_ones_that_do_not_shrink(self) -> None:
        cold = age_of(300)
        device = FakeDevice(*blocks(32, size=RAW, age=cold, tried=True), *blocks(32, size=RAW, age=cold))
        run(device, make(device), 60)
        assert device.order == list(range(30))

    def test_raw_ones_without_recompression(self) -> None:
        """Nothing ever makes them smaller."""
        device = FakeDevice(*blocks(45, size=RAW, age=age_of(300)))
        run(device, make(device, recompression="off"), 60)
        assert device.out == 45

    def test_all_raw(self) -> None:
        """4096 bytes for 4096, and 15 in an extent: still no more than the limit."""
        device = FakeDevice(*blocks(3000, size=RAW, age=OLD, tried=True))
        run(device, make(device, writeback_limit="1M"), 3600)
        assert device.bd_writes == 1 << 20

    def test_four_mebibytes_a_second(self) -> None:
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device)
        run(device, served, 10.5)
        device.flushes.clear()
        run(device, served, 8)
        assert sum(written for _, written in device.flushes) == pytest.approx(8 * (4 << 20), rel=0.02)

    def test_nothing_stored(self) -> None:
        device = FakeDevice()
        served = make(device)
        assert served.tick() == SWEEP

    def test_few_turns_while_there_is_nothing_to_do(self) -> None:
        device = FakeDevice(*blocks(100, hot=True))
        served = make(device)
        device.sweep()
        assert served.tick() == 1.0
        run(device, served, 600)
        assert device.log["gather"] == 0


class TestWanted:
    def test_until_enough_is_gone(self) -> None:
        """Oldest first, until the pool is at 70 % of mem_limit."""
        device = FakeDevice(*blocks(1000, age=50), *blocks(1000, age=100), *blocks(1000, age=10))
        device.limit = device.used * 10 // 9
        device.mode = "wanted"
        run(device, make(device), 15)
        assert set(device.order) <= set(range(1000, 2000))
        assert device.used == pytest.approx(0.7 * device.limit, rel=0.03)

    def test_at_once(self) -> None:
        """It does not wait for a sweep, nor for its share of a second."""
        device = FakeDevice(*blocks(10_000, age=100))
        served = make(device)
        run(device, served, 11)
        assert device.out == 0
        device.limit, device.mode = device.used, "wanted"
        run(device, served, 1.5)
        assert device.out > 2500

    def test_the_machine_lacks_memory(self) -> None:
        """Without mem_limit: a tenth with each sweep, as long as it lasts."""
        device = FakeDevice(*blocks(10_000, age=100))
        served = make(device)
        device.mode = "wanted"
        run(device, served, 12)
        assert 960 <= device.out < 1100
        run(device, served, 10)
        assert 1800 <= device.out < 2100
        device.mode = "calm"
        run(device, served, 20)
        assert device.out < 2100

    def test_small_rests_go_too(self) -> None:
        device = FakeDevice(*blocks(10, age=100))
        device.mode, device.limit = "wanted", 4
        run(device, make(device), 15)
        assert device.out == 10
        assert device.flushes[0][1] == 20480

    def test_less_than_is_worth_an_extent(self) -> None:
        device = FakeDevice(*blocks(8, age=100))
        device.mode, device.limit = "wanted", 4
        run(device, make(device), 600)
        assert device.flushes == []

    def test_full(self) -> None:
        """Whatever was left alone for a sweep: raw ones first."""
        device = FakeDevice(*blocks(500), *blocks(60, size=RAW))
        device.mode, device.limit = "full", device.used
        run(device, make(device), 15)
        assert device.order[:60] == list(range(500, 560))
        assert device.out == 560

    def test_another_mode_is_another_pass(self) -> None:
        """What was copied for the earlier one is dropped."""
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device)
        run(device, served, 10.5)
        assert 0 < device.out < 10_000
        device.mode = "full"
        drops = device.log["drop"]
        served.tick()
        assert device.log["drop"] > drops

    def test_memory_is_at_ease_again(self) -> None:
        device = FakeDevice(*blocks(20_000, age=100))
        device.limit, device.mode = device.used, "wanted"
        served = make(device)
        run(device, served, 10.1)
        gone = device.out
        assert gone
        device.mode = "calm"
        run(device, served, 9)
        assert device.out == gone


class TestLimit:
    def test_what_reaches_the_device(self) -> None:
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device, writeback_limit="1M")
        run(device, served, 60)
        assert device.bd_writes == 1 << 20
        assert served.left() == pytest.approx(60 * (1 << 20) / DAY, abs=1000)
        assert served.numbers()["mode"] == "paused"
        assert served.numbers()["reason"].startswith("writeback_limit is used up, the next extent may be")

    def test_in_the_long_run(self) -> None:
        """Whatever the mode."""
        device = FakeDevice(*blocks(2000, age=100))
        device.mode, device.limit = "full", 1
        run(device, make(device, writeback_limit="2M"), DAY / 2)
        assert (2 << 20) * 1.45 < device.bd_writes <= (2 << 20) * 1.5

    def test_kept(self) -> None:
        """A server that goes on with the device goes on with its budget."""
        device = FakeDevice(*blocks(20_000, age=OLD))
        run(device, make(device, writeback_limit="1M"), 60)
        written = device.bd_writes
        for _ in range(5):
            run(device, make(device, writeback_limit="1M"), 12)
        assert device.bd_writes == written

    def test_a_kill_while_it_writes(self) -> None:
        """All of an extent is taken off before: nobody gets it back by dying."""
        device = FakeDevice(*blocks(20_000, age=OLD))
        run(device, make(device, writeback_limit="1M"), 12)
        expected = [(1 << 20) - EXTENT * number for number in range(1, 17)]
        assert device.budgets == pytest.approx(expected, abs=9)

    def test_what_was_not_written(self) -> None:
        """A small extent takes what it takes; a full device nothing."""
        device = FakeDevice(*blocks(10, age=100))
        device.mode, device.limit = "wanted", 4
        served = make(device, writeback_limit="1M")
        run(device, served, 15)
        assert served.left() == pytest.approx((1 << 20) - 20480, abs=100)
        device.extents = 1
        device.fill(*blocks(100, age=100))
        run(device, served, 15)
        assert served.left() == pytest.approx((1 << 20) - 20480, abs=400)

    def test_failed_writes_count(self) -> None:
        """Nobody knows how much of them has reached the device."""
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device, writeback_limit="1M")
        run(device, served, 25)
        assert served.left() == pytest.approx((1 << 20) - 8 * EXTENT, abs=500)

    def test_changed(self) -> None:
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device, writeback_limit="1M")
        run(device, served, 30)
        served.configure(settings(writeback_limit="2M"))
        run(device, served, 12)
        assert device.bd_writes == 2 << 20
        served.configure(settings(writeback_limit="off"))
        run(device, served, 12)
        assert device.bd_writes > 8 << 20
        assert served.left() is None
        assert served.numbers()["limit_left"] is None
        assert served.numbers()["writeback_limit"] == 0

    def test_given_by_hand(self) -> None:
        device = FakeDevice(*blocks(20_000, age=OLD))
        served = make(device, writeback_limit="1M")
        served.set_left(0)
        assert served.left() == 0
        run(device, served, 30)
        assert device.bd_writes == 0
        served.set_left(3 << 20)
        assert served.left() == 3 << 20
        run(device, served, 30)
        assert device.bd_writes == 3 << 20

    def test_given_without_a_limit(self) -> None:
        with pytest.raises(DeviceError, match=r"^writeback_limit is off: set it"):
            make(FakeDevice()).set_left(1 << 20)

    def test_reclaim_counts(self) -> None:
        device = full_of_holes()
        before = device.bd_writes
        served = make(device, writeback_limit="1M")
        run(device, served, 12)
        assert device.reclaimed
        assert device.bd_writes - before <= 1 << 20
        assert served.left() == pytest.approx((1 << 20) - (device.bd_writes - before), abs=200)


def full_of_holes(extents: int = 20) -> FakeDevice:
    """A device of which a quarter of each extent lives, but for one that is free; more wants to go out."""
    device = FakeDevice(*blocks(8 * (extents - 1)), *blocks(200, age=OLD), extents=extents)
    for number in range(8 * (extents - 1)):
        device.put(number, 1 + number // 8)
    return device


class TestRoom:
    def test_extents_are_emptied(self) -> None:
        """Four that hold a quarter are one; then there is room for what wants to go out."""
        device = full_of_holes()
        run(device, make(device), 30)
        assert device.out == 192
        assert device.reclaimed
        assert all(block.extent for block in device.blocks[:152]), "what was out is out"

    def test_not_while_there_is_room(self) -> None:
        device = full_of_holes()
        device.extents = 200
        run(device, make(device), 30)
        assert (device.reclaimed, device.out) == (0, 192)

    def test_not_without_need(self) -> None:
        """Nothing wants to go out: moving what is there would only wear the device out."""
        device = full_of_holes()
        for block in device.blocks[152:]:
            block.hot = True
        run(device, make(device), 600)
        assert device.flushes == []

    def test_not_what_lives_for_the_most_part(self) -> None:
        device = FakeDevice(*blocks(17 * 19), *blocks(200, age=OLD), extents=20)
        for number in range(17 * 19):
            device.put(number, 1 + number // 17)
        served = make(device)
        run(device, served, 600)
        assert (device.reclaimed, device.flushes) == (0, [])
        assert served.numbers()["mode"] == "paused"
        assert served.numbers()["reason"] == "the device is full, and no extent of it is mostly dead"

    def test_smaller_than_what_wants_to_go_out(self) -> None:
        """It takes what it holds, and writes no more: not the same again and again."""
        device = FakeDevice(*blocks(10_000, age=OLD), extents=40)
        served = make(device)
        run(device, served, 60)
        assert device.out == 39 * 32
        written = device.bd_writes
        run(device, served, 3600)
        assert device.bd_writes == written

    def test_one_extent(self) -> None:
        device = FakeDevice(*blocks(1000, age=OLD), extents=1)
        run(device, make(device), 600)
        assert device.out <= 32

    def test_room_again(self) -> None:
        """A twentieth must be free."""
        device = FakeDevice(*blocks(10_000, age=OLD), extents=100)
        served = make(device)
        run(device, served, 60)
        before = device.out
        for number in [number for extent in (1, 2, 3) for number in device.lists[extent]]:
            device.put(number, 0)
        run(device, served, 60)
        assert device.out == before
        for number in list(device.lists[4]):
            device.put(number, 0)
        run(device, served, 60)
        assert device.out == before + 4 * 32

    def test_none_after_all(self) -> None:
        """The device knows better than the count."""
        device = FakeDevice(*blocks(1000, age=OLD), extents=100)
        counters = device.counters
        device.counters = lambda: counters() | {"backing_free": 3}  # type: ignore[method-assign]
        device.free = list  # type: ignore[method-assign]
        served = make(device)
        run(device, served, 30)
        assert len(device.budgets) == 1
        assert served.numbers()["reason"].startswith("the device is full")
        assert served.trouble == ""

    def test_an_extent_that_cannot_be_read(self) -> None:
        """It stays as it is, and others are emptied."""
        device = full_of_holes()
        device.unreadable = {1, 2}
        run(device, make(device), 30)
        assert device.out == 192
        assert {block.extent for block in device.blocks[:16]} == {1, 2}

    def test_a_device_that_cannot_be_read_for_a_moment(self) -> None:
        """It loses an extent or two, and is no device that fails: eight in a row take as many seconds."""
        device = full_of_holes()
        device.unreadable = set(range(1, 13))
        served = make(device)
        served.submit(WritePass())
        run(device, served, 2.5)
        assert 1 <= len(device.bad) <= 3
        device.unreadable = set()
        run(device, served, 30)
        assert served.trouble == ""

    def test_what_died_is_seen(self) -> None:
        """The next pass may be an hour away: until then it is not to say that the device is full."""
        device = FakeDevice(*blocks(1000, age=OLD), extents=20)
        served = make(device)
        run(device, served, 300)
        assert served.numbers()["reason"].startswith("the device is full")
        for number, block in enumerate(device.blocks):
            device.put(number, 0)
            block.age = 0
        run(device, served, 20)
        assert "full" not in served.numbers()["reason"]

    def test_no_room_below(self) -> None:
        """A file on a full file system fails as any disk: that is no want of extents."""
        device = FakeDevice(*blocks(1000, age=OLD))
        device.error = errno.ENOSPC
        served = make(device)
        run(device, served, 60)
        assert len(device.flushes) == writebackpolicy.ERRORS
        assert "fails: No space left on device 8 times" in served.trouble
