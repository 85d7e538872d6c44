"""Size classes: their sizes, how long the zspages of each are, and what a state must agree on.

As in Linux' mm/zsmalloc.c, a class has the zspage length that wastes least, and sizes whose zspages are alike are merged.
docs/density.md compares the kernel's geometry with this one.
"""

from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t

from zramd.core.memory.region cimport HEAD_SIZE, page_unit, whole_pages
from zramd.core.system.checks cimport zr_static_assert
from zramd.core.types cimport (
    CELLS_SLACK,
    CELL_TAGS,
    CELL_TAG_BITS,
    CHUNK_ALIGN,
    CLASS_DELTA,
    CLASS_SIZES,
    FINE_CHUNK,
    GROUPS,
    ISOLATED,
    MAPPED_CHUNKS,
    MAX_CHUNKS,
    MAX_CLASSES,
    MIN_CHUNK,
    NO_CHUNK,
    PAGE_SIZE,
    SPAN_PAGES,
    SPAN_SHIFT,
    SPAN_SIZE,
    zspage,
)

import zlib

# What must agree, the compiler looks at. (Each comparison by itself: of two, Cython does not make a constant.)
zr_static_assert(sizeof(zspage) == 32)
zr_static_assert(SPAN_SIZE == SPAN_PAGES * PAGE_SIZE)
zr_static_assert(SPAN_PAGES <= 8 * sizeof(uint16_t))        # Arena.committed
zr_static_assert(MAPPED_CHUNKS <= 8 * sizeof(uint64_t))     # zspage.used_map
zr_static_assert(MAX_CHUNKS * MIN_CHUNK == SPAN_SIZE)
zr_static_assert(MAX_CHUNKS < NO_CHUNK)
zr_static_assert((CLASS_SIZES - 1) * CLASS_DELTA == PAGE_SIZE)
zr_static_assert(MAX_CLASSES < 1 << 8 * sizeof(uint8_t))    # Pool.span_class holds their number + 1
zr_static_assert(GROUPS < ISOLATED)
zr_static_assert(CELL_TAGS == (1 << CELL_TAG_BITS) - 1)
zr_static_assert(CELL_TAGS < CHUNK_ALIGN)


cdef void geometry(uint32_t size, uint32_t unit, uint32_t *pages, uint32_t *objs) noexcept nogil:
    """The zspage of a chunk size: the fewest pages with the least waste a page. unit: pages of 4096 bytes in the kernel's.

    zsmalloc takes the least waste of a zspage; a page's share of it is what memory is lost.
    """
    cdef uint32_t n, waste, best = 0
    pages[0] = 0
    for n in range(1, SPAN_PAGES + 1):
        if n % unit or n * PAGE_SIZE < size:
            continue
        waste = n * PAGE_SIZE % size
        if pages[0] == 0 or waste * pages[0] < best * n:
            best = waste
            pages[0] = n
    objs[0] = pages[0] * PAGE_SIZE // size


def size_classes(uint32_t unit):
    """The size classes, smallest first, the huge class last: tuples (bytes of a chunk, pages and chunks of a zspage).

    unit: how many pages of 4096 bytes the kernel gives and takes back together: each zspage is of whole ones. As in
    zsmalloc, sizes whose zspages have as many pages and hold as many objects are merged into the largest.
    """
    cdef uint32_t size, pages, objs
    merged = [(PAGE_SIZE, SPAN_PAGES, SPAN_PAGES)]
    last = None
    # The largest class that still puts more than one object in a page's worth of memory; above it, a raw block is
    # as small.
    size = PAGE_SIZE - CLASS_DELTA
    while size >= MIN_CHUNK:
        geometry(size, unit, &pages, &objs)
        if objs > pages and (pages, objs) != last:
            last = (pages, objs)
            merged.append((size, pages, objs))
        size -= CLASS_DELTA if size <= FINE_CHUNK else 2 * CLASS_DELTA
    assert len(merged) <= MAX_CLASSES
    merged.reverse()
    return merged


CLASSES = size_classes(min(page_unit(), SPAN_PAGES))     # (With larger pages there is no pool.)


def layout_sum(uint32_t unit):
    """Names the size classes, and the size of a page with them, in a state."""
    return zlib.crc32(repr(size_classes(unit)).encode() + (b"" if unit == 1 else b"%d" % unit))


def pool_layout(uint64_t max_objects):
    """See state_layout in device.pyx."""
    cdef uint64_t spans = max_objects + CELLS_SLACK
    return {
        "cells": spans + 1,
        "spans": spans,
        "span_size": SPAN_SIZE,
        "size_classes": layout_sum(min(page_unit(), SPAN_PAGES)),
        "bytes": (HEAD_SIZE + whole_pages(max_objects * sizeof(uint64_t)) + whole_pages(spans)
                  + whole_pages((spans + 1) * sizeof(uint64_t)) + (spans << SPAN_SHIFT)),
    }
