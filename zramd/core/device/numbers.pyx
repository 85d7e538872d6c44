"""What can be asked of a table of blocks: its counters, how long requests took, what stands for a block.

Nothing here is counted: that is done where it happens.
"""

from libc.stdint cimport uint64_t

from zramd.core.device.blocks cimport OP_READ, OP_TRIM, OP_WRITE, OP_ZERO, STRIPES, Blocks, counters
from zramd.core.device.slots cimport HOLE, LOST, RAW, SAME
from zramd.core.device.slots cimport block_kind, has_object, is_cold, slot_bytes, slot_handle, slot_kind
from zramd.core.pool.zsmalloc cimport object_place, place
from zramd.core.system.latency cimport BUCKETS
from zramd.core.system.locks cimport load_relaxed, pthread_mutex_lock, pthread_mutex_unlock
from zramd.core.system.words cimport number_words, read_words
from zramd.core.types cimport BLOCK_SHIFT

from zramd.errors import CorruptionError


cdef dict counter_indexes():
    cdef counters fields
    cdef dict found
    number_words(<uint64_t *>&fields, sizeof(fields))
    found = fields
    del found["unused"], found["corrupt_block"]
    return found


cdef dict COUNTERS = counter_indexes()      # each is a statistic


cdef dict table_stats(Blocks table):
    """The numbers of a table by the names of the statistics, as a dict of ints."""
    return read_words(<uint64_t *>table.counters, COUNTERS) | {
        "orig_data_size": load_relaxed(&table.counters.pages_stored) << BLOCK_SHIFT,
        "reads": requests(table, OP_READ),
        "writes": requests(table, OP_WRITE),
        "trims": requests(table, OP_TRIM),
        "zeroes": requests(table, OP_ZERO),
        "metadata_bytes": table.metadata_bytes(),
    }


cdef dict table_latencies(Blocks table):
    """See Device.latencies."""
    cdef int kind, i
    found = {}
    for kind, name in enumerate(("read", "write", "trim", "zero")):
        counts = tuple([load_relaxed(&table.counters.latencies[kind].buckets[i]) for i in range(BUCKETS)])
        found[name] = (load_relaxed(&table.counters.latencies[kind].sum), counts)
    return found


cdef dict describe_block(Blocks table, uint64_t number):
    """See Device.block. Nobody resets the table meanwhile."""
    cdef uint64_t slot, word = 0
    cdef block_kind what
    cdef place at
    cdef int rc = 0
    with nogil:
        pthread_mutex_lock(&table.stripes[number % STRIPES])
        slot = table.get(number)
        what = slot_kind(slot)
        if what == SAME:
            word = table.word_of(slot)
        elif has_object(slot):
            rc = object_place(table.pool, slot_handle(slot), &at)
        pthread_mutex_unlock(&table.stripes[number % STRIPES])
    if rc:
        raise CorruptionError(f"a slot's handle is not live (at {number})")
    if what == HOLE:
        return {"block": number, "kind": "hole"}
    if what == LOST:
        return {"block": number, "kind": "lost"}
    if what == SAME:
        return {"block": number, "kind": "same", "word": word, "handle": slot_handle(slot)}
    return {
        "block": number,
        "kind": "raw" if what == RAW else "zstd" if is_cold(slot) else "lz4",
        "handle": slot_handle(slot),
        "payload_bytes": slot_bytes(slot),
        "obj": at.obj,
        "zspage": at.span,
        "chunk": at.chunk,
        "class_index": at.class_index,
        "class_size": at.class_size,
        "zspage_inuse": at.inuse,
        "zspage_objs": at.objs,
        "zspage_pages": at.pages,
    }
