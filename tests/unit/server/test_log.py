"""Between the server and its standard error: nobody waits for who reads it, and lines are counted."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from zramd.server.log import Log


def in_child(code: str) -> str:
    """Run code in a Python of its own, whose standard error it may replace; its output, errors included."""
    found = subprocess.run(
        [sys.executable, "-P", "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    return found.stdout.decode()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_few_lines_pass_and_the_rest_is_counted() -> None:
    clock = Clock()
    log = Log(clock=clock)
    many = b"".join(b"line %d\n" % n for n in range(50))
    assert log.filter(many) == b"".join(b"line %d\n" % n for n in range(log.BURST))
    assert log.held_back == 50 - log.BURST
    clock.now += log.PERIOD
    passed = log.filter(b"next\n")
    assert passed == b"zramd: 30 lines more like these were held back\nnext\n"
    assert log.held_back == 0


def test_a_storm_is_counted() -> None:
    clock = Clock()
    log = Log(clock=clock)
    log.filter(b"line\n" * log.BURST)
    assert log.filter(b"line\n" * 1000 + b"half a li") == b""
    assert log.held_back == 1000
    clock.now += log.PERIOD
    held_back = b"zramd: 1000 lines more like these were held back\n"
    assert log.filter(b"ne\nnext\n") == held_back + b"half a line\nnext\n"


@pytest.mark.parametrize(
    "line",
    [
        b"zramd: /dev/nbd0 is in use as swap: stopping once 'swapoff /dev/nbd0' was run\n",
        b"nbdkit: debug: accepted connection\n",
        b"nbdkit: python[12]: debug: python: pread count=4096 offset=0\n",
    ],
)
def test_what_is_said_once_or_asked_for_passes_in_a_storm(line: bytes) -> None:
    log = Log(clock=Clock())
    error = b"nbdkit: python[1]: error: pwrite: pool is full\n"
    log.filter(error * 100)
    assert log.filter(error * 100 + line + error * 100) == line
    assert log.held_back == 300 - log.BURST


def test_whole_lines_pass() -> None:
    log = Log(clock=Clock())
    assert log.filter(b"one\ntw") == b"one\n"
    assert log.filter(b"o\n") == b"two\n"
    assert log.filter(b"x" * 5000) == b"x" * 5000 + b"\n"


def test_all_lines_are_passed_or_counted() -> None:
    code = """
        import os, time
        from zramd.server.log import Log
        Log.PERIOD = 3600.0  # however long this takes
        log = Log()
        log.start()
        for number in range(20000):
            while True:
                try:
                    os.write(2, b"nbdkit: error: pool is full\\n")
                    break
                except BlockingIOError:
                    time.sleep(0.001)
        log.stop()
    """
    *lines, last = in_child(code).splitlines()
    assert lines == ["nbdkit: error: pool is full"] * Log.BURST
    assert last == f"zramd: {20000 - Log.BURST} lines more like these were held back"


# What standard error may be, as code that makes `reader` and `writer`.
ERRORS = {
    "pipe": "reader, writer = os.pipe()",
    "full pipe": """
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        try:
            while True:
                os.write(writer, b"full".ljust(4095) + b"\\n")
        except BlockingIOError:
            os.set_blocking(writer, True)
""",
    "terminal": """
        import pty
        reader, writer = pty.openpty()
""",
    "stopped terminal": """
        import pty, termios
        reader, writer = pty.openpty()
        termios.tcflow(writer, termios.TCOOFF)
""",
    "socket": """
        import socket
        one, other = socket.socketpair()
        reader, writer = one.detach(), other.detach()
""",
}
# Takes what standard error became, with 100,000 lines written to it that nobody reads.
UNREAD = """
        import os, sys, threading, time
        from zramd.server import log as module
        MADE
        os.dup2(writer, 2)
        module.Log.BURST = 10**9
        log = module.Log()
        log.start()
        refused = 0
        for number in range(100000):
            try:
                os.write(2, b"line %d\\n" % number)
            except BlockingIOError:
                refused += 1
"""


@pytest.mark.parametrize("kind", ERRORS)
def test_who_writes_never_waits_and_the_end_comes(kind: str) -> None:
    code = (
        UNREAD.replace("MADE", ERRORS[kind].strip())
        + """
        ending = threading.Thread(target=log.stop, daemon=True)
        ending.start()
        ending.join(30)
        print("ended" if not ending.is_alive() else "stuck", flush=True)
        os._exit(0)
    """
    )
    assert in_child(code) == "ended\n"


@pytest.mark.parametrize("kind", ["pipe", "full pipe", "socket"])
def test_what_nobody_read_is_counted(kind: str) -> None:
    """Each line is read, refused to who wrote it, or told of once there is a reader."""
    code = (
        UNREAD.replace("MADE", ERRORS[kind].strip())
        + """
        while not log.lost:
            time.sleep(0.01)
        text = b""
        def read():
            global text
            while part := os.read(reader, 65536):
                text += part
        threading.Thread(target=read, daemon=True).start()
        lost = count = 0
        while count + lost + refused < 100000:  # more of them may come after it was told that some are lost
            time.sleep(0.01)
            lines = text.split(b"\\n")[:-1]
            told = [int(line.split()[1]) for line in lines if line.endswith(b": nobody took them")]
            count = sum(line.startswith(b"line ") for line in lines)
            lost = sum(told)
        print(lost > 0, count + lost + refused, flush=True)
        os._exit(0)
    """
    )
    assert in_child(code) == "True 100000\n"


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_a_reader_that_went_is_no_end(kind: str) -> None:
    code = (
        UNREAD.replace("MADE", ERRORS[kind].strip() + "; os.close(reader)\n")
        + """
        while not log.lost:
            time.sleep(0.01)
        log.stop()
        print("ended", flush=True)
        os._exit(0)
    """
    )
    assert in_child(code) == "ended\n"


def test_standard_error_is_given_back() -> None:
    code = """
        import sys
        from zramd.server.log import Log
        log = Log()
        log.start()
        print("first", file=sys.stderr)
        log.stop()
        print("second", file=sys.stderr)
    """
    assert in_child(code) == "first\nsecond\n"


def test_a_child_that_keeps_it_does_not_hold_the_end_up() -> None:
    code = """
        import os, subprocess, sys
        from zramd.server.log import Log
        log = Log()
        log.start()
        child = subprocess.Popen(["sleep", "60"])
        log.stop()
        child.kill()
        print("ended")
    """
    assert in_child(code) == "ended\n"


def test_a_file_is_bounded(tmp_path: Path) -> None:
    code = f"""
        import os, sys
        from zramd.server.log import Log
        Log.BURST, Log.LIMIT = 10**9, 10000
        log = Log()
        print("early", file=sys.stderr)
        log.start()
        log.write_to(os.open("{tmp_path}/log", os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        log.start()
        for number in range(1000):
            print("line", number, "x" * 90, file=sys.stderr, flush=True)
            while number % 10 == 9 and f"line {{number}} " not in open("{tmp_path}/log").read():
                pass
        log.stop()
        print("late", file=sys.stderr)
    """
    assert in_child(code) == "early\n"
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[-2].startswith("line 999 ")
    assert lines[-1] == "late"
    assert 5 < len(lines) < 210  # all that was passed on at once may come on top


@pytest.mark.parametrize("file", [True, False])
def test_a_want_of_memory_to_wait_with_is_told(tmp_path: Path, file: bool) -> None:
    """Whoever gives up on such a server looks here for the cause."""
    code = f"""
        import os, select, sys, threading, time
        from zramd.server.log import Log, say
        path = {str(tmp_path / "log")!r}
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        log = Log()
        log.start()
        if {file}:
            log.write_to(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND))
        class Short:
            def register(self, *about): pass
            def poll(self, *about): raise OSError(12, "Cannot allocate memory")
        poll, select.poll = select.poll, Short
        say("wakes it up")
        say("no memory")
        end = time.monotonic() + 10
        found = b""
        os.set_blocking(reader, False)
        while b"no memory" not in found and time.monotonic() < end:
            time.sleep(0.01)
            try:
                found += open(path, "rb").read() if {file} else os.read(reader, 100)
            except BlockingIOError:
                pass
        log.stop()
        print(log._thread.is_alive(), b"zramd: no memory" in found)
    """
    assert in_child(code).strip() == "False True"


@pytest.mark.parametrize("number", [12, 105], ids=["ENOMEM", "ENOBUFS"])
def test_what_could_not_be_passed_on_for_want_of_memory_is_passed_on_later(number: int) -> None:
    code = f"""
        import os, time
        from zramd.server.log import Log, say
        reader, writer = os.pipe()
        os.dup2(writer, 2)
        log = Log()
        log.start()
        write, failed = log._write_some, []
        def short(data):
            failed.append(data)
            if len(failed) < 4:
                raise OSError({number}, "no")
            return write(data)
        log._write_some = short
        say("no memory")
        print(os.read(reader, 100), len(failed))
        log.stop()
    """
    assert in_child(code).strip() == r"b'zramd: no memory\n' 4"


def test_a_full_disk_is_no_end() -> None:
    code = """
        import os, time
        from zramd.server.log import Log
        saved = os.dup(2)
        os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
        log = Log()
        log.start()
        os.write(2, b"line\\n")
        while not log.lost:
            time.sleep(0.01)
        log.stop()
        os.write(saved, b"ended\\n")
    """
    assert in_child(code) == "ended\n"


@pytest.mark.parametrize("how", ["os.abort()", "ctypes.CDLL(None).abort()"])
def test_what_is_said_right_before_an_abort_is_passed_on(how: str) -> None:
    said = in_child(
        f"""
        import ctypes, os
        from zramd.server.log import Log
        Log().start()
        os.write(2, b"assertion failed: the end\\n")
        {how}
        """
    )
    assert "assertion failed: the end" in said


def test_what_is_said_before_the_program_exits_is_passed_on() -> None:
    said = in_child(
        """
        import ctypes, os
        from zramd.core.system import process
        from zramd.server.log import Log
        log = Log()
        log.start()
        process.at_failing_exit(log.stop)
        os.write(2, b"cannot listen\\n")
        ctypes.CDLL(None).exit(1)
        """
    )
    assert said == "cannot listen\n"


def test_an_exit_that_is_no_failure_is_left_alone() -> None:
    said = in_child(
        """
        import ctypes
        from zramd.core.system import process
        process.at_failing_exit(lambda: print("called", flush=True))
        ctypes.CDLL(None).exit(0)
        """
    )
    assert said == ""
