"""What a server does on request: of clients, by its front, and of the control socket's callers, by routes."""

import os
import select
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from zramd import __version__
from zramd.contract import handover
from zramd.contract.rundir import DATA_ID, Rundir
from zramd.core.device.device import Device
from zramd.core.device.saving import load as load_stream
from zramd.core.device.saving import save as save_stream
from zramd.core.device.tier import Tier
from zramd.core.device.writeback import Writeback as Hands
from zramd.core.system.process import idle_io
from zramd.errors import BackingError, ConfigError, DeviceError
from zramd.kernel import swapuse
from zramd.process.steps import step
from zramd.server import sockets
from zramd.server.compactor import Compactor
from zramd.server.fronts.front import Front
from zramd.server.tiers import Tiers
from zramd.server.trouble import Troubles
from zramd.server.undone import Undone
from zramd.server.withoutbacking import Without
from zramd.server.worker import Worker
from zramd.settings import codecs
from zramd.settings.config import Config, find
from zramd.settings.config import value as parse_value
from zramd.stats import snapshots

if TYPE_CHECKING:
    from zramd.server.backingfile import BackingFile
    from zramd.server.budget import Member
    from zramd.server.writeback import Writeback

STREAM_PATIENCE = 600.0  # seconds that a save or a load may stand still: ssh may ask for a password
_DATA_ID_FAILS = "data_id is not written"


class Service:
    """One device for all its users: see zramd.server.routes.Service.

    config: the settings as they are now. device: what is served. backing: where it writes what leaves memory.
    clients: how many there are. front: how they reach it. member: its part of the host's budget.
    """

    def __init__(
        self,
        config: Config,
        device: Device,
        rundir: Rundir,
        troubles: Troubles,
        front: Front,
        wake_up: Callable[[], None] = lambda: None,
        backing: "BackingFile | None" = None,
        member: "Member | None" = None,
    ) -> None:
        """`wake_up` has the housekeeper look around: a setting was changed, or a client has come."""
        self.config = config
        self.clients = 0
        self.undone = Undone(troubles)
        self.front = front
        self.troubles = troubles
        self.wake_up = wake_up
        self.compactor = Compactor(device, config)
        self.tiers = Tiers(device, Tier(device), config)
        self.worker = Worker(self.compactor, self.tiers)
        self.writeback: Writeback | Without = Without()
        self.out_worker: Worker | None = None
        if backing is not None:
            from zramd.server import writeback  # only here: most servers have none

            renew = partial(backing.renew, device)
            self.writeback = writeback.Writeback(device, Hands(device), config, self.tiers, renew=renew)
            # Not nice: on one busy processor less would go out than comes in. It leaves clients time itself.
            self.out_worker = Worker(self.writeback, name="zramd-out", nice=0, prepare=idle_io)
        self.device = device
        self.backing = backing
        self.member = member
        self._rundir = rundir
        self._started = time.monotonic()
        self._clients_lock = threading.Lock()
        self._changes_lock = threading.Lock()
        self._backing_lock = threading.Lock()
        self._loading = False

    def client_opened(self) -> None:
        """Count a client; waits while the device is being reset, raises DeviceError while it is loaded."""
        with self._clients_lock:
            if self._loading:
                raise DeviceError(f"{self.config.name} is being loaded: connect when that is done")
            self.clients += 1

    def client_closed(self) -> None:
        """Count a client that left."""
        with self._clients_lock:
            self.clients -= 1

    def snapshot(self) -> snapshots.Snapshot:
        """Return all numbers now."""
        return snapshots.take(
            self.device,
            name=self.config.name,
            comp_algorithm=self.config.comp_algorithm,
            version=__version__,
            started=self._started,
            swap=swapuse.numbers(self.config.name, self.config.disksize),
            tiers=self.tiers.numbers(),
            writeback=self.writeback.numbers(),
            front=self.front.numbers(),
        )

    def classes(self) -> list[snapshots.ClassRow]:
        """Return the table of size classes now."""
        return snapshots.take_classes(self.device)

    def health(self) -> dict[str, Any]:
        """Return status (ok or degraded), its causes, number of clients, process, the front, and the like."""
        compactor = self.compactor.status
        causes = self.troubles.causes()
        if self.compactor.failure:
            causes.append(f"background compaction {compactor}")
        if self.tiers.failure:
            causes.append(f"{self.tiers.title} failed: {self.tiers.failure}")
        if self.writeback.trouble:
            causes.append(self.writeback.trouble)
        return {
            "status": "degraded" if causes else "ok",
            "causes": causes,
            "compactor": compactor,
            "clients": self.clients,
            "pid": os.getpid(),
            "backing_silent": round(self.writeback.silent),  # seconds
            "leaves_pid": 1,  # the file, in a hand-over: see zramd.contract.handover
            "standby": handover.is_standby(),
            **self.front.health(),
        }

    def compact(self, timeout: float) -> int:
        """Compact now and return the pages freed; raises RuntimeError when the compactor does not run."""
        return self.compactor.compact_now(timeout)

    def settings(self) -> dict[str, Any]:
        """Return every setting as it is now."""
        now = self.config._asdict()
        if self.member is not None:
            now["budget"] = self.member.core.budget  # another device may have changed it
        return now

    def change(self, name: str, text: str) -> Any:
        """Change a setting that can be while the device is served; return its value as it is then.

        Raises ConfigError for a value that cannot be used, and for a setting that stays as it is; DeviceError
        when there is no memory for the change.
        """
        setting = find(name)
        if setting.fixed:
            raise ConfigError(f"{name} cannot be changed while the device is served: {setting.fixed}")
        value = parse_value(setting, text)
        if name == "backing":
            with self._backing_lock:  # held for as long as a disk takes to answer
                self._reattach(value)
                return self._set(name, value)
        if name == "budget":
            self._set_budget(value)
        if name == "mem_limit":
            self.device.mem_limit = value
            value = self.device.mem_limit  # whole pages
        return self._set(name, value)

    def _set_budget(self, size: int) -> None:
        if self.member is None:
            raise ConfigError(
                f"{self.config.name} has no part in a budget: restart it with budget={size}, or change that "
                "of a device that has"
            )
        self.member.set(size)

    def _set(self, name: str, value: Any) -> Any:
        with self._changes_lock:  # two changes at once
            changed = self.config._replace(**{name: value})
            codecs.must_gain(changed.comp_algorithm, changed.recompression)
            self.tiers.configure(changed)
            self.writeback.configure(changed)
            self.config = changed
        self.compactor.configure(self.config)
        self.wake_up()  # stats_interval
        return value

    def _reattach(self, path: str) -> None:
        """Use the backing at `path`, which is the one that there was. Raises ConfigError, DeviceError."""
        if self.backing is None or not path:
            raise ConfigError(
                "backing can only be given anew while the device is served, after it had vanished: for "
                "another one, or none, restart the server"
            )
        try:
            self.backing.reattach(path)
        except BackingError as error:
            raise DeviceError(str(error)) from None
        self.writeback.try_again()

    def reset(self) -> bool:
        """Drop all data and return True, or return False if a client is connected.

        Raises RundirError, with nothing dropped, when what names the data cannot be taken back.
        """
        with self._clients_lock:
            if self.clients or self._loading:
                return False
            self._rundir.withdraw(DATA_ID)
            self.device.reset()
            self.writeback.forget()
            self._publish_data_id()
            return True

    def save(self, fd: int, *, live: bool) -> None:
        """Write the device to a descriptor; raises SaveError, OSError."""
        step("server.saves")
        save_stream(self.device, fd, live=live, patience=STREAM_PATIENCE)

    def load(self, fd: int, begun: bytes, length: int) -> dict[str, int]:
        """Fill the empty device from a descriptor. Raises DeviceError, SaveError, PoolFullError."""
        if not begun and length:
            _await_data(fd, STREAM_PATIENCE)  # meanwhile clients may come
        with self._clients_lock:
            if self._loading:
                raise DeviceError("the device is being loaded already")
            if self.clients:
                raise DeviceError("the device is in use: disconnect every client before a load")
            if self.device.counters()["pages_stored"]:
                raise DeviceError("the device is not empty: --force drops what it holds")
            self._rundir.withdraw(DATA_ID)
            self._loading = True
        try:
            step("server.loads")
            return load_stream(self.device, fd, begun=begun, length=length, patience=STREAM_PATIENCE)
        finally:
            with self._clients_lock:
                self._loading = False
                self._publish_data_id()

    def send_sockets(self, path: str) -> None:
        """Send the listening sockets to the process that listens at `path`. Raises OSError."""
        sockets.send(path, self.front.listening, "made" if self._rundir.made else "found")

    def attach(self, fd: int, wanted: dict[str, Any]) -> None:
        """Serve the kernel's device on a descriptor. Raises DeviceError."""
        self.front.attach(fd, wanted)

    def detach(self, number: int) -> None:
        """Let go of a device that the kernel has stopped. Raises DeviceError."""
        self.front.detach(number)

    def publish_data_id(self) -> None:
        """Tell which data the device holds, at the start. Raises RundirError for what is no shortage."""
        self.undone.attempt(_DATA_ID_FAILS, self._write_data_id, self._write_data_id_later)

    def _publish_data_id(self) -> None:
        """Tell which data the device holds, by which a client knows it again; soon, if that fails now.

        A kernel that swaps must not be connected to a server that holds other data than the one that died. So
        before data goes, its name is taken back: without one nobody knows which it is.
        """
        try:
            self._write_data_id()
        except Exception as error:
            self.undone.failed(_DATA_ID_FAILS, error, self._write_data_id_later)

    def _write_data_id(self) -> None:
        self._rundir.publish(DATA_ID, self.device.data_id + "\n")

    def _write_data_id_later(self) -> None:
        with self._clients_lock:  # no reset comes between
            if not self._loading:  # else the load does it
                self._write_data_id()


def _await_data(fd: int, seconds: float) -> None:
    """Wait until something comes from a descriptor, or its end."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(seconds * 1000)
