"""One Prometheus over several hosts: the example configuration, and a dashboard that keeps hosts apart."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.backings import preallocated
from support.prometheus import (
    DOCS,
    METRIC,
    OF_SWAP,
    Answer,
    Query,
    exposition,
    node_exporter,
    prometheus,
    promtool,
    queries,
    work,
)
from support.run import wait_until
from support.server import NbdkitProcess

Serve = Callable[..., NbdkitProcess]
Ask = Callable[..., Answer]
HOSTS = ("memory1", "memory2")
ALL = ".+"  # what Grafana sends for 'All'
BEGIN, STEPS, STEP = 1_700_000_000, 41, 15  # of the data: seconds, and how often they were looked at
NOW = BEGIN + (STEPS - 1) * STEP
# What no server here has: a budget, swap of its own machine; and mirrors, which guests have.
MORE: dict[str, dict[str, str]] = {
    "zramd_budget_bytes": {},
    "zramd_budget_used_bytes": {},
    "zramd_budget_granted_bytes": {},
    **{name: {} for name in sorted(OF_SWAP)},
    "node_md_disks_required": {"device": "md0"},
    "node_md_disks": {"device": "md0", "state": "active"},
}


@pytest.fixture
def told(serve: Serve, disk_folder: Path) -> str:
    """What a server tells that has had work of all kinds."""
    served = serve(name="swap0", mem_limit="32M", backing=preallocated(disk_folder))
    work(served)
    return exposition(served)


def series(told: str, host: int) -> Iterator[tuple[str, float, bool]]:
    """Yield the series of a host, each with its value at first, and whether it grows.

    Each host has devices of the same names, whose numbers differ in all.
    """
    samples = [sample for family in text_string_to_metric_families(told) for sample in family.samples]
    plain = [(sample.name, sample.labels, sample.value) for sample in samples if sample.name not in MORE]
    plain += [(name, labels, 1000.0) for name, labels in MORE.items()]
    for device in range(2 + host):
        for number, (name, labels, value) in enumerate(plain):
            every = {"device": f"swap{device}", **labels, "instance": HOSTS[host]}
            if "device" in labels and not name.startswith("node_"):
                every["device"] = f"swap{device}"
            text = ",".join(f'{key}="{word}"' for key, word in every.items())
            grows = name.endswith(("_total", "_bucket", "_sum", "_count"))
            yield f"{name}{{{text}}}", (value + 1 + number) * (1 + host * 0.7 + device * 0.3), grows


def store(told: str, hosts: tuple[int, ...], folder: Path) -> Path:
    """Make Prometheus' data of some minutes of these hosts."""
    lines: dict[str, None] = {}
    for host in hosts:
        for name, value, grows in series(told, host):
            for step in range(STEPS):
                now = value * (1 + step) if grows else value
                lines[f"{name} {now!r} {BEGIN + step * STEP}"] = None
    folder.mkdir()
    source = folder.with_suffix(".txt")
    # A metric's samples stand together, as the format has it.
    ordered = sorted(lines, key=lambda line: line.partition("{")[0])
    source.write_text("\n".join([*ordered, "# EOF\n"]))
    promtool("tsdb", "create-blocks-from", "openmetrics", source, folder)
    return folder


def same(one: Answer, other: Answer) -> bool:
    """Whether two answers are equal, but for the order in which something was added up."""
    return one.keys() == other.keys() and all(
        value == pytest.approx(other[key]) for key, value in one.items()
    )


NOTHING = "there is no answer"
OTHERS = "where one host is chosen the other one's numbers are in it"
NAMELESS = "an answer does not say of which host it is"
MIXED = "where all are chosen hosts are mixed"


def mixed(query: Query, both: Ask, alone: dict[str, Ask]) -> str:
    """Return what is wrong with a query's answers for two hosts, '' if nothing.

    both: asks a Prometheus that knows both; alone: those that know one each.
    """
    own = {host: ask(query.sent(ALL), NOW) for host, ask in alone.items()}
    if not all(own.values()):
        return NOTHING
    if "$host" in query.text and not all(same(both(query.sent(host), NOW), own[host]) for host in own):
        return OTHERS
    if query.is_heat_map and query.each:  # which has no place for a name; its row has it
        return ""
    together: Answer = {}
    for answer in own.values():
        together |= answer
    if len(together) != sum(map(len, own.values())):
        return NAMELESS
    return "" if same(both(query.sent(ALL), NOW), together) else MIXED


@pytest.fixture
def worlds(told: str, tmp_path: Path) -> Iterator[tuple[Ask, dict[str, Ask]]]:
    """Three Prometheus: of both hosts, and of each alone."""
    config = tmp_path / "empty.yml"
    config.write_text("{}")
    with ExitStack() as stack:

        def world(name: str, *hosts: int) -> Ask:
            return stack.enter_context(prometheus(store(told, hosts, tmp_path / name), config))

        yield world("both", 0, 1), {name: world(name, host) for host, name in enumerate(HOSTS)}


def test_no_panel_mixes_hosts(worlds: tuple[Ask, dict[str, Ask]]) -> None:
    """Devices of one name on two hosts stay two, whichever hosts are chosen; and this would be found."""
    both, alone = worlds
    asked = queries()
    assert len(asked) > 60
    wrong = {query.panel: fault for query in asked if (fault := mixed(query, both, alone))}
    assert wrong == {}

    anyones = 'zramd_mem_used_bytes{device=~"$device"}'
    chosen = '{instance=~"$host", device=~"$device"}'
    for text, fault in (
        (f"sum by (device) ({anyones})", NAMELESS),
        (f"max(zramd_mem_used_bytes{chosen})", NAMELESS),
        (f"topk(2, zramd_mem_used_bytes{chosen})", MIXED),
        (f"{anyones} / on (device) group_left () zramd_mem_limit_bytes{chosen}", OTHERS),
        (f"zramd_mem_used_bytes{chosen} - ignoring (instance) {anyones}", OTHERS),
        (f"sum by (le) (zramd_request_duration_seconds_bucket{chosen})", NAMELESS),
        (f"zramd_nothing{chosen}", NOTHING),
    ):
        assert mixed(Query("wrong", text, False), both, alone) == fault, text


# ------------------------------------------------------------------------------------------------------------
# The example configuration


def test_configuration_is_right() -> None:
    """promtool takes it, with the alerts that it names."""
    said = promtool("check", "config", DOCS / "prometheus.yml")
    assert "1 rule files found" in said
    assert "12 rules found" in said


def configured(places: list[str], folder: Path) -> Path:
    """The example, with other hosts, and faster."""
    text = (DOCS / "prometheus.yml").read_text()
    for pattern, instead in (
        (r"\[memory1:9100, memory2:9100, memory3:9100\]", json.dumps(places)),
        (r"\[guest1:9100\]", "[]"),
        (r"(\w+_interval): 15s", r"\1: 250ms"),
        (r"\[alerts\.yml\]", json.dumps([str(DOCS / "alerts.yml")])),
    ):
        text, count = re.subn(pattern, instead, text)
        assert count, pattern
    path = folder / "prometheus.yml"
    path.write_text(text)
    return path


def test_two_hosts(serve: Serve, tmp_path: Path, disk_folder: Path) -> None:
    """Servers, files, node_exporters, Prometheus: each query of the dashboard has an answer for each host."""
    addresses = ("127.0.0.1", "127.0.0.2")
    with ExitStack() as stack:
        places, servers = [], []
        for address in addresses:
            folder = tmp_path / address
            folder.mkdir()
            own = disk_folder / address
            own.mkdir()
            files = {"metrics_file": folder / "a.prom", "backing": preallocated(own)}
            servers.append(serve(name="swap0", stats_interval="0.1", mem_limit="32M", budget="64M", **files))
            places.append(stack.enter_context(node_exporter(folder, address)))
        ask = stack.enter_context(prometheus(tmp_path / "data", configured(places, tmp_path)))
        wait_until(lambda: len(ask("zramd_build_info")) == 2, 30)
        for _ in range(4):
            for served in servers:
                work(served)
            time.sleep(0.3)
        wait_until(lambda: len(ask('increase(zramd_requests_total{op="read"}[30s]) > 0')) == 2, 30)
        for query in queries():
            for address in addresses:
                answer = ask(query.sent(re.escape(address).replace("\\", "\\\\"), "30s"))
                if OF_SWAP & {*METRIC.findall(query.text)} or "node_md" in query.text:
                    assert not answer, query
                    continue
                assert answer, query
                if not query.is_heat_map:  # a host is called by its name, without the port
                    assert {dict(labels)["instance"] for labels in answer} == {address}, query
        bucket = 'zramd_request_duration_seconds_bucket{op="write", instance="127.0.0.2"}'
        (median,) = ask(f"histogram_quantile(0.5, rate({bucket}[30s]))").values()
        # Prometheus sees a part of the requests: near, not equal.
        assert median * 1e6 == pytest.approx(servers[1].stats()["latency"]["write"]["p50_us"], rel=0.5)
