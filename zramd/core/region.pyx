"""Regions: memory for one table each, anonymous or a part of a file that outlives the process.

A region reads as zeros and costs nothing until it is touched, and its whole pages can be given back. A file's regions
follow each other behind its head:

    | header page | kept words (counters) … | slots | classes of spans | cells | arena |
    0             4K                        64K

Only what was written may be read: reading a hole of a file's mapping would allocate the page.
"""

cimport cython
from libc.errno cimport EINVAL, errno
from libc.stdint cimport int64_t, uint64_t
from posix.mman cimport (
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_NORESERVE,
    MAP_PRIVATE,
    MAP_SHARED,
    PROT_NONE,
    PROT_READ,
    PROT_WRITE,
    madvise,
    mmap,
    munmap,
)

from zramd.core.locks cimport load_relaxed, store_relaxed
from zramd.core.types cimport PAGE_SIZE

import os

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <sys/vfs.h>
    #include <unistd.h>
    #ifndef MADV_POPULATE_WRITE
    #define MADV_POPULATE_WRITE 23      /* Linux 5.14 */
    #endif
    #ifndef MADV_DONTNEED_LOCKED
    #define MADV_DONTNEED_LOCKED 24     /* Linux 5.18 */
    #endif
    #ifndef SEEK_DATA
    #define SEEK_DATA 3
    #define SEEK_HOLE 4
    #endif
    /* Unlike MADV_REMOVE it works on locked memory, too. */
    static int punch_hole(int fd, uint64_t offset, uint64_t size)
    {
        return (int)syscall(SYS_fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
    }
    /* Bytes that are free in the file system, or as good as all where it has no limit. */
    static uint64_t room(int fd)
    {
        struct statfs s;
        return fstatfs(fd, &s) || s.f_blocks == 0 ? UINT64_MAX : (uint64_t)s.f_bavail * s.f_bsize;
    }
    static long filesystem_type(int fd)
    {
        struct statfs s;
        return fstatfs(fd, &s) ? -1 : (long)s.f_type & 0xFFFFFFFF;
    }
    """
    int MADV_NOHUGEPAGE, MADV_POPULATE_WRITE, MADV_DONTNEED_LOCKED, SEEK_DATA, SEEK_HOLE
    int punch_hole(int fd, uint64_t offset, uint64_t size) noexcept nogil
    uint64_t room(int fd) noexcept nogil
    long filesystem_type(int fd) noexcept nogil
    int close(int fd) noexcept nogil
    int64_t lseek(int fd, int64_t offset, int whence) noexcept nogil

cdef enum:
    LOOK = 64
    SCARCE = 64 << 20       # bytes: what others may take of the file system between two looks

cdef int give_back_advice = MADV_DONTNEED


cdef int region_populate(void *start, uint64_t size) noexcept nogil:
    """Make the whole pages that a range touches resident; 0, or -1 with errno."""
    cdef uint64_t first = <uint64_t>start & ~<uint64_t>(PAGE_SIZE - 1)
    return madvise(<void *>first, whole_pages(<uint64_t>start + size) - first, MADV_POPULATE_WRITE)


cdef void regions_are_locked() noexcept nogil:
    """From now on the process's memory is locked: plain MADV_DONTNEED would refuse to give such pages back."""
    global give_back_advice
    give_back_advice = MADV_DONTNEED_LOCKED


def filesystem(int fd):
    """The magic number of the file system that a file lies on (see statfs). Raises OSError."""
    cdef long kind = filesystem_type(fd)
    if kind < 0:
        raise OSError(errno, os.strerror(errno))
    return kind


@cython.final
cdef class Region:
    """size bytes of address space, anonymous, or from offset on of the file fd. Raises MemoryError."""

    def __cinit__(self, uint64_t size, bint writable=True, int fd=-1, uint64_t offset=0):
        cdef void *base
        self.size = whole_pages(size)
        self.fd = fd
        self.offset = offset
        base = mmap(NULL, self.size, PROT_READ | PROT_WRITE if writable else PROT_NONE,
                    (MAP_PRIVATE | MAP_ANONYMOUS if fd < 0 else MAP_SHARED) | MAP_NORESERVE, fd, offset)
        if base == MAP_FAILED:
            raise MemoryError(f"no address space for {size} bytes")
        self.base = <char *>base
        # A huge page would make 2 MiB resident for one touched slot or object.
        madvise(base, self.size, MADV_NOHUGEPAGE)

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.size)

    cdef bint is_scarce(self) noexcept nogil:
        """Whether there is so little room left in the file's file system that new pages need ready.

        It looks every LOOK calls: asking for each page would cost 4 % of what it takes to fill a device.
        """
        cdef uint64_t looks = load_relaxed(&self.looks)
        if self.fd < 0:
            return False
        store_relaxed(&self.looks, looks + 1)
        if looks % LOOK == 0:
            store_relaxed(&self.scarce, room(self.fd) < SCARCE)
        return load_relaxed(&self.scarce)

    cdef int ready(self, void *start, uint64_t size) noexcept nogil:
        """Before pages are touched for the first time: 0, or -1, there is no room for them in the file.

        Touching them would end the process (SIGBUS).
        """
        if self.fd < 0 or region_populate(start, size) == 0 or errno == EINVAL:     # before Linux 5.14
            return 0
        return -1

    cdef int release(self, void *start, uint64_t size) noexcept nogil:
        """Give whole pages back to the operating system; they read as zeros afterwards."""
        if self.fd < 0:
            return madvise(start, size, give_back_advice)
        return punch_hole(self.fd, self.offset + <uint64_t>(<char *>start - self.base), whole_pages(size))

    cdef int release_all(self) noexcept nogil:
        return self.release(self.base, self.size)

    cdef bint next_extent(self, uint64_t *start, uint64_t *end) noexcept nogil:
        """The next run of pages of the file that hold something, from start[0] on and up to end[0]: False, there is none.

        Both are offsets in the region, and both are changed.
        """
        cdef int64_t first = lseek(self.fd, <int64_t>(self.offset + start[0]), SEEK_DATA), last
        if first < 0 or <uint64_t>first >= self.offset + end[0]:
            return False
        last = lseek(self.fd, first, SEEK_HOLE)
        start[0] = <uint64_t>first - self.offset
        if last >= 0 and <uint64_t>last < self.offset + end[0]:
            end[0] = whole_pages(<uint64_t>last - self.offset)
        return True


@cython.final
cdef class Memory:
    """Where a device's regions come from: the file fd, which they divide up in the order they are asked for, or none.

    The descriptor remains the caller's: this has one of its own, and with it the file's lock.
    """

    def __cinit__(self, int fd=-1):
        self.fd = -1
        if fd >= 0:
            self.fd = os.dup(fd)
        self.head = self.region(HEAD_SIZE, True)
        if self.head.ready(self.head.base + KEPT_STATE, KEPT_PAGES * PAGE_SIZE):
            raise MemoryError("the file system of the state is full")

    def __dealloc__(self):
        if self.fd >= 0:
            close(self.fd)

    cdef Region region(self, uint64_t size, bint writable):
        cdef uint64_t offset = self.end
        self.end += whole_pages(size)
        return Region(size, writable, self.fd, offset)

    cdef uint64_t *kept(self, uint64_t offset) noexcept nogil:
        """Words that are kept as long as the memory is."""
        return <uint64_t *>(self.head.base + offset)
