"""One thread for what can wait: whose turn it is, and what happens when one fails."""

import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from support.run import wait_until

from zramd.core.system.process import idle_io
from zramd.server.worker import Worker


class FakePart:
    """What the worker serves: each turn takes and answers what the test says."""

    title = "background test"
    interval = 0.5

    def __init__(self, name: str, log: list[str], delay: float = 1.0) -> None:
        self.name, self.log, self.delay = name, log, delay
        self.failure = ""
        self.yields = False
        self.wake: Callable[[], None] = lambda: None
        self.error: Exception | None = None
        self.during_turn: Callable[[], None] = lambda: None
        self.begun = self.ended = False

    def tick(self) -> float:
        self.log.append(self.name)
        self.during_turn()
        if self.error is not None:
            raise self.error
        return self.delay

    def begin(self) -> None:
        self.begun = True

    def end(self) -> None:
        self.ended = True


class World:
    """Two parts, and a clock that stands still but where the worker rests."""

    def __init__(self) -> None:
        self.now = 100.0
        self.log: list[str] = []
        self.one, self.two = FakePart("one", self.log), FakePart("two", self.log)
        self.worker = Worker(self.one, self.two, clock=lambda: self.now)

    def run(self, seconds: float) -> str:
        self.log.clear()
        end = self.now + seconds
        while self.now < end:
            self.now += min(self.worker.turn(), end - self.now)
            assert len(self.log) < 1000
        return " ".join(self.log)


def test_each_at_its_own_pace() -> None:
    world = World()
    world.two.delay = 3
    assert world.run(6) == "one two one one one two one one"


def test_none_keeps_another_waiting() -> None:
    """What always has more to do takes turns with the other."""
    world = World()
    world.one.delay = world.two.delay = 0.0
    world.log.clear()
    for _ in range(6):
        world.worker.turn()
        world.now += 0.001
    assert world.log == ["one", "two"] * 3


def test_time_left_to_clients_is_left_by_all() -> None:
    world = World()
    world.one.delay, world.one.yields = 4.0, True
    world.two.delay = 0.0
    assert world.worker.turn() == 4.0
    world.now += 4
    assert world.worker.turn() == 0.0
    assert world.log == ["one", "two"]


def test_a_call_is_a_turn_at_once() -> None:
    world = World()
    world.one.delay = world.two.delay = 1000.0
    world.run(1)
    world.two.wake()
    assert world.run(1) == "two"


def test_a_call_during_the_turn() -> None:
    """It may be about more than the turn has looked at."""
    world = World()
    world.one.delay = world.two.delay = 1000.0
    world.one.during_turn = lambda: world.one.wake() if world.log.count("one") == 1 else None
    assert sorted(world.run(1).split()) == ["one", "one", "two"]


@pytest.mark.parametrize("error", [MemoryError(), OSError(12, "Cannot allocate memory")], ids=repr)
def test_shortage(error: Exception) -> None:
    world = World()
    world.one.error = error
    assert world.run(1).split().count("one") == 2
    assert world.one.failure
    assert not world.two.failure
    world.one.error = None
    world.run(1)
    assert not world.one.failure


def test_a_failure_ends_one_part(capfd: pytest.CaptureFixture[str]) -> None:
    world = World()
    world.one.error = ValueError("broken")
    assert world.run(3.5).split().count("one") == 1
    assert world.log.count("two") == 4
    assert (world.one.failure, world.one.ended, world.two.ended) == ("ValueError: broken", True, False)
    assert capfd.readouterr().err == "zramd: background test stopped: ValueError: broken\n"


def test_life() -> None:
    log: list[str] = []
    part = FakePart("one", log, delay=3600.0)
    worker = Worker(part)
    assert not part.begun
    worker.start()
    assert part.begun
    wait_until(lambda: log)
    assert not part.ended
    worker.stop()
    assert part.ended


def test_what_waits_for_a_disk_has_a_thread_of_its_own() -> None:
    """It is told apart by its name; where a sandbox forbids what it is to do first, it does without."""
    tried: list[str] = []

    def refused() -> None:
        tried.append(Path(f"/proc/self/task/{threading.get_native_id()}/comm").read_text())
        raise PermissionError("forbidden")

    part = FakePart("one", [])
    worker = Worker(part, name="zramd-out", prepare=refused)
    worker.start()
    wait_until(lambda: part.log)
    worker.stop()
    assert tried == ["zramd-out\n"]


def test_a_stop_need_not_wait_for_a_disk(capfd: pytest.CaptureFixture[str]) -> None:
    part = FakePart("one", [])
    answers = threading.Event()
    part.during_turn = lambda: assert_true(answers.wait(10))
    worker = Worker(part)
    worker.start()
    wait_until(lambda: part.log)
    worker.stop(patience=0.01)
    assert capfd.readouterr().err == "zramd: background test is still under way: not waited for\n"
    assert not part.ended
    answers.set()
    worker.stop()
    assert part.ended
    assert part.log == ["one"]
    assert capfd.readouterr().err == ""


def test_idle_io() -> None:
    """The calling thread's alone."""

    def ionice(*options: str) -> str:
        command = ["ionice", *options, "-p", str(threading.get_native_id())]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    found: list[str] = []

    def work() -> None:
        ionice("-c", "best-effort", "-n", "4")
        found.append(ionice())
        idle_io()
        found.append(ionice())

    before = ionice()
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == ["best-effort: prio 4", "idle"]
    assert ionice() == before


def assert_true(value: bool) -> None:
    assert value
