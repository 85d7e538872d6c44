/* LD_PRELOAD: mmap, madvise, mprotect and sysconf as a kernel with pages of SHIM_PAGE bytes has them, on one with smaller
   pages. madvise(2): EINVAL for a start that is not page aligned; "length is rounded up to a multiple of page size". What
   Linux would map on a fault it maps with the rest of the page: here only MADV_POPULATE_WRITE does, see shim_touched. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SHIM_PAGE
#define SHIM_PAGE 16384UL
#endif

static unsigned long up(unsigned long n) { return (n + SHIM_PAGE - 1) & ~(SHIM_PAGE - 1); }

void *mmap(void *start, size_t size, int protection, int flags, int fd, off_t offset)
{
    char *place, *aligned;
    if (fd >= 0 && offset % SHIM_PAGE) {
        errno = EINVAL;
        return MAP_FAILED;
    }
    if (start || flags & MAP_FIXED)
        return (void *)syscall(SYS_mmap, start, size, protection, flags, fd, offset);
    place = (char *)syscall(SYS_mmap, NULL, up(size) + SHIM_PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0L);
    if (place == MAP_FAILED)
        return place;
    aligned = (char *)up((uintptr_t)place);
    if (aligned > place)
        syscall(SYS_munmap, place, aligned - place);
    syscall(SYS_munmap, aligned + up(size), place + up(size) + SHIM_PAGE - (aligned + up(size)));
    return (void *)syscall(SYS_mmap, aligned, size, protection, flags | MAP_FIXED, fd, offset);
}

void *mmap64(void *start, size_t size, int protection, int flags, int fd, off64_t offset)
{
    return mmap(start, size, protection, flags, fd, offset);
}

int madvise(void *start, size_t size, int advice)
{
    if ((uintptr_t)start % SHIM_PAGE) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_madvise, start, up(size), advice);
}

int mprotect(void *start, size_t size, int protection)
{
    if ((uintptr_t)start % SHIM_PAGE) {
        errno = EINVAL;
        return -1;
    }
    return (int)syscall(SYS_mprotect, start, up(size), protection);
}
