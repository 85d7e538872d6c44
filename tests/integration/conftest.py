"""Servers that are begun by `zramd start`, and may be restarted."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.server import Started


@pytest.fixture
def state(memory_folder: Path) -> Path:
    """Where a server's state lies."""
    return memory_folder / "state"


@pytest.fixture
def started(tmp_path: Path, state: Path) -> Iterator[Callable[..., Started]]:
    """Start a server with a state: `started(*words)`; the test's end ends it."""
    made: list[Started] = []

    def start(*words: str) -> Started:
        made.append(Started(tmp_path, state, *words))
        return made[-1]

    yield start
    for served in made:
        if served.pid:
            os.kill(served.pid, signal.SIGKILL)
