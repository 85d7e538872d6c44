"""Kinds of madvise that the C library may not know yet. (One that the kernel does not know is EINVAL.)"""

cdef extern from *:
    """
    #include <sys/mman.h>
    #ifndef MADV_POPULATE_READ
    #define MADV_POPULATE_READ 22       /* Linux 5.14 */
    #endif
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23      /* Linux 5.14 */
    #endif
    #ifndef MADV_DONTNEED_LOCKED
    #define MADV_DONTNEED_LOCKED 24     /* Linux 5.18 */
    #endif
    """
    int MADV_POPULATE_READ, MADV_POPULATE_WRITE, MADV_DONTNEED_LOCKED
