"""The functions that nbdkit calls: as its documentation has them, and what they raise."""

import errno
import os
from collections.abc import Iterator

import pytest
from support.pages import PAGE, UNIT

from zramd.core.device import requests
from zramd.core.device.device import Device
from zramd.errors import PoolFullError

BLOCK = 4096
MAY_TRIM = 1


@pytest.fixture
def told() -> Iterator[list[int]]:
    """The errnos that a client would get."""
    numbers: list[int] = []
    requests.prepare(numbers.append, errno.EIO)
    yield numbers
    requests.prepare(lambda number: None, errno.ENOSPC)


def test_each_does_its_work() -> None:
    device = Device(1 << 20)
    requests.pwrite(device, memoryview(b"a" * BLOCK + b"bc" * BLOCK), BLOCK, 0)
    found = bytearray(2 * BLOCK)
    requests.pread(device, memoryview(found), 2 * BLOCK, 0)
    assert found == b"bc" * BLOCK
    requests.trim(device, BLOCK, 2 * BLOCK, 0)
    requests.zero(device, BLOCK, BLOCK, 0)
    requests.zero(device, BLOCK, 3 * BLOCK, MAY_TRIM)
    requests.flush(device, 0)
    assert requests.extents(device, 4 * BLOCK, 0, 0) == [
        (0, BLOCK, 3),
        (BLOCK, BLOCK, 2),
        (2 * BLOCK, 2 * BLOCK, 3),
    ]
    assert len(requests.extents(device, 4 * BLOCK, 0, 4)) == 1


def test_a_full_pool_raises_one_exception_again_and_again(told: list[int]) -> None:
    device = Device(1 << 20, mem_limit=PAGE)
    requests.pwrite(device, os.urandom(PAGE), 0, 0)
    raised = []
    for block in range(UNIT, UNIT + 3):
        with pytest.raises(PoolFullError) as caught:
            requests.pwrite(device, os.urandom(BLOCK), block * BLOCK, 0)
        assert caught.tb.tb_next is None, "a frame of the function itself, which nbdkit would keep"
        raised.append(caught.value)
        caught.value.__traceback__ = None  # this test's own frame
    assert raised[0] is raised[1] is raised[2]
    assert told == [errno.EIO] * 3


def test_beyond_the_end(told: list[int]) -> None:
    device = Device(1 << 20)
    for call in (
        lambda: requests.pread(device, bytearray(BLOCK), 1 << 20, 0),
        lambda: requests.pwrite(device, bytes(BLOCK), (1 << 20) - 1, 0),
        lambda: requests.trim(device, BLOCK, 1 << 40, 0),
        lambda: requests.zero(device, 1 << 30, BLOCK, 0),
    ):
        with pytest.raises(ValueError, match="out of range"):
            call()
    assert told == [errno.EINVAL] * 4
    assert device.counters()["invalid_io"] == 4


def test_arguments_are_looked_at() -> None:
    device = Device(1 << 20)
    with pytest.raises(TypeError, match="takes 4 arguments"):
        requests.pread(device, bytearray(BLOCK), 0)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        requests.pread(object(), bytearray(BLOCK), 0, 0)  # type: ignore[arg-type]
    with pytest.raises(BufferError):
        requests.pread(device, b"read only", 0, 0)  # type: ignore[arg-type]
    with pytest.raises(OverflowError):
        requests.pwrite(device, b"x", -1, 0)
