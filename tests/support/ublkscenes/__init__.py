"""What happens to queues that the fake kernel drives.

Each module here is a script, `MODULE.py SCENE ...`, that runs with shim_ublk.c preloaded: see
support.run.run_in_fake_kernel. It ends with 0, or an exception.
"""

import gc
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress

import pytest

from support.fakeublk import FakeDisk, Kernel
from support.run import wait_until
from zramd.core.ublk.queues import Queues
from zramd.errors import UblkError

SIZE = 8 << 20
KERNEL = Kernel()


def refused(code: int, words: str, work: Callable[[], object]) -> None:
    """Require that the kernel's refusal is told: its errno, and words of the sentence."""
    with pytest.raises(UblkError, match=re.escape(words)) as caught:
        work()
    assert caught.value.errno == code


def over(disk: FakeDisk, queues: Queues) -> None:
    """Stop a disk, and require that nothing of it is left."""
    disk.stop()
    assert queues.join(10)
    assert not queues.serving
    assert disk.fetched == 0
    disk.delete()


def threads() -> int:
    """How many of zramd's this process has; a sanitizer may have one, too."""
    names = []
    for task in os.listdir("/proc/self/task"):
        with suppress(OSError), open(f"/proc/self/task/{task}/comm") as file:
            names.append(file.read())
    return sum(name.startswith("zramd-") for name in names)


def no_threads() -> None:
    """Require that all of zramd's have ended. Who has waited for a thread may see it for another moment."""
    wait_until(lambda: threads() == 0)


def descriptors() -> int:
    """How many this process has."""
    return len(os.listdir("/proc/self/fd"))


def play(scenes: Mapping[str, Callable[[], None]]) -> None:
    """Play the scenes that this script was asked for, one after the other; raises what is wrong."""
    for scene in sys.argv[1:]:
        scenes[scene]()
        gc.collect()  # a scene's queues may be part of a cycle, and no thread of theirs is to be left
        assert KERNEL.violation == "", (scene, KERNEL.violation)
