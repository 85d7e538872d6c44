"""Room that is refused, by a file system or the kernel: what needed it fails, and says which it was."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from support.content import compressible, noise
from support.pages import UNIT
from support.run import SANITIZED, preloaded

from zramd import Device, PoolFullError, Zsmalloc
from zramd.core.device.device import state_layout

BLOCK = 4096
SIZE = 8 << 20
SHIM = Path(__file__).parents[2] / "support" / "shim_madvise.c"

# What each script begins with: a tmpfs of its own, which goes with the process.
HEAD = """
import gc, os, random, subprocess, sys, tempfile
from zramd import Device, PoolFullError
from zramd.server import statefile
from zramd.core.device import saving
from zramd.core.memory.region import page_size
BLOCK, PAGE, SIZE = 4096, page_size(), 8 << 20
UNIT, SLOTS = PAGE // BLOCK, PAGE // 8     # blocks that fit into a page, and whose slots do
folder = sys.argv[1]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=" + sys.argv[2], "zramd-test", folder], check=True)

def start(verify=False, name="state"):
    fd = statefile.open_state(folder + "/" + name, SIZE, verify)
    try:
        return Device(SIZE, state=fd, verify=verify)
    finally:
        os.close(fd)

def fill(left=0):
    with open(folder + "/filler", "ab", buffering=0) as filler:
        while (room := os.statvfs(folder).f_bavail * PAGE // BLOCK - left) > 0:
            filler.write(bytes(min(room, 4096) * BLOCK))

def empty():
    os.unlink(folder + "/filler")

def refused(work):
    try:
        work()
    except (PoolFullError, MemoryError) as error:
        return str(error)
    raise AssertionError("there was room")

def read(device, block):
    buf = bytearray(BLOCK)
    device.read(buf, block * BLOCK)
    return bytes(buf)

FULL = "the file system of the state is full"
"""


def in_tmpfs(folder: Path, code: str, size: str = "6m", **environment: str) -> str:
    """Run a script with a small tmpfs; what it prints. A SIGBUS fails the test."""
    command = (
        ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    )
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs")
    command += [sys.executable, "-c", HEAD + code, str(folder), size]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shim") / "madvise.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O1", "-o", path, SHIM], check=True)
    return path


def test_a_load_on_a_full_file_system(tmp_path: Path) -> None:
    """It touches slots that nobody has asked for yet."""
    code = """
source = Device(SIZE)
for block in range(0, SIZE // BLOCK, 512):
    source.zero(block * BLOCK, BLOCK, False)
for block in range(1, 200):
    source.write(random.Random(block).randbytes(900).ljust(BLOCK, b"\\0"), block * BLOCK)
stream = tempfile.TemporaryFile(dir="/dev/shm")
saving.save(source, stream.fileno())

def load():
    stream.seek(0)
    return saving.load(device, stream.fileno())

device = start()
for left in range(0, 40, 3):
    fill(left)
    assert FULL in refused(load), left
    assert device.counters()["pages_stored"] == 0
    device.check()
    empty()
assert load()["blocks"] == source.counters()["pages_stored"]
assert all(read(device, block) == read(source, block) for block in range(SIZE // BLOCK))
"""
    in_tmpfs(tmp_path, code)


@pytest.mark.parametrize("size", [1050, 1390, 1490, 1690, 1860, 2900])
def test_compaction_on_a_full_file_system(tmp_path: Path, size: int) -> None:
    """The pages that it wants back for a zspage with a bitmap may have gaps between them."""
    code = """
rnd = random.Random(SIZES)
device, model = start(), {}
for turn in range(60):
    for block in range(60):
        if block not in model:
            data = rnd.randbytes(SIZES - 20).ljust(BLOCK, b"\\0")
            try:
                device.write(data, block * BLOCK)
                model[block] = data
            except PoolFullError:
                pass
    for block in rnd.sample(sorted(model), int(len(model) * rnd.uniform(0.4, 0.95))):
        device.trim(block * BLOCK, BLOCK)
        del model[block]
    fill(rnd.randrange(0, 4))
    device.compact(rnd.choice((0, 0, 4096, 65536)))
    if turn % 10 == 9:
        del device
        device = start()
    empty()
    assert all(read(device, block) == model.get(block, bytes(BLOCK)) for block in range(60))
    device.check()
""".replace("SIZES", str(size))
    in_tmpfs(tmp_path, code, "2m")


def test_others_fill_the_file_system(tmp_path: Path) -> None:
    """All at once, while nothing is written to the device: the next page is not taken for granted."""
    code = """
SIZE *= UNIT    # as many pages of slots, whatever a page is
for writes in range(0, 70, 7):
    device = start(name=f"state{writes}")
    for block in range(writes):
        device.write(random.Random(block).randbytes(BLOCK), block * BLOCK)
    fill()
    stored = 0
    for block in range(2 * SLOTS - 24, 2 * SLOTS + 76):
        try:
            device.write(random.Random(block).randbytes(BLOCK), block * BLOCK)
            stored += 1
        except PoolFullError as error:
            assert FULL in str(error)
    assert stored < 50
    for block in range(3 * SLOTS, SIZE // BLOCK, 100):
        refused(lambda: device.zero(block * BLOCK, BLOCK, False))
    device.check()
    empty()
    device.write(random.Random(3000).randbytes(BLOCK), (4 * SLOTS - 48) * BLOCK)
    del device
    os.unlink(f"{folder}/state{writes}")
"""
    in_tmpfs(tmp_path, code, "150m")


def test_each_table_says_which_room_there_is_none_of(tmp_path: Path) -> None:
    """Slots, cells, classes of spans, the pool, a part of a block: none has anything to do with mem_limit."""
    code = """
SIZE *= UNIT    # as many pages of slots, whatever a page is
device = start()
device.write(b"x" * BLOCK, 0)
device.write(b"x" * BLOCK, (SLOTS + 88) * BLOCK)    # the slots of so many blocks are there
third = 2 * SLOTS * BLOCK   # whose slot is on the third page
fill()
assert refused(lambda: device.zero(third, BLOCK, False)).endswith(FULL)
assert refused(lambda: device.write(random.Random(1).randbytes(BLOCK), third)).endswith(FULL)
assert refused(lambda: device.write(b"part", third + 5)).endswith(FULL)
message = refused(lambda: [device.write(b"%08d" % i * 512, i * BLOCK) for i in range(SLOTS + 88)])
assert message.endswith(FULL), message
try:
    device.write(random.Random(1).randbytes(BLOCK), third)
except PoolFullError as error:
    assert error.errno == 28
assert read(device, 0)[:8] != bytes(8)
device.check()
empty()
device.write(b"y" * BLOCK, third)
device.mem_limit = PAGE
message = refused(lambda: [device.write(os.urandom(BLOCK), i * BLOCK) for i in range(9 * UNIT)])
assert message.endswith("mem_limit or the budget leaves no room"), message
"""
    in_tmpfs(tmp_path, code, f"{2 * UNIT}m")


def test_a_full_file_system_when_there_is_something_to_compact(tmp_path: Path) -> None:
    """A write makes room in the pool first, as it does below mem_limit."""
    code = """
device = start()
data = {}
for block in range(1500):
    data[block] = random.Random(block).randbytes(2500).ljust(BLOCK, b"\\0")
    device.write(data[block], block * BLOCK)
for block in range(1500):
    if block % 3:
        device.trim(block * BLOCK, BLOCK)
fill()
freeable = device.pressure()[0]
assert freeable > 100
stored = 0
for block in range(1, 1500, 3):
    try:
        device.write(random.Random(-block).randbytes(BLOCK), block * BLOCK)
        stored += 1
    except PoolFullError:
        pass
assert stored > 0.8 * min(freeable, 500), (stored, freeable)
assert all(read(device, block) == data[block] for block in range(0, 1500, 3))
device.check()
"""
    in_tmpfs(tmp_path, code)


@pytest.mark.parametrize(
    "use",
    [
        "device.zero(at, BLOCK, False)",
        "device.write(b'x' * BLOCK, at)",
        "device.write(random.Random(1).randbytes(BLOCK), at)",
        "device.write(b'part', at + 5)",
    ],
)
def test_room_for_a_slot_is_made_in_the_pool(tmp_path: Path, use: str) -> None:
    """What is stored finds room by itself here; the page for its slot is one that compaction frees."""
    code = f"""
device = start()
for block in range(600):
    device.write(b"%08d" % block * 512, block * BLOCK)
    device.zero(block * BLOCK, BLOCK)       # there are cells enough
data = {{}}
for block in range(300):
    data[block] = random.Random(block).randbytes(2500).ljust(BLOCK, b"\\0")
    device.write(data[block], block * BLOCK)
for block in range(300):
    if block % 3:
        device.trim(block * BLOCK, BLOCK)
fill()
assert device.pressure()[0] > 10
at = 1500 * BLOCK
{use}
for block in range(0, 300, 3):
    assert read(device, block) == data[block]
device.check()
"""
    in_tmpfs(tmp_path, code, "6m")


@pytest.mark.parametrize("left", range(4))
@pytest.mark.parametrize(
    "use",
    [
        "device.write(b'part', at + 5)",
        "device.zero(at + 5, 100, False)",
        "device.write(random.Random(1).randbytes(BLOCK), at)",
        "device.write(b'x' * BLOCK, at)",
    ],
)
def test_room_for_the_object_or_its_slot(tmp_path: Path, use: str, left: int) -> None:
    """Where there is too little for both it is refused: what is freed by that is no room that was made."""
    code = f"""
device = start()
device.write(random.Random(2).randbytes(2000).ljust(BLOCK, b"\\0"), 0)
fill({left})
at = 1500 * BLOCK
try:
    {use}
except PoolFullError:
    assert not any(read(device, 1500))
device.check()
empty()
{use}
device.check()
"""
    in_tmpfs(tmp_path, code, "1m")


def test_a_kernel_that_cannot_populate(tmp_path: Path, shim: Path) -> None:
    """Before Linux 5.14 the file system itself is asked for the room."""
    code = """
device = start()
stored = 0
for block in range(SIZE // BLOCK):
    try:
        device.write(random.Random(block).randbytes(BLOCK), block * BLOCK)
        stored += 1
    except PoolFullError as error:
        assert FULL in str(error)
assert 400 < stored < 512, stored
del device
device = start()
device.check()
assert device.counters()["recovered_blocks"] == stored
assert read(device, 7) == random.Random(7).randbytes(BLOCK)
"""
    environment = preloaded(shim) | {"SHIM_WHILE": "/", "SHIM_ERRNO": str(errno.EINVAL)}
    in_tmpfs(tmp_path, code, "2m", **environment)


def test_memory_that_the_kernel_refuses_is_not_a_full_file_system(tmp_path: Path, shim: Path) -> None:
    code = """
device = start()
device.write(random.Random(1).randbytes(BLOCK), 0)
open(os.environ["SHIM_WHILE"], "w").close()
message = refused(lambda: device.write(random.Random(1).randbytes(BLOCK), 1024 * BLOCK))
assert message.endswith("the system refuses memory"), message
assert read(device, 0) == random.Random(1).randbytes(BLOCK)
os.unlink(os.environ["SHIM_WHILE"])
for block in range(40):
    device.write(random.Random(block).randbytes(BLOCK), block * BLOCK)
device.check()
"""
    environment = preloaded(shim) | {"SHIM_ERRNO": str(errno.ENOMEM)}
    in_tmpfs(tmp_path, code, SHIM_WHILE=str(tmp_path.with_suffix(".refuse")), **environment)


def test_a_reset_that_gets_no_memory_for_its_tables(tmp_path: Path, shim: Path) -> None:
    code = """
device = start()
device.reserve_start(1 << 20)
device.write(b"secret" * 700, 0)
open(os.environ["SHIM_WHILE"], "w").close()
message = refused(device.reset)
assert message.startswith("the data is dropped, but the tables of an empty device are not resident: ")
assert message.endswith("the system refuses memory"), message
assert read(device, 0) == bytes(BLOCK)
os.unlink(os.environ["SHIM_WHILE"])
device.check()
device.write(b"new" * 700, 0)
device.reset()
device.check()
"""
    environment = preloaded(shim) | {"SHIM_ERRNO": str(errno.ENOMEM)}
    in_tmpfs(tmp_path, code, SHIM_WHILE=str(tmp_path.with_suffix(".refuse")), **environment)


@pytest.mark.parametrize("verify", [False, True])
def test_a_sparse_copy_is_taken_over_on_a_full_file_system(tmp_path: Path, verify: bool) -> None:
    """Pages of zeros are missing in it: they are asked for before they are touched."""
    code = """
verify = VERIFY
device, model = start(verify), {}
rnd = random.Random(1)
for block in range(600):
    # Payloads that end in the page before the one that their chunk ends on.
    model[block] = rnd.randbytes(rnd.randrange(1800, 3600)).ljust(BLOCK, b"\\0")
    device.write(model[block], block * BLOCK)
del device
subprocess.run(["cp", "--sparse=always", folder + "/state", folder + "/copy"], check=True)
os.unlink(folder + "/state")
before = os.stat(folder + "/copy").st_blocks
fill()
try:
    start(verify, "copy")
except PoolFullError as error:
    assert str(error).endswith("taking over the state: " + FULL), error
empty()
device = start(verify, "copy")
device.check()
assert all(read(device, block) == model[block] for block in model)
""".replace("VERIFY", str(verify))
    in_tmpfs(tmp_path, code, "8m")


@pytest.mark.parametrize("verify", [False, True])
def test_damage_on_a_full_file_system(tmp_path: Path, verify: bool) -> None:
    """What leads to a page that is not there must not be followed: reading it would take that page."""
    code = """
from zramd.core.device.device import state_layout
from contextlib import suppress
from zramd.errors import CorruptionError, CorruptObjectError
verify = VERIFY
layout = state_layout(SIZE)
arena = layout["bytes"] - layout["spans"] * layout["span_size"]
cells = arena - -(-8 * layout["cells"] // PAGE) * PAGE
device, model = start(verify), {}
rnd = random.Random(1)
for block in range(300):
    model[block] = rnd.randbytes(rnd.randrange(100, 4096)).ljust(BLOCK, b"\\0")
    device.write(model[block], block * BLOCK)
del device
fd = os.open(folder + "/state", os.O_RDWR)

def use(live, at, bit):
    device = start(verify) if live else None
    byte = os.pread(fd, 1, at)[0]
    os.pwrite(fd, bytes([byte ^ 1 << bit]), at)
    fill()
    with suppress(PoolFullError, CorruptionError) if not (live or verify) else suppress(PoolFullError):
        device = device or start(verify)
        for block in model:
            with suppress(CorruptObjectError):
                assert read(device, block) == model[block] or not verify
        with suppress(CorruptionError):
            device.check()
    empty()
    os.pwrite(fd, bytes([byte]), at)

for bit in range(16, 48):
    slot = (1 << 16) + 8 * (bit * 5)
    handle = int.from_bytes(os.pread(fd, 4, slot + 2), "little")
    for live in (False, True) if verify else (False,):
        use(live, slot + bit // 8, bit % 8)     # the handle
        use(live, cells + 8 * handle + bit // 8, bit % 8)   # the span
        use(live, cells + 8 * handle + 1, bit % 8)  # the place in it
""".replace("VERIFY", str(verify))
    in_tmpfs(tmp_path, code)


def test_memory_refused_for_what_the_pool_grows_into() -> None:
    code = """
import random, resource
from zramd import Device
device = Device(1 << 30)
device.write(b"x" * 4096, 0)
now = int(next(line for line in open("/proc/self/status") if line.startswith("VmData")).split()[1]) << 10
resource.setrlimit(resource.RLIMIT_DATA, (now + (4 << 20), resource.RLIM_INFINITY))
rnd = random.Random(1)
try:
    for block in range(1 << 14):
        device.write(rnd.randbytes(4096), block * 4096)
except MemoryError as error:
    print(error)
device.check()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.startswith("write of 4096 bytes at "), done.stderr
    assert done.stdout.endswith(": the system refuses memory\n")


@pytest.mark.skipif(SANITIZED, reason="a sanitizer takes all the address space that there is")
def test_what_starts_can_be_taken_over(memory_folder: Path) -> None:
    """With no more address space than it was started with, and no thread for it."""
    code = """
import os, random, resource, sys
from zramd import Device
from zramd.server import statefile
path, limit, size, turn = sys.argv[1], int(sys.argv[2]), 64 << 30, sys.argv[3]
fd = statefile.open_state(path, size, False)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
device = Device(size, state=fd, progress=lambda done, total: None)
rnd = random.Random(1)
for block in range(0, 40000):
    data = rnd.randbytes(60).ljust(4096, b"\\0")
    if turn == "first":
        device.write(data, block << 12)
    elif block % 100 == 0:
        buf = bytearray(4096)
        device.read(buf, block << 12)
        assert buf == data
print("right")
"""
    layout = state_layout(64 << 30)
    # As much as its tables take beside the file, and little more.
    limit = layout["bytes"] + layout["spans"] * 38 + (130 << 20)
    for turn in ("first", "second"):
        path = memory_folder / "state"
        done = subprocess.run(
            [sys.executable, "-c", code, path, str(limit), turn], capture_output=True, text=True, timeout=120
        )
        assert done.stdout == "right\n", (turn, done.stderr)


def flags() -> dict[tuple[int, int], set[str]]:
    """The flags of the mappings of this process."""
    found = {}
    place = (0, 0)
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if words[0] == "VmFlags:":
            found[place] = set(words[1:])
        elif not words[0].endswith(":"):
            low, high = words[0].split("-")
            place = (int(low, 16), int(high, 16))
    return found


@pytest.mark.parametrize("where", ["anonymous", "state"])
def test_no_memory_for_data_is_in_a_core_dump(where: str) -> None:
    fd = -1
    if where == "state":
        fd = os.memfd_create("zramd")
        os.ftruncate(fd, state_layout(SIZE)["bytes"])
    before = flags()
    device = Device(SIZE, state=fd)
    for block in range(500):
        device.write((noise(block), compressible(block))[block % 2], block * BLOCK)
    device.write(b"part", 10)
    new = {place: found for place, found in flags().items() if place not in before}
    # Those of the core are known by another flag: no huge pages.
    regions = {place: found for place, found in new.items() if "nh" in found}
    assert sum(high - low for low, high in regions) > state_layout(SIZE)["bytes"]
    assert all("dd" in found for found in regions.values())


@pytest.mark.skipif(SANITIZED, reason="a sanitizer has terabytes that a core dump would hold")
def test_scratch_is_not_in_a_core_dump() -> None:
    """It is of the heap, which is dumped otherwise: nothing there may hold what was written."""
    code = """
import mmap, re
from pathlib import Path
from zramd import Device
device = Device(1 << 20)
buf = mmap.mmap(-1, 4096)   # not of the heap, and not dumped
buf.madvise(mmap.MADV_DONTDUMP)
for i in range(8):
    buf.seek(0)
    for _ in range(560):
        buf.write(b"MARK%03d" % i)
    device.write(memoryview(buf)[:3900], i * 4096 + 3)  # a part of a block goes through scratch
dumped = []
lines = Path("/proc/self/smaps").read_text().splitlines()
for line in lines:
    first = line.split()[0]
    if not first.endswith(":"):
        low, high = (int(word, 16) for word in first.split("-"))
        readable = line.split()[1].startswith("r") and "[v" not in line
    elif first == "VmFlags:" and readable and "dd" not in line.split():
        dumped.append((low, high))
found = 0
with open("/proc/self/mem", "rb", buffering=0) as memory:
    for low, high in dumped:
        memory.seek(low)
        data = memory.read(high - low)
        found += len(re.findall(b"(?:MARK00[0-7]){6}", data))
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "0\n", (done.stdout, done.stderr)


@pytest.mark.parametrize("size", [1, 4096, 8192, 65536])
def test_a_small_reserve(size: int) -> None:
    """What is asked for of it fades until nothing is left to divide by."""
    device = Device(1 << 20)
    device.reserve_start(size)
    for turn in range(40):
        for block in range(256):
            device.write(compressible(turn * 256 + block, 3800), block * BLOCK)
        device.trim(0, 1 << 20)
    device.check()
    assert device.counters()["reserve_bytes"] >= size


def test_a_reserve_that_cannot_grow_gives_back_what_is_too_much(tmp_path: Path) -> None:
    """Spans of some lengths are missing, without room for them; of another length there are far too many."""
    code = """
import threading, time
device = start()
device.reserve_start(1 << 20)
refiller = threading.Thread(target=device.reserve_keep)
refiller.start()
rnd = random.Random(1)
for block in range(900):
    device.write(rnd.randbytes(2500).ljust(BLOCK, b"\\0"), block * BLOCK)
time.sleep(0.3)
fill()
for block in range(900, 2048):      # the reserve is all in use then
    try:
        device.write(rnd.randbytes(300).ljust(BLOCK, b"\\0"), block * BLOCK)
    except PoolFullError:
        break
device.trim(0, 900 * BLOCK)
end = time.monotonic() + 20
while device.counters()["reserve_bytes"] > 2 << 20 and time.monotonic() < end:
    time.sleep(0.01)
print(device.counters()["reserve_bytes"] >> 20)
device.check()
device.reserve_stop()
refiller.join()
"""
    assert int(in_tmpfs(tmp_path, code)) <= 2


def test_messages_of_what_is_not_a_file_system() -> None:
    device = Device(SIZE, mem_limit=BLOCK)
    with pytest.raises(
        PoolFullError, match=r"^\[Errno 28\] write of .*: mem_limit or the budget leaves no room$"
    ):
        for block in range(10):
            device.write(noise(block), block * BLOCK)
    pool = Zsmalloc(2)
    for _ in range(2):
        pool.malloc(1)
    with pytest.raises(MemoryError, match="the pool holds 2 objects, as many as it may"):
        pool.malloc(1)


def test_limits_of_this_process_are_as_they_were() -> None:
    assert resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY
