"""zsmalloc against a dict: the same calls in any order, and check() after each."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule
from support.run import SCALE

from zramd import PoolFullError, Zsmalloc
from zramd.core.memory.region import page_size

SIZES = st.one_of(st.integers(1, 4096), st.integers(1, 64), st.sampled_from([500, 1360, 3844, 3845, 4096]))


class ZsmallocModel(RuleBasedStateMachine):
    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.pool = Zsmalloc(10_000)
        self.model: dict[int, bytes] = {}
        self.limit = 0

    def _malloc(self, size: int, seed: int) -> int | None:
        try:
            handle = self.pool.malloc(size)
        except PoolFullError:
            assert self.limit, "refused without a limit"
            assert sum(row[17] for row in self.pool.table()) == 0, "refused while compaction could make room"
            assert self.pool.compact(1 << 30) == 0, "refused while compaction could make room"
            return None
        assert handle not in self.model
        data = (seed.to_bytes(3, "little") * (size // 3 + 1))[:size]
        self.pool.write(handle, data)
        self.model[handle] = data
        return handle

    @rule(target=handles, size=SIZES, seed=st.integers(0, (1 << 24) - 1))
    def malloc(self, size: int, seed: int):
        handle = self._malloc(size, seed)
        return multiple() if handle is None else handle

    @rule(target=handles, size=SIZES, count=st.integers(10, 200))
    def malloc_many(self, size: int, count: int):
        made = [self._malloc(size, i) for i in range(count)]
        return multiple(*[handle for handle in made if handle is not None])

    @rule(handle=consumes(handles))
    def free_one(self, handle: int) -> None:
        self.free(handle)

    def free(self, handle: int) -> None:
        assert self.pool.read(handle, len(self.model[handle])) == self.model.pop(handle)
        self.pool.free(handle)

    @rule(handle=consumes(handles), others=st.lists(consumes(handles), min_size=5, max_size=150))
    def free_many(self, handle: int, others: list[int]) -> None:
        for each in (handle, *others):
            self.free(each)

    @rule(handle=handles, seed=st.integers(0, 255))
    def overwrite(self, handle: int, seed: int) -> None:
        self.model[handle] = bytes([seed]) * len(self.model[handle])
        self.pool.write(handle, self.model[handle])

    @rule(budget=st.one_of(st.just(0), st.integers(1, 20_000)))
    def compact(self, budget: int) -> None:
        before = self.pool.stats()
        freed = self.pool.compact(budget)
        after = self.pool.stats()
        # The end of a budget may leave a zspage half moved.
        begun = 16 if budget else 0
        assert after["mem_used_total"] <= before["mem_used_total"] - (freed - begun) * 4096
        if budget == 0 and not self.limit:
            assert before["mem_used_total"] - after["mem_used_total"] == freed * 4096
            assert after["freeable_pages"] == 0
            self.bounded()

    def bounded(self) -> None:
        """After compaction the pool is no larger than docs/density.md says, whatever was done before."""
        classes = sum(row[14] > 0 for row in self.pool.table()[:-1])
        payload = sum(len(data) for data in self.model.values())
        raw = sum(len(data) > 3844 for data in self.model.values())
        bound = 1.1 * payload + 31 * len(self.model) + page_size() * classes + (page_size() - 4096) * raw
        assert self.pool.stats()["mem_used_total"] <= bound

    @rule(pages=st.one_of(st.just(0), st.integers(1, 300)))
    def set_limit(self, pages: int) -> None:
        self.pool.mem_limit = self.limit = pages * 4096

    @invariant()
    def sound(self) -> None:
        self.pool.check()
        stats = self.pool.stats()
        assert stats["objs_used"] == len(self.model)
        assert stats["mem_used_total"] >= sum(map(len, self.model.values()))

    def teardown(self) -> None:
        for handle, data in self.model.items():
            assert self.pool.read(handle, len(data)) == data
            self.pool.free(handle)
        self.pool.compact()
        self.pool.check()
        assert self.pool.stats()["mem_used_total"] == 0


TestZsmallocModel = ZsmallocModel.TestCase
TestZsmallocModel.settings = settings(
    deadline=None, stateful_step_count=40, max_examples=int(100 * max(SCALE, 1))
)
