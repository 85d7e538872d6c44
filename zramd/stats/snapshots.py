"""All numbers of one device at one moment."""

import os
import time
from itertools import accumulate
from typing import NamedTuple, Protocol

from zramd.stats.buckets import quantile
from zramd.stats.numbers import COUNTED, SWAP, UBLK, Values, derive


class Source(Protocol):
    """What is read from a device."""

    def counters(self) -> dict[str, int]: ...
    def classes(self) -> list[tuple[int, ...]]: ...
    def latencies(self) -> dict[str, tuple[int, tuple[int, ...]]]: ...
    @property
    def latency_bounds(self) -> tuple[int, ...]: ...


class Latency(NamedTuple):
    """How long the requests of one operation took, the failed ones too."""

    bounds: tuple[float, ...]  # seconds: the most that a request in each bucket took; the last has none
    counts: tuple[int, ...]  # requests in each bucket, one more than bounds
    sum: float  # seconds of all requests together

    @property
    def requests(self) -> int:
        """All requests."""
        return sum(self.counts)

    def quantile(self, share: float) -> float:
        """Return the seconds within which a share (0 to 1) of the requests was done, 0 without requests."""
        return quantile(self.bounds, tuple(accumulate(self.counts)), share) or 0.0


class Snapshot(NamedTuple):
    """What a server shows of itself."""

    name: str
    comp_algorithm: str
    version: str
    pid: int
    values: Values  # each of NUMBERS, by its name
    latency: dict[str, Latency]  # by operation: read, write, trim, zero
    tiers: Values | None = None  # see zramd.stats.tiers
    writeback: Values | None = None  # see zramd.stats.writeback

    @property
    def recompression(self) -> str:
        """The setting of that name: what makes blocks cold, or off."""
        return self.tiers["recompression"] if self.tiers else "off"


class ClassRow(NamedTuple):
    """One size class: zspages per fullness group (10 % … 90 %, 99 %, 100 %), objects and pages."""

    class_index: int
    size: int
    zspages: tuple[int, ...]
    obj_allocated: int
    obj_used: int
    pages_used: int
    pages_per_zspage: int
    freeable: int


def take(
    device: Source,
    *,
    name: str,
    comp_algorithm: str,
    version: str,
    started: float,
    swap: Values | None = None,
    tiers: Values | None = None,
    writeback: Values | None = None,
    front: Values | None = None,
) -> Snapshot:
    """Return the device's numbers now; `started` is the server's start on the clock of time.monotonic().

    `swap` has those that are SWAP: none where this machine does not swap to the device. `tiers` and
    `writeback` have what the device does not know itself: see the modules of these names in zramd.stats.
    `front` has those that are UBLK, nothing with another front.
    """
    counters = device.counters()
    values: Values = {name: counters[name] for name in COUNTED}
    values |= (swap or dict.fromkeys(SWAP)) | (front or dict.fromkeys(UBLK))
    values |= {"uptime": time.monotonic() - started, "resident_bytes": resident_bytes()}
    latency = _take_latency(device)
    return Snapshot(name, comp_algorithm, version, os.getpid(), derive(values), latency, tiers, writeback)


def _take_latency(device: Source) -> dict[str, Latency]:
    bounds = tuple(bound / 1e9 for bound in device.latency_bounds)
    return {op: Latency(bounds, counts, total / 1e9) for op, (total, counts) in device.latencies().items()}


def take_classes(device: Source) -> list[ClassRow]:
    """Return one row for each size class of the device's pool."""
    return [ClassRow(row[0], row[1], row[2:13], *row[13:]) for row in device.classes()]


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    with open("/proc/self/statm", "rb") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
