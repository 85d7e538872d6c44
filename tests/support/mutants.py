"""Builds the core with a fault in it, in a copy: whether a test finds the fault is the test's own test."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BACKEND = "scripts/lib/backend"


def build(folder: Path, edits: dict[str, list[tuple[str, str]]], added: Iterable[Path] = ()) -> Path:
    """Build the debug profile of a copy of the source, with parts of it replaced; the package's folder.

    edits: files in zramd/core, with what is replaced by what. added: modules to put there.
    Only what was changed is compiled, if the checkout's own debug build is of the present source.
    """
    shutil.copytree(ROOT / "zramd", folder / "zramd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "nbdkit_plugin.py"):
        shutil.copy2(ROOT / name, folder / name)
    for name in (BACKEND, "docs", "systemd", "build/debug", "build/tmp/debug"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, pairs in edits.items():
        file = folder / "zramd" / "core" / name
        text = file.read_text()
        for old, new in pairs:
            assert text.count(old) == 1, f"{name} has changed, so this fault cannot be made: {old!r}"
            text = text.replace(old, new)
        file.write_text(text)
    for module in added:
        shutil.copy2(module, folder / "zramd" / "core")
    run_build(folder, "debug")
    return folder / "build" / "debug"


def run_build(folder: Path, profile: str) -> None:
    """Build the source in a folder, as scripts/build does; fails with what the compilers say."""
    found = subprocess.run(
        [sys.executable, "-c", "from setuptools import setup; setup()", "build"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": BACKEND, "ZRAMD_BUILD": profile},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stdout
