"""Clients of a disk in many threads, while its device is looked at, emptied, written out, and disks change.

Scaled by ZRAMD_STRESS (1 by default); the seed is printed and can be given as ZRAMD_SEED.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.run import PATIENCE, SCALE, SEED, preloaded

import zramd

SCENES = Path(__file__).parents[1] / "support" / "ublkscenes.py"
PACKAGES = Path(zramd.__file__).parents[1]


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
@pytest.mark.parametrize("scene", ["stress", "emptied", "successor", "abort", "refusals", "readers"])
def test_threads(scene: str, ublk_shim: Path) -> None:
    found = subprocess.run(
        [sys.executable, "-P", SCENES, scene],
        env={
            **os.environ,
            **preloaded(ublk_shim),
            "SHIM_UBLK": str(ublk_shim),
            "PYTHONPATH": f"{PACKAGES}:{SCENES.parents[1]}",
            "ZRAMD_SEED": str(SEED),
        },
        capture_output=True,
        text=True,
        timeout=(60 + 60 * SCALE) * PATIENCE,
    )
    assert found.stderr == ""
    assert found.returncode == 0
