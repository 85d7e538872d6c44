"""A step of a refresh that is given up: another command wants the device, or somebody is killed."""

import errno
import os
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from zramd.guest import areas as kernel
from zramd.guest import files, layout, notes, refresh, steps
from zramd.guest.areas import DISCARD, DISCARD_ONCE, Area
from zramd.guest.files import GivenUp

AREA = Area("/dev/nbd0p1", 1000, 10, 9)
LINE = "/dev/nbd0p1 partition 4000 40 9\n"


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine at ease, with one area; mind that steps run in a process of their own."""
    for name, text in (
        ("proc/swaps", f"head\n{LINE}"),
        ("proc/meminfo", "MemTotal: 1000000 kB\nMemAvailable: 900000 kB\n"),
        ("proc/vmstat", "allocstall_normal 0\n"),
        ("sys/class/block/nbd0p1/stat", "0 " * 17),
        ("sys/class/block/nbd0p1/partition", "1\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "proc/self").mkdir()
    monkeypatch.setattr(files, "PROC", str(tmp_path / "proc"))
    monkeypatch.setattr(files, "SYS", str(tmp_path / "sys"))
    monkeypatch.setattr(files, "RUN", str(tmp_path / "run"))
    return tmp_path


def told(proc: Path) -> list[str]:
    path = proc / "told"
    return path.read_text().splitlines() if path.exists() else []


def tell(proc: Path, words: str) -> None:
    with (proc / "told").open("a") as file:
        file.write(f"{words}\n")


@pytest.fixture
def endless(proc: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """swapoff takes for ever, and ends at a signal as the kernel's does."""

    def swap_off(path: str) -> None:
        tell(proc, f"off {os.getpid()}")
        reads, writes = os.pipe()
        os.set_blocking(writes, False)
        signal.set_wakeup_fd(writes)
        select.select([reads], [], [], 30)
        tell(proc, "interrupted")
        raise OSError(errno.EINTR, "Interrupted", path)

    monkeypatch.setattr(steps, "swap_off", swap_off)
    monkeypatch.setattr(steps, "swap_on", lambda *words: tell(proc, "on"))
    return proc


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_for_another_command(endless: Path) -> None:
    """The area is on as it was: swapoff was interrupted."""
    with pytest.raises(GivenUp, match=r"^another command wants it$"):
        steps.empty(AREA, DISCARD, lambda: "another command wants it" if told(endless) else "")
    assert told(endless)[1:] == ["interrupted"]


def test_when_the_command_is_killed(endless: Path) -> None:
    """Nobody waits for minutes for a step that goes on alone: it ends by itself."""
    command = os.fork()
    if not command:
        steps.empty(AREA)
        os._exit(0)
    wait_for(lambda: told(endless))
    worker = int(told(endless)[0].split()[1])
    os.kill(command, signal.SIGKILL)
    os.waitpid(command, 0)
    wait_for(lambda: "interrupted" in told(endless))
    wait_for(lambda: not Path(f"/proc/{worker}").exists())
    assert told(endless)[1:] == ["interrupted"]


def test_flags_are_kept(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "swap_off", lambda path: None)
    monkeypatch.setattr(steps, "swap_on", lambda *words: tell(proc, " ".join(map(str, words))))
    steps.empty(AREA, DISCARD | DISCARD_ONCE)
    assert told(proc) == [f"/dev/nbd0p1 9 {DISCARD | DISCARD_ONCE}"]


def test_what_a_killed_process_had_off_is_on_again(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that empties is the first that the kernel kills when memory runs out."""
    (proc / "dev").touch()
    known = notes.Notes({"/dev/nbd0p1": notes.Note(9, dirty=900, flags=DISCARD | DISCARD_ONCE)})
    monkeypatch.setattr(refresh, "read_notes", lambda disk: known)
    monkeypatch.setattr(steps, "swap_off", lambda path: (proc / "proc/swaps").write_text("head\n"))
    monkeypatch.setattr(steps, "swap_on", lambda *words: os.kill(os.getpid(), signal.SIGKILL))
    monkeypatch.setattr(layout, "swap_on", lambda *words: tell(proc, " ".join(map(str, words))))
    monkeypatch.setattr(layout.os.path, "exists", lambda path: True)
    monkeypatch.setattr(layout, "_is_swap", lambda path: True)
    monkeypatch.setattr(kernel, "disk_of", lambda path: "/dev/nbd0")
    monkeypatch.setattr(refresh, "disk_of", lambda path: "/dev/nbd0")
    said: list[str] = []
    refresh.refresh("/dev/nbd0", said.append)
    assert said == ["/dev/nbd0p1: given up, as its process was killed, perhaps for lack of memory"]
    assert told(proc) == [f"/dev/nbd0p1 9 {DISCARD | DISCARD_ONCE}"]
