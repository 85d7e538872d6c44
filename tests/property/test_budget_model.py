"""Claims of a budget, by several servers' slots on one file, against a model of a few lines."""

import os
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from zramd.contract import budget as file
from zramd.core.memory.budget import Budget

PAGE = file.PAGE
SLOTS = st.integers(0, 5)
PAGES = st.integers(0, 120)


def new_file() -> int:
    """A budget's file that nobody has a part in."""
    fd = os.memfd_create("budget")
    os.ftruncate(fd, file.BYTES)
    os.pwrite(fd, file.head(), 0)
    return fd


class Claims(RuleBasedStateMachine):
    """Slots that are taken, claimed for, given back, and left in the middle of a claim."""

    def __init__(self) -> None:
        super().__init__()
        self.fd = new_file()
        self.budget = 100
        self.slots: dict[int, Budget] = {}
        self.granted: dict[int, int] = {}  # of slots that count, also of the dead
        self.floor: dict[int, int] = {}
        self.over = 0  # pages that were granted beyond what a claim may have: the budget was lowered since
        Budget(self.fd, 0).budget = 100 * PAGE

    def teardown(self) -> None:
        os.close(self.fd)

    def taken(self, granted: dict[int, int]) -> int:
        return sum(max(granted.get(slot, 0), floor) for slot, floor in self.floor.items())

    @rule(slot=SLOTS, floor=st.integers(0, 20))
    def begin(self, slot: int, floor: int) -> None:
        """A server takes a slot, perhaps one that a dead one has left: it has what that had."""
        if slot in self.slots:
            return
        self.slots[slot] = member = Budget(self.fd, slot)
        member.begin(floor * PAGE, 0)
        self.floor[slot] = floor
        self.granted.setdefault(slot, 0)
        assert member.mine == self.granted[slot] * PAGE

    @precondition(lambda self: self.slots)
    @rule(slot=SLOTS, pages=PAGES)
    def claim(self, slot: int, pages: int) -> None:
        if slot not in self.slots:
            return
        after = self.granted | {slot: max(self.granted[slot], pages)}
        fits = self.taken(after) <= self.budget or (
            pages <= self.floor[slot] and sum(after.values()) <= self.budget
        )
        wanted = pages <= self.granted[slot] or fits
        assert self.slots[slot].claim(pages * PAGE) == wanted
        if wanted:
            self.granted = after
        assert self.slots[slot].mine == self.granted[slot] * PAGE

    @rule(slot=SLOTS, more=st.integers(0, 50))
    def die(self, slot: int, more: int) -> None:
        """A server is killed, perhaps between adding to its slot and looking at the others."""
        if slot not in self.slots:
            return
        del self.slots[slot]
        self.granted[slot] += more
        words = (self.granted[slot] * PAGE // PAGE).to_bytes(8, "little")
        os.pwrite(self.fd, words, file.lock_of(slot))

    @rule(slot=SLOTS)
    def sweep(self, slot: int) -> None:
        """Somebody frees a dead server's slot."""
        if slot in self.slots or slot not in self.granted:
            return
        Budget(self.fd, (slot + 1) % 6).free(slot)
        del self.granted[slot], self.floor[slot]

    @rule(slot=SLOTS, left=st.integers(0, 30))
    def end(self, slot: int, left: int) -> None:
        if slot in self.slots:
            self.slots.pop(slot).end(left * PAGE)
            self.granted[slot], self.floor[slot] = left, 0

    @rule(pages=st.integers(1, 200))
    def change(self, pages: int) -> None:
        Budget(self.fd, 0).budget = pages * PAGE
        self.budget = pages

    @invariant()
    def all_say_the_same(self) -> None:
        for member in self.slots.values():
            assert member.budget == self.budget * PAGE
            assert member.taken == self.taken(self.granted) * PAGE
        found = {slot.number: slot for slot in file.slots(self.fd)}
        assert {number: slot.granted // PAGE for number, slot in found.items()} == {
            number: pages for number, pages in self.granted.items() if pages or self.floor[number]
        }
        assert sum(slot.taken for slot in found.values()) == self.taken(self.granted) * PAGE


TestClaims = Claims.TestCase
TestClaims.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)


def test_what_is_damaged_is_too_much_for_claims(tmp_path: Path) -> None:
    """No sum wraps around; and an owner's own slot is mended by what it does next."""
    fd = new_file()
    one, two = Budget(fd, 0), Budget(fd, 1)
    one.budget = 100 * PAGE
    one.begin(0, 0)
    two.begin(0, 0)
    assert one.claim(10 * PAGE)
    os.pwrite(fd, b"\xff" * 8, file.lock_of(0))
    assert not two.claim(PAGE)
    assert one.claim(11 * PAGE)
    assert two.claim(PAGE)
    os.close(fd)
