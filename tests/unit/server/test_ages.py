"""How long nobody has asked for a block: what its age tells."""

from zramd.server import ages
from zramd.server.ages import IDLE, SWEEP
from zramd.settings import values


def test_at_least() -> None:
    """A block of age_of(N) was left alone for N seconds, and no younger one surely was."""
    assert [ages.age_of(seconds) for seconds in (0, 1, 10, 11, 300, 1270)] == [0, 2, 2, 3, 31, 128]
    assert ages.age_of(1271) == 129
    assert ages.age_of(1 << 60) == ages.OLDEST
    for age in range(1, ages.OLDEST):
        assert ages.least_seconds(age) < ages.most_seconds(age)
        assert ages.least_seconds(age) <= ages.least_seconds(age + 1)


def test_ages_of_a_block_that_is_left_alone() -> None:
    """However the coarse sweeps fall, its age never tells more time than has gone by."""
    for late in (0.1, SWEEP / 2, SWEEP - 0.1):
        for first in range(ages.COARSE):
            age, passed = 0, late
            for number in range(first, first + 2500):
                if age < 128 or (number % ages.COARSE == 0 and age < ages.OLDEST):
                    age += 1
                assert ages.least_seconds(age) <= passed <= ages.most_seconds(age)
                passed += SWEEP


def test_any_cold_age_can_be_told() -> None:
    assert ages.least_seconds(ages.OLDEST) >= values.MAX_COLD_AGE


def test_histogram() -> None:
    stored = [0] * 256
    for age, count in (
        (1, 1),
        (2, 2),
        (30, 3),
        (31, 4),
        (ages.OLDEST - 1, 5),
        (ages.OLDEST, 6),
        (IDLE, 7),
        (ages.WANTED, 8),
    ):
        stored[age] = count
    rows = ages.histogram(stored)
    assert [bound for bound, _ in rows] == [10, 30, 60, 300, 600, 1800, 3600, 21600, None, "idle"]
    assert [count for _, count in rows] == [9, 2, 0, 3, 4, 0, 0, 5, 6, 7]
