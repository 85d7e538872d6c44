from libc.stdint cimport uint32_t

from zramd.core.device.recovery cimport Recovery

cdef void rebuild_span(Recovery r, uint32_t span) noexcept nogil
cdef void mend(Recovery r) noexcept nogil
cdef void list_zspages(Recovery r) noexcept nogil
cdef void list_cells(Recovery r) noexcept nogil
cdef void give_back_slots(Recovery r) noexcept nogil
