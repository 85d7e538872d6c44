/* Asks zramd's control socket over HTTP and prints the body of the answer. */

#include "tool.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

int control_main(int argc, char **argv)
{
    static char answer[65536];
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    size_t used = 0;
    ssize_t got;

    if (argc < 3 || argc > 4 || strlen(argv[0]) >= sizeof address.sun_path)
        return 2;
    const char *body = argc == 4 ? argv[3] : "";
    strcpy(address.sun_path, argv[0]);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&address, sizeof address))
        die(argv[0]);
    if (dprintf(fd, "%s %s HTTP/1.1\r\nHost: zramd\r\nContent-Length: %zu\r\n\r\n%s", argv[1], argv[2],
                strlen(body), body) < 0)
        die("request");
    while (used < sizeof answer - 1 && (got = read(fd, answer + used, sizeof answer - 1 - used)) > 0)
        used += got;
    char *start = strstr(answer, "\r\n\r\n");
    if (!start) {
        fprintf(stderr, "no answer\n");
        return 1;
    }
    fwrite(start + 4, 1, answer + used - (start + 4), stdout);
    return strncmp(answer, "HTTP/1.1 200", 12) ? 1 : 0;
}
