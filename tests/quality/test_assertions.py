"""Assertions of the debug build end a process where they are wrong: one that never does proves nothing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import mutants

from zramd.core.pool.zsmalloc import CHECK_LEVEL

pytestmark = pytest.mark.skipif(CHECK_LEVEL < 3, reason="only the debug build is copied, with faults in it")

# A free that changes its zspage without the lock of the class.
UNLOCKED_FREE = [
    (
        """        lock_class(c)
        if not chunk_holds(self, c, span, chunk, handle):
            pthread_mutex_unlock(&c.lock)
            self.obj_end(handle)
            return -ENOENT
        chunk_give(self, c, span, chunk)
""",
        """        chunk_give(self, c, span, chunk)
        lock_class(c)
""",
    )
]
FREE = "from zramd import Zsmalloc; pool = Zsmalloc(10); pool.free(pool.malloc(100))"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faulty")
    added = [Path(__file__).with_name("unheld.pyx")]
    return mutants.build(folder, {"pool/pool.pyx": UNLOCKED_FREE}, added)


def run(packages: Path, code: str) -> tuple[int, str]:
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(packages)},
        capture_output=True,
        text=True,
        check=False,
    )
    return found.returncode, found.stderr


@pytest.mark.parametrize("fault", ["never_held", "given_back", "held_by_another"])
def test_a_lock_that_this_thread_does_not_hold(fault: str, packages: Path) -> None:
    status, said = run(packages, f"from zramd.core import unheld; unheld.{fault}()")
    assert status == -signal.SIGABRT
    assert said.startswith("zramd: ")
    assert "unheld.pyx:" in said
    assert "__owner == gettid()" in said


def test_a_lock_that_this_thread_holds(packages: Path) -> None:
    assert run(packages, "from zramd.core import unheld; unheld.held()") == (0, "")


def test_a_free_without_its_lock(packages: Path) -> None:
    """Of the core itself: the assertion names the file and the line."""
    status, said = run(packages, FREE)
    assert status == -signal.SIGABRT
    assert "chunks.pxd:" in said
    assert "__owner == gettid()" in said
