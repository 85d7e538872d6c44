"""What `zramd attach` is asked for, and what its two ways to the kernel share."""

import time
from collections.abc import Callable
from typing import NamedTuple

from zramd.errors import AttachError

PRIORITY = 100  # before any other swap, as zram-generator has it
DEAD_CONN_TIMEOUT = 120  # seconds
APPEARS = 5.0  # seconds in which a device must have come or gone


class Wanted(NamedTuple):
    """What `zramd attach` is asked for."""

    device: str = ""  # such as /dev/nbd0 or /dev/ublkb0; '': a free one
    connections: int | None = None  # None: 1
    timeout: float | None = None  # seconds; None: by the number of connections
    dead_conn_timeout: int | None = None  # seconds; None: DEAD_CONN_TIMEOUT
    swap: bool = False
    priority: int = PRIORITY
    areas: int = 0  # 0: as many as suit the device
    swapon_options: str = "discard"
    nbd_client: bool = False
    standby: bool | None = None  # another server on standby; None: with swap, if there can be one
    configured: bool = False  # as zramd.conf says: what is attached already stays so


def wait(done: Callable[[], bool], otherwise: str) -> None:
    """Wait until something has come or gone. Raises AttachError, which says `otherwise`."""
    end = time.monotonic() + APPEARS
    while not done():
        if time.monotonic() > end:
            raise AttachError(otherwise)
        time.sleep(0.02)
