"""Whether the memory in which a server's state lies can be swapped out: to the very device that it is for.

While a server lives with swap=local, its lock on all memory holds the state, too. When it has died nobody's
does. The kernel may then begin to swap pages of it out to the device, which nobody serves; the next server
cannot read them before they are written, and nothing is written before it serves.
"""

import os

MOUNTS = "/proc/self/mountinfo"


def is_swappable(path: str) -> bool:
    """Say whether a state at `path`, there already or not, may be swapped out; False if that is not known."""
    try:
        device = os.stat(path if os.path.exists(path) else os.path.dirname(path)).st_dev
        with open(MOUNTS, errors="surrogateescape") as mounts:
            lines = mounts.readlines()
    except OSError:
        return False
    number = f"{os.major(device)}:{os.minor(device)}"
    for words in map(str.split, lines):
        if words[2] == number:
            kind, _, options = words[words.index("-") + 1 :][:3]
            return kind == "tmpfs" and "noswap" not in options.split(",")
    return False
