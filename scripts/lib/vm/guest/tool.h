/* What the parts of the guest's program share. Everything that it prints is one line of JSON, or the body of
   an HTTP answer. */

#ifndef ZRAMD_GUEST_TOOL_H
#define ZRAMD_GUEST_TOOL_H

#include <stddef.h>
#include <stdint.h>

#define PAGE 4096
#define MIB (1u << 20)

/* The verbs; `argc` and `argv` are what follows the verb. Each returns the exit status. */
int pattern_main(int argc, char **argv);
int churn_main(int argc, char **argv);
int hog_main(int argc, char **argv);
int monitor_main(int argc, char **argv);
int control_main(int argc, char **argv);
int load_main(int argc, char **argv);
int revive_main(int argc, char **argv);

/* Take the content of pages from this file or disk of memory pages, instead of making it. */
void page_source(const char *path);

/* Put the content of a page into `out` (4096 bytes, aligned to 8): a pure function of the three numbers. */
void page_content(uint64_t *out, uint64_t seed, uint64_t page, uint64_t version);

/* A well mixed 64-bit number of another one, and the next one of a stream. */
uint64_t mix(uint64_t value);
uint64_t next_random(uint64_t *state);

/* Seconds of the monotonic clock. */
double now(void);

/* Say how willingly the kernel kills this process when memory is out: -1000 (never) to 1000 (first). */
void set_oom_score(int score);

/* Read at most `size - 1` bytes of a file and end them with a NUL; returns their number, -1 if it is not there. */
long read_file(const char *path, char *buffer, size_t size);

/* Return the argument as a number; a word that is none ends the program with status 2. */
unsigned long number(const char *text);

/* Print one sentence and end the program with status 1. */
void die(const char *what) __attribute__((noreturn));

#endif
