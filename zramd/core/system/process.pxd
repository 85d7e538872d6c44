cdef enum:
    CAP_SYS_ADMIN = 21

cdef bint memory_is_locked() noexcept nogil
cdef int lose_capability(int number) noexcept nogil
cdef int be_calm() noexcept nogil
cdef void be_urgent(int priority) noexcept nogil
cdef void touch_stack() noexcept nogil
