"""Regions: memory for one table each, anonymous or a part of a file that outlives the process.

A region reads as zeros and costs nothing until it is touched, and its whole pages can be given back. A file's regions
follow each other behind its head:

    | header page | kept words (counters) … | slots | classes of spans | cells | arena |
    0             4K                        64K

Only what was written may be read, and only what has room may be written: touching a hole of a file's mapping allocates the
page, and ends the process (SIGBUS) where the file system has no room for it. Region.take_room asks first, or Region.touch,
which costs next to nothing.

A page is the kernel's: 4096 bytes, on some machines 16 or 64 KiB. What is counted in pages elsewhere are pieces of 4096
bytes; page_unit says how many of them the kernel gives and takes back together.
"""

cimport cython
from libc.errno cimport EDQUOT, EFAULT, EINTR, EINVAL, ENOMEM, ENOSPC, errno
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memset
from posix.mman cimport (
    MADV_DONTNEED,
    MAP_ANONYMOUS,
    MAP_FAILED,
    MAP_FIXED,
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

from zramd.core.system.advice cimport MADV_DONTNEED_LOCKED, MADV_POPULATE_READ, MADV_POPULATE_WRITE
from zramd.core.system.process cimport memory_is_locked
from zramd.core.types cimport PAGE_SHIFT, PAGE_SIZE, SPAN_SIZE

import os

from zramd.errors import error_from

cdef extern from *:
    """
    #ifndef _GNU_SOURCE
    #define _GNU_SOURCE
    #endif
    #include <fcntl.h>
    #include <linux/falloc.h>
    #include <stdlib.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <sys/vfs.h>
    #include <unistd.h>
    #ifndef SEEK_DATA
    #define SEEK_DATA 3
    #define SEEK_HOLE 4
    #endif
    /* Unlike MADV_REMOVE it works on locked memory, too. */
    static int punch_hole(int fd, uint64_t offset, uint64_t size)
    {
        return (int)syscall(SYS_fallocate, fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, size);
    }
    /* What the file gets it keeps, touched or not; the file does not grow. */
    static int allocate_room(int fd, uint64_t offset, uint64_t size)
    {
        return (int)syscall(SYS_fallocate, fd, FALLOC_FL_KEEP_SIZE, offset, size);
    }
    /* A system call that stores a word at p, whatever it is: where a fault of ours would be a signal, the kernel's own is
       an error. It takes 0.05 us more than the fault, MADV_POPULATE_WRITE 0.8 us. */
    static int fault_in(void *p)
    {
        return (int)syscall(SYS_getcpu, p, NULL, NULL);
    }
    /* The size of a page as the calls have it that take whole pages. The auxiliary vector, where sysconf has it from, is
       that of another machine under some emulators. */
    static uint64_t find_page_size(void)
    {
        uint64_t size = (uint64_t)sysconf(_SC_PAGESIZE), most = 1 << 20;
        char *start = mmap(NULL, 2 * most, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (start == MAP_FAILED)
            return size;
        while (size < most && madvise(start + most + size, size, MADV_NORMAL) && errno == EINVAL)
            size *= 2;
        munmap(start, 2 * most);
        return size;
    }
    static long filesystem_type(int fd)
    {
        struct statfs s;
        return fstatfs(fd, &s) ? -1 : (long)s.f_type & 0xFFFFFFFF;
    }
    """
    int MADV_NOHUGEPAGE, MADV_DONTDUMP, MADV_DODUMP, SEEK_DATA, SEEK_HOLE
    int posix_memalign(void **start, size_t alignment, size_t size) noexcept nogil
    int allocate_room(int fd, uint64_t offset, uint64_t size) noexcept nogil
    int fault_in(void *p) noexcept nogil
    uint64_t find_page_size() noexcept nogil
    int punch_hole(int fd, uint64_t offset, uint64_t size) noexcept nogil
    long filesystem_type(int fd) noexcept nogil
    int close(int fd) noexcept nogil
    int64_t lseek(int fd, int64_t offset, int whence) noexcept nogil

cdef uint64_t kernel_page = find_page_size()


def page_size():
    """Bytes of the kernel's page."""
    return kernel_page


cdef uint64_t whole_pages(uint64_t size) noexcept nogil:
    return (size + kernel_page - 1) & ~(kernel_page - 1)


cdef uint32_t page_unit() noexcept nogil:
    """How many pages of 4096 bytes the kernel gives and takes back together: 1, 2, 4, 8 or 16."""
    return <uint32_t>(kernel_page >> PAGE_SHIFT)


cdef int region_populate(void *start, uint64_t size) noexcept nogil:
    """Make the whole pages that a range touches resident; 0, or -1 with errno."""
    cdef uint64_t first = <uint64_t>start & ~(kernel_page - 1)
    return madvise(<void *>first, whole_pages(<uint64_t>start + size) - first, MADV_POPULATE_WRITE)


cdef int region_map(void *start, uint64_t size) noexcept nogil:
    """Map whole pages that there are already; 0, or -1 with errno.

    Those of a file may be written then, too, and it takes half of the time: 0.3 ms for 1 MiB, against 0.6. The kernel maps
    16 of them for one fault where it is asked to read.
    """
    return madvise(start, size, MADV_POPULATE_READ)


cdef void *secret_alloc(uint64_t size) noexcept nogil:
    """Whole pages of the heap for what clients store, which must not be in a core dump; NULL when memory is short."""
    cdef void *start = NULL
    if posix_memalign(&start, kernel_page, whole_pages(size)):
        return NULL
    madvise(start, whole_pages(size), MADV_DONTDUMP)
    return start


cdef void secret_free(void *start, uint64_t size) noexcept nogil:
    if start != NULL:
        memset(start, 0, size)
        madvise(start, whole_pages(size), MADV_DODUMP)
        free(start)


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
        self._advise()

    def __dealloc__(self):
        if self.base != NULL:
            munmap(self.base, self.size)

    cdef void _advise(self) noexcept nogil:
        # A huge page would make 2 MiB resident for one touched slot or object.
        madvise(self.base, self.size, MADV_NOHUGEPAGE)
        # What other programs stored is not for a core dump, and gigabytes would be written before a restart.
        madvise(self.base, self.size, MADV_DONTDUMP)

    cdef int take_room(self, void *start, uint64_t size) noexcept nogil:
        """Before pages are touched for the first time: 0; -EDQUOT, the file's file system has no room for them; -ENOMEM.

        Touching them would end the process (SIGBUS).
        """
        cdef int rc
        if self.fd < 0 or region_populate(start, size) == 0:
            return 0
        if errno == EINVAL:     # before Linux 5.14
            rc = allocate_room(self.fd, self.offset + <uint64_t>(<char *>start - self.base), size)
            while rc and errno == EINTR:
                rc = allocate_room(self.fd, self.offset + <uint64_t>(<char *>start - self.base), size)
            if rc == 0:
                return 0
        return self.refusal()

    cdef int touch(self, char *start, uint64_t size) noexcept nogil:
        """As take_room, of whole pages that hold nothing yet: something is written to each."""
        cdef uint64_t done = 0
        if self.fd >= 0:
            while done < size and fault_in(start + done) == 0:
                done += kernel_page
            if done < size:
                return self.take_room(start, size)
        return 0

    cdef int refusal(self) noexcept nogil:
        """After pages could not be had: -EDQUOT, the file's file system has no room for them, or -ENOMEM."""
        return -EDQUOT if self.fd >= 0 and (errno == EFAULT or errno == ENOSPC) else -ENOMEM

    cdef int populate(self, uint64_t size) noexcept nogil:
        """Make its first size bytes resident; 0, -EDQUOT or -ENOMEM."""
        if region_populate(self.base, size) == 0:
            return 0
        return self.refusal()

    cdef int release(self, void *start, uint64_t size) noexcept nogil:
        """Give whole pages back to the operating system; they read as zeros afterwards."""
        if self.fd < 0:
            return madvise(start, size, MADV_DONTNEED_LOCKED if memory_is_locked() else MADV_DONTNEED)
        return punch_hole(self.fd, self.offset + <uint64_t>(<char *>start - self.base), size)

    cdef void clear(self) noexcept nogil:
        """Make all of it zeros, and give its pages back unless the system refuses."""
        cdef uint64_t start = 0, end = self.size
        if self.release(self.base, self.size) == 0:
            return
        if self.fd < 0:
            if mmap(self.base, self.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
                    -1, 0) == MAP_FAILED:
                memset(self.base, 0, self.size)
            else:
                self._advise()
            return
        while self.next_extent(&start, &end):
            memset(self.base + start, 0, end - start)
            start = end
            end = self.size

    cdef bint next_extent(self, uint64_t *start, uint64_t *end) noexcept nogil:
        """The next run of pages of the file that hold something, from start[0] on and up to end[0]; False when none is left.

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

    The descriptor remains the caller's: this has one of its own, and with it the file's lock. Raises ValueError for a file
    that is too short to be a state, MemoryError on a kernel whose pages are too large, and PoolFullError.
    """

    def __cinit__(self, int fd=-1):
        cdef int rc
        self.fd = -1
        if kernel_page < PAGE_SIZE or kernel_page > SPAN_SIZE:
            raise MemoryError(f"this kernel has pages of {kernel_page} bytes: zramd needs one with 4096 to {SPAN_SIZE}")
        if fd >= 0:
            self.fd = os.dup(fd)
        self.head = self.region(HEAD_SIZE, True)
        if fd < 0:
            return
        if os.fstat(fd).st_size < HEAD_SIZE:
            raise ValueError(f"a file of {os.fstat(fd).st_size} bytes is not a state")
        rc = self.head.take_room(self.head.base + KEPT_STATE, KEPT_PAGES * PAGE_SIZE)
        if rc:
            raise error_from(rc, "the state's first pages")

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
