"""The housekeeper: whatever fails, it goes on, says so once, and loses no signal."""

import errno
import os
import signal
import threading
from collections.abc import Iterator

import pytest
from support.run import wait_until

from zramd.errors import RundirError
from zramd.server import housekeeping, trouble
from zramd.server.housekeeping import Chore, Housekeeper

TERM = bytes([signal.SIGTERM])
FAILURES = (
    OSError(errno.EMFILE, "Too many open files"),
    OSError(errno.ENOSPC, "No space left on device"),
    MemoryError(),
    RuntimeError("can't start new thread"),
    RundirError("rundir '/x' cannot be written: no space left on device"),
    ZeroDivisionError("nobody expected this"),
)


class Kept:
    """A housekeeper with what it does."""

    def __init__(self) -> None:
        self.wake, self.waker = os.pipe2(os.O_NONBLOCK)
        self.stopping = threading.Event()
        self.troubles = trouble.Troubles()
        self.obeyed: list[bytes] = []
        self.failing: dict[str, BaseException] = {}
        self.done = 0
        chores = [Chore("chore fails", self.chore, lambda: 0.01), Chore("never", self.chore, lambda: 0)]
        self.keeper = Housekeeper(self.wake, self.stopping, self.troubles, self.obey, chores)
        self.thread = threading.Thread(target=self.keeper.run, daemon=True)

    def _fail(self, place: str) -> None:
        if place in self.failing:
            raise self.failing[place]

    def chore(self) -> None:
        self._fail("chore")
        self.done += 1

    def answer(self) -> None:
        self._fail("answer")

    def obey(self, signals: bytes) -> None:
        self._fail("obey")
        self.obeyed.append(signals)

    def end(self) -> None:
        self.stopping.set()
        os.write(self.waker, b"\0")
        self.thread.join(30)
        assert not self.thread.is_alive()
        os.close(self.wake)
        os.close(self.waker)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Kept]:
    monkeypatch.setattr(housekeeping, "PAUSE", 0.01)
    made = Kept()
    yield made
    made.end()


def done_again(kept: Kept) -> None:
    before = kept.done
    wait_until(lambda: kept.done > before + 2)


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_chore_that_fails(kept: Kept, failure: BaseException, capfd: pytest.CaptureFixture[str]) -> None:
    kept.thread.start()
    kept.failing["chore"] = failure
    wait_until(lambda: bool(kept.troubles))
    (cause,) = kept.troubles.causes()
    assert cause.startswith("chore fails: ")
    os.write(kept.waker, TERM)
    wait_until(lambda: kept.obeyed == [TERM])
    kept.failing.clear()
    done_again(kept)
    assert kept.troubles.causes() == []
    assert capfd.readouterr().err == f"zramd: {cause}\n", "once, though it failed many times"


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_a_signal_is_kept_until_it_is_obeyed(kept: Kept, failure: BaseException) -> None:
    kept.failing["obey"] = failure
    kept.thread.start()
    os.write(kept.waker, TERM)
    wait_until(lambda: bool(kept.troubles))
    assert kept.obeyed == []
    done_again(kept)  # and all else is done meanwhile
    kept.failing.clear()
    wait_until(lambda: kept.obeyed == [TERM])
    wait_until(lambda: not kept.troubles)


@pytest.mark.parametrize("failure", FAILURES, ids=repr)
def test_an_answer_that_fails(kept: Kept, failure: BaseException) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"x")  # and nobody takes it: it is there again at once
    kept.keeper.listen(reader, kept.answer)
    kept.failing["answer"] = failure
    kept.thread.start()
    wait_until(lambda: bool(kept.troubles))
    assert kept.troubles.causes()[0].startswith("housekeeping is disturbed: ")
    done_again(kept)
    os.write(kept.waker, TERM)
    wait_until(lambda: kept.obeyed == [TERM])
    kept.failing.clear()
    os.read(reader, 1)
    wait_until(lambda: not kept.troubles)
    os.close(reader)
    os.close(writer)


def test_waiting_that_fails(kept: Kept) -> None:
    """What has come is looked at all the same."""

    class Poll:
        def poll(self, timeout: float) -> list[tuple[int, int]]:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")

    whole, kept.keeper._poll = kept.keeper._poll, Poll()  # type: ignore[assignment]
    kept.thread.start()
    os.write(kept.waker, TERM)
    wait_until(lambda: kept.obeyed == [TERM])
    done_again(kept)
    kept.keeper._poll = whole
    wait_until(lambda: not kept.troubles)


@pytest.mark.parametrize("failure", [MemoryError(), RuntimeError("can't allocate lock")], ids=repr)
def test_no_memory_even_to_tell_of_it(
    kept: Kept, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as short:
        short.setattr(kept.troubles, "begin", fail)
        kept.failing["obey"] = MemoryError()
        kept.thread.start()
        os.write(kept.waker, TERM)
        done_again(kept)
        assert kept.thread.is_alive()
    kept.failing.clear()
    wait_until(lambda: kept.obeyed == [TERM])


def test_zeros_only_wake(kept: Kept) -> None:
    kept.thread.start()
    os.write(kept.waker, bytes(100))
    done_again(kept)
    assert kept.obeyed == []


def test_shorter_interval_counts_at_once(kept: Kept) -> None:
    """Nothing is due when the thread starts: a server that takes over has others to answer first."""
    interval = [3600.0]
    times: list[int] = []
    beats: list[int] = []
    chores = [
        Chore("x", lambda: times.append(1), lambda: interval[0]),
        Chore("y", lambda: beats.append(1), lambda: 0.01),
    ]
    kept.keeper = Housekeeper(kept.wake, kept.stopping, kept.troubles, kept.obey, chores)
    kept.thread = threading.Thread(target=kept.keeper.run, daemon=True)
    kept.thread.start()
    wait_until(lambda: len(beats) > 2)
    assert times == []
    interval[0] = 0.01
    wait_until(lambda: len(times) > 2)


class TestTroubles:
    @pytest.mark.parametrize(
        ("cause", "text"),
        [
            ("", "x is not done"),
            ("why", "x is not done: why"),
            (
                OSError(errno.EMFILE, "Too many open files", "/proc/self/statm"),
                "x is not done: '/proc/self/statm': too many open files: "
                "raise ulimit -n, or LimitNOFILE= of the service",
            ),
            (ZeroDivisionError("by zero"), "x is not done: ZeroDivisionError: by zero"),
            (
                RuntimeError("can't start new thread"),
                "x is not done: no more threads can be started: raise ulimit -u, or TasksMax= of the service",
            ),
        ],
    )
    def test_sentence(self, cause: BaseException | str, text: str, capfd: pytest.CaptureFixture[str]) -> None:
        troubles = trouble.Troubles()
        troubles.begin("x is not done", cause)
        troubles.begin("x is not done", cause)
        assert troubles.causes() == [text]
        assert capfd.readouterr().err == f"zramd: {text}\n"
        troubles.over("x is not done")
        troubles.over("y")
        assert not troubles
