from libc.stdint cimport uint64_t

from zramd.core.device.blocks cimport Blocks
from zramd.core.system.gate cimport gate

cdef const char *find_table_fault(Blocks table, gate *closed, uint64_t *where) noexcept nogil
