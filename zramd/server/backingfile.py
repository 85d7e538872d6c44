"""The backing of a server: which one it may use, and from when on it is its own.

    look         before the server from which we take over has left: it has the backing, and we only look
    open_for     alone, before the device is made; what is on it is as it was
    take_over    the device is made, and has said which data it holds: the superblock is to name that
    reattach     at work: the disk had vanished or failed, and is there again

A superblock that names other data is accepted when that data has gone (Superblock.is_needed), or when it is
the data of our state. Which that is, the device knows, once it has taken its state over.

The id of the superblock stays while anything is out: state and superblock must never disagree about it,
whatever ends us. What a reset or a load makes of the data, `renew` writes there; until then the old one does.
"""

import os
import threading
from typing import TypeGuard

from zramd.contract import superblock
from zramd.contract.superblock import Superblock
from zramd.core.device.backing import Backing
from zramd.core.device.device import Device
from zramd.errors import BackingError, reason
from zramd.kernel import backingdevice, blockdevices
from zramd.kernel.backingdevice import Opened
from zramd.server.statefile import NOTHING_KEPT, Kept
from zramd.settings.config import Config

NAMING = 1.0  # seconds that a superblock may take to be written before nobody waits for that


def look(config: Config, kept: Kept = NOTHING_KEPT) -> Superblock | None:
    """Return what the superblock says of the backing, which a server may be using now; None: it has none.

    `kept` is what the state says, if there is one. Raises BackingError for one that is none for this device.
    """
    opened = backingdevice.open_to_look(config.backing)
    try:
        found = _accept(config, opened)
    finally:
        os.close(opened.fd)
    if config.state and not kept.out_pages and _is_anothers(found, kept.backing_id, kept.data_id):
        raise _anothers(config.backing, found)
    return found


def open_for(config: Config) -> "BackingFile":
    """Return the backing, which is ours alone. Raises BackingError, one sentence; it is as it was then."""
    opened = backingdevice.open_alone(config.backing)
    try:
        return BackingFile(config, opened, _accept(config, opened))
    except BaseException:
        os.close(opened.fd)
        raise


def _accept(config: Config, opened: Opened) -> Superblock | None:
    """Return what the superblock says, if the device may use such a backing. Raises BackingError."""
    path = config.backing
    _check_place(config, opened)
    found = backingdevice.look(opened)
    if found and found.is_needed():
        if found.size > opened.size:
            raise BackingError(
                f"backing '{path}' has shrunk from {found.size} to {opened.size} bytes: make it as large as "
                f"it was, or, if nobody needs what is on it, run 'zramd backing format --force {path}'"
            )
        if not config.state:
            raise _anothers(path, found)
    return found


def _check_place(config: Config, opened: Opened) -> None:
    """Raise BackingError for what the device cannot write to, whatever is on it."""
    if own := blockdevices.own(opened.number, config.name):
        raise BackingError(
            f"backing '{opened.path}' lies on {own}, which is {config.name} itself: use a disk, or a part of "
            "one"
        )
    if config.swap == "local":
        backingdevice.refuse_for_swap(opened)


def _is_anothers(found: Superblock | None, backing_id: str, data_id: str) -> TypeGuard[Superblock]:
    """Say whether another state may need what is on a backing than the one that names it and its data so."""
    # A server that was killed while it made it its own has written the superblock, and no more.
    return found is not None and found.id != backing_id and found.is_needed() and found.data_id != data_id


def _anothers(path: str, found: Superblock) -> BackingError:
    """Return the error for a backing with blocks that are not ours, but that another state may need."""
    where = "" if found.machine == superblock.machine_id() else " of another machine"
    return BackingError(
        f"backing '{path}' may hold blocks of {found.name}{where} (data {found.data_id}): start it with the "
        f"state that has that data, or, if nobody needs it, run 'zramd backing format --force {path}'"
    )


class BackingFile:
    """A backing that this server alone has open, until it ends.

    core: what the device writes to. id: the superblock's, if what is on it may be ours, else ''.
    """

    def __init__(self, config: Config, opened: Opened, found: Superblock | None) -> None:
        """Take over the descriptor; `found` is what the superblock says, None if there is none."""
        self.path = opened.path
        self._opened = opened
        self._found = found
        self._config = config
        self._naming = threading.Lock()  # while the superblock's id, or where it is, may change
        is_kept = found is not None and bool(config.state) and found.size <= opened.size
        # What may be ours lies where the granule says: if the size would be another one's, it stays, too.
        fits = found is None or found.granule == superblock.granule_of(opened.size)
        self._size = found.size if found and is_kept and not fits else opened.size
        self.id = found.id if found and is_kept else ""
        self.core = Backing(opened.fd, self._size, superblock.granule_of(self._size), opened.sector)

    def take_over(self, device: Device) -> None:
        """Have superblock and device know each other; `device` was just made with this backing.

        Raises BackingError when the backing may hold what another state needs, or cannot be written.
        """
        found = self._found
        if found and self.id == device.backing_id:  # as the device has seen to if anything is out
            current = self._made(found.data_id)._replace(id=found.id, claimed=found.claimed)
            if found != current:  # the machine was booted since, say
                self._put(current)
            return
        if _is_anothers(found, device.backing_id, device.data_id):
            raise _anothers(self.path, found)
        self._claim(device)

    def reattach(self, path: str) -> None:
        """Go on with this very backing, which had vanished or failed, or whose name is another one now.

        Waits for the disk. Raises BackingError, one sentence; then all is as it was.
        """
        opened = backingdevice.open_again(path, self._opened)
        try:
            self._check_same(opened)
            if not self._naming.acquire(timeout=NAMING):
                raise BackingError(
                    f"backing '{self.path}' does not answer, and its superblock is being written: try again "
                    "later"
                )
            try:
                self._change_to(opened)
            finally:
                self._naming.release()
        finally:
            os.close(opened.fd)

    def _check_same(self, opened: Opened) -> None:
        """Raise BackingError unless the device can go on with what was opened, whatever is on it."""
        path = opened.path
        _check_place(self._config._replace(backing=path), opened)
        if opened.size < self._size:
            raise BackingError(
                f"backing '{path}' has {opened.size} bytes, and the device needs {self._size}: make it as "
                "large as it was"
            )
        if opened.sector > self.core.sector:
            raise BackingError(
                f"backing '{path}' is read in sectors of {opened.sector} bytes, and the server in ones of "
                f"{self.core.sector}: give it by 'zramd restart {self._config.name} backing={path}'"
            )

    def _change_to(self, opened: Opened) -> None:
        try:
            found = backingdevice.named(opened)
        except OSError as error:
            raise BackingError(f"backing '{opened.path}' cannot be read: {reason(error)}") from None
        if found is None or found.id != self.id:
            raise BackingError(
                f"backing '{opened.path}' is not the one that the device has: 'zramd backing show PATH' says "
                "whose blocks are on one"
            )
        # The descriptors keep their numbers: other threads may be about to use them.
        os.dup2(opened.fd, self._opened.fd, inheritable=False)
        self.core.reopen(opened.fd)
        self._opened = opened._replace(fd=self._opened.fd)
        self.path = opened.path

    def renew(self, device: Device) -> None:
        """Name the data that the device holds since a reset or a load, if nothing is out.

        Only the thread that writes to the backing may call this. Raises BackingError; nothing is worse then.
        """
        with self._naming:
            is_named = self._found is not None and self._found.data_id == device.data_id
            if not is_named and not device.counters()["out_pages"]:
                self._claim(device)

    def _claim(self, device: Device) -> None:
        self._put(self._made(device.data_id))
        device.claim_backing(self.id)

    def _put(self, made: Superblock) -> None:
        backingdevice.put(self._opened, made)
        self._found, self.id = made, made.id

    def _made(self, data_id: str) -> Superblock:
        granule = superblock.granule_of(self._size)
        config = self._config
        return superblock.new(
            self._size, granule, data_id=data_id, name=config.name, has_state=bool(config.state)
        )
