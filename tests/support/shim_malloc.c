/* LD_PRELOAD: counts what the process asks the heap for; shim_fail lets the one after so many fail, once. What asks for
   whole pages of SHIM_REFUSED bytes, of the environment, fails always. */
#define _GNU_SOURCE
#include <errno.h>
#include <stddef.h>
#include <stdlib.h>

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *start, size_t size);
extern void *__libc_memalign(size_t alignment, size_t size);

static long count, least, left;

/* From now on: how many requests for at least so many bytes there were before. */
long shim_count(size_t bytes)
{
    least = (long)bytes;
    return __atomic_exchange_n(&count, 0, __ATOMIC_SEQ_CST);
}

/* Let the n-th of these from now on fail, 1 is the next; 0: none. */
void shim_fail(long n) { __atomic_store_n(&left, n, __ATOMIC_SEQ_CST); }

static int fails(size_t size)
{
    if ((long)size < least)
        return 0;
    __atomic_add_fetch(&count, 1, __ATOMIC_SEQ_CST);
    return __atomic_load_n(&left, __ATOMIC_SEQ_CST) && __atomic_sub_fetch(&left, 1, __ATOMIC_SEQ_CST) == 0;
}

void *malloc(size_t size) { return fails(size) ? NULL : __libc_malloc(size); }
void *calloc(size_t n, size_t size) { return fails(n * size) ? NULL : __libc_calloc(n, size); }
void *realloc(void *start, size_t size) { return fails(size) ? NULL : __libc_realloc(start, size); }

int posix_memalign(void **start, size_t alignment, size_t size)
{
    const char *refused = getenv("SHIM_REFUSED");
    if (fails(size) || (refused && (size_t)atol(refused) == size))
        return ENOMEM;
    *start = __libc_memalign(alignment, size);
    return *start ? 0 : ENOMEM;
}
