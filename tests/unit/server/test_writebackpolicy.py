"""What leaves memory, how much and how fast: rules that know no clock."""

import errno

import pytest

from zramd.core.device.backing import EXTENT
from zramd.server import writebackpolicy
from zramd.server.ages import IDLE, OLDEST, WANTED, age_of
from zramd.server.tierpolicy import HURRY_AGE, Census
from zramd.server.writebackpolicy import DAY, LEAST, Budget, Look, Pace, Plan, Policy, View
from zramd.settings import config

GIB = 1 << 30
HOUR = age_of(3600)


def settings(**given: str) -> config.Config:
    return config.parse(({"disksize": "64M", "rundir": "/tmp/zramd-test"} | given).items())


class TestBudget:
    def test_a_new_one_is_full(self) -> None:
        assert Budget(GIB, (0, 0), 5000.0).left == GIB

    def test_fills_evenly(self) -> None:
        budget = Budget(DAY * 1000, (0, 5000), 5000.0)
        assert budget.left == 0
        for now in (5001.0, 5001.5, 5010.0):
            budget.fill(now)
            assert budget.left == (now - 5000) * 1000

    def test_holds_a_day(self) -> None:
        budget = Budget(GIB, (GIB // 2, 1000), 1000.0)
        budget.fill(1000 + DAY / 4)
        assert budget.left == GIB * 3 // 4
        budget.fill(1000 + 10 * DAY)
        assert budget.left == GIB

    def test_a_restart_gives_nothing(self) -> None:
        """However often: what was used is used."""
        budget = Budget(GIB, (0, 0), 1000.0)
        for restart in range(100):
            now = 1000.0 + restart
            budget.spend(EXTENT)
            budget = Budget(GIB, budget.kept, now)
        assert budget.left is not None
        assert budget.left <= GIB - 100 * EXTENT + 100 * GIB / DAY

    def test_time_while_nobody_served_counts(self) -> None:
        assert Budget(DAY * 1000, (0, 1000), 1000.0 + 60).left == 60_000

    def test_another_boot(self) -> None:
        """A time that lies ahead says nothing of how long ago it was."""
        budget = Budget(GIB, (123456, 900_000), 50.0)
        assert budget.left == 123456
        budget.fill(50.0 + DAY / 2)
        assert budget.left == 123456 + GIB // 2

    def test_a_clock_that_jumps(self) -> None:
        budget = Budget(GIB, (0, 1000), 1000.0)
        budget.fill(1000.0 + 1e12)
        assert budget.left == GIB
        budget.spend(GIB)
        budget.fill(1000.0)
        assert budget.left == 0
        budget.fill(1000.0 + DAY)
        assert budget.left == GIB

    def test_off(self) -> None:
        budget = Budget(0, (0, 0), 1000.0)
        budget.spend(1 << 50)
        budget.fill(2000.0)
        assert (budget.left, budget.allows(1 << 50), budget.waits(1 << 50)) == (None, True, 0)

    def test_on_and_off_gives_nothing(self) -> None:
        """Not to one who switches it; while it is off, time goes on for it."""
        budget = Budget(GIB, (0, 0), 1000.0)
        budget.spend(GIB)
        for _ in range(10):
            budget.change(0)
            budget.fill(1000.0)
            budget.change(GIB)
            assert budget.left == 0
        budget.change(0)
        budget.fill(1000.0 + DAY / 4)
        budget.change(GIB)
        budget.fill(1000.0 + DAY / 4)
        assert budget.left == GIB // 4

    def test_off_at_first(self) -> None:
        budget = Budget(0, (0, 0), 1000.0)
        budget.change(GIB)
        budget.fill(2000.0)
        assert budget.left == GIB

    @pytest.mark.parametrize(
        ("used", "limit", "left"),
        [
            (0, 2 * GIB, 2 * GIB),
            (GIB, 10 * GIB, 9 * GIB),  # who raises it may go on at once
            (GIB // 4, GIB // 2, GIB // 4),
            (GIB // 2, GIB // 4, 0),  # below what is used already
            (0, EXTENT, EXTENT),  # below what is left
        ],
    )
    def test_change(self, used: int, limit: int, left: int) -> None:
        """Of a day's, as much is used as before."""
        budget = Budget(GIB, (0, 0), 1000.0)
        budget.spend(used)
        budget.change(limit)
        assert budget.left == left

    def test_lowered_and_raised_again(self) -> None:
        """What was used beyond the lower one is used still, in as many steps as you like."""
        budget = Budget(10 * GIB, (0, 0), 1000.0)
        budget.spend(8 * GIB)
        for limit, left in ((1, 0), (5, 0), (4, 0), (9, 1), (0, None), (2, 0), (10, 2)):
            budget.change(limit * GIB)
            assert budget.left == (left if left is None else left * GIB), limit

    def test_what_was_used_beyond_a_limit_is_of_that_day(self) -> None:
        budget = Budget(10 * GIB, (0, 0), 1000.0)
        budget.spend(9 * GIB)
        budget.change(GIB)  # 8 GiB beyond it
        assert not budget.allows(EXTENT)
        budget.fill(1000.0 + DAY / 2)
        assert budget.left == GIB // 2
        same = budget.copy()
        same.change(10 * GIB)  # 4 GiB of them are forgotten
        assert same.left == GIB // 2 + 9 * GIB - 4 * GIB
        assert (budget.left, budget.limit) == (GIB // 2, GIB)
        budget.fill(1000.0 + DAY)
        budget.change(10 * GIB)
        assert budget.left == 10 * GIB

    def test_another_limit_since_the_restart(self) -> None:
        assert Budget(GIB, (5 * GIB, 1000), 1000.0).left == GIB
        assert Budget(5 * GIB, (GIB, 1000), 1000.0).left == GIB

    def test_given_by_hand(self) -> None:
        """More than a day's, too; then nothing is added until it is used."""
        budget = Budget(GIB, (0, 1000), 1000.0)
        budget.left = 3 * GIB
        budget.fill(1000.0 + DAY)
        assert budget.left == 3 * GIB
        budget.left = 0
        assert not budget.allows(EXTENT)

    def test_the_greatest_limit(self) -> None:
        """What is kept has 64 bits, and a float rounds what has as many."""
        limit = (1 << 64) - 1
        made = Budget(limit, (0, 0), 5)
        assert made.kept == (limit, 5)
        assert Budget(limit, made.kept, 9).kept == (limit, 9)

    def test_when_an_extent_may_be_written(self) -> None:
        budget = Budget(DAY * 1000, (EXTENT - 5000, 1000), 1000.0)
        assert not budget.allows(EXTENT)
        assert budget.waits(EXTENT) == 5
        budget.fill(1005.0)
        assert budget.allows(EXTENT)
        assert budget.waits(EXTENT) == 0

    def test_the_least_limit(self) -> None:
        """An extent a day, and no more."""
        budget = Budget(EXTENT, (0, 0), 1000.0)
        written = 0
        for minute in range(10 * 24 * 60):
            budget.fill(1000.0 + 60 * minute)
            if budget.allows(EXTENT):
                budget.spend(EXTENT)
                written += 1
        assert written in (10, 11)


class TestPace:
    def test_calm(self) -> None:
        """4 MiB a second, the time that the extent took included."""
        pace = Pace()
        assert pace.rest(EXTENT, 0.005, "calm") == pytest.approx(1 / 64 - 0.005)
        assert pace.rest(EXTENT, 0.5, "calm") == 0

    def test_as_fast_as_it_can(self) -> None:
        assert Pace().rest(EXTENT, 0.04, "wanted") == 0

    def test_one_slow_write_in_a_hundred_is_none(self) -> None:
        pace = Pace()
        for number in range(1000):
            pace.took(0.2 if number % 100 == 0 else 0.001)
        assert pace.slowness == 1

    def test_slow(self) -> None:
        """Two in a hundred: half as much is written."""
        pace = Pace()
        for number in range(60):
            pace.took(0.2 if number in (0, 50) else 0.001)
        assert pace.slowness == 2
        assert pace.rest(EXTENT, 0.2, "wanted") == pytest.approx(0.2)
        assert pace.rest(EXTENT, 0.001, "calm") == pytest.approx(1 / 32 - 0.001)

    @pytest.mark.parametrize(("seconds", "slowness"), [(0.05, 1), (0.051, 2)])
    def test_what_is_slow(self, seconds: float, slowness: int) -> None:
        pace = Pace()
        for _ in range(2):
            pace.took(seconds)
        assert pace.slowness == slowness

    def test_recovers(self) -> None:
        pace = Pace()
        for _ in range(1000):
            pace.took(1.0)
        assert pace.slowness == writebackpolicy.MAX_SLOWNESS
        seen = []
        for _ in range(700):
            pace.took(0.001)
            seen.append(pace.slowness)
        assert [seen[at] for at in (98, 99, 199, 299, 399, 499, 599)] == [64, 32, 16, 8, 4, 2, 1]
        assert seen[-1] == 1


def census(
    unread: dict[int, int] | None = None,
    read: dict[int, int] | None = None,
    huge: dict[int, int] | None = None,
    raw: dict[int, int] | None = None,
) -> Census:
    """What a sweep has counted: in extents by age, and raw blocks that may shrink by age."""

    def spread(given: dict[int, int] | None, unit: int = EXTENT) -> list[int]:
        return [(given or {}).get(age, 0) * unit for age in range(256)]

    nothing = [0] * 256
    return Census(nothing, spread(raw, 1), nothing, 0, spread(unread), spread(read), spread(huge))


def view(**given: int | None) -> View:
    return View(**({"used": 100, "limit": 0, "extents": 100, "free": 100, "back": 0} | given))  # type: ignore[arg-type]


def policy(mode: str = "calm", **given: str) -> Policy:
    made = Policy(settings(**given))
    made.look(0.0, mode)
    return made


def looks(made: Policy, found: Census, **given: int | None) -> list[Look]:
    made.swept(found)
    plan = made.plan(view(**given))
    return list(plan.looks) if plan else []


def policy_in_calm(found: Census) -> Plan | None:
    """What goes out in calm after ten seconds."""
    made = policy(writeback_age="10")
    made.swept(found)
    return made.plan(view())


class TestCalm:
    def test_nobody_has_read_it(self) -> None:
        """What nobody has read goes first; the rest in another walk."""
        found = looks(policy(), census(unread={HOUR: 1}, read={HOUR: 5}))
        assert found[:2] == [Look(HOUR, unread=True), Look(HOUR)]

    def test_whole_extents(self) -> None:
        """It waits until there is enough for one."""
        cold = age_of(300)
        nothing = [0] * 256
        for raw, enough in ((0, False), (1, True)):
            unread, read, huge = ([0] * 256 for _ in range(3))
            unread[HOUR], read[HOUR], huge[cold] = EXTENT // 2 - 1, EXTENT // 2, 4096 * raw
            found = looks(policy(), Census(nothing, nothing, nothing, 0, unread, read, huge))
            assert bool(found) is enough

    def test_not_what_is_younger(self) -> None:
        assert looks(policy(), census(unread={HOUR - 1: 9}, read={HOUR - 1: 9})) == []
        assert looks(policy(writeback_age="10min"), census(unread={age_of(600): 9})) != []

    def test_not_what_is_marked_or_wanted(self) -> None:
        """A mark alone is no age: a script marks all, to look later what is still marked."""
        assert looks(policy(), census(unread={IDLE: 9, WANTED: 9}, read={IDLE: 9})) == []

    def test_raw_blocks_once_they_are_cold(self) -> None:
        """Those that recompression has tried: the others may yet shrink."""
        cold = age_of(300)
        assert looks(policy(), census(huge={cold: 3}, raw={cold: 33})) == []
        assert looks(policy(), census(huge={cold: 3}, raw={cold: 32}))[-1] == Look(cold, raw=True, tried=True)
        assert looks(policy(), census(huge={cold - 1: 3})) == []

    def test_raw_blocks_without_recompression(self) -> None:
        cold = age_of(300)
        made = policy(recompression="off")
        assert looks(made, census(huge={cold: 3}, raw={cold: 48}))[-1] == Look(cold, raw=True, tried=False)

    def test_cold_age_beyond_writeback_age(self) -> None:
        """Then raw blocks are like all others."""
        made = policy(cold_age="2h", writeback_age="1h")
        assert looks(made, census(huge={age_of(7200): 9})) == []

    def test_the_oldest_where_little_may_be_written(self) -> None:
        ages = {HOUR: 100, HOUR + 5: 2, HOUR + 10: 1}
        for left, age in ((EXTENT, HOUR + 10), (2 * EXTENT, HOUR + 5), (50 * EXTENT, HOUR), (None, HOUR)):
            assert looks(policy(), census(read=ages), left=left)[1] == Look(age)

    def test_a_sweep_that_counts_no_bytes(self) -> None:
        nothing = [0] * 256
        assert looks(policy(), Census(nothing, nothing, nothing, 0)) == []


class TestWanted:
    def test_what_must_go(self) -> None:
        """The oldest that bring the pool below 70 %: of 1000 pages, with 800 used, 100."""
        made = policy("wanted")
        ages = {200: 2, 150: 2, 100: 2, 50: 20}
        made.swept(census(unread=ages, read=ages))
        plan = made.plan(view(used=800, limit=1000))
        assert plan is not None
        assert plan.need == 100 * 4096
        assert plan.looks == (Look(idle=True), Look(150, unread=True), Look(150))
        assert plan.least == LEAST

    def test_down_to_half_a_minute(self) -> None:
        least = age_of(HURRY_AGE)
        ages = {least: 1, least - 1: 100}
        assert looks(policy("wanted"), census(read=ages), used=900, limit=1000)[-1] == Look(least)
        assert looks(policy("wanted"), census(read={least - 1: 100}), used=900, limit=1000) == []
        young = policy("wanted", writeback_age="10")
        assert looks(young, census(read={2: 100}), used=900, limit=1000)[-1] == Look(2)

    def test_the_machine_lacks_memory(self) -> None:
        """Without mem_limit nobody knows how much must go: a tenth, with each sweep."""
        made = policy("wanted")
        made.swept(census(read={200: 3, 100: 7, 50: 90}))
        plan = made.plan(view(limit=0))
        assert plan is not None
        assert (plan.need, plan.looks[-1]) == (10 * EXTENT, Look(100))

    def test_the_machine_lacks_memory_while_the_pool_is_small(self) -> None:
        made = policy("wanted")
        made.swept(census(read={200: 3, 100: 7, 50: 90}))
        plan = made.plan(view(used=100, limit=1000))
        assert plan is not None
        assert plan.need == 10 * EXTENT

    def test_marked_ones_are_the_oldest(self) -> None:
        found = looks(policy("wanted"), census(read={IDLE: 100, 200: 3}), used=800, limit=1000)
        assert found[::2] == [Look(idle=True), Look(OLDEST)]

    def test_no_more_than_the_limit(self) -> None:
        found = looks(policy("wanted"), census(read={200: 3, 100: 90}), used=900, limit=1000, left=2 * EXTENT)
        assert found[-1] == Look(200)

    def test_goes_on_with_what_comes_next(self) -> None:
        """More is wanted before the next sweep: what has gone is in its census still."""
        made = policy("wanted")
        made.swept(census(read={200: 7, 100: 7, 50: 90}))
        plan = made.plan(view(used=800, limit=1000))
        assert plan is not None
        assert plan.looks[-1] == Look(200)
        made.sent(7 * EXTENT)
        made.pass_ended(10.0, 7 * EXTENT, plan.need, 100, 0)
        assert not made.wants_pass(10.5)
        assert made.wants_pass(11)
        plan = made.plan(view(used=800, limit=1000))
        assert plan is not None
        assert plan.looks[-1] == Look(100)

    @pytest.mark.parametrize("limit", [0, 1000])
    def test_never_less_than_in_calm(self, limit: int) -> None:
        """Once the pool is below its mark, or a tenth is out, what is old enough goes all the same."""
        made = policy("wanted", writeback_age="10")
        made.swept(census(read={age_of(10): 100}))
        plan = made.plan(view(used=100, limit=limit))
        assert plan is not None
        assert plan.need == 10 * EXTENT
        made.sent(10 * EXTENT)
        made.pass_ended(10.0, 10 * EXTENT, plan.need, 100, 0)
        assert made.wants_pass(11)
        assert made.plan(view(used=90, limit=limit)) == policy_in_calm(census(read={age_of(10): 90}))
        # Nothing is left of what the sweep has counted.
        made.sent(90 * EXTENT)
        made.pass_ended(20.0, 90 * EXTENT, 90 * EXTENT, 900, 0)
        assert made.wants_pass(21)
        assert made.plan(view(used=20, limit=limit)) is None

    def test_waits_for_a_sweep_when_nothing_is_left(self) -> None:
        made = policy("wanted")
        made.swept(census(read={200: 7}))
        assert made.plan(view(used=800, limit=1000)) is not None
        made.sent(EXTENT)
        made.pass_ended(10.0, EXTENT, 7 * EXTENT, 16, 0)
        assert not made.wants_pass(1e6)
        made.swept(census(read={200: 7}))
        assert made.wants_pass(20)


def test_full() -> None:
    """Raw ones first, then what nobody has read: whatever was left alone for a sweep."""
    found = looks(policy("full"), census(read={1: 1}))
    assert found == [Look(1, raw=True), Look(idle=True), Look(1, unread=True), Look(1)]
    assert looks(policy("full"), census(read={0: 100})) == []


class TestBackOff:
    def pauses(self, made: Policy, blocks: int, back: int, times: int) -> list[float]:
        """How long it waits after passes that sent so many blocks, while so many came back."""
        found, now = [], 1000.0
        for number in range(times):
            made.swept(census(unread={HOUR: 10}))
            assert made.wants_pass(now)
            made.plan(view(back=number * back))
            made.pass_ended(now, 0, 0, blocks, (number + 1) * back)
            found.append(max(0.0, made.waits(now)))
            now += found[-1]
        return found

    def test_nothing_goes_out(self) -> None:
        assert self.pauses(policy(), 0, 0, 8) == [20, 40, 80, 160, 320, 600, 600, 600]

    def test_what_goes_out_comes_back(self) -> None:
        """Blocks that go in a circle wear the device out, and gain nothing."""
        assert self.pauses(policy(), 100, 51, 8) == [20, 40, 80, 160, 320, 600, 600, 600]

    def test_some_come_back(self) -> None:
        assert self.pauses(policy(), 100, 50, 8) == [0] * 8

    def test_ends_with_the_mode(self) -> None:
        made = policy()
        self.pauses(made, 0, 0, 8)
        made.swept(census(unread={HOUR: 10}))
        assert not made.wants_pass(1000)
        made.look(1000, "wanted")
        assert made.wants_pass(1000)

    def test_ends_with_a_setting(self) -> None:
        made = policy()
        self.pauses(made, 0, 0, 8)
        made.configure(settings())
        assert not made.backs_off


class TestRoom:
    def test_full_until_some_is_free(self) -> None:
        made = policy()
        assert made.room(view(extents=1000, free=2))
        assert not made.room(view(extents=1000, free=1))
        assert not made.room(view(extents=1000, free=49))
        assert made.room(view(extents=1000, free=50))
        assert made.room(view(extents=1000, free=2))

    def test_no_free_extent_was_found(self) -> None:
        made = policy()
        assert not made.flushed(0, errno.EXFULL)
        assert not made.room(view(extents=1000, free=30))
        assert made.room(view(extents=1000, free=50))
        assert not made.has_trouble

    @pytest.mark.parametrize("extents", [2, 3, 10])
    def test_small_devices(self, extents: int) -> None:
        """They are used, too."""
        made = policy()
        assert made.room(view(extents=extents, free=extents))
        made.flushed(0, errno.EXFULL)
        assert made.room(view(extents=extents, free=extents))

    @pytest.mark.parametrize(
        ("extents", "free", "reclaims"), [(1000, 5, False), (1000, 4, True), (5, 1, True)]
    )
    def test_reclaims(self, extents: int, free: int, reclaims: bool) -> None:
        assert policy().reclaims(view(extents=extents, free=free)) is reclaims

    def test_a_full_device_is_emptied_until_it_is_used_again(self) -> None:
        made = policy()
        made.flushed(0, errno.EXFULL)
        assert made.reclaims(view(extents=1000, free=49))
        assert not made.room(view(extents=1000, free=48))
        assert made.room(view(extents=1000, free=50))
        assert not made.reclaims(view(extents=1000, free=49))


class TestErrors:
    def test_eight_in_a_row(self) -> None:
        made = policy()
        changes = [made.flushed(100.0, errno.EIO) for _ in range(8)]
        assert changes == [False] * 7 + [True]
        assert made.is_paused(100 + 599)
        assert not made.is_paused(100 + 600)
        assert made.trouble(100.0) == "Input/output error 8 times in a row, the next try comes in 600 s"

    def test_one_that_works(self) -> None:
        made = policy()
        for _ in range(5):
            for _ in range(7):
                made.flushed(100.0, errno.EIO)
            assert not made.flushed(100.0, 0)
        assert not made.has_trouble
        assert made.trouble(100.0) == ""

    def test_mended(self) -> None:
        """A device that is there again is a good one; one that was only asked of again has failed so far."""
        made = policy()
        for _ in range(8):
            made.flushed(100.0, errno.EIO)
        made.configure(settings())
        assert made.has_trouble
        assert not made.is_paused(100)
        assert made.trouble(100.0).endswith("the next try comes in 0 s")
        made.mended()
        assert not made.has_trouble
        assert made.trouble(100.0) == ""
        changes = [made.flushed(100.0, errno.EIO) for _ in range(8)]
        assert changes == [False] * 7 + [True]

    def test_the_next_try(self) -> None:
        """One failure is enough then: each costs an extent."""
        made = policy()
        for _ in range(8):
            made.flushed(100.0, errno.EIO)
        assert not made.flushed(700.0, errno.ENODEV)
        assert made.is_paused(700 + 599)
        assert made.trouble(700.0).startswith("No such device 9 times")
        assert made.flushed(1300.0, 0)
        assert not made.is_paused(1300)
        assert not made.has_trouble


class TestBringsBack:
    def test_in_calm(self) -> None:
        made = policy()
        assert made.brings_back(100, view())
        assert not policy("wanted").brings_back(100, view())
        assert not policy("full").brings_back(100, view())

    def test_not_so_that_others_must_leave(self) -> None:
        """Between both marks of mem_limit memory is at ease, but what comes would make it short."""
        assert policy().brings_back(100, view(used=699, limit=1000))
        assert not policy().brings_back(100, view(used=700, limit=1000))

    def test_a_circle_is_damped(self) -> None:
        """What comes back makes memory short, so that it has to leave: each time it comes later."""
        made = policy()
        now, waits = 0.0, []
        for _ in range(8):
            made.brought_back(10)
            made.look(now, "wanted")
            made.look(now, "calm")
            wait = next(wait for wait in range(2000) if made.brings_back(now + wait, view()))
            waits.append(wait)
            now += wait
        assert waits == [20, 40, 80, 160, 320, 600, 600, 600]

    def test_memory_that_others_take(self) -> None:
        made = policy()
        for now in range(8):
            made.look(now, "wanted")
            made.look(now, "calm")
        assert made.brings_back(17, view())
