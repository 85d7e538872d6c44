"""A machine that the code of zramd.guest takes for the one that it runs on."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.swapareas import FakeMachine

Make = Callable[..., FakeMachine]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Return what makes a machine of the sizes of its areas, in pages."""

    def make(*sizes: int) -> FakeMachine:
        made = FakeMachine(tmp_path, list(sizes))
        made.become(monkeypatch)
        return made

    return make
