"""How tests run things: programs, threads, waiting, and how much of it."""

import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import zramd

SUPPORT = Path(__file__).parent

SCALE = float(os.environ.get("ZRAMD_STRESS", "1"))  # how much longer tests with threads and kills are to last
# Of random choices; all processes that share the tests of a run have the same one.
SEED = int(os.environ.setdefault("ZRAMD_SEED", str(random.SystemRandom().randrange(1 << 32))))
PATIENCE = float(os.environ.get("ZRAMD_PATIENCE", "1"))  # how much longer all may take: more if emulated
BUILD = os.environ.get("ZRAMD_BUILD", "")
SANITIZED = "san" in BUILD
# Share of the examples that Python's own work gets under a sanitizer, which slows it and sees little of it.
FEWER = 0.1 if SANITIZED else 1.0
# What a script that a test starts is told of all that: conftest.py hides every other setting.
SETTINGS = {
    "ZRAMD_STRESS": str(SCALE),
    "ZRAMD_SEED": str(SEED),
    "ZRAMD_PATIENCE": str(PATIENCE),
    "ZRAMD_BUILD": BUILD,
}


def zramd_command(*words: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command as a user does."""
    return subprocess.run(
        [sys.executable, "-P", "-m", "zramd", *map(str, words)],
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60 * PATIENCE,
    )


def run_in_fake_kernel(shim: Path, script: str, *words: object, timeout: float) -> str:
    """Run a script of this folder with the shim that is a kernel with ublk; return what it says is wrong."""
    done = subprocess.run(
        [sys.executable, "-P", SUPPORT / script, *map(str, words)],
        env={
            **os.environ,
            **SETTINGS,
            **preloaded(shim),
            "SHIM_UBLK": str(shim),
            "PYTHONPATH": f"{Path(zramd.__file__).parents[1]}:{SUPPORT.parent}",
        },
        capture_output=True,
        text=True,
        timeout=timeout * PATIENCE,
    )
    return done.stderr or (f"ended with {done.returncode}" if done.returncode else "")


def run_threads(works: Iterable[Callable[[], None]]) -> None:
    """Run each in a thread of its own, all to their end; raise the first exception of one."""
    errors: list[BaseException] = []

    def guard(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guard, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def wait_until(predicate: Callable[[], object], timeout: float = 10.0) -> None:
    """Poll until `predicate` is true; fails the test after `timeout` seconds, PATIENCE times as many."""
    timeout *= PATIENCE
    end = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > end:
            pytest.fail(f"not within {timeout} s: {predicate}")
        time.sleep(0.01)


def preloaded(library: Path) -> dict[str, str]:
    """What has a program use a library before all others, but for a sanitizer's, which must be the first."""
    before = os.environ.get("LD_PRELOAD")
    return {"LD_PRELOAD": f"{before}:{library}" if before else str(library)}


def talk(path: Path, data: bytes, timeout: float = 10.0) -> bytes:
    """Send `data` to a unix socket and return all that comes back."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(timeout)
        sock.connect(str(path))
        sock.sendall(data)
        return b"".join(iter(lambda: sock.recv(65536), b""))
