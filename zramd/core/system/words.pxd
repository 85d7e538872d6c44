"""A struct of counters as a dict, by the names of its fields: a new field needs no line for that.

Cython makes a dict of a struct by itself, but reads it as if no other thread wrote to it. So it is asked once, for a struct
whose words hold their own index, and counters are read by the indexes that it found.
"""

from libc.stdint cimport uint64_t

from zramd.core.system.locks cimport load_relaxed

cdef inline void number_words(uint64_t *words, uint64_t size) noexcept nogil:
    """Make each word of a struct of size bytes its index. Its dict is what read_words takes."""
    cdef uint64_t i
    for i in range(size // sizeof(uint64_t)):
        words[i] = i

cdef inline dict read_words(uint64_t *words, dict indexes):
    """The single words of a struct; arrays and structs in it are left out."""
    cdef uint64_t i
    found = {}
    for name, index in indexes.items():
        if isinstance(index, int):
            i = index
            found[name] = load_relaxed(&words[i])
    return found
