"""What can be asked of a table of blocks: functions over Blocks."""

from libc.stdint cimport uint32_t, uint64_t

from zramd.core.device.blocks cimport Blocks, op
from zramd.core.system.gate cimport gate
from zramd.core.system.latency cimport latency_count

cdef inline uint64_t requests(Blocks table, op kind) noexcept nogil:
    """How many requests of a kind were served, failed ones too."""
    return latency_count(&table.counters.latencies[<int>kind])

cdef dict table_stats(Blocks table)
cdef dict table_latencies(Blocks table)
cdef dict describe_block(Blocks table, uint64_t number)
cdef uint32_t describe_blocks(
    Blocks table, gate *entrance, char *out, uint32_t room, uint64_t *block, uint64_t now, uint64_t sweep
) noexcept nogil
