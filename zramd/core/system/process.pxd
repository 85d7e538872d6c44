cdef bint memory_is_locked() noexcept nogil
cdef int be_calm() noexcept nogil
cdef void be_urgent(int priority) noexcept nogil
cdef void touch_stack() noexcept nogil
