"""What a kernel refuses, and is asked for: commands, rings, disks that are not served."""

import errno
import os

import pytest

from support.content import noise
from support.fakeublk import CONTROL
from support.ublkscenes import KERNEL, SIZE, descriptors, no_threads, over, play, refused, threads
from zramd import Device
from zramd.core.ublk.control import Control, available
from zramd.core.ublk.queues import Queues


def commands() -> None:
    """Control says to the kernel what it must hear, and tells what that answers."""
    assert available(CONTROL) == ""
    with Control(CONTROL) as control:
        assert {"user_recovery_reissue", "ioctl_encode", "user_copy"} < control.features()
        assert "quiesce" not in control.features()
        info = control.add(5, queues=2, depth=16, max_io_bytes=65536, recovers=True)
        assert (info.number, info.queues, info.depth, info.max_io_bytes) == (5, 2, 16, 65536)
        assert (info.state, info.recovers) == ("dead", True)
        assert control.add(queues=1, depth=4).number == 0
        assert not control.info(0).recovers
        refused(errno.EEXIST, "/dev/ublkb5 exists already", lambda: control.add(5))
        refused(errno.EACCES, "ublks_max", lambda: control.add(1000))
        refused(
            errno.ENODEV, "cannot ask about /dev/ublkb7: there is no such device", lambda: control.info(7)
        )
        refused(errno.EINVAL, "no parameters yet", lambda: control.start(5, os.getpid()))
        control.set_params(5, SIZE, max_io_bytes=65536)
        assert control.params(5) == {
            "disksize": SIZE,
            "block": 4096,
            "max_io_bytes": 65536,
            "max_discard_bytes": 1 << 30,
            "max_zeroes_bytes": 1 << 30,
        }
        refused(errno.EINVAL, "process 1 is not its server", lambda: control.start(5, 1))
        control.start_recovery(5)
        refused(errno.EINVAL, "begun already", lambda: control.start_recovery(5))
        assert control.info(5).state == "quiesced"
        refused(errno.EINVAL, "does not outlive its server", lambda: control.start_recovery(0))
        control.stop(5)
        control.delete(5)
        control.delete(0, wait=False)
        refused(errno.ENODEV, "no such device", lambda: control.delete(0, wait=False))
        with pytest.raises(ValueError, match="not a multiple"):
            control.set_params(0, 5000)
        with pytest.raises(ValueError, match="1 or more"):
            control.add(queues=0)
        with pytest.raises(ValueError, match="4096 at most"):
            control.add(depth=4097)


def silence() -> None:
    """A kernel that does not answer is waited for so long; then the next command is refused at once."""
    KERNEL.library.fake_silent(1)
    with Control(CONTROL, timeout=0.2) as control:
        refused(errno.ETIME, "does not answer", lambda: control.info(0))
        KERNEL.library.fake_silent(0)
        refused(errno.EBADF, "has not answered an earlier command", lambda: control.info(0))


def no_rings() -> None:
    """Who cannot have a ring is told why."""
    reasons = {errno.ENOSYS: "older than Linux 5.4", errno.EPERM: "seccomp", errno.EINVAL: "Linux 6.0"}
    for code, words in reasons.items():
        KERNEL.library.fake_no_rings(code)
        assert words in available(CONTROL), available(CONTROL)
        refused(code, words, lambda: Control(CONTROL))
        refused(code, words, lambda: Queues(Device(SIZE), 2, 4))
    KERNEL.library.fake_no_rings(0)
    Queues(Device(SIZE), 2, 4)
    no_threads()


def refusals() -> None:
    """A kernel that refuses: nothing serves then, nothing is left, and the same queues serve another disk."""
    device = Device(SIZE)
    no_threads()
    queues = Queues(device, 3, 4, 65536)
    assert threads() == 3
    before = descriptors()
    for code, words in (
        (errno.EINVAL, "it has not 3 queues of 4 requests"),
        (errno.EBUSY, "it is served already"),
        (errno.ENODEV, "it is being stopped"),
        (errno.EIO, "input/output error"),
    ):
        KERNEL.library.fake_no_fetch(1, code)
        refused(code, words, lambda: KERNEL.disk(queues, SIZE))
        assert not queues.serving
        no_threads()
        assert queues.join(0)
    KERNEL.library.fake_no_fetch(2**32 - 1, 0)
    with open("/dev/null") as null:
        refused(errno.ENODEV, "the descriptor is not /dev/ublkcN's", lambda: queues.serve(null.fileno()))
    disk = KERNEL.disk(queues, SIZE)
    disk.write(noise(1), 0)
    refused(errno.EBUSY, "serve a disk already", lambda: disk.serve(queues))
    assert disk.read(0) == noise(1)
    assert not queues.join(0.2)
    over(disk, queues)
    assert descriptors() == before + 4  # the fake kernel's: disks that were made and not deleted
    queues.close()
    no_threads()
    assert queues.join()
    disk = KERNEL.disk(queues, SIZE)
    assert disk.read(0) == noise(1)
    over(disk, queues)


if __name__ == "__main__":
    play(globals())
