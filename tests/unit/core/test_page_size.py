"""Kernels whose page is larger than 4096 bytes, as a preload plays them: data, and what counts as memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.pages import PAGE
from support.run import SANITIZED, preloaded

from zramd.core.pool.size_classes import CLASSES, layout_sum, size_classes
from zramd.errors import StateError
from zramd.server import statefile

SHIM = Path(__file__).parents[2] / "support" / "shim_pages.c"

USE = """
import os, random, sys
from zramd import Device
from zramd.core.device.device import state_layout
from zramd.core.memory.region import page_size

PAGE, kept, seed = int(sys.argv[1]), sys.argv[2] == "state", int(sys.argv[3])
BLOCK, BLOCKS = 4096, 2048
assert page_size() == PAGE, page_size()
fd = -1
if kept:
    fd = os.memfd_create("zramd")
    os.ftruncate(fd, state_layout(BLOCKS * BLOCK)["bytes"])
    assert state_layout(BLOCKS * BLOCK)["bytes"] % PAGE == 0
rnd = random.Random(seed)
device = Device(BLOCKS * BLOCK, state=fd)
model = {}

def content():
    kind = rnd.randrange(4)
    if kind == 0:
        return rnd.randbytes(BLOCK)
    if kind == 1:
        return rnd.randbytes(8) * 512
    return rnd.randbytes(rnd.choice((rnd.randrange(8, 300), rnd.randrange(300, 3800)))).ljust(BLOCK, b"\\0")

def resident():
    # Of a kernel with pages of PAGE bytes: what is mapped of one is all of it.
    maps = [line.split()[:2] for line in open("/proc/self/maps")]
    maps = [(*(int(word, 16) for word in where.split("-")), mode) for where, mode in maps]
    # The arena is what is followed by gigabytes of address space that it will grow into.
    (end, last), = [
        (high[0], high[1])
        for low, high in zip(maps, maps[1:])
        if low[1] == high[0] and low[2] == "rw-p" and high[2] == "---p" and high[1] - high[0] > 1 << 30
    ]
    layout = state_layout(BLOCKS * BLOCK)
    start = last - layout["spans"] * layout["span_size"]
    own = os.sysconf("SC_PAGESIZE")     # of the kernel that plays the other
    with open("/proc/self/pagemap", "rb") as pagemap:
        pagemap.seek(start // own * 8)
        entries = pagemap.read((end - start) // own * 8)
    there = [at for at in range(0, len(entries) // 8) if entries[at * 8 + 7] & 0x80]
    return len({(start + at * own) // PAGE for at in there}) * PAGE

def check():
    device.check()
    buf = bytearray(BLOCK)
    for block in range(BLOCKS):
        device.read(buf, block * BLOCK)
        assert buf == model.get(block, bytes(BLOCK)), f"block {block} is wrong"
    used = device.counters()["mem_used_total"]
    assert used % PAGE == 0
    return used

for turn in range(6):
    for block in rnd.sample(range(BLOCKS), 900):
        model[block] = content()
        device.write(model[block], block * BLOCK)
    for block in rnd.sample(sorted(model), len(model) * rnd.randrange(2, 9) // 10):
        device.trim(block * BLOCK, BLOCK)
        del model[block]
    check()
    used = device.counters()["mem_used_total"]
    freed = device.compact()
    assert check() == used - freed * BLOCK
    assert device.counters()["freeable_pages"] == 0
    if kept:
        device = Device(BLOCKS * BLOCK, state=fd)
        assert device.counters()["leaked_objects"] == 0
        check()
if not kept:
    used = device.counters()["mem_used_total"]
    assert used == resident() > 0, (used, resident())
device.mem_limit = 1 << 20
for block in range(BLOCKS):
    try:
        data = content()
        device.write(data, block * BLOCK)
        model[block] = data
    except OSError:
        pass
check()
while model:
    block, _ = model.popitem()
    device.trim(block * BLOCK, BLOCK)
device.compact()
assert check() == 0
device.reset()
device.mem_limit = 0
device.reserve_start(2 << 20)
model = {block: content() for block in range(500)}
for block, data in model.items():
    device.write(data, block * BLOCK)
check()
device = Device(BLOCKS * BLOCK)
device.reserve_start(32 << 20)
# What was asked for is ready, and at most one more span of each length that this kernel allows.
assert 0 <= device.counters()["reserve_bytes"] - (32 << 20) <= 136 * BLOCK, device.counters()["reserve_bytes"]
for block in range(400):
    device.write(rnd.randbytes(BLOCK), block * BLOCK)
# A raw block takes a page of 4096 bytes whatever the kernel's is; with a reserve, one that was there before.
counters = device.counters()
assert counters["mem_used_total"] <= (400 + 32) * BLOCK, counters["mem_used_total"] // BLOCK
assert counters["reserve_misses"] == 0, counters["reserve_misses"]
for turn in range(3000):
    at = rnd.randrange(400) * BLOCK
    device.trim(at, BLOCK) if rnd.random() < 0.5 else device.write(rnd.randbytes(BLOCK), at)
device.check()
print("right")
"""


@pytest.fixture(scope="module")
def shims(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The preload for each page size."""
    folder = tmp_path_factory.mktemp("shims")
    made = {}
    for size in (16384, 65536, 131072):
        if size <= PAGE:
            continue
        made[size] = folder / f"pages-{size}.so"
        define = f"-DSHIM_PAGE={size}UL"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O1", define, "-o", made[size], SHIM], check=True)
    return made


def run(shim: Path | None, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ} | (preloaded(shim) if shim else {})
    return subprocess.run(
        [sys.executable, "-c", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("size", [size for size in (4096, 16384, 65536) if size >= PAGE])
@pytest.mark.parametrize("where", ["anonymous", "state"])
def test_data_is_right_and_memory_counted(shims: dict[int, Path], size: int, where: str) -> None:
    if SANITIZED and where == "anonymous":
        pytest.skip("a sanitizer has mappings of its own beside those that are counted here")
    for seed in range(2):
        done = run(shims.get(size), USE, size, where, seed)
        assert (done.stdout, done.returncode) == ("right\n", 0), done.stderr


def test_larger_pages_are_refused_in_one_sentence(shims: dict[int, Path]) -> None:
    for make in ("Device(1 << 20)", "Zsmalloc(10)"):
        done = run(
            shims[131072],
            f"from zramd import Device, Zsmalloc\ntry: {make}\nexcept MemoryError as error: print(error)",
        )
        assert done.stdout == "this kernel has pages of 131072 bytes: zramd needs one with 4096 to 65536\n", (
            done.stderr
        )


def test_zspages_are_whole_pages() -> None:
    assert size_classes(PAGE // 4096) == CLASSES
    for unit in (1, 4, 16):
        for size, pages, objs in size_classes(unit):
            assert pages % unit == 0
            assert objs == pages * 4096 // size


@pytest.mark.skipif(PAGE == 65536, reason="there are no larger pages that zramd can do with")
def test_a_state_is_tied_to_its_page_size(shims: dict[int, Path], memory_folder: Path) -> None:
    """What a kernel with other pages has laid out is refused in a sentence that says so, both ways."""
    assert len({layout_sum(unit) for unit in (1, 2, 4, 8, 16)}) == 5
    make = "import sys; from zramd.server import statefile; statefile.open_state(sys.argv[1], 1 << 20, False)"
    own = memory_folder / "own"
    assert run(None, make, own).returncode == 0
    for size in (size for size in (16384, 65536) if size > PAGE):
        other = memory_folder / str(size)
        assert run(shims[size], make, other).returncode == 0
        with pytest.raises(
            StateError, match=rf"^state .* kernel with pages of {size} bytes, this one has {PAGE}: "
        ):
            statefile.open_state(str(other), 1 << 20, False)
        refused = run(shims[size], make, own)
        assert f"kernel with pages of {PAGE} bytes, this one has {size}: " in refused.stderr
