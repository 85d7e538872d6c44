"""The server's threads and its ends, without nbdkit."""

import os
import threading

import pytest

from zramd.server.ending import Ends
from zramd.server.server import Serving
from zramd.server.trouble import Troubles


def test_a_thread_dies_loudly(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = Serving.__new__(Serving)  # nothing of it runs
    made._troubles = Troubles()

    def fail() -> None:
        raise ZeroDivisionError("by zero")

    monkeypatch.setattr(threading, "excepthook", made._thread_failed)
    thread = threading.Thread(target=fail, name="zramd-refill")
    thread.start()
    thread.join()
    text = "zramd-refill has ended: ZeroDivisionError: by zero"
    assert capfd.readouterr().err == f"zramd: {text}\n"
    assert made._troubles.causes() == [text]


def test_a_full_pipe_is_no_error() -> None:
    made = Serving.__new__(Serving)
    made._wake = os.pipe2(os.O_NONBLOCK)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(made._wake[1], bytes(4096))
    made._wake_up()
    for fd in made._wake:
        os.close(fd)


def test_what_was_begun_last_ends_first(capfd: pytest.CaptureFixture[str]) -> None:
    """Once, and whatever fails."""
    ends = Ends()
    done: list[str] = []

    def fail() -> None:
        assert ends.stopping.is_set()
        raise OSError(5, "no")

    ends.add(lambda: done.append("a"))
    ends.add(fail)
    ends.add(lambda: done.append("b"))
    ends.fail()
    ends.run()
    assert done == ["b", "a"]
    assert ends.failed
    assert capfd.readouterr().err == "zramd: not everything could be shut down: no\n"
