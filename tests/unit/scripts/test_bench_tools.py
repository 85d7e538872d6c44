"""What scripts/bench computes. What it measures is not tested."""

import random
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts" / "lib"))

from bench import density_rows, page
from bench.kernel_pool import KernelPool, Moved, Pool, SizeClass, Zspage, size_classes
from bench.moves import CountedDevice, per_page, pool_of
from bench.results import Report, Table

BLOCK = 4096


def test_size_classes_are_those_of_a_kernel() -> None:
    classes, _ = size_classes()
    assert len(classes) == 119
    by_size = {c.size: (c.pages, c.objs) for c in classes}
    # Some of what the kernel makes of the rule: pages and objects of a zspage.
    assert (
        by_size.items()
        >= {
            32: (1, 128),
            48: (3, 256),
            208: (3, 59),
            1216: (3, 10),
            2176: (8, 15),
            3632: (8, 9),
            4096: (1, 1),
        }.items()
    )


@pytest.mark.parametrize(
    ("payload", "size"),
    [(1, 32), (24, 32), (25, 48), (40, 48), (41, 64), (3624, 3632), (3625, 4096), (4096, 4096)],
)
def test_class_of_a_payload(payload: int, size: int) -> None:
    assert KernelPool().class_of(payload).size == size


def counts(size_class: SizeClass) -> list[int]:
    return sorted(len(zspage.objects) for members in size_class.lists for zspage in members)


def pool_with(size_class: SizeClass, *inuse: int) -> Pool:
    pool = Pool([size_class])
    name = 0
    for count in inuse:
        pool.place(Zspage(size_class), range(name, name + count))
        name += count
    return pool


def test_compaction_goes_from_the_emptiest_to_the_fullest() -> None:
    size_class = SizeClass(400, 1, 10)
    moved = pool_with(size_class, 1, 9, 5, 3, 10).compact()
    # 1 fills up 9; then 3 goes to 5. Two places are left: less than a zspage's worth.
    assert (moved.objects, moved.bytes, moved.pages_freed) == (4, 1600, 2)
    assert counts(size_class) == [8, 10, 10]


def test_what_has_less_than_a_zspage_of_holes_is_left_alone() -> None:
    size_class = SizeClass(400, 1, 10)
    assert pool_with(size_class, 5, 5, 9).compact().pages_freed == 1
    size_class = SizeClass(400, 1, 10)
    assert pool_with(size_class, 5, 6, 10).compact().objects == 0


@given(st.lists(st.integers(1, 13), max_size=40))
def test_compaction_frees_what_the_kernel_says_it_can(inuse: list[int]) -> None:
    size_class = SizeClass(624, 2, 13)
    pool = pool_with(size_class, *inuse)
    promised = (13 * len(inuse) - sum(inuse)) // 13
    moved = pool.compact()
    assert moved.pages_freed == 2 * promised
    assert size_class.inuse == sum(counts(size_class)) == sum(inuse)
    assert size_class.zspages == len(counts(size_class)) == len(inuse) - promised
    for name in range(sum(inuse)):
        pool.free(name)
    assert pool.pages == 0


def test_allocation_takes_the_fullest_zspage_and_the_last_of_its_group() -> None:
    size_class = SizeClass(400, 1, 10)
    pool = pool_with(size_class, 7, 3, 9, 9)
    for name in range(100, 105):
        pool.malloc(size_class, name)
    # The two with 9 are filled up, then the one with 7.
    assert counts(size_class) == [3, 10, 10, 10]
    pool.malloc(size_class, 105)
    assert counts(size_class) == [4, 10, 10, 10]


def test_kernel_pool_keeps_the_blocks_it_is_told() -> None:
    pool = KernelPool()
    dice = random.Random(3)
    sizes: dict[int, int] = {}
    for _ in range(3000):
        block, size = dice.randrange(300), dice.choice((0, 100, 100, 900, 4096))
        pool.store(block, size)
        sizes[block] = size
        if dice.random() < 0.01:
            pool.compact()
    assert sum(c.inuse for c in pool.classes) == sum(size > 0 for size in sizes.values())
    for block in sizes:
        pool.store(block, 0)
    assert pool.pages == 0


def block_at(zspage: int, chunk: int, handle: int) -> dict[str, object]:
    return {
        "kind": "lz4",
        "class_index": 1,
        "zspage": zspage,
        "zspage_objs": 4,
        "zspage_pages": 1,
        "chunk": chunk,
        "handle": handle,
        "obj": zspage * 65536 + chunk * 1024,
    }


TABLE = [(0, 512, *[0] * 14, 1, 0), (1, 1024, *[0] * 14, 1, 0)]


def test_same_zspages_as_the_device() -> None:
    blocks = [block_at(7, 0, 1), block_at(7, 2, 2), block_at(7, 3, 3), block_at(9, 1, 4), {"kind": "hole"}]
    pool = pool_of(blocks, TABLE)
    assert [(c.size, c.pages, c.objs, c.zspages, c.inuse) for c in pool.classes] == [(1024, 1, 4, 2, 4)]
    moved = pool.compact()
    assert (moved.objects, moved.bytes, moved.pages_freed) == (1, 1024, 1)
    assert per_page(moved) == 1024


def test_pages_that_are_not_there_are_not_freed() -> None:
    """A zspage of zramd has only the pages that were touched: the kernel's rules free no more than those."""
    table = [(0, 512, *[0] * 14, 1, 0), (1, 2048, *[0] * 14, 3, 0)]
    blocks = [
        {**block_at(7, 0, 1), "zspage_objs": 6, "zspage_pages": 1},
        {**block_at(7, 1, 2), "zspage_objs": 6, "zspage_pages": 1},
        {**block_at(9, 3, 3), "zspage_objs": 6, "zspage_pages": 2},
    ]
    moved = pool_of(blocks, table).compact()
    # The target grows by a page, and the source has two.
    assert (moved.objects, moved.bytes, moved.pages_freed) == (1, 2048, 1)
    assert per_page(Moved()) == 0


def test_a_compaction_of_the_device_is_counted() -> None:
    """As much as the kernel's algorithm frees, and then the rest."""
    device = CountedDevice(600)
    dice = random.Random(4)
    for block in range(600):
        device.write(small_block(dice), block * BLOCK)
    for block in dice.sample(range(600), 400):
        device.trim(block * BLOCK, BLOCK)
    before = device.device.counters()
    device.compact()
    after = device.device.counters()
    (whole,), (as_much,), (same,) = device.zramd, device.as_much, device.same_state
    assert whole.pages_freed == after["pages_compacted"] - before["pages_compacted"] > 0
    assert whole.bytes == after["bytes_migrated"] > 0
    assert same.pages_freed <= as_much.pages_freed <= whole.pages_freed


def test_trace_on_a_device() -> None:
    """Both the device and the model beside it see all requests; the marks say when."""
    trace = density_rows.Trace("small", 600, small_block)
    device = CountedDevice(trace.blocks)
    history = density_rows.run(trace, device, lambda: density_rows.usage_of(device.device.counters()))
    assert list(history.steps) == list(history.marks) == list(density_rows.STEPS)
    filled, freed, compacted, aged, end = history.marks.values()
    assert (filled, freed, compacted, end) == (600, 990, 990, aged)
    assert aged == freed + int(2 * 600 * 0.85)
    assert len(device.zramd) == len(device.same_state) == len(device.kernel) == 2
    assert sum(c.inuse for c in device.model.classes) == device.device.counters()["objs_used"]
    assert device.zramd[0].pages_freed > 0
    assert history.curve == sorted(history.curve, key=lambda point: point[0])
    ratios = {step: usage.frag_ratio for step, usage in history.steps.items()}
    assert ratios[density_rows.FREED_SOME] < ratios[density_rows.COMPACTED]


def small_block(dice: random.Random) -> bytes:
    return dice.randbytes(dice.choice((64, 300, 700))).ljust(BLOCK, b"\0")


def test_page_keeps_what_people_wrote() -> None:
    text = f"# Figures\n\n{page.START}old\n{page.END}\n## Why\n"
    assert page.filled(text, "new\n") == f"# Figures\n\n{page.START}new\n{page.END}\n## Why\n"
    with pytest.raises(ValueError, match="around what is to be replaced"):
        page.filled("# Figures\n", "new\n")


def test_tables_are_shown_everywhere() -> None:
    report = Report({"machine": "one"}, {})
    report.tables.append(Table("Steps", "MiB.", ["after", "used"], [["filling", "1.5"]]))
    assert "filling  1.5" in report.text()
    assert "## Steps\n\nMiB.\n\n| after | used |\n| --- | --- |\n| filling | 1.5 |\n" in report.markdown()
    assert report.as_dict()["tables"][0]["rows"] == [["filling", "1.5"]]
