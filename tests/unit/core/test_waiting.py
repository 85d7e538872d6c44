"""Who waits for whom: nobody fails for lack of patience, and nobody keeps others out for long.

What is waited for is a mover that stands still in the middle of its copy, for as long as the test wants: see
scripts/lib/bench/slow_copy.c. How long things take is measured by scripts/bench --only waiting.
"""

import os
import random
import shutil
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
from support.content import noise
from support.run import SANITIZED, preloaded

from zramd import Device, PoolFullError
from zramd.core.device import saving
from zramd.core.pool.size_classes import CLASSES
from zramd.errors import SaveError

BLOCK = 4096
ROOT = Path(__file__).resolve().parents[3]
PAYLOAD = 319  # bytes of each object of the scene

needs_preload = pytest.mark.skipif(
    SANITIZED or shutil.which("cc") is None, reason="needs cc, and a sanitizer has a memcpy of its own"
)
needs_real_time = pytest.mark.skipif(os.geteuid() != 0, reason="real-time priority needs root")

# The scene: blocks 0 to 599, of which two thirds are gone, so that there is something to move. `hold` lets
# the thread that compacts stand still in a move, `let_go` lets it go on.
SCENE = """
    import ctypes, os, random, sys, threading, time
    from zramd.kernel import protection
    from zramd.core.device.device import Device
    stage = ctypes.c_int.in_dll(ctypes.CDLL(None), "slow_copy")
    dice = random.Random(1)
    device = Device(64 << 20)
    if "urgent" in sys.argv:
        device.inherit_priority()
    stored = {}
    for block in range(600):
        stored[block] = dice.randbytes(290) + bytes(4096 - 290)
        device.write(stored[block], block * 4096)
    assert device.block(0)["payload_bytes"] == 319
    for block in dice.sample(range(600), 400):
        device.trim(block * 4096, 4096)
        del stored[block]
    failed = []

    def start(work, *arguments):
        def run():
            try:
                work(*arguments)
            except BaseException as error:
                failed.append(f"{work.__name__} {arguments}: {error}")
        thread = threading.Thread(target=run)
        thread.start()
        return thread

    def read(block):
        buffer = bytearray(4096)
        device.read(buffer, block * 4096)
        assert buffer == stored[block]

    def hold(compact=device.compact):
        stage.value = 1
        mover = start(compact)
        while stage.value != 2:
            time.sleep(0.001)
        return mover

    def let_go(*threads):
        stage.value = 3
        for thread in threads:
            thread.join()
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    library = tmp_path_factory.mktemp("preload") / "slow_copy.so"
    source = ROOT / "scripts" / "lib" / "bench" / "slow_copy.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def play(library: Path, code: str, *words: str) -> str:
    """Run the scene and code in a Python of its own; its output, errors included."""
    chunk = next(size for size, _, _ in CLASSES if size >= PAYLOAD + 4)
    found = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(SCENE) + textwrap.dedent(code), *words],
        env={**os.environ, "LD_PRELOAD": str(library), "ZRAMD_COPY": str(chunk - 4), "ZRAMD_COPY_MS": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    return found.stdout.decode()


@needs_preload
@pytest.mark.slow
def test_a_mover_that_stands_still_is_waited_for(library: Path) -> None:
    """Reads, writes and trims of what it moves wait as long as it takes: no error, and nothing is left."""
    code = """
        mover = hold()
        blocks = sorted(stored)
        readers = [start(read, block) for block in blocks[:70]]
        writers = [start(device.write, bytes(range(256)) * 16, block * 4096) for block in blocks[70:140]]
        trimmers = [start(device.trim, block * 4096, 4096) for block in blocks[140:]]
        time.sleep(12)     # longer than one waits for a pin that nobody holds
        waiting = [thread for thread in readers + writers + trimmers if thread.is_alive()]
        let_go(mover, *readers, *writers, *trimmers)
        print(len(waiting) > 0, failed)
        device.check()
        device.trim(0, 64 << 20)
        print(device.counters()["objs_used"])
        device.check()
    """
    assert play(library, code) == "True []\n0\n"


@needs_preload
def test_a_part_write_without_room_holds_no_stripe(library: Path) -> None:
    """It waits for who compacts; blocks of its stripe, one in 256, can be read meanwhile."""
    code = """
        same = 1111
        stored[same] = dice.randbytes(2000) + bytes(2096)
        device.write(stored[same], same * 4096)
        device.release_stock()
        device.mem_limit = device.counters()["mem_used_total"]
        mover = hold()
        part_write = start(device.write, dice.randbytes(3900), (same + 256) * 4096 + 100)
        part_write.join(1)
        print(part_write.is_alive())
        reader = start(read, same)
        reader.join(20)
        print(reader.is_alive())
        let_go(mover, part_write, reader)
        print(failed)
        device.check()
    """
    assert play(library, code) == "True\nFalse\n[]\n"


@needs_preload
def test_room_that_others_made_is_found(library: Path) -> None:
    """As many writes as there are pages to be freed, all refused before the first is."""
    code = """
        device.release_stock()
        twin = Device(64 << 20)
        dice = random.Random(1)
        for block in range(600):
            twin.write(dice.randbytes(290) + bytes(4096 - 290), block * 4096)
        for block in dice.sample(range(600), 400):
            twin.trim(block * 4096, 4096)
        twin.release_stock()
        twin.mem_limit = twin.counters()["mem_used_total"]
        pages = twin.compact(1 << 30)

        device.mem_limit = device.counters()["mem_used_total"]
        for block in range(1000, 1000 + pages):
            stored[block] = random.Random(block).randbytes(4096)
        mover = hold(lambda: device.write(stored[1000], 1000 * 4096))
        writers = [start(device.write, stored[block], block * 4096) for block in range(1001, 1000 + pages)]
        time.sleep(0.5)
        let_go(mover, *writers)
        print(pages > 2, len(failed))
        for block in stored:
            read(block)
        device.check()
    """
    assert play(library, code) == "True 0\n"


@needs_preload
@needs_real_time
def test_who_holds_a_pin_gets_the_priority_of_who_waits(library: Path) -> None:
    """The kernel shows it; and who compacts is real-time again once it is done, and no sooner."""
    code = """
        def compact():
            protection.take_priority(protection.BESIDE)
            compacts.append(threading.get_native_id())
            device.compact()
            print("then", os.sched_getscheduler(0) == os.SCHED_RR, os.sched_getparam(0).sched_priority)

        def real_time(block):
            protection.take_priority(protection.SERVE)
            read(block)

        def priority():
            with open(f"/proc/self/task/{compacts[0]}/stat") as stat:
                return int(stat.read().rpartition(")")[2].split()[15])

        compacts = []
        mover = hold(compact)
        print(os.sched_getscheduler(compacts[0]) == os.SCHED_OTHER, priority() >= 0)
        readers = [start(real_time, block) for block in stored]
        for _ in range(2000):
            if priority() < 0:
                break
            time.sleep(0.01)
        print(priority())
        let_go(mover, *readers)
        print(failed)
    """
    assert play(library, code, "urgent") == "True True\n-3\nthen True 1\n[]\n"


@needs_preload
def test_every_lock_hands_priority_on(tmp_path: Path) -> None:
    """Whatever is done with an urgent device, each lock of the core that is taken for it."""
    library = tmp_path / "shim_locks.so"
    source = Path(__file__).parents[2] / "support" / "shim_locks.c"
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    code = """
        import ctypes, os, random, tempfile, threading
        from zramd.core.device import saving
        from zramd.core.device.device import Device
        shim = ctypes.CDLL(None)
        looked_at = ctypes.c_long.in_dll(shim, "locks_looked_at")
        without = ctypes.c_long.in_dll(shim, "locks_without")
        SIZE = 8 << 20
        device = Device(SIZE)
        device.inherit_priority()
        taken = looked_at.value, without.value
        device.reserve_start(1 << 20)
        refiller = threading.Thread(target=device.reserve_keep)
        refiller.start()
        dice = random.Random(1)
        for block in range(0, 2048, 3):
            content = dice.randbytes(dice.choice((8, 300, 700, 2900, 4096)))
            device.write(content.ljust(4096, b"\\0"), block * 4096)
            device.write(dice.randbytes(8) * 512, (block + 1) * 4096)
            device.write(b"part", block * 4096 + 100)
        device.trim(SIZE // 4, SIZE // 2)
        device.compact(1 << 16)
        device.compact()
        device.mem_limit = 1 << 20
        device.release_stock()
        device.read(bytearray(SIZE), 0)
        device.zero(1000, 5000)
        device.block(0)
        device.extents(0, SIZE)
        device.check()
        with tempfile.TemporaryFile() as stream:
            saving.save(device, stream.fileno())
            stream.seek(0)
            device.mem_limit = 0
            device.reset()
            saving.load(device, stream.fileno())
        device.counters(), device.classes(), device.pressure()
        device.reserve_stop()
        refiller.join()
        print(looked_at.value - taken[0] > 10_000, without.value - taken[1])
    """
    found = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        env={**os.environ, **preloaded(library)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=120,
        check=False,
    )
    assert found.stdout.decode() == "True 0\n"


def test_a_long_request_lets_others_close_the_gate() -> None:
    """A reset comes in while blocks are written, and all is in order: it does not wait for the last one.

    A reset, as it closes the gate once. A check does for each of its pieces, and on a busy processor all of
    these together take longer than the request.
    """
    content = b"".join(noise(block)[:3000] + bytes(BLOCK - 3000) for block in range(64)) * 256
    device = Device(len(content))
    met = False
    deadline = time.monotonic() + 60
    while not met and time.monotonic() < deadline:
        device.reset()
        request = threading.Thread(target=device.write, args=(content, 0))
        request.start()
        while request.is_alive() and not device.counters()["requests_inflight"]:
            pass
        device.reset()
        request.join()
        device.check()
        met = 0 < device.counters()["pages_stored"] < len(content) // BLOCK
    assert met


def test_a_save_knows_of_a_request_that_it_came_in_between() -> None:
    """What is changed before and after the save's end is a change, though the request is not done."""
    device = Device(1 << 30)
    null = os.open("/dev/null", os.O_WRONLY)
    refused = False
    deadline = time.monotonic() + 60
    while not refused and time.monotonic() < deadline:
        device.trim(0, 1 << 30)
        done = sum(device.latencies()["zero"][1])
        request = threading.Thread(target=device.zero, args=(1 << 20, (1 << 30) - (1 << 20), False))
        request.start()
        while request.is_alive() and not device.counters()["requests_inflight"]:
            pass
        error = ""
        try:
            saving.save(device, null)
        except SaveError as refusal:
            error = str(refusal)
        at_work = sum(device.latencies()["zero"][1]) == done
        if at_work:
            assert error == "a client changed the device while it was saved"
            refused = True
        request.join()
    os.close(null)
    assert refused


def fill_with_holes(zspages: int) -> tuple[Device, list[int]]:
    """A device of which a class has an object or two in each zspage; and the blocks that are left."""
    dice = random.Random(2)
    device = Device(64 << 20)
    blocks = zspages * 17
    for block in range(blocks):
        device.write(dice.randbytes(3800) + bytes(BLOCK - 3800), block * BLOCK)
    assert device.block(0)["zspage_objs"] == 17
    kept = sorted(block for first in range(0, blocks, 17) for block in (first + 3, first + 10))
    for block in set(range(blocks)) - set(kept):
        device.trim(block * BLOCK, BLOCK)
    device.release_stock()
    return device, kept


def test_room_in_a_zspage_that_had_none_is_found() -> None:
    """At the limit each zspage is looked at once; then only those of which a chunk came back."""
    device, kept = fill_with_holes(300)
    device.mem_limit = device.counters()["mem_used_total"]
    block = 8000
    with pytest.raises(PoolFullError):
        while True:
            device.write(noise(block)[:3800] + bytes(BLOCK - 3800), block * BLOCK)
            block += 1
    device.check()
    for gone in random.Random(3).sample(kept, 50):
        before = device.counters()["limit_compactions"]
        device.trim(gone * BLOCK, BLOCK)
        device.write(noise(gone)[:3800] + bytes(BLOCK - 3800), gone * BLOCK)
        device.check()
        assert device.counters()["limit_compactions"] == before


def test_compaction_beside_writes_at_the_limit() -> None:
    """Those who want room and those who have time take turns; nobody fails while there is room."""
    device, _ = fill_with_holes(300)
    device.mem_limit = device.counters()["mem_used_total"] + (1 << 20)
    done = threading.Event()
    failures: list[str] = []

    def compact() -> None:
        while not done.is_set():
            device.compact(65536)
            device.compact()

    def write(first: int) -> None:
        try:
            for block in range(first, first + 300):
                device.write(noise(block)[:3800] + bytes(BLOCK - 3800), block * BLOCK)
        except PoolFullError as error:
            failures.append(f"{block - first}: {error}")

    compactor = threading.Thread(target=compact)
    compactor.start()
    writers = [threading.Thread(target=write, args=(10_000 + 1000 * me,)) for me in range(4)]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    compactor.join()
    assert not failures  # 600 + 1200 objects want 1692 pages of those that there are
    assert device.counters()["mem_used_total"] <= device.mem_limit
    device.check()


def test_extents_ask_for_the_gil_seldom() -> None:
    """Where another thread computes, each time costs a turn of that one: here 20 ms, of 4096 extents 82 s."""
    device = Device(4096 * BLOCK)
    for block in range(0, 4096, 2):
        device.write(noise(block), block * BLOCK)
    interval = sys.getswitchinterval()
    ended = threading.Event()

    def compute() -> None:
        while not ended.is_set():
            pass

    computer = threading.Thread(target=compute)
    sys.setswitchinterval(0.02)
    computer.start()
    try:
        began = time.monotonic()
        assert len(device.extents(0, 4096 * BLOCK)) == 4096
        assert time.monotonic() - began < 20
    finally:
        ended.set()
        sys.setswitchinterval(interval)
        computer.join()


@needs_real_time
@pytest.mark.skipif(SANITIZED, reason="a sanitizer has memory that cannot be locked")
def test_every_thread_has_the_priority_of_its_work(tmp_path: Path) -> None:
    """With swap=local all threads are real-time, those that serve more than others; not who refills."""
    code = """
        import os, sys, threading, time
        from zramd.kernel import protection
        from zramd.settings import config
        from zramd.server.fronts.nbd import Nbd
        from zramd.server.server import prepare

        protection.prepare = lambda: None     # the rights for it are another matter
        settings = {"size": "16M", "swap": "local", "reserve": "1M", "rundir": sys.argv[1]}
        server = prepare(config.parse(settings.items()), Nbd(lambda: None)).start()
        def name(task):
            return open(f"/proc/self/task/{task}/comm").read().strip()

        def tasks():
            return os.listdir("/proc/self/task")

        while not {"zramd", "zramd-worker", "zramd-log", "zramd-refill"} <= set(map(name, tasks())):
            time.sleep(0.01)
        refiller, = (int(task) for task in tasks() if name(task) == "zramd-refill")
        while os.sched_getscheduler(refiller) != os.SCHED_OTHER:
            time.sleep(0.01)
        before = tasks()
        client = threading.Thread(target=time.sleep, args=(60,), daemon=True)
        client.start()
        names = {}
        for task in tasks():
            names[name(task) if task in before else "client"] = int(task)
        main = threading.main_thread().native_id
        names = {role: task for role, task in names.items() if task != main} | {"main": main}
        for role, task in sorted(names.items()):
            policy = {os.SCHED_OTHER: "ordinary", os.SCHED_RR: "real-time"}[os.sched_getscheduler(task)]
            print(role, policy, os.sched_getparam(task).sched_priority)
        print("nice", os.getpriority(os.PRIO_PROCESS, names["zramd-refill"]))
        server.stop()
    """
    found = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code), tmp_path / "run"],
        env={**os.environ, "PYTHONMALLOC": "malloc"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert found.stdout.splitlines() == [
        "client real-time 2",
        "main real-time 2",
        "zramd real-time 1",
        "zramd-log real-time 1",
        "zramd-refill ordinary 0",
        "zramd-worker real-time 1",
        "nice -20",
    ]
