"""Rates and latencies from what a server tells, without a server."""

import pytest
from support.samples import sample

from zramd.control import samples
from zramd.control.samples import Histogram, Watch

INF = float("inf")
METRICS = """\
# TYPE zramd_request_duration_seconds histogram
zramd_request_duration_seconds_bucket{device="zram0",op="read",le="2.5e-07"} 0
zramd_request_duration_seconds_bucket{device="zram0",op="read",le="5e-07"} 4
zramd_request_duration_seconds_bucket{device="zram0",op="read",le="+Inf"} 5
zramd_request_duration_seconds_sum{device="zram0",op="read"} 1.5
zramd_request_duration_seconds_bucket{device="zram0",op="write",le="2.5e-07"} 7
zramd_request_duration_seconds_bucket{device="zram0",op="write",le="5e-07"} 7
zramd_request_duration_seconds_bucket{device="zram0",op="write",le="+Inf"} 7
"""


class TestHistogram:
    def test_from_metrics(self) -> None:
        found = samples.histograms(METRICS)
        assert found == {
            "read": Histogram((2.5e-07, 5e-07, INF), (0, 4, 5)),
            "write": Histogram((2.5e-07, 5e-07, INF), (7, 7, 7)),
        }

    @pytest.mark.parametrize(
        ("counts", "share", "seconds"),
        [
            ((10, 10, 10), 0.5, 0.5),  # half way into the first bucket
            ((0, 10, 10), 0.5, 1.5),
            ((0, 10, 10), 1.0, 2.0),
            ((5, 10, 10), 0.5, 1.0),
            ((0, 0, 10), 0.5, 2.0),  # beyond the last bound
            ((0, 0, 0), 0.5, None),
        ],
    )
    def test_quantile(self, counts: tuple[int, ...], share: float, seconds: float | None) -> None:
        assert Histogram((1.0, 2.0, INF), counts).quantile(share) == seconds

    def test_since_and_plus(self) -> None:
        old, new = Histogram((1.0, INF), (2, 3)), Histogram((1.0, INF), (2, 9))
        assert new.since(old).counts == (0, 6)
        assert new.since(None) == new
        assert new.since(Histogram((5.0,), (1,))) == new, "another server's buckets are not subtracted"
        assert old.since(new).counts == (0, 0), "a reset is no negative number of requests"
        assert old.plus(new).counts == (4, 12)
        assert old.plus(None) == old


class TestRates:
    def test_between_two_samples(self) -> None:
        old = sample(reads=100, read_bytes=1 << 20)
        new = sample(reads=150, read_bytes=3 << 20, uptime=12.0)
        new.classes[0]["zspages"]["100%"] += 3
        rates = samples.rates(old, new)
        assert rates.seconds == 2
        assert rates.per_second["reads"] == 25
        assert rates.per_second["read_bytes"] == 1 << 20
        assert rates.groups["100%"] == 3
        assert sum(map(abs, rates.groups.values())) == 3

    def test_since_the_start(self) -> None:
        rates = samples.rates(None, sample(writes=500, uptime=10.0))
        assert rates.per_second["writes"] == 50
        assert rates.groups == {}

    def test_reset_is_no_negative_rate(self) -> None:
        rates = samples.rates(sample(reads=100), sample(reads=1, uptime=11.0))
        assert rates.per_second["reads"] == 0


class TestWatch:
    def test_history(self) -> None:
        watch = Watch()
        assert not watch.add(sample(frag_ratio=90.0))
        assert not watch.add(sample(frag_ratio=95.0, uptime=11.0, reads=sample().stats["reads"] + 9))
        assert list(watch.frag) == [90.0, 95.0]
        assert list(watch.requests["read"]) == [9.0], "the mean since the start is of another scale"

    def test_empty_pool_has_no_frag_ratio(self) -> None:
        watch = Watch()
        watch.add(sample(mem_used_total=0, frag_ratio=100.0))
        assert list(watch.frag) == [None]

    @pytest.mark.parametrize("changes", [{"pid": 8, "uptime": 20.0}, {"uptime": 1.0}])
    def test_another_server_begins_anew(self, changes: dict[str, object]) -> None:
        watch = Watch()
        watch.add(sample(reads=1000))
        assert watch.add(sample(reads=20, **changes))
        assert watch.rates is not None
        assert watch.rates.per_second["reads"] == 20 / float(str(changes["uptime"]))
        assert list(watch.frag)[1] is None, "the time without a server is a gap"

    def test_history_has_an_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(samples, "HISTORY", 20)
        watch = Watch()
        for second in range(25):
            watch.add(sample(frag_ratio=float(second), uptime=10.0 + second))
        assert list(watch.frag) == [float(second) for second in range(5, 25)]
