"""Devices that share a budget, in one process: what they may take, and what they give back."""

import os
import random
import threading

import pytest
from support.run import SCALE, run_threads

from zramd import Device
from zramd.contract import budget as file
from zramd.core.memory.budget import Budget
from zramd.errors import PoolFullError

MIB = 1 << 20
BLOCK = 4096


@pytest.fixture
def room() -> int:
    fd = os.memfd_create("budget")
    os.ftruncate(fd, file.BYTES)
    os.pwrite(fd, file.head(), 0)
    return fd


def member(fd: int, slot: int, budget: int, floor: int = 0, **settings: int) -> tuple[Device, Budget]:
    """A device that takes part."""
    core = Budget(fd, slot)
    core.budget = budget
    core.begin(floor, 0)
    device = Device(64 * MIB, **settings)
    device.join(core)
    return device, core


def fill(device: Device, first: int = 0, count: int = 16384) -> int:
    """Write blocks that do not compress until there is no room; how many."""
    for block in range(first, first + count):
        try:
            device.write(random.randbytes(BLOCK), block * BLOCK)
        except PoolFullError:
            return block - first
    return count


def used(*devices: Device) -> int:
    return sum(device.counters()["mem_used_total"] for device in devices)


@pytest.mark.parametrize("cold_level", [0, 3])
def test_two_share_all_of_it_and_no_more(room: int, cold_level: int) -> None:
    """The last pages are for who makes payloads smaller: they are granted and not in use."""
    one, core = member(room, 0, 8 * MIB, cold_level=cold_level)
    two, other = member(room, 1, 8 * MIB, cold_level=cold_level)
    fill(one, count=1000)
    fill(two)
    with pytest.raises(PoolFullError, match="mem_limit or the budget leaves no room"):
        two.write(random.randbytes(64 << 10), 60 * MIB)
    assert used(one, two) <= core.taken <= 8 * MIB
    last = 2 * 16 * BLOCK if cold_level else 0
    one.tidy_budget()  # what it has claimed ahead
    fill(two, 8000)
    assert used(one, two) >= 8 * MIB - last - 2 * 32 * BLOCK
    assert core.mine >= used(one)
    assert other.mine >= used(two)
    for device in one, two:
        device.check()


def test_what_one_frees_the_other_gets(room: int) -> None:
    one, _ = member(room, 0, 8 * MIB)
    two, _ = member(room, 1, 8 * MIB)
    fill(one)
    assert fill(two) < 64
    one.trim(0, 4 * MIB)
    assert fill(two) < 64, "nothing is given back by itself"
    one.tidy_budget()
    assert fill(two) > 800
    assert used(one, two) <= 8 * MIB
    assert one.pressure()[5] > 0.9


def test_a_floor_is_kept_and_counts(room: int) -> None:
    one, core = member(room, 0, 8 * MIB)
    two, floored = member(room, 1, 8 * MIB, floor=2 * MIB)
    fill(one)
    assert used(one) <= 6 * MIB
    assert fill(two) == 512
    assert core.taken <= 8 * MIB
    assert floored.mine == 2 * MIB
    assert two.pressure()[5] == 0, "what it has is its own: it need not become smaller for others"


def test_a_floor_that_comes_late_gets_what_is_left(room: int) -> None:
    """And the rest once others give back; the sum is never above the budget."""
    one, _ = member(room, 0, 8 * MIB)
    fill(one)
    one.trim(0, MIB)
    one.tidy_budget()
    two, _ = member(room, 1, 8 * MIB, floor=2 * MIB)
    got = fill(two)
    assert 150 <= got <= 256
    assert used(one, two) <= 8 * MIB
    assert fill(one, 10000) < 100, "it has more than its share, and gets none of what is freed"
    one.trim(0, 3 * MIB)
    one.tidy_budget()
    assert fill(two, got) >= 512 - got
    assert used(one, two) <= 8 * MIB


def test_a_lower_budget_takes_nothing_and_gives_nothing(room: int) -> None:
    one, core = member(room, 0, 8 * MIB)
    two, _ = member(room, 1, 8 * MIB)
    fill(one, count=1024)
    fill(two, count=512)
    core.budget = 4 * MIB
    for device in one, two:
        device.tidy_budget()
    before = used(one, two)
    assert fill(one, 2000) <= 40
    assert fill(two, 2000) <= 40
    assert used(one, two) <= before + 80 * BLOCK, "but for the few that were granted"
    back = bytearray(BLOCK)
    one.read(back, 0)
    assert any(back)
    core.budget = 16 * MIB
    assert fill(two, 2000, 512) == 512


def test_mem_limit_holds_as_well(room: int) -> None:
    one, core = member(room, 0, 64 * MIB, mem_limit=MIB)
    fill(one)
    assert used(one) == MIB
    assert core.mine <= MIB
    one.mem_limit = 2 * MIB
    assert fill(one, 5000) == 256
    one.mem_limit = 0
    assert fill(one, 6000, 512) == 512


def test_who_leaves_takes_no_more(room: int) -> None:
    one, core = member(room, 0, 8 * MIB)
    fill(one, count=100)
    left = one.leave_budget()
    assert left == used(one)
    core.end(left)
    assert fill(one, 1000) == 0
    one.tidy_budget()
    one.mem_limit = 0
    assert fill(one, 1000) == 0
    assert core.taken == left


def test_a_fork_has_the_same_slot(room: int) -> None:
    """As nbdkit's: who forked ends, and what the other takes counts."""
    one, core = member(room, 0, 8 * MIB)
    two, other = member(room, 1, 8 * MIB)
    child = os.fork()
    if child == 0:
        try:
            fill(one, count=700)
            os._exit(0 if used(one) <= core.mine else 2)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    assert other.taken >= 700 * BLOCK
    fill(two)
    assert used(two) <= 8 * MIB - 700 * BLOCK


def test_threads_claim_and_give_back_at_once(room: int) -> None:
    """Each counts what it has: never more than is granted, and the sum of that is within the budget."""
    budget = 4 * MIB
    devices = [member(room, slot, budget, cold_level=3) for slot in range(3)]
    over: list[str] = []
    end = threading.Event()

    def write(device: Device, seed: int) -> None:
        rnd = random.Random(seed)
        for _ in range(int(1500 * SCALE)):
            block = rnd.randrange(1200)
            try:
                if rnd.random() < 0.5:
                    device.write(rnd.randbytes(BLOCK), block * BLOCK)
                else:
                    device.trim(block * BLOCK, rnd.randrange(1, 32) * BLOCK)
            except PoolFullError:
                device.trim(block * BLOCK, 64 * BLOCK)

    def tidy() -> None:
        while not end.is_set():
            for device, core in devices:
                device.tidy_budget()
                device.cool(0, 64)
                if device.counters()["mem_used_total"] > core.budget:
                    over.append("a device has more than the budget")

    def look() -> None:
        while not end.is_set():
            if used(*(device for device, _ in devices)) > budget:
                over.append("all have more than the budget")

    def all_writers() -> None:
        try:
            run_threads([lambda d=device, s=seed: write(d, s) for seed in range(2) for device, _ in devices])
        finally:
            end.set()

    run_threads([all_writers, tidy, look])
    assert not over
    for device, core in devices:
        device.check()
        device.tidy_budget()
        assert used(device) <= core.mine
    assert core.taken <= budget


def test_refused_slots(room: int) -> None:
    with pytest.raises(ValueError, match="slot 1024 is out of range"):
        Budget(room, 1024)
    with pytest.raises(ValueError, match="slot 1024 is out of range"):
        Budget(room, 0).free(1024)
    os.ftruncate(room, 4096)
    with pytest.raises(ValueError, match="a file of 4096 bytes is not a budget"):
        Budget(room, 0)
