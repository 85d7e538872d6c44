"""Every order in which threads can come: allocate, free, read, write and move, one interleaving a seed.

In debug builds tests/support/schedule.c decides who goes on at each named point and lock, so that a seed
repeats what it found; in other builds the same threads run side by side. ZRAMD_STRESS=10 tries ten times as
many seeds, and puts all known races back, not only three.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import mutants
from support.races import RACES
from support.run import SCALE, SEED, preloaded

import zramd
from zramd.core.pool.zsmalloc import CHECK_LEVEL

ROOT = Path(__file__).resolve().parents[2]
SUPPORT = ROOT / "tests" / "support"
POINTS = ROOT / "zramd" / "core" / "system" / "points.pxd"
PACKAGES = Path(zramd.__file__).parents[1]
SEEDS = int(500 * SCALE) if CHECK_LEVEL >= 3 else int(50 * SCALE)
ENOUGH = 2000  # seeds in which each of the known races is found: it takes about 300 at most
TRIED = list(RACES) if SCALE > 1 else list(RACES)[:3]  # each takes a build

# Only where a state is taken over, or a budget is shared with other processes: see test_crash_points.py.
ALONE = {"spans_rebuilt", "recovered", "budget_claimed", "budget_granted", "budget_refused"}

scheduled = pytest.mark.skipif(CHECK_LEVEL < 3, reason="only the debug build has points to schedule at")


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """schedule.c, for builds that ask it."""
    if CHECK_LEVEL < 3:
        return None
    if shutil.which("cc") is None:
        pytest.skip("needs cc")
    library = tmp_path_factory.mktemp("preload") / "schedule.so"
    source = SUPPORT / "schedule.c"
    flags = ["-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, "-o", library, source], check=True)
    return library


def run(packages: Path, library: Path | None, *words: object) -> subprocess.CompletedProcess[str]:
    """Run interleavings.py with a build of zramd."""
    return subprocess.run(
        [sys.executable, "-P", SUPPORT / "interleavings.py", *map(str, words)],
        env={
            **os.environ,
            "PYTHONPATH": f"{packages}:{SUPPORT.parent}",
            **(preloaded(library) if library else {}),
        },
        capture_output=True,
        text=True,
        check=False,
    )


def last_seed(found: subprocess.CompletedProcess[str]) -> int:
    """The seed at which a run ended."""
    return int(re.findall(r"^seed (\d+)", found.stdout, re.MULTILINE)[-1])


def test_no_interleaving_goes_wrong(library: Path | None) -> None:
    first = SEED % 1_000_000_000
    found = run(PACKAGES, library, first, SEEDS)
    if found.returncode:
        where = f"{SUPPORT / 'interleavings.py'} {last_seed(found)} 1"
        load = f"LD_PRELOAD={library} " if library else ""
        pytest.fail(
            f"{load}PYTHONPATH={PACKAGES}:{SUPPORT.parent} {sys.executable} -P {where}\n{found.stderr}"
        )
    assert len(found.stdout.splitlines()) == SEEDS


@scheduled
@pytest.mark.parametrize("seed", [SEED % 1000, SEED % 1000 + 1])
def test_a_seed_repeats_each_step(seed: int, library: Path) -> None:
    """Of the device (even seeds) and of the pool."""
    runs = [run(PACKAGES, library, seed, "TRACE") for _ in range(3)]
    assert [found.stderr for found in runs] == [""] * 3
    assert runs[0].stdout == runs[1].stdout == runs[2].stdout
    threads = {line.split(" ", 1)[0] for line in runs[0].stdout.splitlines()}
    assert threads == set("0123" if seed % 2 else "01234")
    assert runs[0].stdout != run(PACKAGES, library, seed + 2, "TRACE").stdout


@scheduled
def test_every_point_is_reached(library: Path) -> None:
    names = set(re.findall(r"^        (\w+)\b", POINTS.read_text().split("enum point:")[1], re.MULTILINE))
    assert names > ALONE
    reached: set[str] = set()
    for seed in range(40):
        reached |= set(re.findall(r"^\d+ (\w+)$", run(PACKAGES, library, seed, "TRACE").stdout, re.MULTILINE))
    assert reached == names - ALONE


@scheduled
@pytest.mark.parametrize("race", TRIED)
def test_a_known_race_is_found(race: str, library: Path, tmp_path: Path) -> None:
    """With the fault in the core some seed fails, and it does again."""
    packages = mutants.build(tmp_path, RACES[race])
    found = run(packages, library, 1, ENOUGH)
    assert found.returncode, f"not in {ENOUGH} seeds"
    seed = last_seed(found)
    print(f"found with seed {seed}: {found.stderr.splitlines()[-1]}")
    again = run(packages, library, seed, 1)
    assert again.returncode == found.returncode
    assert again.stderr.splitlines()[-1] == found.stderr.splitlines()[-1]
