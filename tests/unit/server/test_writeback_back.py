"""What is brought back into memory, and passes by hand, with a clock and a disk of the test's own."""

import pytest
from support.writebacks import DAY, OLD, RAW, Block, FakeDevice, blocks, make, run, settings

from zramd.core.device.backing import EXTENT
from zramd.errors import DeviceError
from zramd.server import writeback
from zramd.server.ages import IDLE
from zramd.server.writeback import Writeback, WritePass


class TestBack:
    def out(self, count: int = 320, **given: int) -> tuple[FakeDevice, Writeback]:
        device = FakeDevice(*blocks(count, age=OLD), *blocks(16, hot=True), **given)
        served = make(device)
        run(device, served, 12)
        assert device.out == count
        return device, served

    def test_what_is_read_again(self) -> None:
        device, served = self.out()
        for block in device.blocks[:100]:
            block.wanted = True
        run(device, served, 11)
        assert device.back == 100

    def test_nothing_is_read_again(self) -> None:
        device, served = self.out()
        run(device, served, 100)
        assert device.log["bring_back"] == 0

    def test_not_under_pressure(self) -> None:
        device, served = self.out()
        device.mode = "wanted"
        for block in device.blocks[:100]:
            block.wanted = True
        run(device, served, 100)
        assert device.back == 0
        device.mode = "calm"
        run(device, served, 25)
        assert device.back == 100

    def test_no_room(self) -> None:
        """It is tried again after a sweep."""
        device, served = self.out()
        for block in device.blocks[:100]:
            block.wanted = True
        device.room_for = 10
        run(device, served, 10.1)
        assert device.back == 10
        device.room_for = 1 << 30
        run(device, served, 20)
        assert device.back == 100

    def test_a_circle(self) -> None:
        """All that goes out is read again at once: less and less goes out, and the device is spared."""
        device = FakeDevice(*blocks(3200, age=OLD))
        served = make(device)
        written = []
        for _ in range(6):
            before = device.bd_writes
            for _ in range(60):
                for block in device.blocks:
                    block.wanted = True
                    block.age = OLD  # as if it were left alone: the worst that can be
                run(device, served, 10)
            written.append(device.bd_writes - before)
        assert written[-1] < written[0] / 3
        assert written[-1] <= 3200 * 2200

    def test_what_came_back_stays(self) -> None:
        """As long as for anything else that was asked for."""
        device, served = self.out()
        for block in device.blocks[:320]:
            block.wanted = True
        run(device, served, 600)
        assert (device.back, device.out) == (320, 320)


class TestRecall:
    def test_everything(self) -> None:
        device = FakeDevice(*blocks(1000, age=OLD))
        served = make(device)
        run(device, served, 20)
        assert device.out == 992
        served.bring_back()
        assert served.numbers()["reason"] == "everything is being brought back"
        run(device, served, 1)
        assert device.counters()["out_pages"] == 0
        for block in device.blocks:
            block.age = OLD
        run(device, served, 100)
        assert device.counters()["out_pages"] == 0, "who wants to take the disk away can"
        assert served.numbers()["mode"] == "off"
        assert served.numbers()["reason"].startswith("everything was brought back: ")

    def test_whatever_the_mode(self) -> None:
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 12)
        device.mode = "full"
        served.bring_back()
        run(device, served, 60)
        assert device.counters()["out_pages"] == 0

    def test_no_room(self) -> None:
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 12)
        device.room_for = 100
        served.bring_back()
        run(device, served, 60)
        assert device.back == 100
        assert served.numbers()["reason"] == ("220 blocks could not be brought back: No space left on device")

    def test_one_extent_cannot_be_read(self) -> None:
        """The others are not left for it."""
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 12)
        device.unreadable = {3}
        served.bring_back()
        run(device, served, 60)
        assert device.counters()["out_pages"] == 32
        assert served.numbers()["reason"] == "32 blocks could not be brought back: some cannot be read"

    @pytest.mark.parametrize("how", ["writeback_age", "writeback_limit", "by hand"])
    def test_begins_again(self, how: str) -> None:
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 12)
        served.bring_back()
        run(device, served, 5)
        for block in device.blocks:
            block.age = OLD
        served.configure(settings(compaction="off"))
        run(device, served, 15)
        assert device.out == 320
        if how == "by hand":
            served.submit(WritePass(frozenset({"huge"})))
        else:
            served.configure(settings(**{how: {"writeback_age": "50min", "writeback_limit": "1G"}[how]}))
        run(device, served, 15)
        assert device.out == 640

    def test_nothing_of_a_dropped_pass_is_left(self) -> None:
        """What it had taken is no longer marked as leaving."""
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        served.submit(WritePass(ranges=((0, 10), (10, 320))))
        served.tick()
        assert device.pending
        served.bring_back()
        run(device, served, 5)
        assert (device.pending, device.out) == (0, 0)

    def test_passes_that_wait_are_dropped(self) -> None:
        device = FakeDevice(*blocks(320))
        served = make(device)
        served.submit(WritePass())
        served.bring_back()
        run(device, served, 5)
        assert device.out == 0


class TestByHand:
    @pytest.mark.parametrize(
        ("wanted", "out"),
        [
            (WritePass(), [0, 1, 2, 3, 4, 5]),
            (WritePass(frozenset({"huge"})), [2, 3, 5]),
            (WritePass(frozenset({"idle"})), [1, 3]),
            (WritePass(frozenset({"huge", "idle"})), [3]),
            (WritePass(frozenset({"incompressible"})), [5]),
            (WritePass(ranges=((1, 3), (5, 6))), [1, 2, 5]),
            (WritePass(ranges=((5, 6), (0, 1))), [5, 0]),
            (WritePass(frozenset({"huge"}), ((0, 3),)), [2]),
            (WritePass(ranges=((4, 1 << 40),)), [4, 5]),
        ],
        ids=["all", "huge", "idle", "both", "raw", "two ranges", "in order", "huge of a range", "beyond"],
    )
    def test_what_goes_out(self, wanted: WritePass, out: list[int]) -> None:
        device = FakeDevice(Block(), Block(), Block(RAW), Block(RAW), Block(100), Block(RAW, tried=True))
        for number in (1, 3):
            device.blocks[number].age = IDLE
        served = make(device)
        served.submit(wanted)
        run(device, served, 1)
        assert device.order == out
        assert served.numbers()["reason"] != "a pass by hand is under way"

    def test_many_ranges_share_extents(self) -> None:
        device = FakeDevice(*blocks(320))
        served = make(device)
        served.submit(WritePass(ranges=tuple((number, number + 1) for number in range(0, 320, 2))))
        run(device, served, 1)
        assert device.out == 160
        assert len(device.flushes) == 5

    def test_at_once(self) -> None:
        """It does not keep to what is written in calm."""
        device = FakeDevice(*blocks(10_000))
        served = make(device)
        served.submit(WritePass())
        run(device, served, 1)
        assert device.out == 10_000

    def test_ends_with_the_limit(self) -> None:
        """As the kernel's does: what is left waits for another."""
        device = FakeDevice(*blocks(10_000))
        served = make(device, writeback_limit="1M")
        served.submit(WritePass())
        run(device, served, 5)
        assert device.bd_writes == 1 << 20
        assert "by hand" not in served.numbers()["reason"]

    def test_is_refused_where_nothing_would_be_written(self) -> None:
        """Whoever asks is told, and not that it goes on in the background."""
        device = FakeDevice(*blocks(10_000))
        served = make(device, writeback_limit="1M")
        served.submit(WritePass())
        run(device, served, 5)
        used_up = r"^writeback_limit is used up, the next extent may be written in 1\.5 h: raise it, "
        with pytest.raises(DeviceError, match=used_up):
            served.submit(WritePass())
        run(device, served, 5)
        assert device.bd_writes == 1 << 20
        # What was changed counts at once, whether the thread has seen it or not.
        served.configure(settings(writeback_limit="2M"))
        served.submit(WritePass())
        run(device, served, 5)
        assert device.bd_writes == 2 << 20
        served.set_left(EXTENT)
        served.submit(WritePass())
        run(device, served, 5)
        assert device.bd_writes == (2 << 20) + EXTENT
        served.set_left(0)
        with pytest.raises(DeviceError, match=r"^writeback_limit is used up, "):
            served.submit(WritePass())
        served.configure(settings(writeback_limit="off"))
        served.submit(WritePass())
        run(device, served, 5)
        assert device.out == 10_000
        # Time passes for it, too, where the thread has nothing to do.
        served = make(device, writeback_limit="1M")
        served.set_left(0)
        run(device, served, 1)
        device.now += 2 * DAY * EXTENT / (1 << 20)
        served.submit(WritePass())

    def test_comes_before_what_goes_by_itself(self) -> None:
        device = FakeDevice(*blocks(5000, age=OLD), *blocks(32))
        served = make(device)
        run(device, served, 10.1)
        before = device.out
        served.submit(WritePass(ranges=((5000, 5032),)))
        run(device, served, 0.1)
        assert device.order[before : before + 32] == list(range(5000, 5032))
        run(device, served, 30)
        assert device.out > 4950

    def test_a_setting_changes_meanwhile(self) -> None:
        """It is what it was asked to be."""
        device = FakeDevice(*blocks(1000))
        served = make(device)
        device.during_flush = lambda: served.configure(settings(writeback_age="30min"))
        served.submit(WritePass())
        run(device, served, 1)
        assert device.out == 1000

    def test_many(self) -> None:
        served = make(FakeDevice(*blocks(1)))
        for _ in range(writeback.MOST_PASSES):
            served.submit(WritePass())
        assert served.numbers()["reason"] == "a pass by hand is under way"
        with pytest.raises(DeviceError, match="16 passes are queued already"):
            served.submit(WritePass())

    def test_one_after_the_other(self) -> None:
        device = FakeDevice(*blocks(64))
        served = make(device)
        served.submit(WritePass(ranges=((32, 64),)))
        served.submit(WritePass(ranges=((0, 40),)))
        run(device, served, 1)
        assert device.order == [*range(32, 64), *range(32)]
