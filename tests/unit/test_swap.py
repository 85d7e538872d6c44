"""swap=local: each measure is taken, read back, and refused with its name when it cannot be had."""

import os
import random
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from zramd import kernelswap, swap
from zramd.core import process
from zramd.core.device import Device
from zramd.errors import SwapError

BLOCK = 4096
SANITIZED = "san" in os.environ.get("ZRAMD_BUILD", "")


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


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_log_passes_few_lines_and_counts_the_rest() -> None:
    clock = Clock()
    log = swap.Log(clock=clock)
    many = b"".join(b"line %d\n" % n for n in range(50))
    assert log.filter(many) == b"".join(b"line %d\n" % n for n in range(log.BURST))
    assert log.held_back == 50 - log.BURST
    clock.now += log.PERIOD
    passed = log.filter(b"next\n")
    assert passed == b"zramd: 30 lines more like these were held back\nnext\n"
    assert log.held_back == 0


def test_log_counts_a_storm() -> None:
    clock = Clock()
    log = swap.Log(clock=clock)
    log.filter(b"line\n" * log.BURST)
    assert log.filter(b"line\n" * 1000 + b"half a li") == b""
    assert log.held_back == 1000
    clock.now += log.PERIOD
    assert log.filter(b"ne\nnext\n") == b"zramd: 1000 lines more like these were held back\nne\nnext\n"


def test_log_passes_whole_lines() -> None:
    log = swap.Log(clock=Clock())
    assert log.filter(b"one\ntw") == b"one\n"
    assert log.filter(b"o\n") == b"two\n"
    assert log.filter(b"x" * 5000) == b"x" * 5000 + b"\n"


def test_log_never_blocks_the_writer() -> None:
    """The reader of standard error does not read: a pipe of its own fills up, and nobody waits."""
    code = """
        import os, sys, time
        from zramd import swap
        reader, writer = os.pipe()
        saved = os.dup(2)
        os.dup2(writer, 2)
        swap.Log.BURST = 10**9
        log = swap.Log()
        log.start()
        started = time.monotonic()
        refused = 0
        for _ in range(5000):
            try:
                os.write(2, b"x" * 99 + b"\\n")
            except BlockingIOError:
                refused += 1
        took = time.monotonic() - started
        print("refused some" if refused else "refused none", "at once" if took < 5 else f"after {took} s")
        sys.stdout.flush()
        os._exit(0)
    """
    assert in_child(code) == "refused some at once\n"


def test_log_gives_standard_error_back() -> None:
    code = """
        import os, sys
        from zramd import swap
        log = swap.Log()
        log.start()
        print("first", file=sys.stderr)
        log.stop()
        print("second", file=sys.stderr)
    """
    assert in_child(code) == "first\nsecond\n"


def test_log_in_a_file_is_bounded(tmp_path: Path) -> None:
    code = f"""
        import os, sys
        from zramd import swap
        swap.Log.BURST, swap.Log.LIMIT = 10**9, 10000
        log = swap.Log()
        print("early", file=sys.stderr)
        log.start()
        log.write_to("{tmp_path}/log")
        log.start()
        for number in range(1000):
            print("line", number, "x" * 90, file=sys.stderr, flush=True)
            while number % 10 == 9 and f"line {{number}} " not in open("{tmp_path}/log").read():
                pass
        log.stop()
        print("late", file=sys.stderr)
    """
    assert in_child(code) == "early\n"
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-2].startswith("line 999 ")
    assert lines[-1] == "late"
    assert 5 < len(lines) < 210  # all that was passed on at once may come on top


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
def test_protected_process_needs_no_more_pages() -> None:
    """After protect, a device is filled, rewritten and trimmed with pages that are there already."""
    code = """
        import os, random, threading, time
        from zramd import swap
        from zramd.core.device import Device
        device = Device(64 << 20)
        swap.protect(device, 24 << 20)
        keeper = threading.Thread(target=device.reserve_keep)
        keeper.start()
        rnd = random.Random(1)
        pages = [rnd.randbytes(size) + bytes(4096 - size) for size in range(100, 4096, 37)]
        def write(count):
            for n in range(count):
                device.write(pages[n * 31 % len(pages)], n % 12000 * 4096)
                if n % 50 == 0:
                    time.sleep(0)
        write(100)
        time.sleep(0.2)
        before = swap.minor_faults()
        for round in range(10):
            write(1000)
            time.sleep(0.05)
            device.trim(0, 2000 * 4096)
        counters = device.counters()
        print("misses", counters["reserve_misses"])
        device.trim(0, 64 << 20)
        for _ in range(100):
            time.sleep(0.02)
            if device.counters()["reserve_bytes"] <= 60 << 20:
                break
        device.check()
        device.reserve_stop()
        keeper.join()
        print("used", device.counters()["mem_used_total"])
    """
    assert in_child(code) == "misses 0\nused 0\n"


def blocks_of_all_sizes(count: int) -> list[bytes]:
    rnd = random.Random(5)
    return [
        rnd.randbytes(size) + bytes(BLOCK - size) for size in (rnd.randrange(50, BLOCK) for _ in range(count))
    ]


def test_the_reserve_serves_to_its_last_page() -> None:
    """Whatever lengths are asked for: nothing is missing while anything is ready. (Nobody refills it.)"""
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
    """With a reserve, a part-filled zspage keeps its pages: what comes next needs none."""
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
        assert device.counters()["freeable_pages"] == 0
        assert device.counters()["reserve_misses"] == 0
    device.check()


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
def test_locked_memory_is_given_back() -> None:
    """What is locked cannot be given back with plain MADV_DONTNEED: the resident memory shows."""
    code = """
        import os
        from zramd import stats, swap
        from zramd.core import process
        from zramd.core.device import Device
        process.lock_memory()
        device = Device(64 << 20)
        before = stats.resident_bytes()
        for n in range(8192):
            device.write(os.urandom(4096), n * 4096)
        full = stats.resident_bytes()
        device.trim(0, 64 << 20)
        device.trim_stock()
        print(full - before > 30 << 20, stats.resident_bytes() - before < 1 << 20)
    """
    assert in_child(code) == "True True\n"


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has a heap of its own")
def test_heap_that_takes_pages_is_refused() -> None:
    code = """
        from zramd import swap
        from zramd.errors import SwapError
        try:
            swap._warm_heap()
        except SwapError as error:
            print(error)
    """
    assert "the heap takes pages from the kernel" in in_child(code, PYTHONMALLOC="pymalloc")
    assert in_child(code) == ""


@pytest.mark.parametrize(
    ("function", "step", "text"),
    [
        ("set_io_flusher", "_io_flusher", "cannot become an I/O flusher: no right: run it as root"),
        ("lock_memory", "_locked_memory", "cannot lock memory: no right: run it as root"),
        ("make_resident", "_resident_code", "cannot read the program's code into memory: no right"),
        ("warm_heap", "_warm_heap", "cannot make the heap resident: no right"),
    ],
)
def test_refused(monkeypatch: pytest.MonkeyPatch, function: str, step: str, text: str) -> None:
    def refuse(*arguments: int) -> None:
        raise PermissionError(1, "no right")

    monkeypatch.setattr(process, function, refuse)
    with pytest.raises(SwapError, match=r"^swap=local: ") as caught:
        getattr(swap, step)()
    assert text in str(caught.value)


def test_a_measure_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The call succeeds, and reading back shows that nothing came of it."""
    monkeypatch.setattr(process, "set_io_flusher", lambda: None)
    monkeypatch.setattr(process, "is_io_flusher", lambda: False)
    with pytest.raises(SwapError, match="the kernel does not say so"):
        swap._io_flusher()
    monkeypatch.setattr(process, "lock_memory", lambda: None)
    with pytest.raises(SwapError, match=r"cannot lock memory: 0 of \d+ kB are"):
        swap._locked_memory()
    monkeypatch.setattr(process, "make_resident", lambda start, size: None)
    monkeypatch.setattr(swap, "_missing_code", lambda: 12)
    with pytest.raises(SwapError, match="12 kB are missing"):
        swap._resident_code()


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
        swap._reserve(Poor(), 8192)  # type: ignore[arg-type]
    with pytest.raises(SwapError, match="it has 4096 of 8192 bytes"):
        swap._reserve(Liar(), 8192)  # type: ignore[arg-type]


def test_devices_in_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    swaps = tmp_path / "swaps"
    swaps.write_text(
        "Filename\tType\tSize\tUsed\tPriority\n"
        "/dev/vda2 partition 1000 0 -2\n/dev/nbd0 partition 1048572 0 100\n/dev/nbd1 partition 4 0 100\n"
    )
    monkeypatch.setattr(kernelswap, "SWAPS", str(swaps))
    monkeypatch.setattr(swap, "_size", {"/dev/nbd0": 1 << 30, "/dev/nbd1": 8192}.get)
    assert swap.devices_in_use(1 << 30) == ["/dev/nbd0"]
    assert swap.devices_in_use(4096) == []
