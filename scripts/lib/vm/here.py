"""zramd on this machine, outside of any guest: its command, what a server answers, and how it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from vm.errors import VmError
from zramd.contract import exchange, rundir

ASK_TIMEOUT = 120.0  # seconds; a compaction waits for its end


def pairs(settings: Mapping[str, str]) -> list[str]:
    """Return settings as zramd's command line has them."""
    return [f"{key}={value}" for key, value in settings.items()]


def command(*words: str) -> list[str]:
    """Return the command line of zramd with these words, by the Python that runs this."""
    return [sys.executable, "-m", "zramd", *words]


def environment() -> dict[str, str]:
    """Return the environment that it runs in: it leaves no compiled files in the build."""
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def zramd(*words: str, namespace: str = "") -> str:
    """Run zramd, if asked in a network namespace, and return what it prints; raises VmError."""
    within = ["ip", "netns", "exec", namespace] if namespace else []
    ran = subprocess.run(
        [*within, *command(*words)],
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if ran.returncode:
        raise VmError(ran.stderr.strip() or f"zramd {words[0]} fails without a reason")
    return ran.stdout


def ask(folder: Path, method: str, path: str, body: str = "") -> str:
    """Return what the server of a run folder answers; raises VmError."""
    try:
        status, content = exchange.ask(str(folder), method, path, body, ASK_TIMEOUT)
    except OSError as error:
        raise VmError(f"zramd does not answer {method} {path}: {error}") from None
    if status != 200:
        raise VmError(f"zramd refuses {method} {path}: {content.strip()}")
    return content


def kill(folder: Path) -> bool:
    """Kill the server of a run folder and wait for its end; whether there was one."""
    pid = rundir.holder(str(folder))
    if pid is None:
        return False
    os.kill(pid, signal.SIGKILL)
    while rundir.holder(str(folder)) == pid:
        time.sleep(0.001)
    return True
