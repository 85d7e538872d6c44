"""Fixtures of the control socket's tests."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.endpoints import Running


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    made = Running(tmp_path / "control.sock")
    yield made
    made.service.hold.set()
    made.close()
