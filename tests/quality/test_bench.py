"""scripts/bench at its smallest: every row is there and has numbers. What the numbers are is not tested."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "scripts" / "bench"
sys.path.insert(0, str(BENCH.parent / "lib"))

NEEDED = ["nbdkit", "fio", "cc"]
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, NEEDED)),
    reason=f"needs {', '.join(NEEDED)}: run the tests through scripts/test",
)

GROUPS = {
    "nbd": 12,
    "connections": 7,
    "tls": 2,
    "lz4": 3,
    "threads": 2 if len(os.sched_getaffinity(0)) > 1 else 0,
    "density": 20,
    "steady": 14,
    "compaction": 3,
    "tiers": 8,
    "writeback": 11,
    "dictionary": 0,
    "idle": 4,
    "many": 1,
    "waiting": 5 if os.geteuid() == 0 else 0,
    "state": 7,
    "scale": 8,
    "large": 8,
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BENCH, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)


PICTURES = ["frag-ratio.svg", "throughput.svg", "cost.svg"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_row(tmp_path: Path) -> None:
    json_file, markdown_file = tmp_path / "bench.json", tmp_path / "bench.md"
    done = run(
        *("--quick", "--large", "--report", str(tmp_path)),
        *("--json", str(json_file), "--markdown", str(markdown_file)),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(json_file.read_text())
    rows = report["rows"]
    # `large` measures what `scale` does, and more.
    assert len(rows) == sum(GROUPS.values()) - GROUPS["scale"], done.stdout
    for row in rows:
        numbers = [row["value"], *row["values"], *row["peer_values"], *row["ratios"]]
        numbers += [row[key] for key in ("peer_value", "ratio") if row["peer_values"]]
        assert all(math.isfinite(number) and number >= 0 for number in numbers), row
        assert (row["met"] is None) == (row["aim"].endswith("\N{MULTIPLICATION SIGN}") and not row["ratios"])
        assert row["what"] in done.stdout
        assert f"| {row['what']}" in markdown_file.read_text()
        if row["peer"] and not row["peer_values"]:
            assert report["skipped"], f"{row['what']} has no peer, and nothing says why"
    assert {"machine", "software", "load average at the start"} <= report["machine"].keys()
    assert report["settings"]
    page = (tmp_path / "benchmarks.md").read_text()
    assert markdown_file.read_text() in page
    for picture in PICTURES:
        assert f"]({picture})" in page
        assert ElementTree.parse(tmp_path / picture).getroot().tag.endswith("svg")
    assert_pictures_are_the_same_again(report["curves"], tmp_path)


def assert_pictures_are_the_same_again(curves: dict[str, Any], folder: Path) -> None:
    """Drawn twice from the same figures, a picture has the same bytes."""
    from bench import plots  # scripts/bench has installed what it needs
    from bench.results import Report

    assert plots.apart([3, 10, 1], 4) == [4, 10, 0]  # where its labels go
    report = Report({}, {})
    report.curves = curves
    drawn = []
    for name in ("first", "second"):
        (folder / name).mkdir()
        captions = plots.draw(report, folder / name)
        drawn.append({picture: (folder / name / picture).read_bytes() for picture in captions})
    assert drawn[0].keys() == {"frag-ratio.svg", "cost.svg"}
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "nbd,speed"], "'speed' is not measured: use " + ", ".join(GROUPS)),
        (["--rounds", "0"], "'0' is not a whole number above 0"),
        (["--seconds", "nan"], "'nan' is out of range"),
        (["--json", "/nowhere/file"], "'/nowhere/file' cannot be written"),
        (["--corpus", "/nowhere/pages"], "'/nowhere/pages' cannot be read"),
        (["--report", "/nowhere"], "'/nowhere' is not a folder that can be written to"),
        (["--quick", "--report"], "name another folder for its report"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert says in done.stderr
    assert not done.stdout


def test_help_names_every_group() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: scripts/bench ")
    assert re.findall(r"^ {21}([a-z0-9]+) ", done.stdout, re.MULTILINE) == list(GROUPS)


def test_corpus_has_no_page_of_one_word(tmp_path: Path) -> None:
    corpus = tmp_path / "pages"
    done = subprocess.run(
        [ROOT / "scripts" / "capture_pages", corpus, "2"],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if "run as root" in done.stderr:
        pytest.skip("may not look into a child's memory")
    assert done.returncode == 0, done.stderr
    data = corpus.read_bytes()
    pages = [data[at : at + 4096] for at in range(0, len(data), 4096)]
    assert 1 << 20 <= len(data) <= 2 << 20
    assert not any(page == page[:8] * 512 for page in pages)
