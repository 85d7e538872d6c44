"""What a kernel's page size costs: what a device takes along the density rows' traces, in a table.

python -m bench.page_sizes CORPUS           # the table, for pages of 4, 16 and 64 KiB
python -m bench.page_sizes --here [CORPUS]  # this kernel's alone, as JSON; without CORPUS one trace

Pages larger than this kernel's are played by the preload of the tests (tests/support/shim_pages.c).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import astuple
from pathlib import Path

from bench.density_rows import STEPS, Trace, Usage, run, small_block, usage_of
from bench.setup import BLOCK, MIB
from zramd import Device

SIZES = (4096, 16384, 65536)
SHIM = Path(__file__).parents[3] / "tests/support/shim_pages.c"

# By trace: of each step the bytes of payload, pool, and pool with metadata.
Steps = dict[str, dict[str, tuple[int, int, int]]]


def here(corpus: Path | None) -> Steps:
    """Run the traces on this kernel."""
    traces = [Trace("highly compressible", 131072, small_block)]
    if corpus:
        data = corpus.read_bytes()
        pages = [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
        traces.append(Trace("memory pages", 60000, lambda dice: dice.choice(pages)))
    found: Steps = {}
    for trace in traces:
        device = Device(trace.blocks * BLOCK)

        def usage(device: Device = device) -> Usage:
            return usage_of(device.counters())

        history = run(trace, device, usage)
        found[trace.name] = {step: astuple(history.steps[step]) for step in STEPS}
    return found


def played(size: int, corpus: Path | None = None) -> Steps:
    """Run the traces with pages of `size` bytes; without a corpus only the first."""
    with tempfile.TemporaryDirectory() as name:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        if size > os.sysconf("SC_PAGESIZE"):
            shim = Path(name) / "shim.so"
            words = ["-shared", "-fPIC", "-O1", f"-DSHIM_PAGE={size}UL", "-o", shim, SHIM]
            subprocess.run(["gcc", *words], check=True)
            environment["LD_PRELOAD"] = str(shim)
        command = [sys.executable, "-m", "bench.page_sizes", "--here", *([str(corpus)] if corpus else [])]
        done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
    steps: Steps = json.loads(done.stdout)
    return steps


def table(found: dict[int, Steps]) -> list[str]:
    """Return the lines of the table in docs/density.md."""
    head = [f"{size >> 10} KiB" for size in found]
    lines = [f"| trace | after | {' | '.join(head)} |", "|---|---|" + "---|" * len(head)]
    first, *_ = found.values()
    for trace in first:
        for step in STEPS:
            least = first[trace][step]
            cells = []
            for steps in found.values():
                _, used, total = steps[trace][step]
                more = f" ({used / least[1]:.3f}, {total / least[2]:.3f})" if steps is not first else ""
                cells.append(f"{used / MIB:.2f} {total / MIB:.2f}{more}")
            lines.append(f"| {trace} | {step} | {' | '.join(cells)} |")
    return lines


def main(words: list[str]) -> None:
    """Do what the command line asks for."""
    if words[:1] == ["--here"]:
        print(json.dumps(here(Path(words[1]) if words[1:] else None)))
        return
    print("\n".join(table({size: played(size, Path(words[0])) for size in SIZES})))


if __name__ == "__main__":
    main(sys.argv[1:])
