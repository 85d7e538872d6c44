"""One reading of a server's numbers, and the rates between two readings.

watch = Watch()
watch.add(take(served))      # rates since the server's start
watch.add(take(served))      # rates since the sample before
"""

import re
from collections import deque
from itertools import zip_longest
from typing import Any, NamedTuple

from zramd.control import servers
from zramd.kernel import attached, swap
from zramd.stats.buckets import quantile

TIMEOUT = 10.0  # seconds to wait for each answer
HISTORY = 1000  # samples: more than a screen is wide
OPERATIONS = ("read", "write", "trim", "zero")
_BUCKET = re.compile(
    r"^zramd_request_duration_seconds_bucket\{[^}\n]*\bop=\"(\w+)\",le=\"([^\"]+)\"\} (\d+)$", re.MULTILINE
)


class Histogram(NamedTuple):
    """How long requests took: bounds in seconds, the last infinite, and how many took no longer than each."""

    bounds: tuple[float, ...]
    counts: tuple[int, ...]

    def since(self, old: "Histogram | None") -> "Histogram":
        """Return the requests that came after `old` was taken."""
        before = old.counts if old is not None and old.bounds == self.bounds else ()
        counts = tuple(max(now - then, 0) for now, then in zip_longest(self.counts, before, fillvalue=0))
        return Histogram(self.bounds, counts)

    def plus(self, other: "Histogram | None") -> "Histogram":
        """Return the requests of both."""
        if other is None or other.bounds != self.bounds:
            return self
        return Histogram(self.bounds, tuple(a + b for a, b in zip(self.counts, other.counts, strict=True)))

    def quantile(self, share: float) -> float | None:
        """Return the seconds within which a share (0 to 1) of the requests was done, None of no requests."""
        return quantile(self.bounds[:-1], self.counts, share)


class Sample(NamedTuple):
    """All that is shown of one device, as its server reported it."""

    stats: dict[str, Any]
    classes: list[dict[str, Any]]
    clients: int
    uses: dict[str, list[str]]  # the kernel's devices that are clients → what they are used for
    latencies: dict[str, Histogram]  # by operation; empty from a server that does not measure them
    front: str = "nbd"  # how clients reach it

    def groups(self) -> dict[str, int]:
        """Return the zspages of all classes by fullness group, the emptiest first."""
        totals: dict[str, int] = {}
        for row in self.classes:
            for group, count in row["zspages"].items():
                totals[group] = totals.get(group, 0) + count
        return totals


class Rates(NamedTuple):
    """How fast counters went: per second, over `seconds`, which ended with a sample."""

    seconds: float
    per_second: dict[str, float]  # by the counter's name in stats.json
    latencies: dict[str, Histogram]  # of the requests in that time
    groups: dict[str, int]  # zspages gained by each fullness group; empty when these are the first rates


_COUNTED = (
    *("reads", "writes", "trims", "zeroes", "read_bytes", "written_bytes", "notify_free"),
    *("objects_migrated", "pages_compacted", "compact_ns"),
)


def take(served: servers.Served, timeout: float = TIMEOUT) -> Sample:
    """Ask the server of a device. Raises DeviceError when it does not answer within `timeout` seconds."""
    stats = served.ask_json("GET", "/stats", timeout=timeout)
    classes: Any = served.ask_json("GET", "/classes.json", timeout=timeout)
    health = served.ask_json("GET", "/health", timeout=timeout)
    # stats.json has quantiles since the start; what happens now can only be seen from the buckets.
    latencies = histograms(served.request("GET", "/metrics", timeout=timeout)) if "latency" in stats else {}
    devices = attached.devices(stats["name"], stats["disksize"])
    uses = {device: swap.uses(device) for device in devices}
    front = health.get("front", "nbd")  # an older server does not say
    return Sample(stats, classes, health["clients"], uses, latencies, front)


def histograms(metrics: str) -> dict[str, Histogram]:
    """Return the histograms of latencies in a text for Prometheus, by operation."""
    found: dict[str, list[tuple[float, int]]] = {}
    for operation, bound, count in _BUCKET.findall(metrics):
        found.setdefault(operation, []).append((float(bound), int(count)))
    return {op: Histogram(*zip(*buckets, strict=True)) for op, buckets in found.items()}


def rates(old: Sample | None, new: Sample) -> Rates:
    """Return the rates between two samples, or since the server's start without an old one."""
    then = old.stats if old else {}
    seconds = max(new.stats["uptime"] - then.get("uptime", 0), 0.001)
    # A reset sets counters to 0.
    gained = {name: max(new.stats[name] - then.get(name, 0), 0) for name in _COUNTED}
    latencies = {
        op: histogram.since(old.latencies.get(op) if old else None) for op, histogram in new.latencies.items()
    }
    before = old.groups() if old else {}
    groups = {group: count - before.get(group, 0) for group, count in new.groups().items()} if old else {}
    return Rates(seconds, {name: count / seconds for name, count in gained.items()}, latencies, groups)


class Watch:
    """One device over time: its last sample, the rates that led to it, and what they were before."""

    def __init__(self) -> None:
        self.sample: Sample | None = None
        self.rates: Rates | None = None
        # Percent, and requests per second; None where the server was away.
        self.frag: deque[float | None] = deque(maxlen=HISTORY)
        self.requests: dict[str, deque[float | None]] = {op: deque(maxlen=HISTORY) for op in OPERATIONS}

    def add(self, sample: Sample) -> bool:
        """Take in the next sample; return whether it comes from another server than the one before."""
        old = self.sample
        other = old is not None and (
            sample.stats["pid"] != old.stats["pid"] or sample.stats["uptime"] < old.stats["uptime"]
        )
        if other:
            old = None
            self.frag.append(None)
            for series in self.requests.values():
                series.append(None)
        self.rates = rates(old, sample)
        self.sample = sample
        self.frag.append(sample.stats["frag_ratio"] if sample.stats["mem_used_total"] else None)
        if old is not None:  # rates since the start are of another scale
            for op, counter in zip(OPERATIONS, ("reads", "writes", "trims", "zeroes"), strict=True):
                self.requests[op].append(self.rates.per_second[counter])
        return other
