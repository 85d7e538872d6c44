"""Makes the device that a server serves: an empty one, or one with what its state has."""

import os

from zramd.core.device.device import Device
from zramd.errors import CorruptionError, PoolFullError, StateError
from zramd.server import statefile
from zramd.server.log import say
from zramd.settings.config import Config


def make_device(config: Config) -> Device:
    """Return the device, with what is in the state if there is one. Raises StateError, MemoryError."""
    path = config.state
    if not path:
        return Device(
            config.disksize,
            mem_limit=config.mem_limit,
            codec=config.codec.name,
            level=config.codec.level,
            verify=config.verify,
            cold_level=config.cold_level,
        )
    fd = statefile.open_state(path, config.disksize, config.verify)
    try:
        device = Device(
            config.disksize,
            mem_limit=config.mem_limit,
            codec=config.codec.name,
            level=config.codec.level,
            verify=config.verify,
            cold_level=config.cold_level,
            state=fd,
            mark_cold=statefile.mark_cold,
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
        say(f"a load into state '{path}' was not completed: the part that had arrived was dropped")
    counters = device.counters()
    if counters["lost_blocks"]:
        say(
            f"{counters['lost_blocks']} blocks of state '{path}' are lost because the words that lead to "
            "them changed in memory: reading them is an error until they are written again"
        )
    if counters["recovered_blocks"]:
        say(
            f"took over {counters['recovered_blocks']} blocks from state '{path}' in "
            f"{counters['recovery_ms']} ms, and freed {counters['leaked_objects']} objects that no block held"
        )
    return device
