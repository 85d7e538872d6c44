"""Makes the device that a server serves, once a small one has shown that the core works here."""

import os

from zramd.core.device.device import Device
from zramd.errors import CorruptionError, PoolFullError, StateError
from zramd.server import state
from zramd.server.log import say
from zramd.settings.config import Config


def self_test() -> None:
    """Store, read, overwrite, drop and compact a few blocks on a tiny device.

    Raises CorruptionError when what comes back is not what was stored.
    """
    size = 16 * 4096
    device = Device(size)
    raw = bytes((i * i * 31 + i // 7) & 0xFF for i in range(4096))
    expected = bytearray(size)
    patterns = (b"\xa5" * 4096, b"zramd selftest, " * 256, raw, b"0123456789abcdef" * 256 * 4)
    for block, pattern in enumerate(patterns):
        start = block * 4096 + 100 * block  # most of them straddle blocks
        device.write(pattern, start)
        expected[start : start + len(pattern)] = pattern
    device.trim(4096, 4096)
    expected[4096:8192] = bytes(4096)
    device.compact()
    found = bytearray(size)
    device.read(found, 0)
    if found != expected:
        raise CorruptionError("self-test failed: the device does not return what was written to it")
    device.check()


def make_device(config: Config) -> Device:
    """Return the device, with what is in the state if there is one. Raises StateError, MemoryError."""
    path = config.state
    if not path:
        return Device(
            config.disksize,
            mem_limit=config.mem_limit,
            acceleration=config.acceleration,
            verify=config.verify,
        )
    fd = state.open_state(path, config.disksize, config.verify)
    try:
        device = Device(
            config.disksize,
            mem_limit=config.mem_limit,
            acceleration=config.acceleration,
            verify=config.verify,
            state=fd,
            progress=lambda done, total: say(f"taking over state '{path}': {100 * done // total} %"),
        )
    except PoolFullError as error:
        raise StateError(f"state '{path}' cannot be used: {error.strerror}: make room there") from None
    except CorruptionError as error:
        raise StateError(
            f"state '{path}' contradicts itself ({error}): restore a copy, or remove the file to start empty"
        ) from None
    finally:
        os.close(fd)  # the device has one of its own, and the lock with it
    if device.dropped:
        say(f"a load into state '{path}' was not completed: what it had of it was dropped")
    counters = device.counters()
    if counters["lost_blocks"]:
        say(
            f"{counters['lost_blocks']} blocks of state '{path}' are lost: what leads to them was "
            "changed in memory; reading them is an error until they are written again"
        )
    if counters["recovered_blocks"]:
        say(
            f"took over {counters['recovered_blocks']} blocks from state '{path}' in "
            f"{counters['recovery_ms']} ms; {counters['leaked_objects']} objects without a block freed"
        )
    return device
