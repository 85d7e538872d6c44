"""A backing that fails, hangs or is slow, and what is told of it, with a clock of the test's own."""

import errno
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
from support.run import wait_until
from support.writebacks import HEAD, OLD, FakeDevice, blocks, make, run, settings

from zramd.core.device.backing import EXTENT
from zramd.errors import BackingError, DeviceError
from zramd.server import writeback, writebackpolicy
from zramd.server.withoutbacking import Without
from zramd.server.worker import Worker
from zramd.server.writeback import Writeback, WritePass


class TestErrors:
    def test_eight_in_a_row(self, capfd: pytest.CaptureFixture[str]) -> None:
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device)
        run(device, served, 60)
        assert len(device.flushes) == writebackpolicy.ERRORS
        assert device.out == 0
        assert served.trouble.startswith("backing '/dev/sdz' fails: Input/output error 8 times")
        assert served.numbers()["mode"] == "paused"
        assert capfd.readouterr().err.count("\n") == 1
        run(device, served, 600)
        assert len(device.flushes) == writebackpolicy.ERRORS + 1
        device.error = 0
        run(device, served, 620)
        assert device.out
        assert served.trouble == ""
        assert capfd.readouterr().err == "zramd: backing '/dev/sdz' works again\n"

    def test_a_few(self) -> None:
        """What could not be written goes with the next."""
        device = FakeDevice(*blocks(320, age=OLD))
        served = make(device)
        run(device, served, 10.001)
        device.error = errno.EIO
        run(device, served, 5)
        device.error = 0
        run(device, served, 30)
        assert 4 <= len(device.bad) < 7
        assert device.out == 320
        assert served.trouble == ""

    def test_somebody_has_seen_to_it(self, capfd: pytest.CaptureFixture[str]) -> None:
        """It is a good one until it fails anew, and what waits goes out at once."""
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device)
        run(device, served, 60)
        assert served.trouble
        served.try_again()
        run(device, served, 1)
        assert served.trouble == ""
        assert len(device.flushes) > writebackpolicy.ERRORS
        run(device, served, 59)
        assert len(device.flushes) == 2 * writebackpolicy.ERRORS
        assert served.trouble
        device.error = 0
        served.try_again()
        run(device, served, 0.5)
        assert device.out
        assert served.trouble == ""
        assert capfd.readouterr().err.count("8 times in a row") == 2

    def test_a_setting_has_it_tried_once(self) -> None:
        """It fails until it has taken something: no setting changes that."""
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device)
        run(device, served, 60)
        served.configure(settings(cold_age="10min"))
        run(device, served, 0.0001)
        assert "Input/output error" in served.trouble
        run(device, served, 60)
        assert len(device.flushes) == writebackpolicy.ERRORS + 1

    def test_blocks_that_cannot_be_read(self) -> None:
        """Health tells of it for as long as writes would pause, or until somebody sees to it."""
        device = FakeDevice(*blocks(100))
        device.read_errors = 2  # of the server before
        served = make(device)
        run(device, served, 20)
        assert served.trouble == ""
        served = make(device)
        device.read_errors = 3  # before the first sweep: health does not wait for one
        run(device, served, writeback.LOOK + 0.1)
        assert served.trouble == "backing '/dev/sdz' fails: blocks that are out cannot be read"
        run(device, served, 580)
        assert served.trouble
        run(device, served, 30)
        assert served.trouble == ""
        device.read_errors = 4
        run(device, served, 20)
        assert served.trouble
        served.try_again()
        run(device, served, 1)
        assert served.trouble == ""
        device.read_errors = 5
        run(device, served, 20)
        assert served.trouble
        device.read_errors = 0  # a reset
        run(device, served, 700)
        assert served.trouble == ""

    def test_others_go_by_their_own(self) -> None:
        """While the device fails, what is asked for by hand is tried, once each."""
        device = FakeDevice(*blocks(10_000, age=OLD))
        device.error = errno.EIO
        served = make(device)
        run(device, served, 60)
        for tries in (1, 2):
            served.submit(WritePass())
            run(device, served, 5)
            assert len(device.flushes) == writebackpolicy.ERRORS + tries


class TestSlow:
    @pytest.mark.parametrize("mode", ["calm", "full"])
    def test_how_much_it_writes(self, mode: str) -> None:
        """Whatever the part, it is said in English."""
        device = FakeDevice(*blocks(5000, age=OLD))
        device.mode, device.limit = mode, 1
        device.sweep()
        served = make(device)
        served.tick()
        start, of = "a pass is under way", "the time"
        if mode == "calm":
            start, of = f"{start} that writes at most 4 MiB a second", "that"
        assert served.numbers()["reason"] == start
        for _ in range(20):
            for _ in range(writebackpolicy.WINDOW):
                served._pace.took(1)
            part = served._pace.slowness
            assert served.numbers()["reason"] == f"{start}, 1/{part} of {of} as the device is slow"
        assert part == writebackpolicy.MAX_SLOWNESS

    def test_half_as_much(self) -> None:
        device = FakeDevice(*blocks(30_000, age=OLD))
        device.each = 0.06
        served = make(device)
        device.mode, device.limit = "full", 1
        run(device, served, 300)
        rests = [after - before for (before, _), (after, _) in pairwise(device.flushes[-10:])]
        assert max(rests) == pytest.approx(64 * 0.06, rel=0.01)
        assert "slow" in served.numbers()["reason"]

    def test_recovers(self) -> None:
        device = FakeDevice(*blocks(40_000, age=OLD), extents=2000)
        device.each = 0.06
        served = make(device)
        run(device, served, 10.3)
        device.each = 0.001
        run(device, served, 13)
        device.flushes.clear()
        run(device, served, 5)
        assert sum(written for _, written in device.flushes) == pytest.approx(5 * (4 << 20), rel=0.02)


def test_a_superblock_that_cannot_be_written() -> None:
    """A pass by hand does not wait for ever, and others after it."""

    def fail() -> None:
        raise BackingError("no")

    device = FakeDevice(*blocks(320))
    served = make(device, renew=fail)
    for _ in range(writeback.MOST_PASSES):
        served.submit(WritePass())
    run(device, served, 60)
    assert device.out == 0
    assert "Input/output error" in served.trouble
    served.submit(WritePass())


def test_a_superblock_that_is_not_answered() -> None:
    told = []

    def hang() -> None:
        device.now += 45
        told.append(served.trouble)

    device = FakeDevice(*blocks(32))
    served = make(device, renew=hang)
    served.submit(WritePass())
    run(device, served, 60)
    assert told == ["backing '/dev/sdz' has not answered for 45 s"]
    assert served.trouble == ""
    assert device.out == 32


@pytest.mark.parametrize(
    ("mode", "step", "pause"),
    [
        ("calm", 0.0002, 0.0198),
        ("calm", 0.001, 0.03),  # where a processor is slow, blocks go out all the same
        ("wanted", 0.001, 0.004),
        ("wanted", 0.01, 0.03),
        ("full", 0.002, 0.002),
        ("full", 0.0001, 0.001),
    ],
)
def test_leaves_the_processor_to_clients(mode: str, step: float, pause: float) -> None:
    device = FakeDevice(*blocks(1000))
    device.mode = mode
    served = make(device)
    served.submit(WritePass())
    served.tick()
    assert not served.yields
    device.inflight = 1
    device.cpu_of_a_look = step
    assert served.tick() == pytest.approx(pause)
    assert served.yields
    device.inflight = 0
    assert served.tick() == 0
    assert not served.yields


class TestADiskThatHangs:
    """The thread is in a write for minutes: nothing else stands still, and all of it is told."""

    @pytest.fixture
    def hung(self) -> tuple[FakeDevice, Writeback, Worker, threading.Event]:
        device = FakeDevice(*blocks(1000, age=OLD))
        served = make(device, writeback_limit="1G")
        device.next_sweep = 0
        device.sweep()
        hangs, answers = threading.Event(), threading.Event()

        def hang() -> None:
            hangs.set()
            assert answers.wait(30)

        device.during_flush = hang
        worker = Worker(served, name="zramd-out")
        worker.start()
        assert hangs.wait(10)
        return device, served, worker, answers

    def test_what_is_told(self, hung: tuple[FakeDevice, Writeback, Worker, threading.Event]) -> None:
        device, served, worker, answers = hung
        assert served.trouble == ""
        device.now += 45
        assert served.trouble == "backing '/dev/sdz' has not answered for 45 s"
        assert served.numbers()["mode"] == "paused"
        assert served.numbers()["reason"] == "the device has not answered for 45 s"
        answers.set()
        device.during_flush = lambda: None
        wait_until(lambda: not served.trouble)
        worker.stop()

    def test_what_is_asked(self, hung: tuple[FakeDevice, Writeback, Worker, threading.Event]) -> None:
        """It is done once the disk answers."""
        device, served, worker, answers = hung
        served.configure(settings(writeback_limit="2G"))
        served.set_left(1 << 20)
        assert served.left() == 1 << 20
        served.submit(WritePass(frozenset({"huge"})))
        served.bring_back()
        with pytest.raises(DeviceError):
            for _ in range(100):
                served.submit(WritePass())
        device.during_flush = lambda: None
        answers.set()
        wait_until(lambda: served.numbers()["limit_left"] == 1 << 20 and not device.buffer)
        worker.stop()

    def test_stop(self, hung: tuple[FakeDevice, Writeback, Worker, threading.Event]) -> None:
        """It ends after the write that is under way, and need not be waited for."""
        device, served, worker, answers = hung
        worker.stop(patience=0.01)
        assert worker.thread is not None
        assert worker.thread.is_alive()
        answers.set()
        worker.stop()
        assert device.out == 32
        with pytest.raises(DeviceError, match=r"^background writeback does not run any more"):
            served.submit(WritePass())
        with pytest.raises(DeviceError, match=r"^background writeback does not run any more"):
            served.bring_back()


def test_a_reset_meanwhile() -> None:
    """The device counts from 0 again, and has nothing that could go out until the next sweep."""
    device = FakeDevice(*blocks(1000, age=OLD))
    served = make(device)
    run(device, served, 31)
    assert served.numbers()["written_out_minute"] == device.out > 900
    device.fill(*blocks(1000))
    device.out = device.back = device.bd_writes = 0
    run(device, served, 60)
    assert (device.out, served.numbers()["written_out_minute"]) == (0, 0)


class TestForget:
    """A reset: what was wanted of the data that was there is not done to what comes next."""

    def test_what_is_queued(self) -> None:
        device = FakeDevice(*blocks(1000))
        served = make(device)
        for _ in range(3):
            served.submit(WritePass())
        served.forget()
        run(device, served, 5)
        assert device.out == 0
        assert "by hand" not in served.numbers()["reason"]

    @pytest.mark.parametrize("by_hand", [True, False])
    def test_what_is_in_the_buffer(self, by_hand: bool) -> None:
        """It was of the data that has gone: the disk never sees it."""
        device = FakeDevice(*blocks(10, age=OLD, read=False), *blocks(990, age=OLD))
        served = make(device)
        device.sweep()
        if by_hand:
            served.submit(WritePass(ranges=((0, 10), (10, 1000))))
        served.tick()
        assert device.pending
        drops, before = device.log["drop"], len(device.flushes)
        device.fill(*blocks(1000))
        served.forget()
        served.tick()
        assert device.log["drop"] == drops + 1
        run(device, served, 30)
        assert len(device.flushes) == before
        assert device.pending == 0

    def test_what_could_not_be_read(self) -> None:
        """It has gone, and what fails from now on is news, however much did before."""
        device = FakeDevice(*blocks(100))
        served = make(device)
        device.read_errors = 9
        run(device, served, 20)
        assert served.trouble
        device.read_errors = 0
        served.forget()
        run(device, served, 1)
        assert served.trouble == ""
        device.read_errors = 1
        run(device, served, 20)
        assert served.trouble == "backing '/dev/sdz' fails: blocks that are out cannot be read"

    def test_in_the_middle_of_a_write(self) -> None:
        device = FakeDevice(*blocks(1000))
        served = make(device)
        device.during_flush = served.forget
        for _ in range(2):
            served.submit(WritePass())
        run(device, served, 5)
        assert len(device.flushes) == 1
        device.during_flush = lambda: None
        served.submit(WritePass())
        run(device, served, 5)
        assert device.out == 1000


def test_what_cannot_be_begun(capfd: pytest.CaptureFixture[str]) -> None:
    """A state that cannot be marked as one with blocks outside: nothing is written, and nothing used up."""
    device = FakeDevice(*blocks(1000, age=OLD))
    served = make(device, writeback_limit="1M")
    device.sweep()

    def fail() -> None:
        raise OSError(errno.ENOMEM, "no memory")

    device.during_flush = fail
    worker = Worker(served, clock=lambda: device.now)
    for _ in range(30):
        device.now += worker.turn()
    assert served.trouble == "background writeback failed: no memory"
    assert served.left() == 1 << 20
    device.during_flush = lambda: None
    for _ in range(30):
        device.now += worker.turn()
    assert device.out
    assert served.trouble == ""


class TestNumbers:
    def test_sections(self) -> None:
        device = FakeDevice(*blocks(320, age=OLD), *blocks(100, hot=True))
        device.bad = {7}
        served = make(device, writeback_limit="1G")
        run(device, served, 25)
        found = served.numbers()
        assert (found["out_pages"], found["out_data_size"]) == (320, 640_000)
        assert found["out_live_bytes"] == 320 * (2000 + HEAD)
        assert found["backing"] == "/dev/sdz"
        assert found["backing_size"] == 1001 * EXTENT
        assert (found["backing_free"], found["backing_bad"]) == (989 * EXTENT, EXTENT)
        assert (found["written_out"], found["written_out_minute"]) == (320, 320)
        assert (found["writeback_age"], found["writeback_limit"]) == (3600, 1 << 30)
        assert found["limit_left"] == served.left()
        run(device, served, 75)
        assert served.numbers()["written_out_minute"] == 0

    def test_every_reason_is_one_sentence(self) -> None:
        device = FakeDevice(*blocks(9000, age=OLD), extents=200)
        served = make(device, writeback_limit="6M")
        reasons = set()
        for second in range(200):
            device.mode = ("calm", "wanted", "full")[second // 20 % 3]
            device.error = errno.EIO if 60 <= second < 80 else 0
            device.each = 0.06 if 80 <= second < 90 else 0.001
            run(device, served, 1)
            reasons.add(served.numbers()["reason"])
            if second == 100:
                served.set_left(1 << 40)
            elif second == 150:
                served.bring_back()
        assert len(reasons) > 4
        for reason in reasons:
            assert reason[0].islower()
            assert not reason.endswith(".")
            assert "\n" not in reason


def test_without_a_backing() -> None:
    without = Without()
    assert (without.numbers(), without.left(), without.trouble) == (None, None, "")
    without.configure(settings())
    asks: list[Callable[[], None]] = [
        lambda: without.submit(WritePass()),
        without.bring_back,
        lambda: without.set_left(1),
    ]
    for ask in asks:
        with pytest.raises(DeviceError, match=r"^there is no backing: start the server with backing=PATH$"):
            ask()
