"""The Python state of threads that Python did not start: kept while they live, deleted after their end."""

import ctypes
import threading

from zramd.core.system import threadstate

libc = ctypes.CDLL(None)
# It calls back for each library that is loaded. A thread that runs this comes into Python anew each time.
MANY_CALLS = ctypes.cast(libc.dl_iterate_phdr, ctypes.c_void_p)
CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


class Visitor:
    """A thread of the C library's that calls into Python several times, and keeps its state."""

    def __init__(self, *, keeps: bool = True) -> None:
        self._local = threading.local()  # as long as a thread has the same state, it finds here what it left
        self._keeps = keeps
        self.counts: list[int] = []
        self._called = CALLBACK(self._call)
        self._thread = ctypes.c_ulong()
        assert not libc.pthread_create(
            ctypes.byref(self._thread), None, MANY_CALLS, ctypes.cast(self._called, ctypes.c_void_p)
        )

    def _call(self, info: int, size: int, data: int) -> int:
        if self._keeps:
            threadstate.keep()
        self._local.calls = getattr(self._local, "calls", 0) + 1
        self.counts.append(self._local.calls)
        return len(self.counts) == 5

    def join(self) -> list[int]:
        """Wait for its end; return the number that each call had in the state that it found."""
        libc.pthread_join(self._thread, None)
        return self.counts


def test_it_is_another_one_each_time_unless_it_is_kept() -> None:
    assert Visitor(keeps=False).join() == [1, 1, 1, 1, 1]
    assert Visitor().join() == [1, 2, 3, 4, 5]


def test_the_next_thread_deletes_those_that_were_left() -> None:
    Visitor().join()
    kept, reclaimed = threadstate.kept()
    for _ in range(100):
        assert Visitor().join() == [1, 2, 3, 4, 5]
    assert threadstate.kept() == (kept + 100, reclaimed + 100)
