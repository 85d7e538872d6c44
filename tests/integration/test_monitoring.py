"""Metrics, dashboard and alerts of one host against what reads them: promtool and node_exporter."""

import json
import re
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.backings import preallocated
from support.prometheus import (
    DOCS,
    METRIC,
    OF_SWAP,
    ROOT,
    dashboard,
    exposition,
    get,
    names,
    node_exporter,
    promtool,
    queries,
    work,
)
from support.run import wait_until
from support.server import NbdkitProcess

Serve = Callable[..., NbdkitProcess]
README = DOCS / "README.md"


@pytest.fixture
def worked(serve: Serve, disk_folder: Path) -> NbdkitProcess:
    served = serve(name="swap0", mem_limit="32M", compaction="off", backing=preallocated(disk_folder))
    work(served)
    return served


# ------------------------------------------------------------------------------------------------------------
# The exposition


def test_promtool_has_nothing_to_say(worked: NbdkitProcess) -> None:
    assert promtool("check", "metrics", text=exposition(worked)) == ""


def test_promtool_would_complain() -> None:
    """The check above can fail."""
    with pytest.raises(AssertionError, match="_total"):
        promtool("check", "metrics", text="# HELP zramd_x X.\n# TYPE zramd_x counter\nzramd_x 1\n")


def test_histogram(worked: NbdkitProcess) -> None:
    """What clients did is in the buckets, which are cumulative and end with all."""
    stats = worked.stats()
    families = {family.name: family for family in text_string_to_metric_families(exposition(worked))}
    assert families["zramd_request_duration_seconds"].type == "histogram"
    samples = families["zramd_request_duration_seconds"].samples
    requests = {sample.labels["op"]: sample.value for sample in families["zramd_requests"].samples}
    assert requests == {"read": 512, "write": 514, "trim": 384, "zero": 1}
    for op, count in requests.items():
        mine = [sample for sample in samples if sample.labels["op"] == op]
        buckets = [sample for sample in mine if sample.name.endswith("_bucket")]
        bounds = [float(sample.labels["le"]) for sample in buckets]
        assert bounds == [0.25e-6 * 2**i for i in range(24)] + [float("inf")]
        values = [sample.value for sample in buckets]
        assert values == sorted(values)
        rest = {sample.name.rpartition("_")[2]: sample.value for sample in mine[len(buckets) :]}
        assert values[-1] == rest["count"] == count == stats["latency"][op]["count"]
        assert rest["sum"] == pytest.approx(stats["latency"][op]["mean_us"] * count / 1e6, rel=0.01)
    latency = stats["latency"]["write"]
    assert 0.5 < latency["p50_us"] <= latency["p90_us"] <= latency["p99_us"] < 1e6


def metrics_table(text: str) -> str:
    """The table of docs/monitoring/README.md."""
    lines = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    for family in text_string_to_metric_families(text):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = dict.fromkeys(label for sample in family.samples for label in sample.labels)
        shown = ", ".join(f"`{label}`" for label in labels if label not in ("device", "le"))
        lines.append(f"| `{name}` | {family.type} | {shown} | {family.documentation} |")
    return "\n".join(lines) + "\n"


def test_readme_has_the_metrics(worked: NbdkitProcess) -> None:
    _, _, rest = README.read_text().partition("<!-- metrics -->\n")
    table, _, _ = rest.partition("<!-- /metrics -->")
    assert table == metrics_table(exposition(worked))


# ------------------------------------------------------------------------------------------------------------
# Dashboard and alerts


def test_dashboard_is_whole() -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        covered = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not covered & places, f"{panel['title']} lies on another panel"
        places |= covered
        if panel["type"] == "row":
            continue
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        for target in panel["targets"]:
            chosen = 'instance=~"$host", device=~"$device"'
            assert target["expr"].count(chosen) == len(METRIC.findall(target["expr"]))


def test_dashboard_has_a_row_for_each_host() -> None:
    """The first row is of all hosts, the second one of each that is chosen; each panel is below its row."""
    board = dashboard()
    panels = board["panels"]
    rows = [panel for panel in panels if panel["type"] == "row"]
    assert panels[0] is rows[0]
    assert [(row["title"], row.get("repeat")) for row in rows] == [("All hosts", None), ("$host", "host")]
    # Grafana repeats what follows a row that is open, and takes what lies in one that is not.
    assert all(row["collapsed"] is False and row["panels"] == [] for row in rows)
    heights = [panel["gridPos"]["y"] for panel in panels]
    assert heights == sorted(heights)
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert list(variables) == ["datasource", "host", "device"]
    assert variables["host"]["query"]["query"] == "label_values(zramd_build_info, instance)"
    asked = 'label_values(zramd_build_info{instance=~"$host"}, device)'
    assert variables["device"]["query"]["query"] == asked
    for name in ("host", "device"):
        choice = variables[name]
        assert choice["multi"] is choice["includeAll"] is True
        assert choice["allValue"] == ".+"
        assert choice["current"] == {"text": "All", "value": "$__all"}


def test_queries_are_right_and_names_exist(worked: NbdkitProcess, tmp_path: Path) -> None:
    """Each query as a recording rule: promtool parses them, and a server has what they ask for."""
    asked = [query.sent(".+") for query in queries()]
    rules = [{"record": f"dashboard:query:{number}", "expr": expr} for number, expr in enumerate(asked)]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    assert f"{len(asked)} rules found" in promtool("check", "rules", path)
    alerts = re.findall(r"expr: (.*)", (DOCS / "alerts.yml").read_text())
    assert len(alerts) == 12
    used = {name for expr in [*asked, *alerts] for name in METRIC.findall(expr)}
    assert used - names(exposition(worked)) == OF_SWAP


def test_alerts() -> None:
    assert "12 rules found" in promtool("check", "rules", DOCS / "alerts.yml")
    promtool("test", "rules", ROOT / "tests/integration/alerts_test.yml")


def test_every_alert_has_a_test() -> None:
    """One that comes and one that does not."""
    tests = (ROOT / "tests/integration/alerts_test.yml").read_text()
    for alert in re.findall(r"- alert: (\w+)", (DOCS / "alerts.yml").read_text()):
        assert f"alertname: {alert}}}" in tests
        assert f"alertname: {alert}\n        exp_alerts:" in tests


# ------------------------------------------------------------------------------------------------------------
# metrics_file


def test_metrics_file(serve: Serve, tmp_path: Path) -> None:
    """Readable by all, beside a run folder that is not; gone with the server."""
    path = tmp_path / "swap0.prom"
    served = serve(name="swap0", metrics_file=path, stats_interval="0.05")
    work(served)
    wait_until(lambda: 'zramd_requests_total{device="swap0",op="read"} 512' in path.read_text())
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert stat.S_IMODE(served.rundir.stat().st_mode) == 0o700
    # node_exporter refuses a whole file for one timestamp
    assert all(len(line.split()) == 2 for line in path.read_text().splitlines() if not line.startswith("#"))
    for _ in range(200):  # whole at every moment
        assert path.read_text().endswith("} 1\n")
    served.stop()
    assert [name for name in tmp_path.iterdir() if name.is_file()] == []


def test_killed_server(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "zram0.prom"
    served = serve(metrics_file=path)
    served.stop(signal.SIGKILL)
    assert path.exists()
    other = serve(wait=False, metrics_file=path, name="other")
    assert other.process.wait(10) == 1
    assert (
        f"metrics_file '{path}' cannot be written: it holds another device's metrics" in other.log.read_text()
    )
    assert not other.rundir.exists()
    again = serve(metrics_file=path)
    again.stop(signal.SIGTERM)
    assert not path.exists()


def test_node_exporter(serve: Serve, tmp_path: Path) -> None:
    """Two devices in one folder: both are there, with everything, and without a complaint."""
    folder = tmp_path / "textfiles"
    folder.mkdir()
    devices = [serve(name=name, metrics_file=folder / f"{name}.prom", stats_interval="0.05") for name in "ab"]
    for served in devices:
        work(served)
        done = f'zramd_requests_total{{device="{served.name}",op="zero"}} 1\n'
        wait_until(lambda path=folder / f"{served.name}.prom", done=done: done in path.read_text())
    with node_exporter(folder) as place:
        text = get(f"http://{place}/metrics") or ""
    assert "node_textfile_scrape_error 0" in text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for ours in text_string_to_metric_families(exposition(devices[0])):
        theirs = families[ours.name]
        assert (theirs.type, theirs.documentation) == (ours.type, ours.documentation)
        assert {sample.labels["device"] for sample in theirs.samples} == {"a", "b"}
    assert names(exposition(devices[0])) <= names(text)
