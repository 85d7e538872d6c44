"""By how much counters rose within a minute: what statistics show beside sums since the start."""

from collections import deque

from zramd.server.ages import SWEEP

MINUTE = 60.0


class Minute:
    """Some counters that go together, as they stood with each sweep of the last minute."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, tuple[int, ...]]] = deque()

    def add(self, now: float, *counts: int) -> None:
        """Take note of how they stand; where one fell the device was reset, and counts from 0 again."""
        if self._seen and any(map(int.__lt__, counts, self._seen[-1][1])):
            self._seen.clear()
            self._seen.append((now - SWEEP, (0,) * len(counts)))
        self._seen.append((now, counts))
        while len(self._seen) > 1 and self._seen[1][0] <= now - MINUTE:
            self._seen.popleft()

    def rise(self, *counts: int) -> tuple[int, ...]:
        """Return by how much each is above what it was a minute ago."""
        before = self._seen[0][1] if self._seen else counts
        return tuple(max(0, count - old) for count, old in zip(counts, before, strict=True))
