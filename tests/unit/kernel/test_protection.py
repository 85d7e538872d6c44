"""swap=local: each measure is taken, read back, and refused with its name when it cannot be had."""

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from support.run import SANITIZED

from zramd.core.device.device import Device
from zramd.core.system import process
from zramd.errors import SwapError
from zramd.kernel import protection

BLOCK = 4096


def in_child(code: str, **environment: str) -> str:
    """Run code in a Python of its own, whose memory it may lock; its output, errors included."""
    found = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONMALLOC": "malloc", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    return found.stdout.decode()


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
def test_protected_process_needs_no_more_pages() -> None:
    """After protect, a device is filled, rewritten and trimmed with pages that are there already."""
    code = """
        import os, random, threading, time
        from zramd.kernel import protection
        from zramd.core.device.device import Device
        device = Device(64 << 20)
        protection.protect(device, 24 << 20)
        refiller = threading.Thread(target=device.reserve_keep)
        refiller.start()
        rnd = random.Random(1)
        pages = [rnd.randbytes(size) + bytes(4096 - size) for size in range(100, 4096, 37)]
        def write(count):
            for n in range(count):
                device.write(pages[n * 31 % len(pages)], n % 12000 * 4096)
                if n % 50 == 0:
                    time.sleep(0)
        write(100)
        time.sleep(0.2)
        before = protection.minor_faults()
        for round in range(10):
            write(1000)
            time.sleep(0.05)
            device.trim(0, 2000 * 4096)
        counters = device.counters()
        print("misses", counters["reserve_misses"])
        device.trim(0, 64 << 20)
        for _ in range(1500):
            time.sleep(0.02)
            if device.counters()["reserve_bytes"] <= 60 << 20:
                break
        device.check()
        device.reserve_stop()
        refiller.join()
        print("used", device.counters()["mem_used_total"])
    """
    assert in_child(code) == "misses 0\nused 0\n"


def blocks_of_all_sizes(count: int) -> list[bytes]:
    rnd = random.Random(5)
    return [
        rnd.randbytes(size) + bytes(BLOCK - size) for size in (rnd.randrange(50, BLOCK) for _ in range(count))
    ]


def test_the_reserve_serves_to_its_last_page() -> None:
    """Whatever lengths are asked for, nothing is missing while anything is ready. Nobody refills it here."""
    device = Device(64 << 20)
    device.reserve_start(4 << 20)
    written = dict(enumerate(blocks_of_all_sizes(4000)))
    for n, data in written.items():
        ready = device.counters()["reserve_bytes"]
        device.write(data, n * BLOCK)
        if ready:
            assert device.counters()["reserve_misses"] == 0
    assert device.counters()["reserve_bytes"] == 0
    assert device.counters()["reserve_misses"] > 0
    device.check()
    buffer = bytearray(BLOCK)
    for n, data in written.items():
        device.read(buffer, n * BLOCK)
        assert buffer == data


def test_compaction_leaves_ready_pages_ready() -> None:
    """With a reserve, the last zspage of a class keeps some pages: what comes next need not start another."""
    device = Device(64 << 20)
    device.reserve_start(48 << 20)
    pages = blocks_of_all_sizes(4000)
    dice = random.Random(6)
    for _ in range(5):
        for n, data in enumerate(pages):
            device.write(data, n * BLOCK)
        for n in dice.sample(range(len(pages)), len(pages) * 2 // 3):
            device.trim(n * BLOCK, BLOCK)
        assert device.compact() > 100
        assert device.counters()["freeable_pages"] < 16
        assert device.counters()["reserve_misses"] == 0
    device.check()


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
def test_locked_memory_is_given_back() -> None:
    """What is locked cannot be given back with plain MADV_DONTNEED: the resident memory shows."""
    code = """
        import os
        from zramd.kernel import protection
        from zramd.stats import snapshots
        from zramd.core.system import process
        from zramd.core.device.device import Device
        process.lock_memory()
        device = Device(64 << 20)
        before = snapshots.resident_bytes()
        for n in range(8192):
            device.write(os.urandom(4096), n * 4096)
        full = snapshots.resident_bytes()
        device.trim(0, 64 << 20)
        device.release_stock()
        print(full - before > 30 << 20, snapshots.resident_bytes() - before < 1 << 20)
    """
    assert in_child(code) == "True True\n"


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
def test_heap_that_takes_pages_is_refused() -> None:
    code = """
        from zramd.kernel import protection
        from zramd.errors import SwapError
        try:
            protection._warm_heap()
        except SwapError as error:
            print(error)
    """
    assert "the heap takes pages from the kernel" in in_child(code, PYTHONMALLOC="pymalloc")
    assert in_child(code) == ""


@pytest.mark.parametrize(
    ("function", "step", "text"),
    [
        ("set_io_flusher", "_io_flusher", "cannot become an I/O flusher: no right: "),
        ("lock_memory", "_locked_memory", "cannot lock memory: no right: "),
        ("make_resident", "_resident_code", "cannot read the program's code into memory: no right"),
        ("warm_heap", "_warm_heap", "cannot make the heap resident: no right"),
    ],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, function: str, step: str, text: str) -> None:
    def refuse(*arguments: int) -> None:
        raise PermissionError(1, "no right")

    monkeypatch.setattr(process, function, refuse)
    with pytest.raises(SwapError, match=r"^swap=local: ") as caught:
        getattr(protection, step)()
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("user", "remedy"),
    [
        (1000, "run it as root, or give it CAP_SYS_RESOURCE, on Linux 5.6 or later"),
        (0, "root lacks CAP_SYS_RESOURCE here: have its container or service give it, on Linux 5.6 or later"),
    ],
)
def test_a_right_that_is_missing(monkeypatch: pytest.MonkeyPatch, user: int, remedy: str) -> None:
    """Who is root already, in a container, is not told to become root."""

    def refuse() -> None:
        raise PermissionError(1, "no right")

    monkeypatch.setattr(process, "set_io_flusher", refuse)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    with pytest.raises(SwapError) as caught:
        protection._io_flusher()
    assert str(caught.value).endswith(f": {remedy}")


def test_a_measure_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call succeeds, and reading back shows that nothing came of it."""
    monkeypatch.setattr(process, "set_io_flusher", lambda: None)
    monkeypatch.setattr(process, "is_io_flusher", lambda: False)
    with pytest.raises(SwapError, match="the kernel does not say so"):
        protection._io_flusher()
    monkeypatch.setattr(process, "lock_memory", lambda: None)
    with pytest.raises(SwapError, match=r"cannot lock memory: 0 of \d+ kB are"):
        protection._locked_memory()
    monkeypatch.setattr(process, "make_resident", lambda start, size: None)
    monkeypatch.setattr(protection, "_missing_code", lambda: 12)
    with pytest.raises(SwapError, match="12 kB are missing"):
        protection._resident_code()


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has memory that cannot be locked")
def test_holes_of_a_state_stay(memory_folder: Path) -> None:
    """A new server locks all memory again when it has the state: it may be just then that none is left."""
    code = """
        import os, random
        from zramd.core.device.device import Device
        from zramd.kernel import protection
        from zramd.server import statefile
        path = os.environ["STATE"]
        def open_device():
            fd = statefile.open_state(path, 64 << 20, False)
            try:
                return Device(64 << 20, state=fd)
            finally:
                os.close(fd)
        device = open_device()
        for n in range(4000):
            device.write(random.Random(n).randbytes(2000) + bytes(2096), n * 4096)
        device.trim(0, 3900 * 4096)
        protection.protect_process()
        del device
        device = open_device()
        before = os.stat(path).st_blocks
        protection.protect_process()
        print("grown by", os.stat(path).st_blocks - before)
    """
    assert in_child(code, STATE=str(memory_folder / "state")) == "grown by 0\n"


def test_reserve_beyond_memory_is_refused() -> None:
    class Poor:
        def reserve_start(self, size: int) -> None:
            raise MemoryError("no")

        def counters(self) -> dict[str, int]:
            return {"reserve_bytes": 4096}

    class Liar(Poor):
        def reserve_start(self, size: int) -> None:
            pass

    with pytest.raises(SwapError, match="cannot fill the reserve: no: use a smaller reserve="):
        protection._reserve(Poor(), 8192)  # type: ignore[arg-type]
    with pytest.raises(SwapError, match="it has 4096 of 8192 bytes"):
        protection._reserve(Liar(), 8192)  # type: ignore[arg-type]
