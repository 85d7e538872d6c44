"""The two steps of a refresh: to empty an area, and to wipe free places. Each can be given up at any time."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from . import files
from .areas import DISCARD, Area, areas, swap_off, swap_on
from .files import PAGE, GivenUp, GuestError, read
from .memory import Watch

LOOK = 0.05  # seconds between two looks at memory during a step
STEP = 64  # pages that are wiped at a time
PAUSE = 0.001  # seconds between two such: requests of others go first
WORD = b"zramwipe"  # not zero: Linux 6.12 writes no pages of zeros

_GIVEN_UP = 3  # exit status of a step's process
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MADV_NOHUGEPAGE, _MADV_PAGEOUT = 15, 21  # asm-generic/mman-common.h


def reached(name: str) -> None:
    """Do nothing: a test puts what holds or kills the process at a named step in this one's place."""


def nothing() -> str:
    """Return that nobody wants a step to be given up."""
    return ""


def _in_child(work: Callable[[Callable[[], bool]], str], wanted: Callable[[], str]) -> str:
    """Let a process of its own do a step, watch memory meanwhile, and return what the step says.

    `work` is given what says whether it is to end; `wanted` returns why it is to be given up, beside memory.
    If this process is killed, the other one gives up too, and swap that is off is on again in the end. If
    memory runs out, it is the one that the kernel kills. Raises GivenUp, GuestError.
    """
    ours, theirs = os.pipe()
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        os.close(ours)
        _work(work, theirs, parent)
    os.close(theirs)
    watch, reason, words = Watch(wanted), "", b""
    try:
        while True:
            ready, _, _ = select.select([ours], [], [], LOOK)
            if ready:
                got = os.read(ours, 4096)
                if not got:
                    break
                words += got
            elif not reason and (reason := watch.reason()):
                os.kill(pid, signal.SIGINT)
    except BaseException:
        os.kill(pid, signal.SIGINT)
        raise
    finally:
        os.close(ours)
        _, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        raise GivenUp(
            "its process was killed" + (f": {reason}" if reason else ", perhaps for lack of memory")
        )
    if code == _GIVEN_UP:
        raise GivenUp(reason or words.decode())
    if code:
        raise GuestError(words.decode() or "no reason given")
    return words.decode()


def _work(work: Callable[[Callable[[], bool]], str], result: int, parent: int) -> NoReturn:
    """Do a step in this process, the child of `parent`, write what it says, and end."""
    status = 1
    try:
        ended: list[int] = []
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, _: ended.append(number))  # swapoff: EINTR
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGINT, 0, 0, 0)
        if os.getppid() != parent:  # killed before it could be told
            ended.append(signal.SIGINT)
        with suppress(OSError), open(f"{files.PROC}/self/oom_score_adj", "w", encoding="utf-8") as file:
            file.write("1000")
        try:
            words = work(lambda: bool(ended))
            status = 0
        except OSError as error:
            # ENOMEM: swapoff may not promise so much (vm.overcommit_memory=2).
            status = _GIVEN_UP if error.errno in (errno.EINTR, errno.ENOMEM) else 1
            told = "it was told to end" if error.errno == errno.EINTR else error.strerror
            words = f"{error.filename}: {told}" if error.filename else str(told)
        os.write(result, words.encode())
    finally:
        os._exit(status)


def empty(area: Area, flags: int = DISCARD, wanted: Callable[[], str] = nothing) -> float:
    """Bring back what is out in an area, discard all of it, and swap to it again; return the seconds.

    `flags` are those of swapon(2); `wanted` as for _in_child. Raises GivenUp: the area is on, as it was.
    Raises GuestError.
    """

    def work(is_ended: Callable[[], bool]) -> str:
        reached("refresh.empties")
        if is_ended():
            raise OSError(errno.EINTR, "")
        swap_off(area.path)
        reached("refresh.off")
        swap_on(area.path, area.priority, flags)  # whatever is_ended says: never without
        reached("refresh.on")
        return ""

    started = time.monotonic()
    _in_child(work, wanted)
    now = next((one for one in areas() if one.path == area.path), None)
    if now is None or max(now.priority, -1) != max(area.priority, -1):  # a negative one the kernel chooses
        raise GuestError(f"{area.path} is not swapped to as it was before it was emptied")
    return time.monotonic() - started


def wipe(paths: list[str], pages: int, wanted: Callable[[], str] = nothing) -> float:
    """Take all free places of some areas with pages of one word, and give them back; return the seconds.

    `pages` is how many these are, with those of areas that the kernel fills before; `wanted` as for
    _in_child. Raises GivenUp, GuestError.
    """
    slack = 128 * (os.cpu_count() or 1)  # the kernel hands places out to each processor by 64
    most = pages + pages // 4 + slack

    def work(is_ended: Callable[[], bool]) -> str:
        reached("refresh.wipes")
        place = mmap.mmap(-1, most * PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        place.madvise(_MADV_NOHUGEPAGE)
        step = WORD * (STEP * PAGE // len(WORD))
        for at in range(0, most - STEP, STEP):
            place[at * PAGE : (at + STEP) * PAGE] = step
            place.madvise(_MADV_PAGEOUT, at * PAGE, STEP * PAGE)
            if is_ended():
                raise OSError(errno.EINTR, "")
            if at // STEP % 8 == 7 and _free(paths) <= slack:
                break
            time.sleep(PAUSE)
            _await_reclaim()
        return str(at + STEP)

    started = time.monotonic()
    _in_child(work, wanted)
    return time.monotonic() - started


def _free(paths: list[str]) -> int:
    return sum(area.free for area in areas() if area.path in paths)


def _await_reclaim() -> None:
    """Let the kernel free what was written, for a second at most.

    It stays in memory until reclaim in the background comes by, which begins where a quarter more is free
    than what is reserved. Who goes on below that reclaims in its place, and has others wait.
    """
    least = int(read(f"{files.PROC}/sys/vm/min_free_kbytes")) * 5 // 4
    end = time.monotonic() + 1
    while _free_kib() < least and time.monotonic() < end:
        time.sleep(LOOK / 5)


def _free_kib() -> int:
    found = re.search(r"^MemFree: +(\d+)", read(f"{files.PROC}/meminfo"), re.MULTILINE)
    return int(found[1]) if found else 0
