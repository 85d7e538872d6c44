"""Dead blocks: what a device stores that swap no longer uses; their figures, and how they are told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

MIB = 1 << 20
CLUSTER = 512  # slots that the kernel discards at a time: a huge page's, where swap knows huge pages
SAME_FILLED = 0.09  # of the workload's pages: see page.c

Histogram = dict[int, int]  # faults by their time: eight buckets to each power of two of nanoseconds


@dataclass(frozen=True)
class Sample:
    """Guest and device at one heartbeat; `time` in seconds, what is not named bytes or time in pages."""

    time: float
    used: int  # slots of swap
    stored: int  # blocks
    same: int  # of them same-filled: they take no memory
    trims: int  # blocks, so far
    total_bytes: int
    available: int  # bytes
    swapped_in: int  # so far
    swapped_out: int

    @property
    def dead(self) -> int:
        """The blocks that take memory, less the pages in swap that do.

        Which of the pages in swap are same-filled is not known from outside. The workload makes so many of its
        pages so, and swaps all kinds alike.
        """
        return max(0, self.stored - self.same - round(self.used * (1 - SAME_FILLED)))

    @property
    def dead_share(self) -> float:
        """The dead part of the blocks that take memory, in percent."""
        costly = self.stored - self.same
        return 100 * self.dead / costly if costly else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return {**asdict(self), "dead": self.dead, "dead_share": round(self.dead_share, 2)}


def means(samples: Sequence[Sample]) -> dict[str, float]:
    """Return the means of samples, which are a second apart; {} of none.

    `bytes_per_page` is the area below total_bytes through the area below the used pages.
    """
    if not samples:
        return {}
    count = len(samples)
    used = sum(each.used for each in samples)
    total = sum(each.total_bytes for each in samples)
    return {
        "seconds": count,
        "used": round(used / count),
        "stored": round(sum(each.stored for each in samples) / count),
        "same": round(sum(each.same for each in samples) / count),
        "dead": round(sum(each.dead for each in samples) / count),
        "dead_share": round(sum(each.dead_share for each in samples) / count, 1),
        "total_bytes": round(total / count),
        "bytes_per_page": round(total / used) if used else 0,
        "swapped_in": samples[-1].swapped_in - samples[0].swapped_in,
        "swapped_out": samples[-1].swapped_out - samples[0].swapped_out,
    }


# ---- Times of page faults -----------------------------------------------------------------------------------


def add(histogram: Histogram, more: Histogram) -> None:
    """Add the faults of another histogram."""
    for bucket, faults in more.items():
        histogram[bucket] = histogram.get(bucket, 0) + faults


def percentile(histogram: Histogram, percent: float) -> float:
    """Return the time in seconds that so many percent of the faults do not exceed, 0 if there were none."""
    wanted, seen = percent / 100 * sum(histogram.values()), 0
    for bucket in sorted(histogram):
        seen += histogram[bucket]
        if seen >= wanted:
            return _upper_bound(bucket)
    return 0.0


def slowest(histogram: Histogram) -> float:
    """Return the time in seconds that no fault exceeded."""
    return _upper_bound(max(histogram)) if histogram else 0.0


def times(histogram: Histogram) -> dict[str, float]:
    """Return how many faults there were and their times in milliseconds."""
    return {
        "faults": sum(histogram.values()),
        "p50_ms": round(percentile(histogram, 50) * 1e3, 3),
        "p99_ms": round(percentile(histogram, 99) * 1e3, 3),
        "slowest_ms": round(slowest(histogram) * 1e3, 1),
    }


def _upper_bound(bucket: int) -> float:
    exponent, eighth = divmod(bucket, 8)
    return float((9 + eighth) * 2.0 ** (exponent - 3)) / 1e9


# ---- The report ---------------------------------------------------------------------------------------------

ROWS = 12  # of a table of moments


def table(churn: dict[str, Any]) -> list[str]:
    """Return the lines of a run's report."""
    lines = [
        f"{'second':>7} {'used':>8} {'stored':>8} {'same':>7} {'dead':>8} {'dead share':>11} {'total MiB':>10}"
        f" {'trims':>9}"
    ]
    samples = churn["samples"]
    step = max(1, len(samples) // ROWS)
    for each in samples[step - 1 :: step]:
        lines.append(
            f"{each['time']:7.0f} {each['used']:8} {each['stored']:8} {each['same']:7} {each['dead']:8}"
            f" {each['dead_share']:9.1f} % {each['total_bytes'] / MIB:10.1f} {each['trims']:9}"
        )
    lines.append("")
    for name, key in (("with programs, mean", "steady"), ("after their end", "after")):
        if mean := churn[key]:
            lines.append(
                f"{name:<26} {mean['used']} pages used, {mean['dead']} blocks dead ({mean['dead_share']:.1f} %),"
                f" total {mean['total_bytes'] / MIB:.1f} MiB, {mean['bytes_per_page']} bytes for a page used"
            )
    for name, when in (("page faults", "else"), ("during a refresh", "refresh")):
        if took := churn["faults"].get(when):
            lines.append(
                f"{name:<26} {took['faults']} from swap, p50 {took['p50_ms']:.2f} ms, p99 {took['p99_ms']:.2f} ms,"
                f" slowest {took['slowest_ms']:.0f} ms"
            )
    for name, looks in (("clusters, with programs", True), ("clusters, without", False)):
        if found := [each for each in churn["clusters"] if bool(each["programs"]) is looks]:
            lines.append(f"{name:<26} {clusters(found[-1])}")
    if refreshes := churn["refreshes"]:
        read, freed = (sum(each[key] for each in refreshes) for key in ("read_back", "freed"))
        each = f", {read / freed:.2f} for each" if freed else ""
        seconds = sum(refresh["seconds"] for refresh in refreshes)
        lines.append(
            f"{'refreshes':<26} {len(refreshes)} in {seconds:.0f} s; {read} pages read back, {freed} blocks freed{each}"
        )
    lines.append(f"{'programs killed':<26} {churn['killed']}")
    return lines


def clusters(found: dict[str, Any]) -> str:
    """Return how the clusters of swap are used, on one line."""
    free = found["total"] - found["clusters"]
    tenths = " ".join(map(str, found["tenths"]))
    return (
        f"{free} of {found['total']} free; {found['clusters']} hold {found['slots']} slots, by tenths full: {tenths}"
    )
