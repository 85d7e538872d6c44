"""What becomes cold by itself, with a clock and a device of the test's own: nothing here sleeps."""

import errno
import threading
from collections.abc import Callable
from itertools import pairwise

import pytest
from support.run import wait_until

from zramd.errors import DeviceError
from zramd.server import ages, tierpolicy, tiers
from zramd.server.ages import IDLE, SWEEP
from zramd.server.tiers import Pass, Tiers
from zramd.server.worker import Worker
from zramd.settings import config

RAW = 4096


def settings(**given: str) -> config.Config:
    return config.parse(({"disksize": "64M", "rundir": "/tmp/zramd-test"} | given).items())


class Block:
    """A block that is stored: as hot or raw, until it is cold or was tried in vain."""

    def __init__(self, size: int = 2000, shrinks: bool = True) -> None:
        self.size, self.shrinks = size, shrinks
        self.age = 0
        self.cold = self.tried = False

    def is_candidate(self, threshold: int) -> bool:
        return not self.cold and not self.tried and (self.size == RAW or self.size >= threshold)


class FakeDevice:
    """Blocks, and a clock that goes on while one is compressed. It is its own Tier."""

    def __init__(self, *blocks: Block, used: int = 100, limit: int = 0) -> None:
        self.blocks = list(blocks)
        self.disksize = 4096 * (len(blocks) or 1)
        self.now, self.cpu = 1000.0, 0.0
        self.each = 80e-6  # seconds that a block takes
        self.walk = 0.0  # seconds of a step that finds nothing
        self.used, self.limit = used, limit
        self.refused = self.done = self.inflight = self.out = 0
        self.short = False
        self.level = 4
        self.stopped = 0
        self.freeable = 0
        self.compactions = 0
        self.no_memory = False
        self.sweeps: list[tuple[bool, bool]] = []
        self.steps: list[tuple[int, int, int, bool, bool]] = []  # tries, threshold, age, raw, idle
        self.order: list[int] = []  # blocks as they were tried
        self.during_step: Callable[[], None] = lambda: None

    def __setattr__(self, name: str, value: object) -> None:
        if name == "level" and getattr(self, "no_memory", False):
            raise MemoryError("no memory for zstd")
        super().__setattr__(name, value)

    def pressure(self) -> tuple[int, int, int, int, int]:
        return 0, self.used, self.limit, self.done, self.inflight

    def compact(self, budget: int = 0) -> int:
        self.compactions += 1
        self.stopped = 0 if self.freeable else self.stopped
        self.freeable = 0
        return 1

    def counters(self) -> dict[str, int]:
        raw = sum(block.size == RAW and not block.cold for block in self.blocks)
        cold = [block.size for block in self.blocks if block.cold]
        return {
            "pages_stored": len(self.blocks) + self.out,
            "out_pages": self.out,
            "same_pages": 0,
            "huge_pages": raw,
            "cold_pages": len(cold),
            "cold_data_size": sum(cold),
            "compr_data_size": sum(block.size for block in self.blocks),
            "recompressed": len(cold),
            "recompress_useless": sum(block.tried for block in self.blocks),
            "recompress_saved": 1000 * len(cold),
            "promoted": 0,
            "failed_writes": self.refused,
        }

    def sweep(self, coarse: bool, keep: bool, threshold: int) -> tuple[list[int], list[int], list[int], int]:
        self.sweeps.append((coarse, keep))
        found = [0] * 256, [0] * 256, [0] * 256
        for block in self.blocks:
            if block.age < 128 or (coarse and block.age < 252):
                block.age += 1
            found[0][block.age] += 1
            if block.is_candidate(threshold):
                found[1 if block.size == RAW else 2][block.age] += 1
        return *found, sum(block.tried for block in self.blocks)

    def mark_idle(self, age: int) -> int:
        for block in self.blocks:
            if block.age >= age:
                block.age = IDLE
        return 0

    def cool(
        self, first: int, tries: int, threshold: int, age: int, raw: bool = False, idle: bool = False
    ) -> tuple[int, int, int, int, int, int]:
        self.steps.append((tries, threshold, age, raw, idle))
        self.during_step()
        tried = looked = done = saved = 0
        self.now += self.walk
        while first < len(self.blocks) and tried < tries:
            number, block = first, self.blocks[first]
            first += 1
            if block.age < age or not block.is_candidate(threshold) or (raw and block.size != RAW):
                continue
            if idle and block.age != IDLE:
                continue
            tried += 1
            looked += block.size
            self.order.append(number)
            self.now += self.each
            self.cpu += self.each
            if self.stopped:
                return first, tried, looked, done, saved, self.stopped
            if block.shrinks:
                block.cold, done, saved = True, done + 1, saved + 1000
                block.size -= 1000
            else:
                block.tried = True
        return first, tried, looked, done, saved, 0

    def promote(self, first: int, tries: int) -> tuple[int, int, int, int]:
        if self.stopped:
            return first, 1, 0, self.stopped
        wanted = [block for block in self.blocks if block.age == ages.WANTED]
        for block in wanted[:tries]:
            block.cold, block.age = False, 0
        return len(self.blocks), len(wanted), len(wanted), 0

    def cold(self) -> int:
        return sum(block.cold for block in self.blocks)


def make(device: FakeDevice, **given: str) -> Tiers:
    return Tiers(
        device,
        device,
        settings(**given),
        clock=lambda: device.now,
        cpu=lambda: device.cpu,
        short=lambda: device.short,
    )


def run(device: FakeDevice, served: Tiers, seconds: float) -> float:
    """Let time pass, with a turn whenever one is due; return how much of it was rest."""
    end = device.now + seconds
    rested = 0.0
    while device.now < end:
        delay = served.tick()
        assert delay >= 0
        delay = min(delay, end - device.now)
        device.now += delay
        rested += delay
    return rested


def blocks(count: int, **given: int | bool) -> list[Block]:
    return [Block(**given) for _ in range(count)]  # type: ignore[arg-type]


class TestSweeps:
    def test_every_ten_seconds(self) -> None:
        device = FakeDevice(*blocks(1))
        run(device, make(device), 321)
        assert [coarse for coarse, _ in device.sweeps] == [False] * 15 + [True] + [False] * 15 + [True]

    def test_a_late_one_is_one(self) -> None:
        device = FakeDevice(*blocks(1))
        served = make(device)
        device.now += 1000  # the processor was not to be had
        served.tick()
        served.tick()
        assert len(device.sweeps) == 1
        run(device, served, 11)
        assert len(device.sweeps) == 2

    def test_pressure_beats_promotion(self) -> None:
        """What was to be hot again is forgotten where memory is short."""
        device = FakeDevice(*blocks(1))
        served = make(device)
        run(device, served, 11)
        device.short = True
        run(device, served, 11)
        assert [keep for _, keep in device.sweeps] == [True, False]


class TestPasses:
    def test_what_is_old_enough(self) -> None:
        device = FakeDevice(*blocks(40), *blocks(40))
        served = make(device, cold_age="60")
        for _ in range(12):
            run(device, served, 10)
            for block in device.blocks[40:]:
                block.age = 0  # somebody asks for them
        assert device.cold() == 40
        assert not any(block.cold for block in device.blocks[40:])

    def test_not_before(self) -> None:
        device = FakeDevice(*blocks(40))
        served = make(device, cold_age="60")
        run(device, served, 60)
        assert device.steps == []
        run(device, served, 20)
        assert device.cold() == 40

    def test_small_payloads_are_left_alone(self) -> None:
        device = FakeDevice(*blocks(40, size=299), *blocks(40, size=300))
        run(device, make(device, cold_age="10"), 60)
        assert device.order == list(range(40, 80))

    def test_raw_blocks_come_first(self) -> None:
        device = FakeDevice(*blocks(100), *blocks(30, size=RAW))
        run(device, make(device, cold_age="10"), 60)
        assert device.order == [*range(100, 130), *range(100)]

    def test_once(self) -> None:
        """What was tried in vain is not tried again."""
        device = FakeDevice(*blocks(40, shrinks=False))
        run(device, make(device, cold_age="10"), 600)
        assert sorted(device.order) == list(range(40))

    def test_few_candidates_are_not_worth_a_walk(self) -> None:
        device = FakeDevice(*blocks(tierpolicy.ENOUGH - 1), *blocks(1000, size=100))
        served = make(device, cold_age="10")
        run(device, served, 600)
        assert device.steps == []
        device.blocks.append(Block())
        run(device, served, 60)
        assert device.cold() == tierpolicy.ENOUGH

    def test_nothing_stored(self) -> None:
        """An empty device is looked at once a sweep."""
        device = FakeDevice()
        served = make(device)
        served.tick()
        assert served.tick() == pytest.approx(SWEEP)

    @pytest.mark.parametrize(("used", "share"), [(100, 0.05), (900, 0.25)])
    def test_share_of_a_processor(self, used: int, share: float) -> None:
        device = FakeDevice(*blocks(100_000), used=used, limit=1000)
        served = make(device, cold_age="10")
        run(device, served, 30)
        before = device.cpu
        run(device, served, 20)
        assert (device.cpu - before) / 20 == pytest.approx(share, rel=0.1)
        assert served.numbers()["cpu_seconds"] == pytest.approx(device.cpu, abs=0.001)
        assert f"{share:.0%} of a processor" in served.numbers()["reason"]

    def test_little_is_saved_up(self) -> None:
        """After hours without work it does not take a whole processor."""
        device = FakeDevice(*blocks(5000))
        device.each = 1e-3
        served = make(device, cold_age="20min")
        for block in device.blocks[:20]:
            block.age = 128
        run(device, served, 1200)
        assert device.cold() == 20
        device.cpu = 0.0
        run(device, served, 40)
        assert 1 < device.cpu < 0.05 * 40 + tierpolicy.BURST + tiers.STEP * device.each

    def test_works_in_spells(self) -> None:
        """What was saved up is used in one go, as each rest leaves the caches to others."""
        device = FakeDevice(*blocks(5000))
        device.each = 1e-4
        times: list[float] = []
        device.during_step = lambda: times.append(device.now)
        run(device, make(device, cold_age="10"), 35)
        assert len(times) > 50
        step = tiers.STEP * device.each
        rests = sum(after - before > 2 * step for before, after in pairwise(times))
        assert 1 < rests < len(times) / 5

    def test_step_by_step(self) -> None:
        device = FakeDevice(*blocks(1000))
        run(device, make(device, cold_age="10"), 120)
        assert device.cold() == 1000
        assert {tries for tries, *_ in device.steps} == {tiers.STEP}

    def test_leaves_time_to_clients(self) -> None:
        device = FakeDevice(*blocks(1000))
        served = make(device, cold_age="10")
        run(device, served, 25)
        device.blocks = blocks(1000)
        for block in device.blocks:
            block.age = 100
        served.submit(Pass())
        served.tick()
        assert not served.yields
        device.inflight = 1
        assert served.tick() == pytest.approx(4 * tiers.STEP * device.each)
        assert served.yields

    def test_earlier_under_pressure(self) -> None:
        device = FakeDevice(*blocks(40))
        served = make(device, cold_age="1h")
        run(device, served, 100)
        assert device.cold() == 0
        device.short = True
        run(device, served, 2)
        assert device.cold() == 40

    def test_full(self) -> None:
        """What was left alone for a sweep, whatever its age, within a second."""
        device = FakeDevice(*blocks(100), *blocks(20, size=RAW), used=1000, limit=1000)
        served = make(device)
        run(device, served, 11)
        assert device.cold() == 0
        device.refused = 1
        run(device, served, 1.1)
        assert device.order[:20] == list(range(100, 120))
        assert served.numbers()["mode"] == "full"

    def test_a_pass_begins_anew_with_the_mode(self) -> None:
        """Raw blocks that are cold only now come before what an earlier pass has left."""
        device = FakeDevice(*blocks(5000), *blocks(20, size=RAW))
        device.each = 1e-3
        served = make(device, cold_age="5min")
        run(device, served, 300)
        for block in device.blocks[5000:]:
            block.age = 4
        run(device, served, 20)
        assert 0 < device.cold() < 5000
        device.short = True
        device.order.clear()
        run(device, served, 3)
        assert device.order[:20] == list(range(5000, 5020))

    def test_off(self) -> None:
        device = FakeDevice(*blocks(100))
        device.level = 0
        served = make(device, recompression="off", cold_age="10")
        run(device, served, 100)
        assert device.steps == []
        assert (served.numbers()["mode"], served.numbers()["reason"]) == ("off", "recompression is off")
        assert len(device.sweeps) == 9  # idle marks and ages are of use without it, too


class TestBackOff:
    def passes(self, device: FakeDevice, served: Tiers, seconds: float) -> list[float]:
        """When passes began; there is always something that does not become smaller."""
        began = []
        end = device.now + seconds
        while device.now < end:
            before = len(device.steps)
            for block in device.blocks:
                block.tried = False
            device.now += served.tick()
            if len(device.steps) > before:
                began.append(device.now)
        return began

    def pauses(self, began: list[float]) -> list[int]:
        return [round((after - before) / SWEEP) for before, after in pairwise(began)]

    def test_doubles(self) -> None:
        device = FakeDevice(*blocks(40, shrinks=False))
        served = make(device, cold_age="10")
        pauses = self.pauses(self.passes(device, served, 6000))
        assert pauses[:5] == [2, 4, 8, 16, 32]
        assert set(pauses[5:]) == {60}
        assert "gained less than 1%" in served.numbers()["reason"]

    @pytest.mark.parametrize("how", ["setting", "by hand", "mode"])
    def test_ends(self, how: str) -> None:
        device = FakeDevice(*blocks(40, shrinks=False))
        served = make(device, cold_age="10")
        self.passes(device, served, 700)
        before = len(device.steps)
        if how == "setting":
            served.configure(settings(cold_age="11"))
        elif how == "by hand":
            served.submit(Pass(threshold=4000))
        else:
            device.short = True
        self.passes(device, served, 12)
        assert len(device.steps) > before + (how == "by hand")

    def test_gain_goes_on(self) -> None:
        device = FakeDevice(*blocks(40))
        served = make(device, cold_age="10")
        for _ in range(5):
            run(device, served, 30)
            assert device.cold() == 40
            device.blocks = blocks(40)


class TestNoRoom:
    @pytest.mark.parametrize("number", [errno.ENOMEM, errno.EDQUOT])
    def test_pauses_at_once(self, number: int) -> None:
        device = FakeDevice(*blocks(100))
        device.stopped = number
        served = make(device, cold_age="10")
        run(device, served, 21)
        assert len(device.order) == 1
        assert served.numbers()["mode"] == "paused"
        assert served.numbers()["reason"].startswith("the s")
        device.stopped = 0
        run(device, served, 2 * tierpolicy.NO_ROOM_PAUSE)
        assert device.cold() == 99
        assert served.numbers()["mode"] == "calm"

    def test_mem_limit_may_leave_room_for_others(self) -> None:
        device = FakeDevice(*blocks(1000))
        device.stopped = errno.ENOSPC
        served = make(device, cold_age="10")
        run(device, served, 21)
        assert len(device.order) == tierpolicy.REFUSALS
        assert served.numbers()["mode"] == "paused"
        assert served.numbers()["reason"].startswith("mem_limit or the budget leaves no room")

    def test_compaction_makes_room(self) -> None:
        """Once in a row of refusals."""
        device = FakeDevice(*blocks(1000))
        device.stopped, device.freeable = errno.ENOSPC, 8
        served = make(device, cold_age="10")
        run(device, served, 40)
        assert device.compactions == 1
        assert device.cold() == 999  # the one that was refused has its turn with the next
        device.stopped = errno.ENOSPC
        device.blocks = blocks(1000)
        device.order.clear()
        run(device, served, 25)
        assert device.cold() == 0
        assert (device.compactions - 1) * tierpolicy.REFUSALS == len(device.order) > 0

    def test_a_pass_by_hand_tries_and_gives_up(self) -> None:
        device = FakeDevice(*blocks(100))
        device.stopped = errno.ENOMEM
        served = make(device)
        for count in (1, 2):
            served.submit(Pass())
            run(device, served, 5)
            assert len(device.order) == count
        assert "by hand" not in served.numbers()["reason"]


class TestByHand:
    @pytest.mark.parametrize(
        ("wanted", "tried"),
        [
            (Pass(), [2, 3, 0, 1, 4]),
            (Pass(frozenset({"huge"})), [2, 3]),
            (Pass(frozenset({"idle"})), [3, 1]),
            (Pass(frozenset({"huge", "idle"})), [3]),
            (Pass(threshold=1500), [2, 3, 0, 1]),
            (Pass(max_pages=3), [2, 3, 0]),
            (Pass(frozenset({"huge"}), max_pages=1), [2]),
        ],
        ids=["all", "huge", "idle", "both", "long ones", "three", "a huge one"],
    )
    def test_what_is_tried(self, wanted: Pass, tried: list[int]) -> None:
        device = FakeDevice(Block(), Block(), Block(RAW), Block(RAW), Block(1000))
        for number in (1, 3):
            device.blocks[number].age = IDLE
        served = make(device)
        served.submit(wanted)
        run(device, served, 1)
        assert device.order == tried
        assert served.tick() > 0

    def test_at_once(self) -> None:
        """It does not wait for its share of a processor, and is not counted against that."""
        device = FakeDevice(*blocks(10_000))
        served = make(device)
        served.submit(Pass())
        assert run(device, served, 1) < 0.21
        assert device.cold() == 10_000

    def test_is_not_charged_to_what_comes_after(self) -> None:
        device = FakeDevice(*blocks(10_000, size=RAW), *blocks(100))
        for block in device.blocks:
            block.age = 5
        served = make(device, cold_age="10")
        served.submit(Pass(frozenset({"huge"})))
        run(device, served, 12)
        assert device.cold() == 10_100

    def test_max_pages_over_steps(self) -> None:
        device = FakeDevice(*blocks(1000))
        served = make(device)
        served.submit(Pass(max_pages=100))
        run(device, served, 1)
        assert len(device.order) == 100

    def test_one_after_the_other(self) -> None:
        device = FakeDevice(*blocks(10), *blocks(10, size=RAW))
        served = make(device)
        served.submit(Pass(frozenset({"huge"}), max_pages=5))
        served.submit(Pass(max_pages=7))
        run(device, served, 1)
        assert device.order == [*range(10, 20), 0, 1]

    def test_many(self) -> None:
        served = make(FakeDevice(*blocks(1)))
        for _ in range(tiers.MOST_PASSES):
            served.submit(Pass())
        assert served.numbers()["reason"] == "a pass by hand is under way"
        with pytest.raises(DeviceError, match="16 passes are queued already"):
            served.submit(Pass())

    def test_off(self) -> None:
        device = FakeDevice(*blocks(10))
        served = make(device, recompression="off")
        with pytest.raises(DeviceError, match="recompression is off"):
            served.submit(Pass())

    def test_switched_off(self) -> None:
        """Those that wait are dropped."""
        device = FakeDevice(*blocks(100))
        served = make(device)
        served.submit(Pass())
        served.configure(settings(recompression="off"))
        run(device, served, 5)
        assert (device.level, device.order) == (0, [])

    @pytest.mark.parametrize(("seconds", "age"), [(None, 0), (0, 0), (300, 31), (1e9, ages.OLDEST)])
    def test_idle(self, seconds: float | None, age: int) -> None:
        device = FakeDevice(*(Block() for _ in range(254)))
        for number, block in enumerate(device.blocks):
            block.age = min(number, ages.OLDEST)
        make(device).mark_idle(seconds)
        assert sum(block.age == IDLE for block in device.blocks) == 254 - age


def test_no_pass_is_queued_for_a_thread_that_is_gone() -> None:
    device = FakeDevice(*blocks(40))
    served = make(device)
    worker = Worker(served)
    device.during_step = broken
    served.submit(Pass())
    worker.turn()
    with pytest.raises(DeviceError, match=r"^background recompression does not run any more, .*: restart"):
        served.submit(Pass())


def broken() -> None:
    raise ValueError("broken")


def test_a_stop_waits_for_one_step() -> None:
    """Whatever is left of a pass."""
    device = FakeDevice(*blocks(1_000_000))
    started, stopping = threading.Event(), threading.Event()

    def hold() -> None:
        started.set()
        assert stopping.wait(10)

    device.during_step = hold
    served = make(device)
    worker = Worker(served)
    worker.start()
    served.submit(Pass())
    assert started.wait(10)
    stopper = threading.Thread(target=worker.stop)
    stopper.start()
    wait_until(lambda: worker._stopping)
    stopping.set()
    stopper.join(10)
    assert not stopper.is_alive()
    assert len(device.steps) == 1


class TestPromotion:
    def test_in_calm(self) -> None:
        device = FakeDevice(*blocks(5))
        device.blocks[3].cold, device.blocks[3].age = True, ages.WANTED
        run(device, make(device), 12)
        assert device.cold() == 0

    def test_not_under_pressure(self) -> None:
        device = FakeDevice(*blocks(5))
        device.blocks[3].cold, device.blocks[3].age = True, ages.WANTED
        device.short = True
        run(device, make(device), 12)
        assert device.cold() == 1

    def test_no_room(self) -> None:
        device = FakeDevice(*blocks(5))
        device.blocks[3].cold, device.blocks[3].age = True, ages.WANTED
        device.stopped = errno.ENOSPC
        served = make(device)
        run(device, served, 15)
        assert device.cold() == 1
        assert "under way" not in served.numbers()["reason"]


class TestSettings:
    def test_level(self) -> None:
        device = FakeDevice()
        served = make(device)
        served.configure(settings(recompression="zstd(level=9)"))
        assert device.level == 9
        assert served.numbers()["recompression"] == "zstd(level=9)"

    def test_no_memory(self) -> None:
        device = FakeDevice(*blocks(100))
        served = make(device, cold_age="10")
        device.no_memory = True
        with pytest.raises(DeviceError, match=r"^recompression stays zstd\(level=4\): .*no memory"):
            served.configure(settings(recompression="zstd(level=9)"))
        assert served.numbers()["recompression"] == "zstd(level=4)"
        run(device, served, 60)
        assert device.cold() == 100

    def test_cold_age(self) -> None:
        device = FakeDevice(*blocks(100))
        served = make(device, cold_age="1h")
        run(device, served, 100)
        assert device.cold() == 0
        served.configure(settings(cold_age="1min"))
        run(device, served, 12)
        assert device.cold() == 100
        assert served.numbers()["cold_age"] == 60


class TestNumbers:
    def test_sums(self) -> None:
        device = FakeDevice(
            *blocks(30), *blocks(20, size=RAW), *blocks(10, shrinks=False), *blocks(5, size=100)
        )
        served = make(device, cold_age="10")
        for seconds in (0, 12, 40):
            run(device, served, seconds)
            found = served.numbers()
            assert sum(found[f"{kind}_pages"] for kind in ("hot", "cold", "raw", "same")) == 65
            assert sum(count for _, count in found["ages"]) == 65
        assert (found["cold_pages"], found["tried_pages"], found["saved_bytes"]) == (50, 10, 50_000)
        assert found["hot_data_size"] == 10 * 2000 + 5 * 100
        assert found["cold_data_size"] == 30 * 1000 + 20 * 3096

    def test_what_is_out_is_not_hot(self) -> None:
        device = FakeDevice(*blocks(40))
        served = make(device)
        device.out = 7
        assert served.numbers()["hot_pages"] == 40

    def test_minute(self) -> None:
        device = FakeDevice(*blocks(40))
        served = make(device, cold_age="10")
        assert served.numbers()["recompressed_minute"] == 0
        run(device, served, 40)
        assert served.numbers()["recompressed_minute"] == 40
        run(device, served, 75)
        assert (served.numbers()["recompressed"], served.numbers()["recompressed_minute"]) == (40, 0)

    def test_a_minute_after_a_reset(self) -> None:
        """The device counts from 0 again: what comes then counts at once."""
        device = FakeDevice(*blocks(400))
        served = make(device, cold_age="10")
        run(device, served, 35)
        assert served.numbers()["recompressed_minute"] == 400
        device.blocks[:] = [*blocks(40), *blocks(360, size=100)]
        run(device, served, 35)
        assert (served.numbers()["recompressed"], served.numbers()["recompressed_minute"]) == (40, 40)

    def test_every_reason_is_one_sentence(self) -> None:
        device = FakeDevice(*blocks(1000), *blocks(40, shrinks=False))
        served = make(device, cold_age="10")
        reasons = []
        while device.now < 1060:
            device.inflight = device.now > 1020
            device.now += min(0.5, served.tick())
            reasons.append(served.numbers()["reason"])
        assert len(set(reasons)) > 1
        for reason in reasons:
            assert reason
            assert reason[0].islower()
            assert not reason.endswith(".")

    def test_failure(self) -> None:
        served = make(FakeDevice())
        served.failure = "no memory"
        assert served.numbers()["reason"] == "background recompression failed: no memory"
