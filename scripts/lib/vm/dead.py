"""Dead blocks: what a device stores that swap no longer uses; their figures, and how they are told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vm.errors import VmError

MIB = 1 << 20
CLUSTER = 512  # slots that the kernel discards at a time: a huge page's, where swap knows huge pages
SAME_FILLED = 0.09  # of the workload's pages: see page.c

Samples = list[dict[str, Any]]  # of a run, as --json has them
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

        Which of the pages in swap are same-filled is not known from outside. The workload makes a known share
        of its pages so, and all kinds are swapped alike.
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

    `dead_share` and `bytes_per_page` are quotients of the areas below the curves: a moment at which hardly
    anything is stored hardly counts.
    """
    if not samples:
        return {}
    count = len(samples)
    used = sum(each.used for each in samples)
    total = sum(each.total_bytes for each in samples)
    dead = sum(each.dead for each in samples)
    costly = sum(each.stored - each.same for each in samples)
    return {
        "seconds": count,
        "used": round(used / count),
        "stored": round(sum(each.stored for each in samples) / count),
        "same": round(sum(each.same for each in samples) / count),
        "dead": round(dead / count),
        "dead_share": round(100 * dead / costly, 1) if costly else 0.0,
        "total_bytes": round(total / count),
        "bytes_per_page": round(total / used) if used else 0,
        "swapped_in": samples[-1].swapped_in - samples[0].swapped_in,
        "swapped_out": samples[-1].swapped_out - samples[0].swapped_out,
    }


def read(words: list[str]) -> dict[str, Samples]:
    """Return the samples of finished runs by their names; each word is NAME=FILE, the file one of --json."""
    runs: dict[str, Samples] = {}
    for word in words:
        name, _, path = word.partition("=")
        try:
            (run,) = json.loads(Path(path).read_text())
            runs[name] = (run["churn"] or run["rest"])["samples"]
        except (OSError, ValueError, KeyError, TypeError):
            raise VmError(
                f"'{word}' does not name a run of --churn or --rest: give NAME=FILE, a file of --json"
            ) from None
    return runs


# ---- Times of page faults ----------------------------------------------------------------------------------


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


# ---- The report --------------------------------------------------------------------------------------------

ROWS = 12  # of the table of moments


def table(churn: dict[str, Any]) -> list[str]:
    """Return the lines of a run's report."""
    facts = {
        "with programs, mean": _mean(churn["steady"]),
        "after their end": _mean(churn["after"]),
        "faults, with programs": _times(churn["faults"].get("busy")),
        "faults, without": _times(churn["faults"].get("calm")),
        "faults, during a refresh": _times(churn["faults"].get("refresh")),
        "clusters, with programs": _clusters(churn["clusters"], with_programs=True),
        "clusters, without": _clusters(churn["clusters"], with_programs=False),
        "refreshes": _refreshes(churn["refreshes"]),
        "not begun at the limit": str(churn["put_off"] or ""),
        "programs killed": str(churn["killed"]),
    }
    return [*_moments(churn["samples"]), "", *(f"{name:<26} {fact}" for name, fact in facts.items() if fact)]


def _moments(samples: list[dict[str, Any]]) -> list[str]:
    lines = [" second     used   stored    same     dead  dead share  total MiB     trims"]
    step = max(1, len(samples) // ROWS)
    for each in samples[step - 1 :: step]:
        lines.append(
            f"{each['time']:7.0f} {each['used']:8} {each['stored']:8} {each['same']:7} {each['dead']:8} "
            f"{each['dead_share']:9.1f} % {each['total_bytes'] / MIB:10.1f} {each['trims']:9}"
        )
    return lines


def _mean(mean: dict[str, float]) -> str:
    if not mean:
        return ""
    return (
        f"{mean['used']} pages used, {mean['dead']} blocks dead ({mean['dead_share']:.1f} %), "
        f"total {mean['total_bytes'] / MIB:.1f} MiB, {mean['bytes_per_page']} bytes for a page used"
    )


def _times(took: dict[str, float] | None) -> str:
    if not took:
        return ""
    p50, p99, slowest = (took[key] for key in ("p50_ms", "p99_ms", "slowest_ms"))
    return f"{took['faults']}: p50 {p50:.2f} ms, p99 {p99:.2f} ms, slowest {slowest:.0f} ms"


def _clusters(looks: list[dict[str, Any]], *, with_programs: bool) -> str:
    """How the last look found the clusters of swap, with programs or without."""
    found = next((each for each in reversed(looks) if bool(each["programs"]) is with_programs), None)
    if not found:
        return ""
    tenths = " ".join(map(str, found["tenths"]))
    free = found["total"] - found["clusters"]
    return f"{free} free, {found['clusters']} hold {found['slots']} slots, by tenths full: {tenths}"


def _refreshes(refreshes: list[dict[str, Any]]) -> str:
    if not refreshes:
        return ""
    read, freed = (sum(each[key] for each in refreshes) for key in ("read_back", "freed"))
    each_freed = f", {read / freed:.2f} for each" if freed else ""
    seconds = sum(refresh["seconds"] for refresh in refreshes)
    words = f"{len(refreshes)} in {seconds:.0f} s: {read} pages read back, {freed} blocks freed"
    return f"{words}{each_freed}"
