"""Kernels whose page is larger than a block."""

import pytest

from zramd.core.memory.region import page_size

BLOCK = 4096
# What one object or table takes is counted exactly there. tests/unit/core/test_page_size.py has larger pages.
pages_of_one_block = pytest.mark.skipif(
    page_size() != BLOCK, reason=f"counts pages of {BLOCK} bytes, and this kernel's have {page_size()}"
)
