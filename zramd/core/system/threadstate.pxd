cdef void keep_current() noexcept
