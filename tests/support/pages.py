"""Kernels whose page is larger than a block."""

from zramd.core.memory.region import page_size

BLOCK = 4096
PAGE = page_size()  # what this kernel gives and takes back, and what a state's tables are whole numbers of
UNIT = PAGE // BLOCK


def whole_pages(count: int) -> int:
    """Return the bytes of the pages that `count` bytes lie on."""
    return -(-count // PAGE) * PAGE
