/* LD_PRELOAD: madvise(MADV_POPULATE_WRITE) fails while the file $SHIM_WHILE exists: with the errno $SHIM_ERRNO.
   EINVAL is what a kernel before Linux 5.14 says. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>

int madvise(void *start, size_t size, int advice)
{
    const char *file = getenv("SHIM_WHILE");
    if (advice == 23 && file && access(file, F_OK) == 0) {
        errno = atoi(getenv("SHIM_ERRNO"));
        return -1;
    }
    return (int)syscall(SYS_madvise, start, size, advice);
}
