"""Metrics, dashboard and alerts against what reads them: promtool, node_exporter and Prometheus.

These come from Debian's packages, which are unpacked into build/ and not installed. Where they cannot be
had these tests fail.
"""

import json
import random
import re
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from support.backings import preallocated
from support.client import NbdSocket
from support.run import wait_until
from support.server import NbdkitProcess

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "lib"))

from vm import packages  # noqa: E402

Serve = Callable[..., NbdkitProcess]
DOCS = ROOT / "docs/monitoring"
README = DOCS / "README.md"
BLOCK = 4096
# Parts of PromQL that look like names of metrics, but for the prefix nothing does.
METRIC = re.compile(r"\bzramd_\w+")
# Metrics that only a machine has which swaps to the device, and that the dashboard shows.
OF_SWAP = {"zramd_swap_used_blocks", "zramd_dead_blocks"}
HISTOGRAM_PARTS = ("_bucket", "_sum", "_count")


def unpacked(package: str) -> Path:
    target = ROOT / "build" / package
    packages.unpack(package, target)
    return target / "usr/bin"


@pytest.fixture(scope="session")
def promtool() -> Callable[..., str]:
    program = unpacked("prometheus") / "promtool"
    if not program.exists():  # Debian 13 has it in a package of its own
        program = unpacked("promtool") / "promtool"

    def run(*arguments: object, text: str | None = None) -> str:
        done = subprocess.run(
            [program, *map(str, arguments)],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    return run


def work(served: NbdkitProcess) -> None:
    """Requests of all kinds, and something to compact."""
    client = NbdSocket(served)
    dice = random.Random(3)
    for block in range(512):
        data = dice.randbytes(dice.randrange(100, 3000))
        assert client.ask(client.WRITE, block * BLOCK, BLOCK, data.ljust(BLOCK, b"\0")) == 0
    assert client.ask(client.WRITE, 600 * BLOCK, BLOCK, dice.randbytes(BLOCK)) == 0
    assert client.ask(client.WRITE, 601 * BLOCK, BLOCK, bytes(BLOCK)) == 0
    for block in range(512):
        client.read(block * BLOCK, BLOCK)
        if block % 4:
            assert client.ask(client.TRIM, block * BLOCK, BLOCK) == 0
    assert client.ask(client.WRITE_ZEROES, 0, BLOCK) == 0
    client.close()
    assert served.request("POST", "/compact")[0] == 200


@pytest.fixture
def worked(serve: Serve, disk_folder: Path) -> NbdkitProcess:
    served = serve(name="swap0", mem_limit="32M", compaction="off", backing=preallocated(disk_folder))
    work(served)
    return served


def exposition(served: NbdkitProcess) -> str:
    status, text = served.request("GET", "/metrics")
    assert status == 200
    return text


def names(text: str) -> set[str]:
    """The names that a query can ask for."""
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


# ------------------------------------------------------------------------------------------------------------
# The exposition


def test_promtool_has_nothing_to_say(worked: NbdkitProcess, promtool: Callable[..., str]) -> None:
    assert promtool("check", "metrics", text=exposition(worked)) == ""


def test_promtool_would_complain(promtool: Callable[..., str]) -> None:
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


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / "grafana-dashboard.json").read_text())
    return found


def queries(interval: str = "5m") -> list[str]:
    """Every query of the dashboard as Grafana would send it."""
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    found = [expr.replace("$__rate_interval", interval).replace("$device", ".+") for expr in found]
    assert not any("$" in expr for expr in found)
    return found


def test_dashboard_is_whole() -> None:
    board = dashboard()
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    places = set()
    for panel in panels:
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["fieldConfig"]["defaults"]["unit"]
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        covered = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not covered & places, f"{panel['title']} lies on another panel"
        places |= covered
        for target in panel["targets"]:
            assert target["expr"].count('device=~"$device"') == len(METRIC.findall(target["expr"]))
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["device"]["query"]["query"] == "label_values(zramd_build_info, device)"


def test_queries_are_right_and_names_exist(
    worked: NbdkitProcess, promtool: Callable[..., str], tmp_path: Path
) -> None:
    """Each query as a recording rule: promtool parses them, and a server has what they ask for."""
    asked = queries()
    rules = [{"record": f"dashboard:query:{number}", "expr": expr} for number, expr in enumerate(asked)]
    path = tmp_path / "rules.yml"
    path.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    assert f"{len(asked)} rules found" in promtool("check", "rules", path)
    alerts = re.findall(r"expr: (.*)", (DOCS / "alerts.yml").read_text())
    assert len(alerts) == 12
    used = {name for expr in [*asked, *alerts] for name in METRIC.findall(expr)}
    assert used - names(exposition(worked)) == OF_SWAP


def test_alerts(promtool: Callable[..., str]) -> None:
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


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def get(url: str) -> str | None:
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text
    except OSError:
        return None


@contextmanager
def running(*command: object) -> Iterator[None]:
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def node_exporter(folder: Path) -> Iterator[str]:
    """A node_exporter with nothing but the textfile collector; yields its URL."""
    address = f"127.0.0.1:{free_port()}"
    with running(
        unpacked("prometheus-node-exporter") / "prometheus-node-exporter",
        "--collector.disable-defaults",
        "--collector.textfile",
        f"--collector.textfile.directory={folder}",
        f"--web.listen-address={address}",
    ):
        wait_until(lambda: get(f"http://{address}/metrics"))
        yield f"http://{address}/metrics"


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
    with node_exporter(folder) as url:
        text = get(url) or ""
    assert "node_textfile_scrape_error 0" in text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for ours in text_string_to_metric_families(exposition(devices[0])):
        theirs = families[ours.name]
        assert (theirs.type, theirs.documentation) == (ours.type, ours.documentation)
        assert {sample.labels["device"] for sample in theirs.samples} == {"a", "b"}
    assert names(exposition(devices[0])) <= names(text)


def test_prometheus(serve: Serve, tmp_path: Path, disk_folder: Path) -> None:
    """Server, file, node_exporter, Prometheus: each query of the dashboard has an answer."""
    folder = tmp_path / "textfiles"
    folder.mkdir()
    served = serve(
        name="swap0",
        metrics_file=folder / "a.prom",
        stats_interval="0.1",
        mem_limit="32M",
        backing=preallocated(disk_folder),
    )
    address = f"127.0.0.1:{free_port()}"
    with node_exporter(folder) as url:
        target = urllib.parse.urlsplit(url).netloc
        job = {"job_name": "node", "static_configs": [{"targets": [target]}]}
        config = {"global": {"scrape_interval": "250ms", "scrape_timeout": "250ms"}, "scrape_configs": [job]}
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))
        with running(
            unpacked("prometheus") / "prometheus",
            f"--config.file={tmp_path}/prometheus.yml",
            f"--storage.tsdb.path={tmp_path}/data",
            f"--web.listen-address={address}",
            "--log.level=error",
        ):

            def ask(query: str) -> list[dict[str, Any]]:
                text = get(f"http://{address}/api/v1/query?{urllib.parse.urlencode({'query': query})}")
                result: list[dict[str, Any]] = json.loads(text)["data"]["result"] if text else []
                return result

            wait_until(lambda: ask("zramd_build_info"), 30)
            for _ in range(4):
                work(served)
                time.sleep(0.3)
            wait_until(lambda: ask('increase(zramd_requests_total{op="read"}[30s]) > 0'), 30)
            for query in queries("30s"):
                answers = ask(query)
                if OF_SWAP & {*METRIC.findall(query)}:
                    assert not answers, query
                    continue
                assert answers, query
                if not query.startswith("sum by (le)"):
                    assert {answer["metric"]["device"] for answer in answers} == {"swap0"}, query
            (median,) = ask(
                'histogram_quantile(0.5, rate(zramd_request_duration_seconds_bucket{op="write"}[30s]))'
            )
            # Prometheus sees a part of the requests: near, not equal.
            assert float(median["value"][1]) * 1e6 == pytest.approx(
                served.stats()["latency"]["write"]["p50_us"], rel=0.5
            )
