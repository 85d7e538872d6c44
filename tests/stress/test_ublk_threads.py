"""Clients of a disk in many threads, while its device is looked at, emptied, written out, and disks change.

Scaled by ZRAMD_STRESS (1 by default); the seed is printed and can be given as ZRAMD_SEED.
"""

import shutil
from pathlib import Path

import pytest
from support.run import SCALE, run_in_fake_kernel


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs cc")
@pytest.mark.parametrize(
    ("script", "scene"),
    [
        ("crowds", "stress"),
        ("crowds", "emptied"),
        ("lives", "successor"),
        ("lives", "abort"),
        ("refusals", "refusals"),
        ("away", "readers"),
    ],
)
def test_threads(script: str, scene: str, ublk_shim: Path) -> None:
    timeout = 60 + 60 * SCALE
    assert run_in_fake_kernel(ublk_shim, f"ublkscenes/{script}.py", scene, timeout=timeout) == ""
