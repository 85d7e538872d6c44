"""Threads whose start never hangs."""

import threading

import pytest

from zramd.core.system import threads


def test_it_works_and_ends() -> None:
    gate = threading.Event()
    seen: list[int] = []

    def work(number: int) -> None:
        seen.append(number)
        gate.wait(10)

    thread = threads.start_thread("one", work, 7)
    assert thread.is_alive()
    thread.join(0.01)
    assert thread.is_alive()
    gate.set()
    thread.join()
    assert not thread.is_alive()
    assert seen == [7]


def test_an_exception_goes_where_those_of_threads_go(monkeypatch: pytest.MonkeyPatch) -> None:
    failures: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)

    def fail() -> None:
        raise ZeroDivisionError("by zero")

    threads.start_thread("one", fail).join()
    assert failures[0].thread is not None
    assert failures[0].thread.name == "one"
    assert str(failures[0].exc_value) == "by zero"


def test_one_that_has_no_memory_to_begin_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_frame(self: object) -> None:
        raise MemoryError

    monkeypatch.setattr(threads._Thread, "_enter", no_frame)
    with pytest.raises(RuntimeError, match="no memory for a thread"):
        threads.start_thread("one", print, patience=0)
