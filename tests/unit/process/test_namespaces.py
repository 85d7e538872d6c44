"""In which namespaces a process is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from zramd.process import namespaces


def test_a_container_has_numbers_of_its_own() -> None:
    unshare = shutil.which("unshare")
    words = "import sys; from zramd.process import namespaces; sys.exit(namespaces.has_own_pids())"
    if unshare is None:
        pytest.skip("needs unshare")
    done = subprocess.run(
        [
            unshare,
            "--user",
            "--map-root-user",
            "--pid",
            "--fork",
            "--mount-proc",
            sys.executable,
            "-P",
            "-c",
            words,
        ],
        capture_output=True,
        text=True,
    )
    if done.stderr:
        pytest.skip(f"there are no namespaces here: {done.stderr.strip()}")
    assert done.returncode == 1


def test_what_is_not_known_is_no_container(tmp_path: Path) -> None:
    assert not namespaces.has_own_pids(str(tmp_path / "none"))
