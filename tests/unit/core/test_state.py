"""The state file: what carries over, and what it costs. (What is refused: test_state_refused.py.)"""

import _thread
import errno
import os
import random
import resource
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.content import compressible, noise
from support.pages import UNIT

from zramd import Device, PoolFullError
from zramd.core.device.device import state_layout
from zramd.core.system import threads
from zramd.errors import StateError
from zramd.server import statefile

BLOCK = 4096
SIZE = 8 << 20


def open_device(
    path: Path, size: int = SIZE, *, verify: bool = False, mem_limit: int = 0, keep_reserve: bool = False
) -> Device:
    """As the server does. Forgetting the device leaves the file as a kill would."""
    fd = statefile.open_state(str(path), size, verify)
    try:
        return Device(size, state=fd, verify=verify, mem_limit=mem_limit, keep_reserve=keep_reserve)
    finally:
        os.close(fd)


def read(device: Device, offset: int = 0, length: int = SIZE) -> bytes:
    buf = bytearray(length)
    device.read(buf, offset)
    return bytes(buf)


def fill(device: Device, seed: int = 1) -> bytes:
    """Blocks of every kind, some overwritten and trimmed; returns what the device holds then."""
    rnd = random.Random(seed)
    model = bytearray(device.disksize)
    for block in [*range(device.disksize // BLOCK), *range(0, device.disksize // BLOCK, 7)]:
        kind = rnd.randrange(6)
        data = {
            0: bytes(BLOCK),
            1: rnd.randbytes(8) * 512,
            2: noise(rnd.randrange(1 << 30)),
        }.get(kind, compressible(rnd.randrange(1 << 30), rnd.randrange(20, 3500)))
        device.write(data, block * BLOCK)
        model[block * BLOCK : (block + 1) * BLOCK] = data
    for block in rnd.sample(range(device.disksize // BLOCK), device.disksize // BLOCK // 3):
        device.trim(block * BLOCK, BLOCK)
        model[block * BLOCK : (block + 1) * BLOCK] = bytes(BLOCK)
    return bytes(model)


@pytest.mark.parametrize("verify", [False, True])
def test_a_device_is_as_it_was(memory_folder: Path, verify: bool) -> None:
    path = memory_folder / "state"
    device = open_device(path, verify=verify)
    model = fill(device)
    before = device.counters()
    del device
    again = open_device(path, verify=verify)
    again.check()
    assert read(again) == model
    after = again.counters()
    assert after["recovered_blocks"] == before["pages_stored"]
    assert after["leaked_objects"] == 0
    for name in ("orig_data_size", "compr_data_size", "same_pages", "huge_pages", "pages_stored"):
        assert after[name] == before[name], name
    for name in ("writes", "trims", "written_bytes", "notify_free", "huge_pages_since", "mem_used_max"):
        assert after[name] == before[name] > 0, name
    assert after["objs_used"] == before["objs_used"]
    # Pages without an object, which were kept for the next one, are given back.
    assert after["compr_data_size"] < after["mem_used_total"] <= before["mem_used_total"]
    # It works on: everything can be written again, moved and freed.
    model = fill(again, 2)
    again.compact()
    again.check()
    assert read(again) == model
    again.trim(0, SIZE)
    again.release_stock()
    again.check()
    assert again.counters()["mem_used_total"] == 0


def resident(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_the_file_holds_what_the_statistics_say(memory_folder: Path) -> None:
    """What the system has allocated for it is the pool's pages, and those of the tables that were touched."""
    path = memory_folder / "state"
    device = open_device(path, 64 << 20)

    def tables() -> int:
        layout = state_layout(64 << 20)
        fd = os.open(path, os.O_RDONLY)
        at = used = 0
        end = layout["bytes"] - layout["spans"] * layout["span_size"]
        try:
            while True:
                at = os.lseek(fd, at, os.SEEK_DATA)
                stop = os.lseek(fd, at, os.SEEK_HOLE)
                if at >= end:
                    break
                used += min(stop, end) - at
                at = stop
        except OSError:
            pass  # ENXIO: no more data
        os.close(fd)
        return used

    def agrees() -> None:
        assert resident(path) - tables() == device.counters()["mem_used_total"]

    fill(device)
    agrees()
    read(device, 0, 64 << 20)
    device.check()
    agrees()
    device.compact()
    agrees()
    del device
    device = open_device(path, 64 << 20)
    agrees()
    device.check()
    read(device, 0, 64 << 20)
    agrees()
    assert tables() <= device.counters()["metadata_bytes"]
    device.trim(0, 64 << 20)
    device.release_stock()
    assert device.counters()["mem_used_total"] == 0
    agrees()
    device.reset()
    assert resident(path) <= 4 * BLOCK  # the header and the counters


def test_reading_holes_takes_no_memory(memory_folder: Path) -> None:
    path = memory_folder / "state"
    device = open_device(path, 1 << 30)
    device.write(b"x", 500 << 20)
    before = resident(path)
    for offset in range(0, 1 << 30, 64 << 20):
        assert not any(read(device, offset, 1 << 20)[: 1 << 10])
    device.extents(0, 1 << 30)
    device.trim(0, 400 << 20)
    device.check()
    assert resident(path) == before


def test_the_limit_carries_on(memory_folder: Path) -> None:
    path = memory_folder / "state"
    device = open_device(path, mem_limit=1 << 20)
    with pytest.raises(PoolFullError):
        fill(device)
    device.mem_limit = 2 << 20  # as the endpoint does for a user
    del device
    assert open_device(path, mem_limit=1 << 20).mem_limit == 2 << 20
    assert open_device(path, mem_limit=3 << 20).mem_limit == 3 << 20
    assert open_device(path, mem_limit=0).mem_limit == 0


def test_a_memfd_is_a_state() -> None:
    memory = os.memfd_create("zramd")
    path = Path(f"/proc/self/fd/{memory}")
    device = open_device(path)
    model = fill(device)
    del device
    assert read(open_device(path)) == model
    os.close(memory)


def test_reset_of_a_state(memory_folder: Path) -> None:
    path = memory_folder / "state"
    device = open_device(path)
    fill(device)
    device.reset()
    device.write(noise(1), BLOCK)
    del device
    again = open_device(path)
    assert read(again) == bytes(BLOCK) + noise(1) + bytes(SIZE - 2 * BLOCK)
    again.check()


def test_a_large_state_is_taken_over_by_threads_with_progress(memory_folder: Path) -> None:
    path = memory_folder / "state"
    size = 1 << 30
    device = open_device(path, size)
    for block in range(0, size // BLOCK, 5):
        device.write(b"%016d" % block * 256 if block % 2 else b"%08d" % block + bytes(100), block * BLOCK)
    stored = device.counters()["pages_stored"]
    del device
    seen: list[tuple[int, int]] = []
    fd = statefile.open_state(str(path), size, False)
    again = Device(size, state=fd, progress=lambda done, total: seen.append((done, total)))
    os.close(fd)
    assert again.counters()["recovered_blocks"] == stored
    assert all(0 <= done <= total for done, total in seen)
    again.check()
    for block in random.Random(1).sample(range(0, size // BLOCK, 5), 500):
        expected = b"%016d" % block if block % 2 else b"%08d" % block
        assert read(again, block * BLOCK, len(expected)) == expected


@pytest.mark.timeout(20)
@pytest.mark.parametrize("progress", [None, lambda done, total: None], ids=["silent", "progress"])
def test_threads_that_find_no_memory_to_begin_with_are_not_waited_for(
    memory_folder: Path, monkeypatch: pytest.MonkeyPatch, progress: Callable[[int, int], None] | None
) -> None:
    """They end without a word: the one that started them does it all."""
    really_begin = _thread.start_new_thread

    def no_frame() -> None:
        raise MemoryError

    def begin(work: Callable[..., object], arguments: tuple[Any, ...], *rest: object) -> int:
        if work is not threads.begin:  # that is compiled and has no frame
            return 1
        return really_begin(work, (no_frame, *arguments[1:]))

    def begin_in_silence(*_: object, **__: object) -> int:
        return 1

    path = memory_folder / "state"
    device = open_device(path)
    model = fill(device)
    del device
    monkeypatch.setattr(_thread, "start_new_thread", begin)
    for starts in {"_start_new_thread", "_start_joinable_thread"} & set(
        vars(threading)
    ):  # Python 3.12's, 3.13's
        monkeypatch.setattr(threading, starts, begin_in_silence)
    fd = statefile.open_state(str(path), SIZE, False)
    again = Device(SIZE, state=fd, progress=progress)
    os.close(fd)
    assert read(again) == model
    again.check()


FILL_A_SMALL_ONE = """
import os, random, subprocess, sys
from zramd import Device, PoolFullError
from zramd.server import statefile
folder, size = sys.argv[1], int(sys.argv[2])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "zramd-test", folder], check=True)

def start():
    fd = statefile.open_state(folder + "/state", size, True)
    device = Device(size, state=fd, verify=True)
    os.close(fd)
    return device

device, model, refused = start(), {}, 0
for turn in range(3):
    for block in range(turn, size // 4096, 37 if turn == 2 else 3):
        data = random.Random(block).randbytes(4096 if block % 2 else 900).ljust(4096, b"\\0")
        data = data if block % 5 else data[:8] * 512
        try:
            device.write(data, block * 4096)
            model[block] = data
        except (PoolFullError, MemoryError):
            refused += 1
    device.check()
    for block in [block for block in model if block % 4 == turn]:
        device.trim(block * 4096, 4096)
        del model[block]
    device.check()
    del device
    device = start()
    device.check()
    buf = bytearray(4096)
    for block, data in model.items():
        device.read(buf, block * 4096)
        assert buf == data
print(refused, len(model))
"""


@pytest.mark.parametrize("there", [False, True])
def test_a_state_without_room_for_its_head_is_none(
    memory_folder: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Nor does the file look like a large one then."""
    path = memory_folder / "state"
    if there:
        path.touch(0o600)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as short:
        short.setattr(os, "pwrite", full)
        with pytest.raises(StateError, match="cannot be made: no space left on device: make room there"):
            statefile.open_state(str(path), 1 << 20, False)
    assert path.stat().st_size == 0
    os.close(statefile.open_state(str(path), 2 << 20, False))


def test_a_full_tmpfs_is_a_full_pool(tmp_path: Path) -> None:
    """Not the end of the process, which a page fault there would be."""
    # The mount is gone when the process is.
    command = (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    )
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    command += [sys.executable, "-c", FILL_A_SMALL_ONE, str(tmp_path), str(64 << 20)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    refused, kept = map(int, done.stdout.split())
    assert refused > 1000
    assert kept > 500


def mapped(path: Path) -> int:
    """Bytes of the file that this process has mapped and resident."""
    total = 0
    counts = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            counts = words[-1] == str(path)
        elif counts and words[0] == "Rss:":
            total += int(words[1]) * 1024
    return total


def test_for_the_local_kernel_all_of_a_state_is_mapped(memory_folder: Path) -> None:
    """A lock holds only what is mapped: what a server has taken over must not be swapped out to itself."""
    path = memory_folder / "state"
    device = open_device(path)
    fill(device)
    del device
    device = open_device(path)
    used = device.counters()["mem_used_total"]
    assert mapped(path) < used
    device.reserve_start(1 << 20)
    counters = device.counters()
    assert counters["mem_used_total"] == used
    assert mapped(path) >= used + counters["reserve_bytes"] + SIZE // BLOCK * 16
    device.check()
    # What is mapped may be written, too, without a page fault.
    for block in range(0, SIZE // BLOCK, 2):
        device.trim(block * BLOCK, BLOCK)
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    device.compact(0)
    assert device.counters()["objects_migrated"] > 20
    assert resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before < 16
    device.check()
    header = BLOCK if UNIT == 1 else 0  # is written, not mapped: unless the counters are on its page
    assert resident(path) == mapped(path) + header


def test_locked_memory_is_given_back(memory_folder: Path) -> None:
    code = (
        "import os, sys; from zramd import Device; from zramd.server import statefile\n"
        "from zramd.core.system import process\n"
        f"fd = statefile.open_state({str(memory_folder / 'state')!r}, {SIZE}, False)\n"
        f"device = Device({SIZE}, state=fd)\n"
        "process.lock_memory()\n"
        "device.write(os.urandom(4 << 20), 0)\n"
        "full = os.fstat(fd).st_blocks\n"
        "device.trim(0, 4 << 20); device.release_stock()\n"
        "assert device.counters()['mem_used_total'] == 0\n"
        "print(full, os.fstat(fd).st_blocks)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    full, empty = map(int, done.stdout.split())
    assert full * 512 > 4 << 20
    assert empty * 512 < 256 << 10


@pytest.mark.parametrize("verify", [False, True])
def test_a_reserve_that_is_kept(memory_folder: Path, verify: bool) -> None:
    """All pages that one server had made ready the next one has: it may get no others."""
    reserve = 1 << 20
    state = memory_folder / "state"
    device = open_device(state, verify=verify)
    device.reserve_start(reserve)
    data = fill(device)
    device.reserve_start(reserve)  # what its refiller would have done
    del device
    for turn in range(4):
        keeps = turn < 3
        device = open_device(state, verify=verify, keep_reserve=keeps)
        device.check()
        before = os.stat(state).st_blocks * 512
        device.reserve_start(reserve)
        taken = os.stat(state).st_blocks * 512 - before
        assert taken < reserve // 20 if keeps else taken > reserve * 0.9
        assert device.counters()["reserve_bytes"] >= reserve
        assert read(device) == data
        data = fill(device, turn)
        device.reserve_start(reserve)
        device.check()
        del device
