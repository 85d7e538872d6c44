"""The allocator by itself: what its functions promise, and the geometry behind them."""

import random

import pytest
from support.pages import UNIT, whole_pages

from zramd import Device, HandleError, PoolFullError, Zsmalloc

PAGE = 4096
HEADER = 4


def rows(pool: Zsmalloc) -> dict[int, tuple[int, ...]]:
    return {row[1]: row for row in pool.table()}


def fill(pool: Zsmalloc, count: int, size: int, first: int = 0) -> list[int]:
    handles = [pool.malloc(size) for _ in range(count)]
    for i, handle in enumerate(handles, first):
        pool.write(handle, i.to_bytes(4, "little") + bytes([i % 256]) * (size - 4))
    return handles


def verify(pool: Zsmalloc, handles: dict[int, int], size: int) -> None:
    for i, handle in handles.items():
        assert pool.read(handle, size) == i.to_bytes(4, "little") + bytes([i % 256]) * (size - 4)


@pytest.mark.parametrize("size", [1, 2, 28, 29, 100, 2048, 3844, 3845, 4095, 4096])
def test_round_trip(size: int) -> None:
    pool = Zsmalloc(1000)
    handle = pool.malloc(size)
    assert pool.read(handle, size) == bytes(size)
    data = random.Random(size).randbytes(size)
    pool.write(handle, data)
    assert pool.read(handle, size) == data
    pool.check()
    pool.free(handle)
    pool.check()
    assert pool.stats()["objs_used"] == 0


@pytest.mark.parametrize("size", [0, 4097, 1 << 40, 1 << 80, -1])
def test_sizes_out_of_range_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"malloc of {size} bytes"):
        Zsmalloc(10).malloc(size)


@pytest.mark.parametrize("handle", [0, 1, 7, 1 << 20, (1 << 64) - 1, 1 << 80, -1])
def test_handles_that_are_not_live(handle: int) -> None:
    pool = Zsmalloc(10)
    for use in (lambda: pool.free(handle), lambda: pool.read(handle), lambda: pool.write(handle, b"x")):
        with pytest.raises(HandleError, match=str(handle)):
            use()
    pool.check()


def test_double_free_is_an_error() -> None:
    pool = Zsmalloc(10)
    handle = pool.malloc(100)
    other = pool.malloc(100)
    pool.free(handle)
    with pytest.raises(HandleError):
        pool.free(handle)
    pool.write(other, b"still here")
    pool.check()


def test_writes_and_reads_beyond_an_object_are_refused() -> None:
    pool = Zsmalloc(10)
    handle = pool.malloc(100)
    with pytest.raises(ValueError, match="4096 bytes"):
        pool.write(handle, bytes(4096))
    with pytest.raises(ValueError, match="4096 bytes"):
        pool.read(handle, 4096)
    pool.free(handle)  # the refused calls left no pin behind
    pool.check()


@pytest.mark.parametrize("size", [1, 10, 28, 29, 700, 3000, 3844, 3845, 4000])
def test_an_object_has_the_size_it_was_made_with(size: int) -> None:
    """Not that of its chunk, which is up to 15 bytes larger, or 251 for a raw page."""
    pool = Zsmalloc(10)
    handle = pool.malloc(size)
    pool.write(handle, b"x" * size)
    for refused in (
        lambda: pool.write(handle, bytes(size + 1)),
        lambda: pool.read(handle, size + 1),
        lambda: pool.read(handle, -1),
    ):
        with pytest.raises(ValueError, match=f"handle {handle}, which has {size}"):
            refused()
    assert pool.read(handle) == b"x" * size
    pool.compact()
    assert pool.read(handle) == b"x" * size


def test_numbers_out_of_range_are_refused() -> None:
    pool = Zsmalloc(10)
    for number in (-1, 1 << 64):
        with pytest.raises(ValueError, match=f"mem_limit {number} is out of range"):
            pool.mem_limit = number
        with pytest.raises(ValueError, match=f"mem_limit {number} is out of range"):
            Zsmalloc(10, mem_limit=number)
        with pytest.raises(ValueError, match=f"budget {number} is out of range"):
            pool.compact(number)
        with pytest.raises(ValueError, match=f"max_objects {number} is out of range"):
            Zsmalloc(number)


def test_occupancy_is_of_what_takes_memory() -> None:
    """Places on pages that went back are no holes: after compaction hardly any other is free."""
    rnd = random.Random(6)
    pool = Zsmalloc(20000)
    handles = [pool.malloc(rnd.randint(400, 3800)) for _ in range(12000)]
    for handle in rnd.sample(handles, 7000):
        pool.free(handle)
    before = pool.stats()
    freed = pool.compact()
    after = pool.stats()
    assert before["mem_used_total"] - after["mem_used_total"] == freed * PAGE
    assert freed == pytest.approx(before["freeable_pages"], rel=0.01)
    assert after["freeable_pages"] == 0
    assert before["objs_used"] / before["objs_allocated"] < 0.7
    assert after["objs_used"] / after["objs_allocated"] > 0.97


def test_max_objects() -> None:
    pool = Zsmalloc(3)
    for _ in range(3):
        pool.malloc(10)
    with pytest.raises(MemoryError):
        pool.malloc(10)
    with pytest.raises(ValueError, match="out of range"):
        Zsmalloc(0)
    with pytest.raises(ValueError, match="out of range"):
        Zsmalloc(1 << 31)


def test_class_geometry() -> None:
    table = Zsmalloc(10).table()
    sizes = [row[1] for row in table]
    assert sizes == sorted(set(sizes))
    assert sizes[0] == 32
    assert sizes[-1] == PAGE
    for _, size, *_, pages, _ in table[:-1]:
        assert 1 <= pages <= 16
        objs = pages * PAGE // size
        assert pages % UNIT == 0
        waste = [(n * PAGE % size) / n for n in range(UNIT, 17, UNIT) if n * PAGE >= size]
        assert (pages * PAGE % size) / pages == min(waste), size
        assert objs > pages, f"class {size} saves nothing over a raw page"


def test_every_size_goes_to_the_smallest_class_that_holds_it() -> None:
    pool = Zsmalloc(5000)
    sizes = [row[1] for row in pool.table()]
    for size in range(1, PAGE + 1):
        before = {row[1]: row[14] for row in pool.table()} if size % 97 == 1 else None
        pool.malloc(size)
        if before is not None:
            (used,) = (row[1] for row in pool.table() if row[14] != before[row[1]])
            wanted = next(s for s in sizes if s >= size + HEADER or s == PAGE)
            assert used == wanted
    pool.check()


def test_pages_are_counted_one_by_one() -> None:
    """A zspage costs the pages that were touched, not all that it may have."""
    pool = Zsmalloc(100)
    chunk, pages = next((row[1], row[16]) for row in pool.table() if row[1] >= 3600 + HEADER)
    assert pages > UNIT
    for count in range(1, pages * PAGE // chunk + 1):
        pool.malloc(3600)
        assert pool.stats()["mem_used_total"] == whole_pages(count * chunk)
    pool.check()


def test_freed_zspages_are_kept_in_a_small_stock_and_given_back() -> None:
    pool = Zsmalloc(10000)
    handles = fill(pool, 5000, 1000)
    full = pool.stats()["mem_used_total"]
    assert full >= 5000 * 1000
    for handle in handles:
        pool.free(handle)
    stats = pool.stats()
    assert 0 < stats["stock_pages"] <= 64
    assert stats["mem_used_total"] == stats["stock_pages"] * PAGE
    pool.check()
    pool.compact()
    assert pool.stats()["mem_used_total"] == 0
    assert pool.stats()["mem_used_max"] == full
    pool.check()


def test_huge_objects_free_their_page_by_themselves() -> None:
    """Those that share a page of the kernel when all of them are free."""
    pool = Zsmalloc(1000)
    handles = fill(pool, 800, PAGE)
    assert pool.stats()["mem_used_total"] == 800 * PAGE
    freed = [i for i in range(800) if i // UNIT % 2 == 0]
    for i in freed:
        before = pool.stats()["mem_used_total"]
        pool.free(handles[i])
        assert pool.stats()["mem_used_total"] == before or i % UNIT == UNIT - 1
    spares = pool.stats()["mem_used_total"] // PAGE - 400
    assert 0 < spares <= 32 if UNIT == 1 else spares == 0  # larger ones are not kept
    assert pool.stats()["freeable_pages"] == spares
    pool.compact()
    assert pool.stats()["mem_used_total"] == 400 * PAGE
    verify(pool, {i: handle for i, handle in enumerate(handles) if i not in freed}, PAGE)
    pool.check()


@pytest.mark.parametrize("size", [20, 100, 333, 1000, 1365, 2000, 3000, 3844])
@pytest.mark.parametrize("keep", [0.05, 0.35, 0.9])
def test_compaction_frees_what_it_promised(size: int, keep: float) -> None:
    pool = Zsmalloc(20000)
    rnd = random.Random(size)
    handles = dict(enumerate(fill(pool, 8000, size)))
    for i in rnd.sample(sorted(handles), int(len(handles) * (1 - keep))):
        pool.free(handles.pop(i))
    pool.check()
    before = pool.stats()
    freed = pool.compact()
    after = pool.stats()
    pool.check()
    verify(pool, handles, size)
    assert freed == before["freeable_pages"] == after["pages_compacted"]
    assert after["freeable_pages"] == after["stock_pages"] == 0
    assert before["mem_used_total"] - after["mem_used_total"] == freed * PAGE
    row = next(row for row in pool.table() if row[14])
    assert row[13] - row[14] < row[16] * PAGE // row[1], "the free chunks would fill a zspage"


def worth_moving(pool: Zsmalloc) -> int:
    """Pages that moving objects within their classes would free: what compaction by a budget is for."""
    return sum(row[17] for row in pool.table())


def test_compaction_in_steps_comes_to_the_same_end() -> None:
    pool = Zsmalloc(20000)
    handles = dict(enumerate(fill(pool, 6000, 500)))
    for i in random.Random(1).sample(sorted(handles), 4000):
        pool.free(handles.pop(i))
    promised = worth_moving(pool)
    freed = steps = 0
    while worth_moving(pool):
        freed += pool.compact(5000)
        steps += 1
        pool.check()
        assert steps < 1000
    assert steps > 10
    assert freed >= promised
    verify(pool, handles, 500)


def test_compaction_moves_no_more_than_it_must() -> None:
    """Emptiest into fullest: one object in a zspage of its own is what moves, not its full neighbours."""
    pool = Zsmalloc(1000)
    size, pages = next((row[1], row[16]) for row in pool.table() if row[1] >= 1024)
    per_zspage = pages * PAGE // size
    handles = fill(pool, per_zspage * 3, size - HEADER)
    before = pool.stats()["mem_used_total"]
    pool.free(handles[0])
    for handle in handles[-per_zspage + 1 :]:
        pool.free(handle)
    assert pool.compact() > 0
    assert before - pool.stats()["mem_used_total"] == pages * PAGE
    assert pool.stats()["objects_migrated"] == 1
    pool.check()


def test_compaction_frees_whole_zspages_first() -> None:
    """One object moved frees a zspage of small ones; the last pages of a larger class come after."""
    pool = Zsmalloc(10000)
    rows = pool.table()
    small, large = (next(row for row in rows if row[1] >= size) for size in (512, 3000))
    objs = [row[16] * PAGE // row[1] for row in (small, large)]
    few = fill(pool, 2 * objs[0], small[1] - HEADER)
    for handle in [few[0], *few[objs[0] + 1 :]]:
        pool.free(handle)
    for handle in fill(pool, objs[1], large[1] - HEADER)[::2]:
        pool.free(handle)
    assert [row[-1] > 0 for row in pool.table() if row[0] in (small[0], large[0])] == [True, True]
    pool.compact(1)
    assert pool.stats()["bytes_migrated"] == small[1]
    pool.compact()
    assert pool.stats()["freeable_pages"] == 0
    assert pool.stats()["bytes_migrated"] > large[1]
    pool.check()


@pytest.mark.parametrize("size", [20, 500, 1500, 3000])
def test_compaction_tightens_the_last_zspage(size: int) -> None:
    """What is left of it goes to its first pages; not more is copied than was on the others."""
    pool = Zsmalloc(10000)
    (chunk, pages) = next((row[1], row[16]) for row in pool.table() if row[1] >= size + HEADER)
    count = pages * PAGE // chunk
    handles = dict(enumerate(fill(pool, count, size)))
    for i in range(count // 3):
        pool.free(handles.pop(i))
    before = pool.stats()
    wanted = whole_pages(len(handles) * chunk) // PAGE
    assert before["freeable_pages"] == before["mem_used_total"] // PAGE - wanted
    assert pool.compact() == before["freeable_pages"]
    assert pool.stats()["mem_used_total"] == wanted * PAGE
    # (Those on the last page that stays move up, too.)
    assert pool.stats()["objects_migrated"] <= (pages - wanted) * PAGE // chunk + 2 * UNIT
    pool.check()
    verify(pool, handles, size)


@pytest.mark.parametrize("size", [1100, 1500, 2000, 3000, 3800])
def test_an_empty_page_goes_back_without_compaction(size: int) -> None:
    """Once much of a class is free. What is written then takes such pages again."""
    rnd = random.Random(size)
    pool = Zsmalloc(10000)
    handles = dict(enumerate(fill(pool, 3000, size)))
    full = pool.stats()["mem_used_total"]
    chunk = next(row[1] for row in pool.table() if row[1] >= size + HEADER)
    # So many touch a page of the kernel on average. It is then as likely to be empty as one of PAGE bytes if
    # a third stays.
    touching = UNIT * PAGE / chunk + 1
    free = 0.65 ** ((PAGE / chunk + 1) / touching)
    for i in rnd.sample(sorted(handles), int(3000 * free)):
        pool.free(handles.pop(i))
    used = pool.stats()["mem_used_total"]
    expected = 1 - free**touching
    assert used / full < expected + 0.12
    pool.check()
    verify(pool, handles, size)
    for i in range(3000):
        if i not in handles:
            handles[i] = fill(pool, 1, size, first=i)[0]
    assert pool.stats()["mem_used_total"] <= 1.01 * full
    pool.check()
    verify(pool, handles, size)
    assert pool.compact() <= 16


def test_a_page_stays_while_little_is_free() -> None:
    """Steady overwriting would else give back and take again all the time."""
    pool = Zsmalloc(10000)
    handles = fill(pool, 3000, 3000)
    used = pool.stats()["mem_used_total"]
    for handle in handles[1000:1020]:
        pool.free(handle)
    assert pool.stats()["freeable_pages"] > 5
    assert pool.stats()["mem_used_total"] == used
    pool.check()


def test_an_empty_page_is_room_below_a_limit() -> None:
    pool = Zsmalloc(10000)
    handles = dict(enumerate(fill(pool, 1000, 3000)))
    pool.mem_limit = pool.stats()["mem_used_total"]
    for i in range(100, 700):
        pool.free(handles.pop(i))
    with pytest.raises(PoolFullError):
        while True:
            pool.malloc(700)
            assert pool.stats()["mem_used_total"] <= pool.mem_limit
    assert pool.stats()["mem_used_total"] > 0.99 * pool.mem_limit
    pool.check()
    verify(pool, handles, 3000)


def test_compaction_fills_and_tightens_in_one_go() -> None:
    """What is moved may take pages where it goes; the last zspage is tightened none the less."""
    pool = Zsmalloc(10000)
    chunk, pages = next((row[1], row[16]) for row in pool.table() if row[1] >= 3800 + HEADER)
    objs = pages * PAGE // chunk
    zspages = [fill(pool, objs, 3800) for _ in range(3)]
    part = fill(pool, objs - 2, 3800)  # has a page or two that it never used
    for handles in zspages:
        for handle in handles[3:]:
            pool.free(handle)
    freeable = pool.stats()["freeable_pages"]
    assert pool.compact() == freeable
    assert pool.stats()["freeable_pages"] == 0
    assert pool.stats()["objs_used"] == 9 + len(part)
    pool.check()


def test_compaction_borrows_chunks_of_larger_classes() -> None:
    """The last pages of a class's part-filled zspage go where larger classes have chunks to spare."""
    rnd = random.Random(3)
    pool = Zsmalloc(10000)
    objects = {}
    for _ in range(3000):
        data = rnd.randbytes(rnd.randrange(800, 3600))
        handle = pool.malloc(len(data))
        pool.write(handle, data)
        objects[handle] = data
    while pool.compact(1 << 20):
        pass
    assert worth_moving(pool) == 0
    promised = pool.stats()["freeable_pages"]
    used = pool.stats()["mem_used_total"]
    migrated = pool.stats()["objects_migrated"]
    freed = pool.compact()
    assert freed >= 30
    assert abs(freed - promised) <= 2
    assert pool.stats()["mem_used_total"] == used - freed * PAGE
    assert pool.stats()["freeable_pages"] == 0
    assert pool.stats()["objects_migrated"] - migrated <= 4 * freed
    pool.check()
    assert all(pool.read(handle, len(data)) == data for handle, data in objects.items())
    assert pool.compact() == 0


def test_borrowed_chunks_are_little_larger_ever() -> None:
    """However often the pool is compacted, no object is in a chunk more than 1/16 larger than its own."""
    rnd = random.Random(4)
    device = Device(1000 * PAGE)
    sizes = sorted(row[1] for row in device.classes())
    for _ in range(60):
        for block in rnd.sample(range(700), 70):
            size = rnd.choice((rnd.randrange(1, 3700), rnd.randrange(1500, 1800)))
            device.write(rnd.randbytes(size).ljust(PAGE, b"\0"), block * PAGE)
        device.compact()
    device.check()
    larger = 0
    for block in range(700):
        found = device.block(block)
        if found["kind"] != "lz4":
            continue
        own = next(chunk for chunk in sizes if chunk >= found["payload_bytes"] + HEADER)
        larger += found["class_size"] > own
        assert own <= found["class_size"] <= own + own // 16
    assert larger


def test_what_frees_nothing_is_not_moved_again_and_again() -> None:
    """Among the objects of a last page there may be one that was lent before: it stays, so all of them do."""
    rnd = random.Random(4)
    pool = Zsmalloc(10000)
    objects: set[int] = set()
    for _ in range(120):
        for handle in rnd.sample(sorted(objects), len(objects) // 10):
            pool.free(handle)
            objects.remove(handle)
        while len(objects) < 900:
            objects.add(pool.malloc(rnd.randrange(200, 500)))
        while pool.compact():
            pass
        migrated = pool.stats()["objects_migrated"]
        assert pool.compact() == 0
        assert pool.stats()["objects_migrated"] == migrated
    assert migrated > 1000


def test_mem_limit_is_never_exceeded() -> None:
    pool = Zsmalloc(10000, mem_limit=100 * PAGE - 5)
    assert pool.mem_limit == 100 * PAGE
    stored = []
    with pytest.raises(PoolFullError, match="malloc of 700 bytes") as info:
        while True:
            stored.append(pool.malloc(700))
            assert pool.stats()["mem_used_total"] <= pool.mem_limit
    assert info.value.errno == 28
    assert pool.stats()["mem_used_total"] == 100 * PAGE
    pool.check()
    pool.free(stored.pop())
    stored.append(pool.malloc(700))  # there is room for as much as was freed
    pool.mem_limit = 0
    stored.append(pool.malloc(700))
    pool.check()


def test_limit_compacts_before_it_refuses() -> None:
    """The third problem of the 2015 series: full, while the pool has holes."""
    pool = Zsmalloc(10000, mem_limit=200 * PAGE)
    small = []
    with pytest.raises(PoolFullError):
        while True:
            small.append(pool.malloc(200))
    for i, handle in enumerate(small):
        if i % 3:
            pool.free(handle)
    kept = small[::3]
    stored = 0
    with pytest.raises(PoolFullError):
        while True:
            pool.malloc(3000)
            stored += 1
            assert pool.stats()["mem_used_total"] <= pool.mem_limit
    assert stored >= 160, "two thirds of 200 pages were holes"
    assert pool.stats()["freeable_pages"] == 0, "refused while compaction could make room"
    for handle in kept:
        pool.read(handle)
    pool.check()


def test_limit_lowered_below_what_is_used() -> None:
    pool = Zsmalloc(10000)
    handles = fill(pool, 1000, 1000)
    pool.mem_limit = PAGE
    for handle in handles[::2]:
        pool.free(handle)
    pool.malloc(1000)  # fits in a hole
    with pytest.raises(PoolFullError):
        for _ in range(1000):
            pool.malloc(1000)
    verify(pool, dict(list(enumerate(handles))[1::2]), 1000)
    pool.check()


def test_table_adds_up() -> None:
    pool = Zsmalloc(10000)
    rnd = random.Random(5)
    handles = [pool.malloc(rnd.randint(1, PAGE)) for _ in range(4000)]
    for handle in rnd.sample(handles, 2000):
        pool.free(handle)
    stats = pool.stats()
    assert len(pool.table()) == pool.class_count
    for row in pool.table():
        _, size, *groups, allocated, used, pages_used, pages, freeable = row
        assert sum(groups) * (pages * PAGE // size) == allocated
        assert used <= allocated
        assert pages_used <= sum(groups) * pages
        assert freeable <= pages_used
    # The table counts all places, as zsmalloc does; the statistics those that take memory.
    assert sum(row[13] for row in pool.table()) >= stats["objs_allocated"] >= stats["objs_used"]
    assert sum(row[14] for row in pool.table()) == stats["objs_used"] == 2000
    assert worth_moving(pool) <= stats["freeable_pages"] - stats["stock_pages"]
    assert (sum(row[15] for row in pool.table()) + stats["stock_pages"]) * PAGE == stats["mem_used_total"]
