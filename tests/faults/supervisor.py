"""Makes system calls of a program fail, by the kernel's own means: seccomp's user notification.

Why not strace --inject: it counts each thread's calls for itself, cannot be told anything once it runs, stops
a thread twice for each call of any kind, and does not know a call by the file that it is about. Here a
listener gets each call before it is made, with its thread and arguments, and says whether it is made, or what
it returns instead. That holds for all that the program starts, and takes 7 microseconds a call.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import re
import select
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import calls
from support.server import PACKAGE_PARENT

_NOTIF = struct.Struct("=QIIiIQ6Q")
_REPLY = struct.Struct("=QqiI")
_RECEIVE, _SEND, _SET_FLAGS = 0xC0502100, 0xC0182101, 0x40082104
_CONTINUE = 1
_ZEROS = bytes(_NOTIF.size)
_PAGE = 4096

_PATH_AT = {  # which argument is a path
    "open": 0, "openat": 1, "openat2": 1, "newfstatat": 1, "stat": 0, "lstat": 0, "statx": 1, "access": 0,
    "faccessat": 1, "faccessat2": 1, "unlink": 0, "unlinkat": 1, "rmdir": 0, "rename": 0, "renameat": 1,
    "renameat2": 1, "mkdir": 0, "mkdirat": 1, "chmod": 0, "fchmodat": 1, "chown": 0, "fchownat": 1,
    "readlink": 0, "readlinkat": 1, "statfs": 0, "truncate": 0, "execve": 0, "chdir": 0, "link": 0,
    "symlink": 1, "utimensat": 1,
}  # fmt: skip
_FD_AT_0 = frozenset(
    re.findall(
        r"\w+",
        "read pread64 readv preadv write pwrite64 writev pwritev recvfrom recvmsg sendto sendmsg fstat"
        " fstatfs lseek fallocate ftruncate fcntl flock ioctl accept accept4 bind listen connect"
        " setsockopt getsockopt getsockname getpeername shutdown dup dup2 dup3 fchmod fchown getdents64"
        " fsync fdatasync",
    )
)
_NUMBER_AT = {
    "fcntl": 1, "ioctl": 1, "prctl": 0, "madvise": 2, "socket": 0, "lseek": 2,
    "setsockopt": 2, "getsockopt": 2,
}  # fmt: skip
# Files of the system, of Python, and the package's own code: the loader and Python read them.
_SYSTEM = ("/usr/", "/lib", "/etc/", "/bin/", "/opt/", sys.prefix, str(PACKAGE_PARENT))
# A program's calls count from when it opens this file: before that the loader, nbdkit and Python begin.
_BEGINS = {"command": "/zramd/commands/__pycache__/__init__", "server": "/nbdkit_plugin.py"}
_CAN_BE_SHORT = frozenset(("read", "write", "pread64", "pwrite64", "preadv", "pwritev", "recvfrom", "sendto"))
_PEERPIDFD = 77  # SO_PEERPIDFD
_DUPFD = (0, 1030)  # F_DUPFD, F_DUPFD_CLOEXEC


class Place(NamedTuple):
    """Where a call is made: by which program and thread, which call, and on what."""

    program: str
    thread: str
    call: str
    what: str

    def __str__(self) -> str:
        return f"{self.program}/{self.thread} {self.call}({self.what})"


@dataclass
class Rule:
    """What is to fail: the `nth` call at a place, or all from then on."""

    place: Place
    nth: int
    error: str
    lasting: bool = False
    seen: int = 0
    hits: int = 0

    def __str__(self) -> str:
        return f"{self.place} #{self.nth} {self.error}{' lasting' if self.lasting else ''}"

    def wants(self, place: Place) -> bool:
        """Count the call and say whether it is to fail."""
        if place == self.place:
            self.seen += 1
            if self.seen == self.nth or (self.seen > self.nth and self.lasting):
                self.hits += 1
                return True
        elif self.lasting and self.hits and place.program == self.place.program:
            # A shortage is met by all who ask for the same.
            met = self.error in calls.SHORTAGES and self.error in errors_of(place)
            self.hits += met
            return met
        return False


def errors_of(place: Place) -> tuple[str, ...]:
    """Return how a call at this place can fail."""
    name = place.call
    if name.startswith("open") and place.what.endswith("+creat"):
        name = "openat+creat"
    if name == "newfstatat" and not place.what:
        return ()  # without a path: fstat of a descriptor that is open
    if name == "fcntl" and place.what.endswith(f" {_DUPFD[1]}"):
        name = "fcntl:dupfd"
    if name == "getsockopt" and place.what.endswith(f" {_PEERPIDFD}"):
        name = "getsockopt:pidfd"
    if name in ("sendto", "sendmsg", "write") and "socket" in place.what:
        name = "sendto"
    if name == "read" and "socket" in place.what:
        name = "recvfrom"
    if name == "read" and ("pipe" in place.what or "event" in place.what):
        return ("EINTR", calls.SHORT)  # what is there already takes nothing
    if name == "write" and ("pipe" in place.what or "event" in place.what):
        return ("EINTR",)
    survived = [(left[0], left[1], left[2]) for left in calls.NBDKIT]
    return tuple(
        error
        for error in calls.ERRORS.get(name, ())
        if (place.thread.rstrip("+"), place.call, error) not in survived
    )


@dataclass
class Program:
    """A program that runs supervised, with all that it starts."""

    name: str
    process: subprocess.Popen[str]
    listener: int
    ended: bool = False
    begun: set[str] = field(default_factory=set)  # which of its two parts count already: see _BEGINS


@dataclass
class Supervisor:
    """Answers the calls of supervised programs, in a thread of its own."""

    replace: list[tuple[str, str]] = field(default_factory=list)  # how paths begin → how places name them
    rule: Rule | None = None
    recording: Counter[Place] | None = None
    failure: BaseException | None = None
    lasting_threads: frozenset[int] = frozenset()  # of the server, where that is known

    def __post_init__(self) -> None:
        self._programs: dict[int, Program] = {}
        self._poll = select.epoll()
        self._lock = threading.Lock()
        self._ending = False
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._thread = threading.Thread(target=self._work, daemon=True, name="supervisor")
        self._thread.start()

    def run(self, name: str, argv: Iterable[object], **options: object) -> Program:
        """Start a program; `name` stands for it, and what it starts, in places."""
        launcher = Path(__file__).with_name("supervised.py")
        words = [sys.executable, "-I", "-S", str(launcher), str(calls.numbers()["seccomp"]), _filter().hex()]
        # In a group of its own: a signal to that must not reach the tests.
        options.setdefault("start_new_session", True)
        process = subprocess.Popen([*words, *map(str, argv)], text=True, **options)  # type: ignore[call-overload]
        listener = _take_listener(process)
        with suppress(OSError):  # Linux 6.6: the two sides run by turns on one processor
            fcntl.ioctl(listener, _SET_FLAGS, 1)
        program = Program(name, process, listener)
        with self._lock:
            self._programs[listener] = program
        self._poll.register(listener, select.EPOLLIN)
        return program

    @contextmanager
    def record(self) -> Iterator[Counter[Place]]:
        """Count the calls at each place meanwhile."""
        self.recording = Counter()
        try:
            yield self.recording
        finally:
            self.recording = None

    @contextmanager
    def failing(self, rule: Rule | None) -> Iterator[None]:
        """Let calls fail by the rule meanwhile."""
        self.rule = rule
        try:
            yield
        finally:
            self.rule = None

    def close(self) -> None:
        """Stop answering: do it when all programs have ended, as their calls wait for answers."""
        self._ending = True
        self._thread.join()
        for program in self._programs.values():
            os.close(program.listener)
        self._poll.close()

    def _work(self) -> None:
        while not self._ending:
            for fd, events in self._poll.poll(0.1):
                if events & select.EPOLLIN:
                    self._answer(fd)
                elif events & select.EPOLLHUP:
                    self._poll.unregister(fd)
                    with self._lock:
                        self._programs.pop(fd).ended = True
                    os.close(fd)

    def _answer(self, fd: int) -> None:
        try:
            notice = _NOTIF.unpack(fcntl.ioctl(fd, _RECEIVE, _ZEROS))
        except OSError:
            return  # who called is gone
        value, error, flags = 0, 0, _CONTINUE
        if self.rule is not None or self.recording is not None or len(self._programs[fd].begun) < 2:
            try:
                value, error, flags = self._judge(self._programs[fd], notice)
            except (OSError, ValueError):
                pass  # it is gone meanwhile
            except BaseException as failure:
                self.failure = failure
        with suppress(OSError):
            fcntl.ioctl(fd, _SEND, _REPLY.pack(notice[0], value, -error, flags))

    def _judge(self, program: Program, notice: tuple[int, ...]) -> tuple[int, int, int]:
        _, tid, _, number, _, _, *arguments = notice
        name = calls.names().get(number, str(number))
        rule = self.rule
        if self.recording is None and name != "openat" and (rule is None or not self._may_want(rule, name)):
            return 0, 0, _CONTINUE
        place = self._place(program, tid, name, arguments)
        if place is None:
            return 0, 0, _CONTINUE
        if self.recording is not None:
            self.recording[place] += 1
        if rule is None or not rule.wants(place):
            return 0, 0, _CONTINUE
        if rule.error == calls.SHORT:
            done = self._short(tid, name, arguments)
            if done is None:  # nothing that could be halved: wait for the next
                rule.hits -= 1
                rule.seen -= 1
                return 0, 0, _CONTINUE
            return done, 0, 0
        if name == "brk":
            return 0, 0, 0  # its way to say that there is no memory: an end that is not the wanted one
        return 0, calls.code(rule.error), 0

    @staticmethod
    def _may_want(rule: Rule, name: str) -> bool:
        return name == rule.place.call or (rule.lasting and rule.hits > 0 and rule.error in calls.SHORTAGES)

    def _place(self, program: Program, tid: int, name: str, arguments: list[int]) -> Place | None:
        comm = Path(f"/proc/{tid}/comm").read_text().rstrip("\n")
        role, part = program.name, "server"
        if comm != "nbdkit" and not comm.startswith("zramd"):
            role, part = role + "-command", "command"
        if part not in program.begun:
            if name == "openat" and _BEGINS[part] in _string(tid, arguments[1]):
                program.begun.add(part)
            return None
        if part == "command":
            comm = "zramd"
        elif self.lasting_threads and tid not in self.lasting_threads:
            comm += "+"  # one of those that come and go, for a client or a caller
        return Place(role, re.sub(r"\d+", "N", comm), name, self._what(tid, name, arguments))

    def _what(self, tid: int, name: str, arguments: list[int]) -> str:
        what = ""
        if name in _PATH_AT:
            address = arguments[_PATH_AT[name]]
            what = self._short_path(_string(tid, address) if address else "")
            if name == "openat" and arguments[2] & os.O_CREAT:
                what += "+creat"
        elif name in _FD_AT_0 or (name == "mmap" and arguments[4] < 1 << 31 and not arguments[3] & 0x20):
            fd = arguments[4] if name == "mmap" else arguments[0]
            with suppress(OSError):
                what = self._short_path(os.readlink(f"/proc/{tid}/fd/{fd}"))
        if name == "mmap":
            what += f" {arguments[2]:x} {arguments[1].bit_length()}"
        if name in ("mprotect", "madvise", "mremap", "mlock"):
            what += f" {arguments[1].bit_length()}"
        if name in _NUMBER_AT:
            what += f" {arguments[_NUMBER_AT[name]]}"
        return what.strip()

    def _short_path(self, path: str) -> str:
        for begin, name in self.replace:
            if path.startswith(begin):
                path = name + path[len(begin) :]
                break
        else:
            if path.startswith(_SYSTEM):
                return "system"
        return re.sub(r"\d+", "N", path)

    def _short(self, tid: int, name: str, arguments: list[int]) -> int | None:
        """Read or write half of what is asked for, in the caller's place; None if there is no half."""
        fd, address, length, at = arguments[:4]
        if name not in _CAN_BE_SHORT:
            return None
        with _copy_of(tid, fd) as copy, open(f"/proc/{tid}/mem", "r+b", buffering=0) as memory:
            if name in ("preadv", "pwritev"):  # the first of several pieces
                address, length = struct.unpack("=QQ", os.pread(memory.fileno(), 16, address))
            half = min(length // 2, 1 << 16)
            if fcntl.fcntl(copy, fcntl.F_GETFL) & os.O_DIRECT:
                half = half // _PAGE * _PAGE  # what a disk has done is whole sectors
            if not half:
                return None
            # Memory that begins with a page, as O_DIRECT wants it.
            with mmap.mmap(-1, half) as data:
                if name in ("write", "pwrite64", "pwritev", "sendto"):
                    data[:] = os.pread(memory.fileno(), half, address)
                    return os.pwrite(copy, data, at) if name.startswith("p") else os.write(copy, data)
                poll = select.poll()
                poll.register(copy, select.POLLIN)
                if not poll.poll(0):
                    return None
                done = os.preadv(copy, [data], at) if name.startswith("p") else os.readv(copy, [data])
                os.pwrite(memory.fileno(), data[:done], address)
                return done


@contextmanager
def _copy_of(tid: int, fd: int) -> Iterator[int]:
    process = os.pidfd_open(_process_of(tid))
    try:
        copy = _pidfd_getfd(process, fd)
    finally:
        os.close(process)
    try:
        yield copy
    finally:
        os.close(copy)


def _process_of(tid: int) -> int:
    match = re.search(r"^Tgid:\s+(\d+)", Path(f"/proc/{tid}/status").read_text(), re.M)
    assert match
    return int(match[1])


def _pidfd_getfd(process: int, fd: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    copy: int = libc.syscall(calls.numbers()["pidfd_getfd"], process, fd, 0)
    if copy < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return copy


def _take_listener(process: "subprocess.Popen[str]") -> int:
    """Return a copy of the launcher's listener: it waits for us in its next call."""
    end = time.monotonic() + 10
    while time.monotonic() < end:
        with suppress(OSError):
            for fd in os.listdir(f"/proc/{process.pid}/fd"):
                if os.readlink(f"/proc/{process.pid}/fd/{fd}") == "anon_inode:seccomp notify":
                    with _copy_of(process.pid, int(fd)) as copy:
                        return os.dup(copy)
        if process.poll() is not None:
            raise OSError(errno.ENOSYS, f"no seccomp user notification here: status {process.returncode}")
        time.sleep(0.0005)
    process.kill()
    raise TimeoutError("the launcher has made no listener")


def _string(tid: int, address: int) -> str:
    with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
        data = b""
        while b"\0" not in data and len(data) < _PAGE:
            data += os.pread(memory.fileno(), _PAGE - (address + len(data)) % _PAGE, address + len(data))
    return os.fsdecode(data.partition(b"\0")[0])


def _filter() -> bytes:
    """Return a seccomp program that lets the excluded calls pass and asks about all others."""
    allow, ask = 0x7FFF0000, 0x7FC00000
    load, equal, give = 0x20, 0x15, 0x06
    machine = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[os.uname().machine]
    program = [(load, 0, 0, 4), (equal, 1, 0, machine), (give, 0, 0, allow), (load, 0, 0, 0)]
    for name in calls.REASONS:
        number = calls.numbers().get(name)
        if number is not None:
            program += [(equal, 0, 1, number), (give, 0, 0, allow)]
    program.append((give, 0, 0, ask))
    return b"".join(struct.pack("=HBBI", *line) for line in program)
