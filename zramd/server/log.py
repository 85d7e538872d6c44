"""The server's standard error: no thread that serves ever waits for its reader."""

import errno
import os
import re
import select
import socket
import stat
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from zramd.core.system import process
from zramd.core.system.threads import start_thread

_READ = 16 << 10  # bytes
_CHUNK = select.PIPE_BUF  # a pipe that can be written to takes as much at once
# What is always passed on: zramd's own sentences, each said once, and what nbdkit -v asks for.
_WANTED = re.compile(rb"zramd: |nbdkit: (?:[^ ]+: )?debug: ")


def say(text: str) -> None:
    """Write a line to standard error; if that takes none now, it is lost. Never raises."""
    with suppress(OSError):
        os.write(2, f"zramd: {text}\n".encode(errors="backslashreplace"))


class Log:
    """Stands between the server and its standard error.

    What the process writes to descriptor 2 goes into a pipe that refuses what does not fit. A thread passes
    it on, of nbdkit's errors at most BURST lines in PERIOD seconds; it reports how many it held back. (nbdkit
    writes a line for each failed request, and to a full pool the kernel sends thousands of them.) What nobody
    reads the thread does not wait for either: BACKLOG bytes are kept, and lines beyond are lost and counted.
    What is written right before the process aborts is passed on all the same.
    """

    BURST = 20
    PERIOD = 10.0  # seconds
    LIMIT = 1 << 20  # bytes: a file that has more starts again from nothing
    BACKLOG = 64 << 10  # bytes
    PARTING = 0.2  # seconds that the end waits for the reader
    RETRY = 0.05  # seconds after which one that refused is tried again

    def __init__(
        self, *, clock: Callable[[], float] = time.monotonic, prepare: Callable[[], None] = lambda: None
    ) -> None:
        """`prepare` is what the thread does first."""
        self._clock = clock
        self._prepare = prepare
        self._since = -self.PERIOD
        self._passed = 0
        self._limited = False
        self.held_back = 0
        self.lost = 0
        self._buffer = bytearray(_READ)
        self._rest = b""
        self._waiting = b""
        self._target = self._pipe = self._end = -1
        self._ending = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Take descriptor 2 over, unless that was done already. Raises OSError, RuntimeError."""
        if self._thread is not None:
            return
        self._target = _unwaiting(os.dup(2))
        self._pipe, writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._end = os.eventfd(0)
        self._thread = start_thread("zramd-log", self._work)
        process.keep_last_words(self._pipe, self._target)
        os.dup2(writer, 2)
        os.close(writer)

    def write_to(self, fd: int) -> None:
        """Pass on to a file, of at most LIMIT bytes, from now on; the reader so far sees the end of the
        file.

        Closes `fd`. Raises OSError.
        """
        try:
            os.dup2(fd, self._target, inheritable=False)
        finally:
            os.close(fd)
        self._limited = True

    def stop(self) -> None:
        """Give descriptor 2 back, with all passed on that was written and is read. Ends within a second.

        Never raises: what cannot be given back stays as it is.
        """
        if self._thread is None:
            return
        with suppress(OSError):
            sys.stderr.flush()
        with suppress(OSError):
            os.dup2(self._target, 2)
        process.forget_last_words()
        self._ending = True
        with suppress(OSError):
            os.eventfd_write(self._end, 1)
        self._thread.join(1.0)
        if self._thread.is_alive():  # it waits for a file: leave it what it uses
            return
        for fd in (self._pipe, self._target, self._end):
            os.close(fd)

    def filter(self, data: bytes) -> bytes:
        """Return what of `data` is to be passed on now, in whole lines."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > 4096:
            lines.append(self._rest)
            self._rest = b""
        passed = []
        for line in lines:
            if self._clock() - self._since >= self.PERIOD:
                passed.append(self.summary())
                self._since, self._passed = self._clock(), 0
            if _WANTED.match(line):
                passed.append(line + b"\n")
            elif self._passed < self.BURST:
                self._passed += 1
                passed.append(line + b"\n")
            else:
                self.held_back += 1
        return b"".join(passed)

    def _is_storm(self, size: int) -> bool:
        """Count the lines in the buffer and be done, if none will pass: those that serve want the GIL."""
        buffer = self._buffer
        if self._passed < self.BURST or self._clock() - self._since >= self.PERIOD:
            return False
        if buffer.find(b"zramd: ", 0, size) >= 0 or buffer.find(b"debug: ", 0, size) >= 0:
            return False
        self.held_back += buffer.count(b"\n", 0, size)
        self._rest = b""
        return True

    def summary(self) -> bytes:
        """Return the line that says how many were held back, b"" if none, and forget them."""
        count, self.held_back = self.held_back, 0
        return b"zramd: %d lines more like these were held back\n" % count if count else b""

    def _work(self) -> None:
        process.name_thread("zramd-log")
        self._prepare()
        while True:
            try:
                if not self._pass_on():
                    break
            except Exception:  # no memory, say: it cannot be reported, and what comes next may work
                self.lost += 1
                time.sleep(self.RETRY)
        with suppress(Exception):
            self._part()

    def _pass_on(self) -> bool:
        """Wait for what comes next, pass it on, and say whether there may be more."""
        if not self._wait():
            self._keep(self.summary())
        with suppress(BlockingIOError):  # there is nothing
            size = process.read_words(self._pipe, self._buffer)
            if not size:
                return False
            if not self._is_storm(size):
                self._keep(self.filter(bytes(self._buffer[:size])))
        if self._waiting:
            self._write()
        process.words_said()
        return not self._ending

    def _wait(self) -> bool:
        """Wait until there is something to do, or time for a summary: say which, True for the former."""
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        poll.register(self._end, select.POLLIN)
        if self._waiting:
            poll.register(self._target, select.POLLOUT)
        try:
            return bool(poll.poll(self.PERIOD * 1000 if self.held_back else None))
        except OSError:  # no memory to wait with, say: that is just what is to be reported
            time.sleep(self.RETRY)
            return True

    def _keep(self, text: bytes) -> None:
        """Queue `text` for the reader, unless too much is queued already."""
        if len(self._waiting) + len(text) > self.BACKLOG and self._waiting:
            self.lost += text.count(b"\n")
        else:
            self._waiting += text

    def _write(self) -> None:
        """Write what waits, as far as that goes without waiting."""
        poll = select.poll()
        poll.register(self._target, select.POLLOUT)
        while self._waiting and self._takes(poll):
            try:
                written = self._write_some(self._waiting[:_CHUNK])
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.EINTR, errno.ENOMEM, errno.ENOBUFS):
                    time.sleep(self.RETRY)
                    return
                # Who read it is gone, or the disk is full.
                self.lost += self._waiting.count(b"\n")
                self._waiting = b""
                return
            self._waiting = self._waiting[written:]
            if not self._waiting and self.lost:
                self._waiting = b"zramd: %d lines were lost: nobody took them\n" % self.lost
                self.lost = 0

    def _takes(self, poll: "select.poll") -> bool:
        """Say whether the target takes something, or refuses it at once."""
        try:
            return bool(poll.poll(0))
        except OSError:
            return self._limited or not os.get_blocking(self._target)

    def _write_some(self, data: bytes) -> int:
        status = os.fstat(self._target)
        if stat.S_ISSOCK(status.st_mode):
            with socket.socket(fileno=os.dup(self._target)) as to:
                return to.send(data, socket.MSG_DONTWAIT)
        if self._limited and status.st_size > self.LIMIT:
            os.ftruncate(self._target, 0)
        return os.write(self._target, data)

    def _part(self) -> None:
        """Pass on what is left in the pipe, if the reader takes it soon."""
        with suppress(BlockingIOError):
            while data := os.read(self._pipe, _READ):
                self._keep(self.filter(data))
        self._keep(self.filter(b"\n" if self._rest else b"") + self.summary())
        end = time.monotonic() + self.PARTING
        while self._waiting and time.monotonic() < end:
            self._write()
            if self._waiting:
                time.sleep(0.01)


def _unwaiting(fd: int) -> int:
    """Return a descriptor that writes where `fd` does, and refuses what would have to wait, if there is one.

    Whether writing waits is a property that all processes share that inherited the file: so it is opened
    anew. A socket cannot be, and needs not; a file never makes wait.
    """
    mode = os.fstat(fd).st_mode
    if not stat.S_ISFIFO(mode) and not os.isatty(fd):
        return fd
    try:
        anew = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:  # another user's, or nobody reads it any more
        return fd
    os.close(fd)
    return anew
