"""Background compaction with a clock of its own: nothing here sleeps."""

import os
import threading
from collections.abc import Callable

import pytest
from support.run import wait_until

from zramd.server.compactor import FRUITLESS_BYTES, MAX_INTERVAL, MIN_FREEABLE, Compactor, Policy, Pressure
from zramd.server.worker import Worker
from zramd.settings import config


def settings(**given: str) -> config.Config:
    defaults = {"disksize": "1G", "rundir": "/tmp/zramd-test", "compaction_threshold": "4"}
    return config.parse((defaults | given).items())


def pressure(freeable: int, used: int = 10000, limit: int = 0, done: int = 0, inflight: int = 0) -> Pressure:
    return Pressure(freeable, used, limit, done, inflight)


class FakeDevice:
    """A pool with some freeable pages, of which each step frees a few."""

    def __init__(self, freeable: int = 0, used: int = 10000, limit: int = 0, gain: int = 10) -> None:
        self.freeable, self.used, self.limit, self.gain = freeable, used, limit, gain
        self.done = self.inflight = 0
        self.now = 0.0
        self.step_seconds = 0.002
        self.budgets: list[int] = []
        self.trims = 0
        self.during_step: Callable[[], None] = lambda: None

    def clock(self) -> float:
        return self.now

    def pressure(self) -> tuple[int, int, int, int, int]:
        return self.freeable, self.used, self.limit, self.done, self.inflight

    def compact(self, budget: int = 0) -> int:
        self.budgets.append(budget)
        self.now += self.step_seconds
        self.during_step()
        freed = min(self.gain, self.freeable)
        self.freeable -= freed
        self.used -= freed
        return freed

    def release_stock(self) -> int:
        self.trims += 1
        return 0


def make(device: FakeDevice, **given: str) -> Compactor:
    return Compactor(device, settings(**given), clock=device.clock)


class TestPolicy:
    @pytest.mark.parametrize(
        ("now", "worth"),
        [
            (pressure(0), False),
            (pressure(399), False),
            (pressure(400), True),  # 4 % of 10000
            (pressure(MIN_FREEABLE - 1, used=20), False),
            (pressure(MIN_FREEABLE, used=20), True),
            (pressure(1, limit=20000), False),
            (pressure(1, used=9000, limit=10000), True),  # 90 % of the limit
            (pressure(1, used=8999, limit=10000), False),
            (pressure(0, used=10000, limit=10000), False),
        ],
    )
    def test_start(self, now: Pressure, worth: bool) -> None:
        assert Policy(settings()).worth_starting(now) is worth

    def test_thresholds_are_settings(self) -> None:
        policy = Policy(settings(compaction_threshold="10", compaction_near_limit="50"))
        assert not policy.worth_starting(pressure(999))
        assert policy.worth_starting(pressure(1000))
        assert policy.worth_starting(pressure(1, used=5000, limit=10000))

    def test_off(self) -> None:
        assert not Policy(settings(compaction="off")).worth_starting(pressure(10000))

    def test_goes_on_below_the_threshold(self) -> None:
        policy = Policy(settings())
        assert policy.worth_going_on(pressure(100))
        assert not policy.worth_going_on(pressure(99))
        assert policy.worth_going_on(pressure(1, limit=10000))

    def test_stops_when_steps_gain_nothing(self) -> None:
        policy = Policy(settings())
        steps = FRUITLESS_BYTES // (64 << 10)
        for _ in range(steps - 1):
            policy.step_done(0)
        assert policy.worth_going_on(pressure(400))
        policy.step_done(1)
        assert policy.worth_going_on(pressure(400))
        for _ in range(steps):
            policy.step_done(0)
        assert not policy.worth_going_on(pressure(400))

    def test_yields_to_clients(self) -> None:
        idle = pressure(400)
        assert idle.pause(0.01, idle) == 0
        assert pressure(400, inflight=1).pause(0.01, idle) == pytest.approx(0.04)
        assert pressure(400, done=1).pause(0.01, idle) == pytest.approx(0.04)
        assert pressure(400, done=1).pause(0.00001, idle) == 0.001

    def test_backs_off(self) -> None:
        policy = Policy(settings(compaction_interval="2"))
        seen = []
        for _ in range(8):
            seen.append(policy.interval)
            policy.run_ended(0)
        assert seen == [2, 4, 8, 16, 32, MAX_INTERVAL, MAX_INTERVAL, MAX_INTERVAL]
        policy.run_ended(1)
        assert policy.interval == 2

    def test_a_long_interval_stays(self) -> None:
        policy = Policy(settings(compaction_interval="600"))
        policy.run_ended(0)
        assert policy.interval == 600


class TestTick:
    def test_sleeps_when_there_is_nothing(self) -> None:
        device = FakeDevice(freeable=10)
        assert make(device).tick() == 1
        assert device.budgets == []

    def test_one_run(self) -> None:
        device = FakeDevice(freeable=500)
        compactor = make(device, compaction_step="128K")
        while (delay := compactor.tick()) == 0:
            pass
        assert delay == 1
        assert set(device.budgets) == {128 << 10}
        assert device.freeable < 100
        assert compactor.pages_freed == 500 - device.freeable

    def test_takes_a_fifth_of_the_time_while_clients_are_active(self) -> None:
        device = FakeDevice(freeable=5000, gain=50)
        device.inflight = 1
        compactor = make(device)
        asleep = 0.0
        for _ in range(50):
            asleep += compactor.tick()
        busy = device.now
        assert busy / (busy + asleep) == pytest.approx(0.2)

    def test_runs_through_when_idle_again(self) -> None:
        device = FakeDevice(freeable=5000)
        compactor = make(device)
        compactor.tick()
        device.done = 5
        assert compactor.tick() > 0  # they came while it paused
        assert compactor.tick() == 0

    def test_run_without_gain_backs_off(self) -> None:
        device = FakeDevice(freeable=500, gain=0)
        compactor = make(device)
        delays = [compactor.tick() for _ in range(12)]
        assert delays == [0, 0, 0, 2, 0, 0, 0, 4, 0, 0, 0, 8]

    def test_gives_the_stock_back_once_when_idle(self) -> None:
        device = FakeDevice()
        compactor = make(device)
        for _ in range(5):
            compactor.tick()
        assert device.trims == 0  # nothing happened yet
        device.done = 1
        compactor.tick()
        assert device.trims == 0
        for _ in range(5):
            compactor.tick()
        assert device.trims == 1
        device.freeable = 500
        while compactor.tick() == 0:
            pass
        compactor.tick()
        assert device.trims == 2  # compaction fills the stock, too


class TestThread:
    """With the real thread; an hour's interval shows that nothing waits for it."""

    def test_stops_at_once(self) -> None:
        compactor = make(FakeDevice(), compaction_interval="3600")
        assert compactor.status == "stopped"
        worker = Worker(compactor)
        worker.start()
        assert compactor.status == "idle"
        worker.stop()
        assert compactor.status == "stopped"

    def test_compact_now_takes_all(self) -> None:
        device = FakeDevice(freeable=55)
        compactor = make(device, compaction="off", compaction_interval="3600")
        worker = Worker(compactor)
        worker.start()
        assert compactor.status == "off"
        assert compactor.compact_now(10) == 55
        assert device.budgets[-1] == 0  # after its steps all at once, which borrows: see compact_whole
        assert compactor.compact_now(10) == 0
        worker.stop()

    def test_configure(self) -> None:
        """What is configured counts at once, even in the middle of an hour's interval."""
        device = FakeDevice(freeable=5000)
        compactor = make(device, compaction="off", compaction_interval="3600")
        worker = Worker(compactor)
        worker.start()
        assert compactor.status == "off"
        compactor.configure(settings(compaction_step="128K"))
        wait_until(lambda: device.freeable < 100)
        assert set(device.budgets) == {128 << 10}
        worker.stop()

    def test_compact_now_ends_when_nothing_can_be_gained(self) -> None:
        device = FakeDevice(freeable=55, gain=0)
        compactor = make(device, compaction_interval="3600")
        worker = Worker(compactor)
        worker.start()
        assert compactor.compact_now(10) == 0
        worker.stop()

    def test_every_caller_gets_an_answer(self) -> None:
        device = FakeDevice(freeable=1000)
        compactor = make(device, compaction_interval="3600")
        worker = Worker(compactor)
        worker.start()
        answers: list[int] = []
        callers = [
            threading.Thread(target=lambda: answers.append(compactor.compact_now(10))) for _ in range(8)
        ]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(20)
        worker.stop()
        assert len(answers) == 8
        assert max(answers) <= 1000
        assert device.freeable == 0

    def test_callers_are_answered_at_the_end(self) -> None:
        device = FakeDevice(freeable=1 << 60, gain=1)  # never done
        started = threading.Event()
        device.during_step = started.set
        compactor = make(device)
        worker = Worker(compactor)
        worker.start()
        answers: list[int] = []
        caller = threading.Thread(target=lambda: answers.append(compactor.compact_now(60)))
        caller.start()
        started.wait(10)
        worker.stop()
        caller.join(10)
        assert len(answers) <= 1
        assert not caller.is_alive()

    @pytest.mark.parametrize("failure", [MemoryError(), OSError(12, "Cannot allocate memory")], ids=repr)
    def test_shortage_ends_when_it_ends(self, failure: Exception) -> None:
        device = FakeDevice(freeable=500)

        def fail() -> None:
            raise failure

        device.during_step = fail
        compactor = make(device, compaction_interval="0.01")
        worker = Worker(compactor)
        worker.start()
        wait_until(lambda: compactor.status.startswith("failed: "))
        device.during_step = lambda: None
        wait_until(lambda: compactor.pages_freed and compactor.status in ("running", "idle"))
        worker.stop()

    @pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("can't allocate lock")], ids=repr)
    def test_no_memory_to_wait(self, failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
        device = FakeDevice(freeable=0)
        compactor = make(device, compaction_interval="0.01")
        worker = Worker(compactor)
        waits: list[float] = []

        def fail(seconds: float) -> None:
            waits.append(seconds)
            raise failure

        with monkeypatch.context() as short:
            short.setattr(worker._wake, "wait", fail)
            worker.start()
            wait_until(lambda: len(waits) > 2)
        device.freeable = 500
        compactor.compact_now(10)
        assert compactor.pages_freed
        worker.stop()

    @pytest.mark.filterwarnings("error")
    def test_failure_is_told_once(self, capfd: pytest.CaptureFixture[str]) -> None:
        device = FakeDevice(freeable=500)

        def fail() -> None:
            raise ValueError("broken")

        device.during_step = fail
        compactor = make(device)
        worker = Worker(compactor)
        worker.start()
        worker.thread.join(10)  # type: ignore[union-attr]
        assert compactor.status == "failed: ValueError: broken"
        assert capfd.readouterr().err == "zramd: background compaction stopped: ValueError: broken\n"
        with pytest.raises(RuntimeError, match="broken"):
            compactor.compact_now(10)
        worker.stop()

    @pytest.mark.parametrize("nice", [None, 0])
    def test_is_nice(self, nice: int | None) -> None:
        device = FakeDevice(freeable=500)
        seen: list[int] = []
        device.during_step = lambda: seen.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        compactor = make(device)
        worker = Worker(compactor) if nice is None else Worker(compactor, nice=nice)
        worker.start()
        compactor.compact_now(10)
        worker.stop()
        before = os.getpriority(os.PRIO_PROCESS, 0)
        assert seen[0] == (max(10, before) if nice is None else before)
