"""swap=local: what a server needs to which its own kernel swaps.

The kernel frees memory by writing pages to us, so we must never wait for memory that only this can free: not
for a page of our own, not in a system call, not behind a thread that waits. Each measure below is set, then
read back, and the server does not start without it. docs/swapping.md lists the hazards that each answers.

before nbdkit forks   mark as I/O flusher, keep the OOM killer away
after                 lock memory, read the code in, warm the heap, fill the reserve, never block on the log,
                      real-time priority for the threads that serve, and for those that may keep them waiting
"""

import gc
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from zramd.core.system import process, threadstate
from zramd.errors import SwapError, reason

if TYPE_CHECKING:
    from zramd.core.device.device import Device

OOM_SCORE_ADJ = -1000
HEAP_BYTES = 4 << 20  # the server's own use beyond its start is under 1 MiB
_REQUEST_BYTES = 128 << 10  # the most in one request of the kernel's

# Real-time priorities. A thread that runs Python beside those that serve may have the GIL, or a lock of
# Python's or of the C library's, when they want it. So it must get the processor before any ordinary program
# does, but after them.
SERVE, BESIDE = 2, 1
SWITCH_INTERVAL = 0.0005  # seconds after which the holder of the GIL is asked for it

_protected = 0  # the process that has locked its memory and warmed its heap: a fork of it has not
_resident: frozenset[str] = frozenset()  # lines of its map: files that are in memory and stay there

_CODE, _FREE = "cannot read the program's code into memory", "free some memory"
_SMALL = 2 << 20  # bytes
_FRAMES = 200  # of Python: they fill the 16 KiB that each thread has for them


def prepare() -> None:
    """Take the measures that a fork inherits. Raises SwapError when one cannot be had."""
    _io_flusher()
    _oom_score_adj()


def protect(device: "Device", reserve: int) -> None:
    """Take the measures that hold for this process only, with `reserve` bytes of pages kept ready.

    Call it in the process that serves, before it starts threads. Raises SwapError when one cannot be had.
    """
    protect_process()
    _reserve(device, reserve)
    _inherited_priority(device)
    sys.setswitchinterval(SWITCH_INTERVAL)
    threadstate.on_keep(warm_stack)
    _settle()


def protect_process(heap: int = HEAP_BYTES) -> None:
    """Take those measures that any process needs to act while memory is short, with `heap` bytes of it warm.

    In a process that has taken them before only what it has mapped since is made resident: whoever waits for
    one that takes over does not wait for the rest again. Raises SwapError when one cannot be had.
    """
    global _protected, _resident
    _locked_memory()
    if _protected == os.getpid():
        _make_resident(_resident)
    else:
        _resident = _resident_code()
        _warm_heap(heap)
        warm_stack()
        _protected = os.getpid()
    _settle()


def _settle() -> None:
    gc.collect()
    gc.freeze()  # what lives now lives for good: the collector need not touch it again


def warm_stack() -> None:
    """Make the calling thread's stacks resident, C's and Python's: a page fault in there holds the GIL."""
    process.warm_stack()
    process.warm_lock()
    _deep(_FRAMES)


def _deep(frames: int) -> int:
    return frames and _deep(frames - 1)


def take_priority(priority: int = SERVE) -> None:
    """Make the calling thread, and the threads that it starts from now on, real-time. Raises SwapError.

    Each answer to the kernel takes a page of memory for the socket. When nothing is free but what
    vm.min_free_kbytes sets aside, ordinary programs wait until swapping out has freed more, and we with them:
    for ever. Real-time threads may take a quarter of what is set aside (half, since Linux 6.4). They also get
    the processor when the machine is busy.
    """
    remedy = _right("SYS_NICE")
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))
    except OSError as error:
        raise _refuse("cannot become real-time", reason(error), remedy) from None
    if os.sched_getscheduler(0) != os.SCHED_RR or os.sched_getparam(0).sched_priority != priority:
        raise _refuse("cannot become real-time", "the kernel does not say so", remedy)


def be_ordinary(nice: int) -> None:
    """Give the calling thread's real-time priority up: for one that neither serves nor keeps others waiting.

    It has the GIL when this returns: it should not have it for long.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def give_up_rights(kept: int) -> None:
    """Give up, for good, this process's capabilities beyond `kept`, a bit for each. Raises OSError."""
    process.keep_capabilities(kept)


def _right(capability: str) -> str:
    """Return what to do for a right that is missing: in a container, or as a service, root may lack it."""
    if os.geteuid():
        return f"run it as root, or give it CAP_{capability}"
    return f"root lacks CAP_{capability} here: have its container or service give it"


def _refuse(measure: str, why: object, remedy: str) -> SwapError:
    return SwapError(f"{measure}: {why}: {remedy}")


def _io_flusher() -> None:
    """Memory that the kernel takes for us must not be waited for by swapping out (PR_SET_IO_FLUSHER)."""
    remedy = f"{_right('SYS_RESOURCE')}, on Linux 5.6 or later"
    try:
        process.set_io_flusher()
    except OSError as error:
        raise _refuse("cannot become an I/O flusher", reason(error), remedy) from None
    if not process.is_io_flusher():
        raise _refuse("cannot become an I/O flusher", "the kernel does not say so", remedy)


def _oom_score_adj() -> None:
    """The OOM killer must not take the server for the one that uses the memory."""
    path = "/proc/self/oom_score_adj"
    try:
        with open(path, "r+") as score:
            score.write(str(OOM_SCORE_ADJ))
            score.seek(0)
            found = score.read().strip()
    except OSError as error:
        raise _refuse(
            f"cannot set {path} to {OOM_SCORE_ADJ}", reason(error), _right("SYS_RESOURCE")
        ) from None
    if found != str(OOM_SCORE_ADJ):
        raise _refuse(f"cannot set {path} to {OOM_SCORE_ADJ}", f"it is {found}", _right("SYS_RESOURCE"))


def _locked_memory() -> None:
    """Our own pages must never be swapped out: nobody could bring them back."""
    remedy = f"{_right('IPC_LOCK')}, or LimitMEMLOCK=infinity, on Linux 5.18 or later"
    try:
        process.lock_memory()
    except OSError as error:
        raise _refuse("cannot lock memory", reason(error), remedy) from None
    status = _status()
    # All that is mapped counts as locked but for a few pages of the kernel's own (vvar, vdso).
    if status["VmLck"] < 0.99 * status["VmSize"]:
        raise _refuse("cannot lock memory", f"{status['VmLck']} of {status['VmSize']} kB are", remedy)


def _resident_code() -> frozenset[str]:
    """Code that was never run yet must not be read from a disk when memory is short.

    Nor may a program's variables be touched for the first time then: such a page fault may hold the GIL.
    Returns the lines of the process's map that are of files.
    """
    lines = _make_resident()
    missing = _missing_code()
    if missing:
        raise _refuse(_CODE, f"{missing} kB are missing", _FREE)
    return lines


def _make_resident(known: frozenset[str] = frozenset()) -> frozenset[str]:
    """Make what is mapped resident, but for the files of lines that are known; return the lines of files."""
    files = set()
    for start, end, line in _mappings():
        if line in known:
            continue
        try:
            process.make_resident(start, end - start)
        except OSError as error:
            raise _refuse(_CODE, reason(error), _FREE) from None
        if "/" in line:  # anonymous memory may go, and other memory come to its place
            files.add(line)
    return frozenset(files)


def _warm_heap(size: int = HEAP_BYTES) -> None:
    """Python and nbdkit must find memory in the heap without asking the kernel for it."""
    # Three quarters, of small objects mostly: Python's own allocator takes 1 MiB at a time and gives it back.
    probe = size * 3 // 4
    remedy = "start it by 'zramd serve' or with PYTHONMALLOC=malloc in its environment"
    try:
        process.warm_heap(size)
    except OSError as error:
        raise _refuse("cannot make the heap resident", reason(error), "free some memory") from None
    # The least of a few: the first time also touches what is not the heap.
    faults = min(_faults_of_heap(probe) for _ in range(3))
    if faults:
        why = f"{faults} page faults for {probe} bytes"
        raise _refuse("the heap takes pages from the kernel", why, remedy)


def _faults_of_heap(size: int) -> int:
    """Return how many pages the heap takes from the kernel for `size` bytes of small and large objects."""
    before = minor_faults()
    objects = [bytes(200) for _ in range((size - _REQUEST_BYTES) // 256)]
    objects.append(bytes(_REQUEST_BYTES))
    return minor_faults() - before


def _reserve(device: "Device", size: int) -> None:
    """Pages of the pool and all tables must be there before they are needed."""
    try:
        device.reserve_start(size)
    except MemoryError as error:
        raise _refuse("cannot fill the reserve", error, "use a smaller reserve= or disksize=") from None
    found = device.counters()["reserve_bytes"]
    if found < size:
        raise _refuse("cannot fill the reserve", f"it has {found} of {size} bytes", "use a smaller reserve=")


def _inherited_priority(device: "Device") -> None:
    """Who has a lock that a thread which serves wants must not wait behind ordinary programs."""
    try:
        device.inherit_priority()
    except OSError as error:
        raise _refuse("locks cannot pass priority on", reason(error), "use a C library that can") from None


def minor_faults() -> int:
    """Return how many pages this process has touched that were not there yet."""
    with open("/proc/self/stat", "rb") as stat:
        return int(stat.read().rpartition(b")")[2].split()[7])


def _status() -> dict[str, int]:
    """Return the sizes in /proc/self/status, in kB."""
    sizes = {}
    with open("/proc/self/status", errors="surrogateescape", newline="\n") as status:
        for line in status:
            name, _, value = line.partition(":")
            if value.endswith(" kB\n"):
                sizes[name] = int(value.split()[0])
    return sizes


def _mappings() -> Iterator[tuple[int, int, str]]:
    """Yield start, end and line of what is mapped of files, and of small mappings: variables, the heap.

    What is large is the device's own (that is what the reserve is for) or nbdkit's 192 MiB that nobody uses.
    So is a shared file: of a state all holes would be filled.
    """
    with open("/proc/self/maps", errors="surrogateescape", newline="\n") as maps:
        lines = maps.readlines()
    for line in lines:
        words = line.split(maxsplit=5)
        start, end = (int(word, 16) for word in words[0].split("-"))
        name = words[5] if len(words) == 6 else ""
        small = end - start <= _SMALL and not name.startswith("[v")  # the kernel's own cannot be locked
        if name.startswith("/") and words[1][3] == "s":
            continue
        if words[1][0] == "r" and (name.startswith("/") or name == "[heap]\n" or small):
            yield start, end, line


def _missing_code() -> int:
    """Return how many kB of the mapped files are not resident."""
    missing = 0
    with open("/proc/self/smaps", errors="surrogateescape", newline="\n") as smaps:
        counts = False
        for line in smaps:
            words = line.split(maxsplit=5)
            if not words[0].endswith(":"):
                counts = len(words) == 6 and words[5].startswith("/") and words[1][:4:3] == "rp"
            elif counts and words[0] == "Size:":
                missing += int(words[1])
            elif counts and words[0] == "Rss:":
                missing -= int(words[1])
    return missing
