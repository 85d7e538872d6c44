/* Loaded first (LD_PRELOAD) it gives each socket that a program opens or accepts a send buffer of ZRAMD_BUFFER bytes,
   as zramd gives its own: see zramd/process/buffers.py. For scripts/bench --only nbd. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/socket.h>

static int widen(int fd)
{
    const char *text = getenv("ZRAMD_BUFFER");
    int size = text ? atoi(text) : 0;
    if (fd >= 0 && size && setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof(size)))
        setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof(size));
    return fd;
}

int socket(int family, int type, int protocol)
{
    int (*real)(int, int, int) = (int (*)(int, int, int))dlsym(RTLD_NEXT, "socket");
    return widen(real(family, type, protocol));
}

int accept(int fd, struct sockaddr *address, socklen_t *size)
{
    int (*real)(int, struct sockaddr *, socklen_t *) =
        (int (*)(int, struct sockaddr *, socklen_t *))dlsym(RTLD_NEXT, "accept");
    return widen(real(fd, address, size));
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags)
{
    int (*real)(int, struct sockaddr *, socklen_t *, int) =
        (int (*)(int, struct sockaddr *, socklen_t *, int))dlsym(RTLD_NEXT, "accept4");
    return widen(real(fd, address, size, flags));
}
