"""How this user has to call zramd, to be told in sentences: in a checkout no shell finds it."""

import os
import re
import shlex
import shutil
import sys

from zramd.kernel import swap

_SHELL_FIRST = rb"""#!/bin/sh\n'''exec' "?((?<=")[^"\n]+|\S+)"""


def zramd(words: str) -> str:
    """Return a command of zramd as this user has to write it."""
    return f"{_command()} {words}"


def sudo(words: str) -> str:
    """Return a command of zramd that root must run, as this user has to write it."""
    if os.geteuid() == 0:
        return zramd(words)
    called = os.path.exists(sys.argv[0])  # else by another program
    return f"sudo {_command(swap.PATH) if called else 'zramd'} {words}"


def _command(path: str | None = None) -> str:
    """Return how to call zramd: in a checkout it is in .venv, off the PATH (of root: `path`)."""
    found = shutil.which("zramd") if path is None else shutil.which("zramd", path=path)
    if found and _runs(found):
        return "zramd"
    beside = os.path.join(os.path.dirname(sys.executable), "zramd")
    for place in (beside, shutil.which("zramd")):
        if place and _runs(place):
            return shlex.quote(place)
    return f"{shlex.quote(sys.executable)} -P -m zramd"


def _runs(script: str) -> bool:
    """Say whether a script is there and so is its interpreter: a folder with both may have been moved."""
    try:
        with open(script, "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    # pip writes the first where the path is long or has spaces.
    match = re.match(_SHELL_FIRST, head) or re.match(rb"#! *(\S+)", head)
    return match is None or os.path.exists(match[1])
