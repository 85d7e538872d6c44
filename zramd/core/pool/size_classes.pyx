"""Size classes: which there are, how long the zspages of each are, and what a state must agree on."""

from libc.stdint cimport uint32_t, uint64_t

from zramd.core.memory.region cimport HEAD_SIZE, page_unit, whole_pages
from zramd.core.types cimport (
    CELLS_SLACK,
    CLASS_DELTA,
    FINE_CHUNK,
    MAX_CLASSES,
    MIN_CHUNK,
    PAGE_SIZE,
    SPAN_PAGES,
    SPAN_SHIFT,
    SPAN_SIZE,
)

import zlib


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
