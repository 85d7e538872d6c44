"""Becomes a program whose system calls a supervisor answers: supervised.py CALL FILTER PROGRAM [WORD ...].

CALL is the number of seccomp(), FILTER a seccomp program in hexadecimal. The exec closes the
listener; the supervisor takes a copy of it before that, as this very exec already waits for its answer.
"""

import ctypes
import os
import sys


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("code", ctypes.c_char_p))


def main() -> None:
    call, words, argv = int(sys.argv[1]), bytes.fromhex(sys.argv[2]), sys.argv[3:]
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid():
        libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    program = _Program(len(words) // 8, words)
    # SECCOMP_SET_MODE_FILTER; FLAG_NEW_LISTENER, and FLAG_WAIT_KILLABLE_RECV: no signal begins a call anew
    for flags in (1 << 3 | 1 << 5, 1 << 3):
        if libc.syscall(call, 1, flags, ctypes.byref(program)) >= 0:
            os.execvp(argv[0], argv)
    os._exit(99)


main()
