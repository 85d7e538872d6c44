"""What reads docs/monitoring, for tests: promtool, Prometheus, node_exporter; and the dashboard's queries.

The programs come from Debian's packages, which are unpacked into build/ and not installed. Where they cannot
be had these tests fail.
"""

import json
import random
import re
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

from support.client import NbdSocket
from support.run import wait_until
from support.server import NbdkitProcess

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "lib"))

from vm import packages  # noqa: E402

DOCS = ROOT / "docs/monitoring"
# Parts of PromQL that look like names of metrics, but for the prefix nothing does.
METRIC = re.compile(r"\bzramd_\w+")
# Metrics that only a machine has which swaps to the device, and that the dashboard shows.
OF_SWAP = {"zramd_swap_used_blocks", "zramd_dead_blocks"}
BLOCK = 4096
Answer = dict[frozenset[tuple[str, str]], float]  # labels → value


def unpacked(package: str) -> Path:
    """Return the folder of the programs of a package."""
    target = ROOT / "build" / package
    packages.unpack(package, target)
    return target / "usr/bin"


def promtool(*arguments: object, text: str | None = None) -> str:
    """Run promtool and return what it says; a complaint is an AssertionError."""
    program = unpacked("prometheus") / "promtool"
    if not program.exists():  # Debian 13 has it in a package of its own
        program = unpacked("promtool") / "promtool"
    done = subprocess.run(
        [program, *map(str, arguments)], input=text, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------
# What a server tells


def work(served: NbdkitProcess) -> None:
    """Have requests of all kinds served, and something to compact."""
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


def exposition(served: NbdkitProcess) -> str:
    """Return what a server has for Prometheus."""
    status, text = served.request("GET", "/metrics")
    assert status == 200
    return text


def names(text: str) -> set[str]:
    """Return the names in it that a query can ask for."""
    return {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}


# ------------------------------------------------------------------------------------------------------------
# The dashboard


class Query(NamedTuple):
    """What a panel asks for. each: the panel is in the row that is there once for each host."""

    panel: str
    text: str
    each: bool

    def sent(self, host: str, interval: str = "5m") -> str:
        """Return it as Grafana sends it, for all devices of the hosts that a regular expression names."""
        text = self.text.replace("$__rate_interval", interval).replace("$device", ".+").replace("$host", host)
        assert "$" not in text
        return text

    @property
    def is_heat_map(self) -> bool:
        """Whether its answers have no label but a bucket's bound."""
        return self.text.startswith("sum by (le)")


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana reads it."""
    found: dict[str, Any] = json.loads((DOCS / "grafana-dashboard.json").read_text())
    return found


def queries() -> list[Query]:
    """Return every query of the dashboard."""
    found, each = [], False
    for panel in dashboard()["panels"]:
        if panel["type"] == "row":
            each = panel.get("repeat") == "host"
        found += [Query(panel["title"], target["expr"], each) for target in panel.get("targets", ())]
    return found


# ------------------------------------------------------------------------------------------------------------
# Running programs


def free_port(address: str = "127.0.0.1") -> int:
    """Return a port on which nobody listens."""
    with socket.create_server((address, 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def get(url: str) -> str | None:
    """Return what is at an address, None if nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text
    except OSError:
        return None


@contextmanager
def running(*command: object) -> Iterator[None]:
    """Run a program, and kill it at the end."""
    process = subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.kill()
        process.wait()


@contextmanager
def node_exporter(folder: Path, address: str = "127.0.0.1") -> Iterator[str]:
    """Run a node_exporter with nothing but the textfile collector; yields where it listens."""
    place = f"{address}:{free_port(address)}"
    with running(
        unpacked("prometheus-node-exporter") / "prometheus-node-exporter",
        "--collector.disable-defaults",
        "--collector.textfile",
        f"--collector.textfile.directory={folder}",
        f"--web.listen-address={place}",
    ):
        wait_until(lambda: get(f"http://{place}/metrics"))
        yield place


@contextmanager
def prometheus(folder: Path, config: Path) -> Iterator[Callable[..., Answer]]:
    """Run a Prometheus with its data in a folder; yields what asks it a query, now or at a time."""
    address = f"127.0.0.1:{free_port()}"

    def ask(query: str, at: float | None = None) -> Answer:
        words = urllib.parse.urlencode({"query": query} | ({} if at is None else {"time": str(at)}))
        text = get(f"http://{address}/api/v1/query?{words}")
        found = json.loads(text)["data"]["result"] if text else []
        return {frozenset(one["metric"].items()): float(one["value"][1]) for one in found}

    with running(
        unpacked("prometheus") / "prometheus",
        f"--config.file={config}",
        f"--storage.tsdb.path={folder}",
        "--storage.tsdb.retention.time=100y",  # data of any date is kept
        f"--web.listen-address={address}",
        "--log.level=error",
    ):
        wait_until(lambda: ask("vector(1)"), 30)
        yield ask
