"""Makes the device that a server serves: an empty one, or one with what its state has, and its backing."""

import os
from typing import TYPE_CHECKING, Any, NamedTuple

from zramd.contract import handover
from zramd.core.device.device import Device
from zramd.errors import BackingError, BudgetError, CorruptionError, PoolFullError, StateError
from zramd.server import statefile
from zramd.server.log import say
from zramd.settings.config import Config

if TYPE_CHECKING:
    from zramd.server.backingfile import BackingFile
    from zramd.server.budget import Member


class Made(NamedTuple):
    """A device, where it writes what leaves memory, and its part of the host's budget."""

    device: Device
    backing: "BackingFile | None"
    member: "Member | None"


def look(config: Config) -> None:
    """Raise StateError, BackingError or BudgetError unless what a server may be using is for these settings.

    What is found now a server would find when the one before it has left. (Until then more may go out.)
    """
    kept = statefile.NOTHING_KEPT
    if config.state:
        kept = statefile.look(config.state, config.disksize, config.verify)
    found = None
    if config.backing:
        from zramd.server import backingfile  # only here: most servers have none

        found = backingfile.look(config, kept)
    if kept.out_pages and (found is None or found.id != kept.backing_id):
        raise _not_its_backing(config)
    if config.budget:
        from zramd.server import budget  # only here: most servers have none

        budget.look(config)


def make_device(config: Config) -> Made:
    """Return the device, with what is in the state if there is one.

    Raises StateError, BackingError, BudgetError, MemoryError.
    """
    member = _join_budget(config)
    backing = _open_backing(config)
    if config.state:
        device = _from_state(config, backing)
    else:
        device = Device(config.disksize, **_ways(config, backing))
    if backing:
        backing.take_over(device)
    if member:
        member.join(device)
    return Made(device, backing, member)


def _join_budget(config: Config) -> "Member | None":
    """Return the part of the budget, None if there is to be none. Raises BudgetError."""
    if not config.budget:
        return None
    from zramd.server import budget  # only here: most servers have none

    try:
        return budget.Member(config)
    except BudgetError as error:
        if not handover.takes_over():
            raise
        # The server before has gone: its clients are not to lose their data.
        say(f"{error}; until the next restart the device has no part in the budget")
        return None


def _from_state(config: Config, backing: "BackingFile | None") -> Device:
    path = config.state
    fd = statefile.open_state(path, config.disksize, config.verify)
    try:
        device = Device(
            config.disksize,
            **_ways(config, backing),
            state=fd,
            mark_cold=statefile.mark_cold,
            mark_out=statefile.mark_out,
            keep_reserve=config.swap == "local",
            progress=lambda done, total: say(f"taking over state '{path}': {100 * done // total} %"),
        )
    except PoolFullError as error:
        raise StateError(f"state '{path}' cannot be used: {error.strerror}: make room there") from None
    except CorruptionError as error:
        raise StateError(
            f"state '{path}' contradicts itself ({error}): restore a copy, or remove the file to start empty"
        ) from None
    except BackingError:
        raise _not_its_backing(config) from None
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


def _ways(config: Config, backing: "BackingFile | None") -> dict[str, Any]:
    """Return how a device compresses, and what bounds it."""
    return {
        "mem_limit": config.mem_limit,
        "codec": config.codec.name,
        "level": config.codec.level,
        "verify": config.verify,
        "cold_level": config.cold_level,
        "backing": backing and backing.core,
        "backing_id": backing.id if backing else "",
    }


def _open_backing(config: Config) -> "BackingFile | None":
    """Return the backing, None if there is to be none. Raises BackingError."""
    if not config.backing:
        return None
    from zramd.server import backingfile  # only here: most servers have none

    if not config.state:
        say(f"what goes to backing '{config.backing}' is lost when this server ends: it has no state")
    return backingfile.open_for(config)


def _not_its_backing(config: Config) -> BackingError:
    if not config.backing:
        return BackingError(
            f"state '{config.state}' has blocks on a backing: start it with backing=PATH; "
            "'zramd backing show PATH' says whose blocks are on one"
        )
    return BackingError(
        f"backing '{config.backing}' is not the one on which blocks of state '{config.state}' are: use that; "
        "'zramd backing show PATH' says whose blocks are on one"
    )
