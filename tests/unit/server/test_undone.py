"""What could not be done at once is done later, in its order."""

import errno
import os
import threading
from pathlib import Path
from typing import Any

import pytest

from zramd.contract import handover
from zramd.server import takeover
from zramd.server.trouble import Troubles
from zramd.server.undone import Undone


def test_two_threads_do_what_was_left_undone_in_its_order() -> None:
    """A manager that is told READY=1 first has no status yet."""
    one = Undone(Troubles())
    begun, go_on = threading.Event(), threading.Event()
    done = []

    def first() -> None:
        begun.set()
        go_on.wait(10)
        done.append("a")

    one.add("a", first)
    one.add("b", lambda: done.append("b"))
    housekeeper = threading.Thread(target=one.do)
    housekeeper.start()
    assert begun.wait(10)
    other = threading.Thread(target=one.do)
    other.start()
    other.join(0.1)
    go_on.set()
    for thread in (housekeeper, other):
        thread.join()
    assert done == ["a", "b"]
    assert not one


def test_a_turn_that_cannot_be_given_now_is_given_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = os.open(tmp_path, os.O_RDONLY)
    monkeypatch.setenv(handover.TURN, str(turn))
    one = Undone(Troubles())
    one.add("turn", lambda: takeover.serving(str(tmp_path)))
    stat = os.stat

    def short(path: Any, **rest: Any) -> os.stat_result:
        if path == str(tmp_path):
            raise OSError(errno.ENOMEM, "no memory")
        return stat(path, **rest)

    with monkeypatch.context() as shortage:
        shortage.setattr(os, "stat", short)
        one.do()
    assert one
    os.fstat(turn)
    one.do()
    assert not one
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(turn)
