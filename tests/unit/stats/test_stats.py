"""Statistics: exact texts, and Prometheus text as Prometheus' own parser reads it."""

import json
import os
import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.numbers import COUNTERS, TIERS, WRITEBACK, FakeDevice

from zramd.core.device.backing import EXTENT
from zramd.core.device.device import Device
from zramd.core.device.tier import Tier
from zramd.server.tiers import Tiers
from zramd.settings import config
from zramd.stats import numbers, prometheus, snapshots, texts, tiers, writeback

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def snapshot() -> snapshots.Snapshot:
    return snapshots.take(FakeDevice(), name="zram0", comp_algorithm="lz4", version="0.1.0", started=0.0)


def test_mm_stat(snapshot: snapshots.Snapshot) -> None:
    expected = "   40960     6144     8192  1048576 12345678901        3        5        7       11\n"
    assert texts.mm_stat(snapshot) == expected


def test_io_stat(snapshot: snapshots.Snapshot) -> None:
    assert texts.io_stat(snapshot) == "      13       17 0       19\n"


def test_classes_table() -> None:
    table = texts.classes_table(snapshots.take_classes(FakeDevice()))
    header, first, unused, last, empty, total, end = table.split("\n")
    groups = ["10%", "20%", "30%", "40%", "50%", "60%", "70%", "80%", "90%", "99%", "100%"]
    rest = " obj_allocated   obj_used pages_used pages_per_zspage freeable"
    assert header == " class  size" + "".join(f"{group:>10}" for group in groups) + rest
    counts = "".join(f"{count:10}" for count in range(1, 12))
    assert first == f"     0    32{counts}          1280        640         10                1        5"
    assert unused.split() == ["4", "96", *["0"] * 14, "3", "0"]
    assert last.split() == ["254", "4096", *["0"] * 10, "21", "21", "21", "21", "1", "0"]
    assert empty == end == ""
    counts = "".join(f"{count:10}" for count in [*range(1, 11), 32])
    assert total == f" Total      {counts}          1301        661         31                         5"


def test_derived(snapshot: snapshots.Snapshot) -> None:
    assert texts.frag_ratio(snapshot) == "75.00\n"
    assert snapshot.values["occupancy"] == 75
    assert snapshot.values["compression_ratio"] == 5
    assert snapshot.values["total_bytes"] == 18432


def test_an_empty_pool_wastes_nothing_and_compresses_nothing(snapshot: snapshots.Snapshot) -> None:
    values = numbers.derive({**snapshot.values, "mem_used_total": 0, "objs_allocated": 0})
    empty = snapshot._replace(values=values)
    assert [values[name] for name in ("frag_ratio", "occupancy", "compression_ratio")] == [100, 100, None]
    assert texts.frag_ratio(empty) == "100.00\n"
    told = json.loads(texts.to_json(empty))
    assert (told["frag_ratio"], told["occupancy"], told["compression_ratio"]) == (100, 100, None)
    shown = prometheus.exposition(empty, [])
    assert "zramd_frag_ratio" in shown
    assert "compression_ratio" not in shown
    assert "ratio" not in texts.sentence(empty)


def test_json(snapshot: snapshots.Snapshot) -> None:
    values = json.loads(texts.to_json(snapshot))
    for key, value in COUNTERS.items():
        assert values[key] == value
    assert values["name"] == "zram0"
    assert values["pid"] == os.getpid()
    assert values["uptime"] > 0
    assert values["resident_bytes"] > 1 << 20
    assert values["frag_ratio"] == values["occupancy"] == 75
    assert values["total_bytes"] == 18432


def test_prometheus(snapshot: snapshots.Snapshot) -> None:
    text = prometheus.exposition(snapshot, snapshots.take_classes(FakeDevice()))
    families = {family.name: family for family in text_string_to_metric_families(text)}
    values = {}
    for family in families.values():
        assert family.documentation.endswith(".")
        assert family.type in ("gauge", "counter", "histogram")
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("device") == "zram0"
            assert sample.name.endswith("_total") == (family.type == "counter")
            values[sample.name, *sorted(labels.values())] = sample.value
    assert values["zramd_mem_used_bytes",] == 8192
    assert values["zramd_frag_ratio",] == 0.75
    assert values["zramd_pool_occupancy_ratio",] == 0.75
    assert values["zramd_freeable_bytes",] == 8192
    assert values["zramd_requests_total", "zero"] == 47
    assert values["zramd_request_errors_total", "write"] == 17
    assert values["zramd_compaction_seconds_total",] == 1.5
    assert values["zramd_class_objects", "32"] == 640
    assert ("zramd_class_objects", "96") not in values
    buckets = [
        values["zramd_request_duration_seconds_bucket", *key]
        for key in (("2.5e-07", "read"), ("5e-07", "read"), ("1e-06", "read"), ("+Inf", "read"))
    ]
    assert buckets == [1, 3, 3, 37]
    assert values["zramd_request_duration_seconds_count", "read"] == 37
    assert values["zramd_request_duration_seconds_sum", "read"] == 1e-5
    info = families["zramd_build_info"].samples[0]
    assert info.value == 1
    assert info.labels["version"] == "0.1.0"


@pytest.mark.parametrize(
    ("used", "dead"),
    [(None, None), (0, 10), (4, 6), (10, 0), (11, 0)],  # same-filled blocks are used, and take no memory
)
def test_dead_blocks(used: int | None, dead: int | None, snapshot: snapshots.Snapshot) -> None:
    """What takes memory and swap does not use; where there is no swap, nobody knows, and nothing is shown."""
    values = snapshot.values | {"pages_stored": 17, "same_pages": 7, "swap_used": used}
    found = snapshot._replace(values=numbers.derive(values))
    assert found.values["dead_blocks"] == dead
    assert json.loads(texts.to_json(found))["dead_blocks"] == dead
    shown = [line for line in prometheus.exposition(found, []).splitlines() if "dead_blocks{" in line]
    assert shown == ([] if dead is None else [f'zramd_dead_blocks{{device="zram0"}} {dead}'])


def test_the_swap_of_this_machine_is_in_the_snapshot() -> None:
    swap = {"swap_used": 3, "refreshed_blocks": 5, "refresh_last_blocks": 2}
    taken = snapshots.take(
        FakeDevice(), name="zram0", comp_algorithm="lz4", version="0", started=0.0, swap=swap
    )
    assert {name: taken.values[name] for name in numbers.SWAP} == swap
    assert 'zramd_refreshed_blocks_total{device="zram0"} 5\n' in prometheus.exposition(taken, [])


def test_the_sentence_for_a_service_manager_says_what_is_out(snapshot: snapshots.Snapshot) -> None:
    values = snapshot.values | {"orig_data_size": 90 << 20, "total_bytes": 20 << 20}
    shown = [
        texts.sentence(snapshot._replace(values=values | {"out_pages": out, "out_data_size": size}))
        for out, size in ((0, 0), (5120, 7 << 20))
    ]
    assert shown == [
        "90 MiB stored in 20 MiB of memory, frag ratio 75 %",
        "90 MiB stored in 20 MiB of memory and 7 MiB on the backing device, frag ratio 75 %",
    ]


def test_large_counters_stay_exact(snapshot: snapshots.Snapshot) -> None:
    large = snapshot._replace(values=snapshot.values | {"written_bytes": (1 << 53) + 1})
    assert f" {(1 << 53) + 1}\n" in prometheus.exposition(large, [])


def latency(*counts: int) -> snapshots.Latency:
    return snapshots.Latency((1.0, 2.0, 4.0), counts, 0.0)


@pytest.mark.parametrize(
    ("counts", "share", "seconds"),
    [
        ((0, 0, 0, 0), 0.5, 0),
        ((10, 0, 0, 0), 0.5, 0.5),  # evenly spread from 0 on
        ((0, 10, 0, 0), 0.5, 1.5),
        ((5, 0, 5, 0), 0.5, 1),
        ((5, 0, 5, 0), 0.6, 2.4),
        ((0, 0, 10, 0), 1, 4),
        ((0, 0, 0, 3), 0.5, 4),  # beyond every bound: the last
        ((98, 0, 0, 2), 0.99, 4),
    ],
)
def test_quantile(counts: tuple[int, ...], share: float, seconds: float) -> None:
    assert latency(*counts).quantile(share) == pytest.approx(seconds)


def test_latency_in_json(snapshot: snapshots.Snapshot) -> None:
    told = json.loads(texts.to_json(snapshot))["latency"]
    assert told["write"] == {"count": 41, "mean_us": 0.488, "p50_us": 0.378, "p90_us": 0.481, "p99_us": 0.795}
    assert told["zero"] == {"count": 0, "mean_us": 0, "p50_us": 0, "p90_us": 0, "p99_us": 0}


def test_each_counter_of_the_core_is_in_the_table() -> None:
    """A counter without a line there would be shown nowhere."""
    not_shown = {"stock_pages"}  # it is part of freeable_pages
    assert sorted({*numbers.COUNTED} | not_shown) == sorted(Device(1 << 20).counters())
    assert COUNTERS.keys() == set(numbers.COUNTED)


def test_each_field_of_the_counters_is_a_statistic() -> None:
    found = set(Device(1 << 20).counters())
    for source, struct, kept_back in (
        ("device/blocks.pxd", "counters", {"unused", "corrupt_block"}),
        ("pool/pool.pxd", "pool_counters", set()),
    ):
        text = (ROOT / "zramd/core" / source).read_text()
        body = text.split(f"cdef struct {struct}:\n")[1].split("\n\n")[0]
        fields = set(re.findall(r"^    uint64_t (\w+)", body, re.MULTILINE))
        assert len(fields) > 4
        assert fields - kept_back <= found
        assert not kept_back & found


@pytest.fixture
def tiered() -> snapshots.Snapshot:
    return snapshots.take(
        FakeDevice(), name="a", comp_algorithm="lz4", version="0", started=0.0, tiers=dict(TIERS)
    )


def test_tiers_are_a_section_of_the_json(snapshot: snapshots.Snapshot, tiered: snapshots.Snapshot) -> None:
    assert json.loads(texts.to_json(tiered))["tiers"] == TIERS
    assert "tiers" not in json.loads(texts.to_json(snapshot))
    assert (tiered.recompression, snapshot.recompression) == ("zstd(level=5)", "off")


def test_tiers_in_prometheus(tiered: snapshots.Snapshot) -> None:
    families = {family.name: family for family in text_string_to_metric_families(exposition_of(tiered))}

    def value(name: str) -> float:
        (sample,) = families[name].samples
        return float(sample.value)

    assert value("zramd_hot_pages") == TIERS["hot_pages"]
    assert value("zramd_hot_data_bytes") == TIERS["hot_data_size"]
    assert value("zramd_cold_pages") == COUNTERS["cold_pages"]
    assert families["zramd_recompression_cpu_seconds"].type == "counter"
    assert value("zramd_recompression_cpu_seconds") == TIERS["cpu_seconds"]
    ages = {sample.labels["age"]: sample.value for sample in families["zramd_age_pages"].samples}
    assert list(ages) == ["10", "30", "60", "300", "600", "1800", "3600", "21600", "more", "idle"]
    assert (ages["10"], ages["more"], ages["idle"]) == (12034, 29376, 14200)
    modes = {sample.labels["mode"]: sample.value for sample in families["zramd_recompression_mode"].samples}
    assert modes == {"calm": 1, "wanted": 0, "full": 0, "paused": 0, "off": 0}


@pytest.fixture
def backed(snapshot: snapshots.Snapshot) -> snapshots.Snapshot:
    return snapshot._replace(writeback=dict(WRITEBACK))


def test_bd_stat_and_backing_dev(snapshot: snapshots.Snapshot, backed: snapshots.Snapshot) -> None:
    """In zram's "%8llu %8llu %8llu\\n", in units of 4096 bytes: extents in use, read, written."""
    assert texts.bd_stat(backed) == "  524240    10240   435200\n"
    assert texts.backing_dev(backed) == "/dev/disk/by-partlabel/swap-out\n"
    odd = backed._replace(writeback=WRITEBACK | {"backing": "/dev/a\nb"})
    assert texts.backing_dev(odd).count("\n") == 1
    assert texts.bd_stat(snapshot) == "       0        0        0\n"
    assert texts.backing_dev(snapshot) == "none\n"


def test_an_empty_backing_device_has_no_block_in_use() -> None:
    """The superblock has an extent of its own."""
    assert writeback.SUPERBLOCK == writeback.EXTENT == EXTENT
    size = 10 * EXTENT
    assert writeback.used({"backing_size": size, "backing_free": 9 * EXTENT, "backing_bad": 0}) == 0
    assert writeback.used({"backing_size": size, "backing_free": 7 * EXTENT, "backing_bad": EXTENT}) == EXTENT


def test_writeback_is_a_section_of_the_json(snapshot: snapshots.Snapshot, backed: snapshots.Snapshot) -> None:
    assert json.loads(texts.to_json(backed))["writeback"] == WRITEBACK
    assert "writeback" not in json.loads(texts.to_json(snapshot))


def test_writeback_in_prometheus(snapshot: snapshots.Snapshot, backed: snapshots.Snapshot) -> None:
    families = {family.name: family for family in text_string_to_metric_families(exposition_of(backed))}
    for number in writeback.WRITEBACK:
        if number.metric:
            (sample,) = families[f"zramd_{number.metric}"].samples
            assert sample.value == WRITEBACK[number.name]
            assert families[f"zramd_{number.metric}"].type == "gauge"
    modes = {sample.labels["mode"]: sample.value for sample in families["zramd_writeback_mode"].samples}
    assert modes == {"calm": 1, "wanted": 0, "full": 0, "paused": 0, "off": 0}
    endless = backed._replace(writeback=WRITEBACK | {"writeback_limit": 0, "limit_left": None})
    assert "zramd_writeback_limit_left_bytes" not in exposition_of(endless)
    assert 'zramd_writeback_limit_bytes{device="zram0"} 0\n' in exposition_of(endless)
    assert "zramd_writeback_" not in exposition_of(snapshot)


def exposition_of(snapshot: snapshots.Snapshot) -> str:
    return prometheus.exposition(snapshot, snapshots.take_classes(FakeDevice()))


def test_what_the_tiers_report_is_in_the_table() -> None:
    """A number without a line there would be documented nowhere."""
    told = Tiers(Device(1 << 20), Tier(Device(1 << 20)), config.parse([("disksize", "1M")])).numbers()
    assert told.keys() == TIERS.keys() == {number.name for number in tiers.TIERS} | {"ages"}
    assert told["mode"] in tiers.MODES


def test_no_metric_is_told_twice() -> None:
    tables = (*numbers.NUMBERS, *tiers.TIERS, *writeback.WRITEBACK)
    metrics = [number.metric for number in tables if number.metric]
    assert len(set(metrics)) == len(metrics)
