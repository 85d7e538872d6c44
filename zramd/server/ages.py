"""How long nobody has asked for a block: what a sweep counts, in seconds. See core/device/ages.pyx."""

from typing import Any

SWEEP = 10.0  # seconds of the monotonic clock, which does not go on while the machine sleeps
COARSE = 16  # each so manieth sweep also ages the old blocks
OLDEST, WANTED, IDLE = 251, 253, 254  # ages, see core/device/ages.pyx
_FINE = 128  # sweeps; above it only coarse ones count
BOUNDS = (10, 30, 60, 300, 600, 1800, 3600, 21600)  # seconds: the rows of the histogram


def least_seconds(age: int) -> int:
    """Return for how many seconds at least nobody has asked for a block of this age, up to OLDEST."""
    sweeps = age - 1 if age <= _FINE else _FINE + COARSE * (age - _FINE - 1)
    return max(0, int(SWEEP) * sweeps)


def most_seconds(age: int) -> float:
    """Return for how many seconds at most, just after a sweep, nobody has asked for a block of this age."""
    if age >= OLDEST:
        return float("inf")
    return SWEEP * (age if age < _FINE else _FINE + COARSE * (age - _FINE + 1) - 1)


def age_of(seconds: float) -> int:
    """Return the youngest age of blocks that nobody has asked for in so many seconds, OLDEST at most."""
    return next((age for age in range(OLDEST) if least_seconds(age) >= seconds), OLDEST)


def _row(age: int) -> int:
    """Return the row of the histogram for blocks of this age."""
    if age == IDLE:
        return -1
    # Readers keep what is wanted young.
    return 0 if age == WANTED else sum(most_seconds(age) > bound for bound in BOUNDS)


_ROWS = tuple(_row(age) for age in range(256))  # made once: it is as much work as a whole snapshot


def histogram(stored: list[int]) -> list[list[Any]]:
    """Return rows [upper bound in seconds, blocks] of what a sweep counted.

    The bound of the last two is None, for more, and "idle", for marked blocks.
    """
    rows: list[list[Any]] = [[bound, 0] for bound in (*BOUNDS, None, "idle")]
    for count, row in zip(stored, _ROWS, strict=False):
        rows[row][1] += count
    return rows
