"""Kernels whose page is larger than a block."""

import pytest

from zramd.core.memory.region import page_size

BLOCK = 4096
PAGE = page_size()  # what this kernel gives and takes back, and what a state's tables are whole numbers of
UNIT = PAGE // BLOCK
# What is only so where each block has a page of its own; the mark's place says why.
pages_of_one_block = pytest.mark.skipif(
    UNIT > 1, reason=f"holds for pages of {BLOCK} bytes, and this kernel's have {PAGE}"
)


def whole_pages(count: int) -> int:
    """Return the bytes of the pages that `count` bytes lie on."""
    return -(-count // PAGE) * PAGE
