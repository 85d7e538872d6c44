"""Quantiles of requests that were counted by how long they took, as Prometheus' histogram_quantile has them.

Server and command line use it.
"""

from collections.abc import Sequence


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Return the seconds within which a share (0 to 1) of the requests was done, None when there were none.

    `counts`: how many took no longer than each of `bounds`, and last of all how many there were. Within a
    bucket they are taken as spread evenly. What took longer than the last bound counts as that bound.
    """
    rank = share * counts[-1] if counts else 0
    if not rank:
        return None
    low, below = 0.0, 0
    for high, count in zip(bounds, counts, strict=False):
        if count >= rank:
            return low + (high - low) * (rank - below) / (count - below)
        low, below = high, count
    return low
