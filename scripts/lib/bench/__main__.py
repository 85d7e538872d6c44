"""Measure zramd beside its peers and print the table of figures it is built to reach; see scripts/bench."""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType

import psutil  # type: ignore[import-untyped]

from bench import (
    compaction_rows,
    connection_rows,
    corpus,
    density_rows,
    dictionary,
    idle_rows,
    in_process_rows,
    large_rows,
    many_rows,
    nbd_rows,
    page,
    state_rows,
    steady_rows,
    tier_rows,
    tls_rows,
    waiting_rows,
    writeback_rows,
)
from bench.results import NotMeasuredError, Report
from bench.setup import GIB, Measure, Setup
from zramd import __version__

ROOT = Path(__file__).parents[3]
DOCS = ROOT / "docs"
QUIET_LOAD = 0.5

GROUPS: dict[str, Measure] = {
    "nbd": nbd_rows.measure,
    "connections": connection_rows.measure,
    "tls": tls_rows.measure,
    "lz4": in_process_rows.measure_lz4,
    "threads": in_process_rows.measure_threads,
    "density": density_rows.measure,
    "steady": steady_rows.measure,
    "compaction": compaction_rows.measure,
    "tiers": tier_rows.measure,
    "writeback": writeback_rows.measure,
    "dictionary": dictionary.measure,
    "idle": idle_rows.measure,
    "many": many_rows.measure,
    "waiting": waiting_rows.measure,
    "state": state_rows.measure,
    "scale": large_rows.measure,
    "large": large_rows.measure_large,
}
NEED_CORPUS = {
    "lz4",
    "threads",
    "density",
    "steady",
    "compaction",
    "tiers",
    "writeback",
    "dictionary",
    "state",
    "scale",
    "large",
}


def main() -> int:
    """Run the measurements that the command line asks for and return the exit status."""
    options = _options()
    signal.signal(signal.SIGTERM, _leave)  # so that what runs is ended, and the kernel's zram reset
    load = os.getloadavg()[0]
    if load > QUIET_LOAD:
        _warn(f"the load average is {load:.2f}: the figures will be too, wait until the machine is idle")
    report = Report(_machine(load), {})
    # What is to be on a disk is in /var/tmp: /tmp may be memory. Run folders are in memory, as below /run: a
    # disk that is kept busy makes a file system's small writes wait, here for up to 1.5 s.
    with (
        tempfile.TemporaryDirectory(prefix="zramd-bench-") as name,
        tempfile.TemporaryDirectory(prefix="zramd-bench-", dir="/var/tmp") as disk,
        tempfile.TemporaryDirectory(prefix="zramd-bench-", dir="/dev/shm") as memory,
    ):
        folder = Path(name)
        setup = Setup(
            quick=options.quick,
            rounds=options.rounds or (2 if options.quick else 5),
            seconds=options.seconds or (0.3 if options.quick else 5),
            threads=options.threads,
            corpus=folder / "corpus",
            folder=folder,
            disk=Path(disk),
            memory=Path(memory),
            report=report,
        )
        report.settings["run"] = (
            f"{setup.rounds} rounds, {setup.seconds:g} s for each fio run, "
            f"nbdkit's threads: {setup.threads or 'its default'}"
        )
        if options.quick:
            report.settings["run"] += "; --quick: too small for the figures to mean anything"
        _measure(setup, options)
        report.settings["took"] = f"{(time.monotonic() - setup.started) / 60:.1f} minutes"
    print(report.text(), end="")
    if options.json:
        options.json.write_text(json.dumps(report.as_dict(), indent=1, ensure_ascii=False) + "\n")
    if options.markdown:
        options.markdown.write_text(report.markdown())
    if options.report and report.rows:
        command = "scripts/bench --report --large" if options.large else "scripts/bench --report"
        for file in page.write(report, options.report, command):
            print(f"zramd: wrote {os.path.relpath(file)}", file=sys.stderr)
    return 0 if report.rows or report.tables else 1


def _measure(setup: Setup, options: argparse.Namespace) -> None:
    wanted = list(options.only)
    if wanted and NEED_CORPUS & set(wanted):
        try:
            corpus.prepare(setup, options.corpus, ROOT / "build" / "bench")
        except NotMeasuredError as reason:
            setup.report.skip(f"{', '.join(group for group in wanted if group in NEED_CORPUS)}: {reason}")
            wanted = [group for group in wanted if group not in NEED_CORPUS]
    for group in wanted:
        try:
            setup.report.rows += GROUPS[group](setup)
        except NotMeasuredError as reason:
            setup.report.skip(f"{group}: {reason}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", allow_abbrev=False, add_help=False)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=_positive_int, metavar="N")
    parser.add_argument("--seconds", type=_seconds, metavar="S")
    parser.add_argument("--only", type=_groups, metavar="NAMES")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--threads", type=_positive_int, metavar="N")
    parser.add_argument("--corpus", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--report", type=Path, metavar="FOLDER", nargs="?", const=DOCS)
    options = parser.parse_args()
    if options.only is None:
        options.only = [group for group in GROUPS if group not in ("large", "dictionary")]
    if options.large:  # it measures what scale does, and more
        options.only = [group for group in options.only if group not in ("scale", "large")] + ["large"]
    if options.corpus and not os.access(options.corpus, os.R_OK):
        parser.error(f"'{options.corpus}' cannot be read")
    if options.quick and options.report == DOCS:
        parser.error("--quick measures nothing that belongs into docs: name another folder for its report")
    if options.report and not (options.report.is_dir() and os.access(options.report, os.W_OK)):
        parser.error(f"'{options.report}' is not a folder that can be written to")
    for file in (options.json, options.markdown):
        # Found now, and not after ten minutes.
        if file and not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
            parser.error(f"'{file}' cannot be written")
    return options


def _positive_int(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        if 0.1 <= float(text) <= 3600:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"'{text}' is out of range: use 0.1 to 3600 seconds")


def _groups(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in GROUPS:
            raise argparse.ArgumentTypeError(f"'{name}' is not measured: use {', '.join(GROUPS)}")
    return [group for group in GROUPS if group in names]


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _warn(sentence: str) -> None:
    print(f"zramd: {sentence}", file=sys.stderr, flush=True)


def _first_line(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.partition("\n")[0]
    except (OSError, subprocess.CalledProcessError):
        return "missing"


def _machine(load: float) -> dict[str, str]:
    models = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    lz4 = _first_line("dpkg-query", "-W", "-f=${Version}", "liblz4-1")
    software = (
        f"zramd {__version__}",
        _first_line("nbdkit", "--version"),
        f"liblz4 {lz4}",
        _first_line("fio", "--version"),
        f"Python {platform.python_version()}",
    )
    return {
        "machine": f"{' / '.join(sorted(models)) or platform.machine()}, {psutil.cpu_count()} cores, "
        f"{psutil.virtual_memory().total / GIB:.0f} GiB",
        "software": f"Linux {platform.release().partition('-')[0]}, {', '.join(software)}",
        "load average at the start": f"{load:.2f}",
    }


if __name__ == "__main__":
    sys.exit(main())
