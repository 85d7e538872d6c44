"""`zramd top` between the keys and the servers, without a terminal."""

from types import SimpleNamespace
from typing import Any

import pytest
from support.run import wait_until

from zramd.commands.top import INTERVALS, Top
from zramd.control import servers
from zramd.errors import DeviceError


@pytest.fixture
def top(monkeypatch: pytest.MonkeyPatch) -> Top:
    """What is shown of a device that nobody serves."""
    monkeypatch.setattr(servers, "every", list)
    terminal: Any = SimpleNamespace(colours=256)
    return Top(terminal, servers.Served("zram0", "/nowhere/zram0", None), 1.0)


def answers(top: Top) -> None:
    """Take in what the threads have brought."""
    wait_until(lambda: top._answers)
    top._answers.popleft()()


def test_server_that_tells_too_little_is_an_error_and_no_traceback(top: Top) -> None:
    got: list[Any] = []
    top._start(lambda: {}["frag_ratio"], got.append)
    answers(top)
    assert isinstance(got[0], DeviceError)
    assert "is it of another version?" in str(got[0])


def test_answer_for_a_device_that_is_no_longer_shown_is_dropped(top: Top) -> None:
    top._ask()
    top._show(servers.Served("zram1", "/nowhere/zram1", None))
    answers(top)
    assert top.lost == ""
    assert top.frame().name == "zram1"


def test_server_that_is_away_is_said(top: Top) -> None:
    top._ask()
    answers(top)
    assert top.lost == "the server of zram0 has ended: waiting for it to come back"


def test_intervals_have_ends(top: Top) -> None:
    for key, end in (("+", INTERVALS[-1]), ("-", INTERVALS[0])):
        for _ in range(2 * len(INTERVALS)):
            top.press(key)
        assert top.interval == end


def test_unknown_keys_do_nothing(top: Top) -> None:
    before = top.frame()
    for key in ("x", "\x00", "\x1b", "\x1b[5~", "\ufffd"):
        top.press(key)
    assert top.frame() == before


def test_no_other_device(top: Top) -> None:
    top.press("next")
    assert top.frame().message == "there is no other device"
