"""The two steps of a refresh, with a stand-in for swapon and swapoff: what is done, and at signals."""

import errno
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from support.run import wait_until

from zramd.guest import files, memory, steps
from zramd.guest.areas import Area
from zramd.guest.files import PAGE, GivenUp, GuestError

AREA = Area("/dev/vdb2", 1000, 100, 99)


class Kernel:
    """Notes what it is asked for, in a file: a step is done by a process of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def swap_off(self, path: str) -> None:
        self.note(f"off {path}")

    def swap_on(self, path: str, priority: int, flags: int) -> None:
        self.note(f"on {path} {priority} {flags:#x}")

    def note(self, words: str) -> None:
        with self.path.open("a") as file:
            file.write(f"{words}\n")

    @property
    def asked(self) -> list[str]:
        return self.path.read_text().splitlines()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/oom_score_adj").write_text("0")
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/min_free_kbytes").write_text("2000\n")
    (tmp_path / "proc/meminfo").write_text("MemFree: 100000 kB\n")
    monkeypatch.setattr(files, "PROC", str(tmp_path / "proc"))
    there = Kernel(tmp_path / "asked")
    monkeypatch.setattr(steps, "swap_off", there.swap_off)
    monkeypatch.setattr(steps, "swap_on", there.swap_on)
    monkeypatch.setattr(steps, "areas", lambda: [AREA])
    monkeypatch.setattr(steps, "Watch", lambda wanted: Calm([]))
    return there


class Calm:
    """Says what it was told to, one look after the other, then that all is well."""

    def __init__(self, reasons: list[str]) -> None:
        self.reasons = reasons

    def reason(self) -> str:
        return self.reasons.pop(0) if self.reasons else ""


def until_signalled(path: str) -> None:
    """As the kernel's swapoff: it ends at a signal, with the area still on."""
    signal.pause()
    raise OSError(errno.EINTR, "", path)


def test_an_area_is_swapped_off_and_on_with_its_priority(kernel: Kernel, tmp_path: Path) -> None:
    assert steps.empty(AREA) >= 0
    assert kernel.asked == ["off /dev/vdb2", "on /dev/vdb2 99 0x10000"]
    # The kernel kills this process first when memory is out.
    assert (tmp_path / "proc/self/oom_score_adj").read_text() == "1000"


def test_it_is_given_up_when_memory_gets_short(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "swap_off", until_signalled)
    monkeypatch.setattr(steps, "Watch", lambda wanted: Calm(["", "programs wait for memory"]))
    with pytest.raises(GivenUp, match=r"^programs wait for memory$"):
        steps.empty(AREA)
    assert kernel.asked == []


def test_what_is_off_is_swapped_on_again_whatever_comes(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def off(path: str) -> None:
        kernel.swap_off(path)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), number)

    monkeypatch.setattr(steps, "swap_off", off)
    steps.empty(AREA)
    assert kernel.asked == ["off /dev/vdb2", "on /dev/vdb2 99 0x10000"]


@pytest.mark.parametrize(("number", "kind"), [(errno.EIO, GuestError), (errno.ENOMEM, GivenUp)])
def test_what_the_kernel_refuses_is_said(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    def off(path: str) -> None:
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(steps, "swap_off", off)
    with pytest.raises(kind, match=f"^/dev/vdb2: {os.strerror(number)}$"):
        steps.empty(AREA)


def test_memory_that_cannot_be_had_is_no_error(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(steps.mmap, "mmap", refuse)
    with pytest.raises(GivenUp, match="Cannot allocate memory"):
        steps.wipe(["/dev/vdb1"], 1000)


def test_a_process_that_is_killed_gives_the_step_up(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "swap_off", lambda path: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(GivenUp, match="killed, perhaps for lack of memory"):
        steps.empty(AREA)


@pytest.mark.parametrize("after", [[], [Area("/dev/vdb2", 1000, 0, -2)]])
def test_an_area_that_is_not_as_it_was_is_an_error(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, after: list[Area]
) -> None:
    monkeypatch.setattr(steps, "areas", lambda: after)
    with pytest.raises(GuestError, match="is not swapped to as it was"):
        steps.empty(AREA)


def test_an_area_whose_priority_the_kernel_chose_gets_another_one(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steps, "areas", lambda: [Area("/dev/vdb2", 1000, 0, -3)])
    steps.empty(Area("/dev/vdb2", 1000, 0, -2))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_without_the_command_the_step_still_ends_with_swap_on(tmp_path: Path, number: int) -> None:
    program = f"""
        import signal, time
        from zramd.guest import steps
        from zramd.guest.areas import Area
        def note(words):
            with open({str(tmp_path / "asked")!r}, "a") as file:
                file.write(words)
        def off(path):
            note("off ")
            time.sleep(0.5)
        steps.swap_off, steps.swap_on = off, lambda path, priority, flags: note("on")
        steps.empty(Area("/dev/vdb2", 1000, 100, 99))
    """
    asked = tmp_path / "asked"
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)]) as process:
        wait_until(lambda: asked.exists() and asked.read_text() == "off ")
        process.send_signal(number)
        process.wait()
    wait_until(lambda: asked.read_text() == "off on")


# ---- Wiping -----------------------------------------------------------------------------------------------


def wiped(monkeypatch: pytest.MonkeyPatch, free: list[int], tmp_path: Path) -> int:
    """Wipe while so many places are free at each look, and return how many pages were written."""
    written = tmp_path / "written"

    class Place:
        def __init__(self, _fd: int, size: int, _flags: int) -> None:
            self.size, self.pages = size, 0

        def madvise(self, advice: int, start: int = 0, length: int = 0) -> None:
            if advice == steps._MADV_PAGEOUT:
                assert (start % PAGE, length) == (0, steps.STEP * PAGE)
                self.pages += steps.STEP
                written.write_text(str(self.pages))

        def __setitem__(self, place: slice, content: bytes) -> None:
            assert len(content) == place.stop - place.start
            assert content == steps.WORD * (len(content) // 8)
            assert place.stop <= self.size

    monkeypatch.setattr(steps.mmap, "mmap", Place)
    monkeypatch.setattr(steps, "_free", lambda paths: free.pop(0) if free else 0)
    monkeypatch.setattr(steps, "PAUSE", 0)
    steps.wipe(["/dev/vdb1"], 10_000)
    return int(written.read_text())


def test_places_are_taken_until_none_is_free(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    looks = 8 * steps.STEP  # pages between two looks
    assert wiped(monkeypatch, [9000, 5000, 0], tmp_path) == 3 * looks


def test_no_more_is_written_than_there_was_to_do(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert 10_000 <= wiped(monkeypatch, [10_000] * 99, tmp_path) <= 1.5 * 10_000


def test_wiping_is_given_up_when_memory_gets_short(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "Watch", lambda wanted: Calm(["only 3 MiB of memory are available"]))
    monkeypatch.setattr(steps, "_free", lambda paths: 1 << 20)
    monkeypatch.setattr(steps, "PAUSE", 0.01)
    started = time.monotonic()
    with pytest.raises(GivenUp, match="only 3 MiB"):
        steps.wipe(["/dev/vdb1"], 1 << 18)
    assert time.monotonic() - started < 60


def test_a_watch_is_set_for_each_step(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[memory.Watch | Calm] = []
    monkeypatch.setattr(steps, "Watch", lambda wanted: made.append(Calm([])) or made[-1])
    steps.empty(AREA)
    steps.empty(AREA)
    assert len(made) == 2


@pytest.mark.parametrize(("free", "waits"), [([5000], 0), ([1000, 2000, 3000], 2), ([1000] * 99, 9)])
def test_a_wipe_lets_reclaim_go_first(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: list[int], waits: int
) -> None:
    """Below what is reserved and a quarter it waits until the kernel has freed some, for a while."""
    meminfo = tmp_path / "proc/meminfo"
    left, slept = [*free], list[float]()

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        show()

    def show() -> None:
        meminfo.write_text(f"MemTotal: 100000 kB\nMemFree: {left.pop(0)} kB\n")

    show()
    monkeypatch.setattr(steps.time, "sleep", sleep)
    monkeypatch.setattr(steps.time, "monotonic", lambda: len(slept) / waits if waits else 0.0)
    steps._await_reclaim()
    assert len(slept) == waits
