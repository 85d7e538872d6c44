"""Clients of a disk in many threads, while its device is looked at, emptied, written out, and disks change.

Scaled by ZRAMD_STRESS (1 by default); the seed is printed and can be given as ZRAMD_SEED.
"""

import shutil
from pathlib import Path

import pytest
from support.run import SCALE, run_in_fake_kernel


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
@pytest.mark.parametrize("scene", ["stress", "emptied", "successor", "abort", "refusals", "readers"])
def test_threads(scene: str, ublk_shim: Path) -> None:
    assert run_in_fake_kernel(ublk_shim, "ublkscenes.py", scene, timeout=60 + 60 * SCALE) == ""
