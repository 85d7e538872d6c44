"""The server's life: prepare before nbdkit forks, start after, stop when nbdkit ends.

prepare   self-test, device, run folder        errors reach the user's terminal
start     pid file, signals, threads           compactor, and housekeeping: endpoint, stats files, stop
stop      threads end, the run folder goes
"""

import os
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from zramd import __version__
from zramd.contract import handover
from zramd.contract.rundir import BACKGROUND, CONTROL_SOCKET, DATA_ID, STATE, Rundir
from zramd.core.device.device import Device
from zramd.core.device.saving import load as load_stream
from zramd.core.device.saving import save as save_stream
from zramd.core.system.process import at_failing_exit, dump_little, name_thread
from zramd.core.system.threads import start_thread
from zramd.errors import (
    ConfigError,
    DeviceError,
    RundirError,
    ZramdError,
    is_shortage,
    sentence,
)
from zramd.kernel import swap
from zramd.process import notify
from zramd.process.steps import step
from zramd.server import sockets, state, takeover
from zramd.server.admission import LOOK_AGAIN, Admission
from zramd.server.compactor import Compactor
from zramd.server.endpoint import Endpoint
from zramd.server.housekeeping import Chore, Housekeeper
from zramd.server.leaving import STOP_SIGNALS, Leaving
from zramd.server.log import Log, say
from zramd.server.making import make_device, self_test
from zramd.server.metricsfile import MetricsFile
from zramd.server.published import StatsFiles
from zramd.server.trouble import Troubles
from zramd.settings.config import Config, find
from zramd.settings.config import value as parse_value
from zramd.stats import stats

SWAPOFF_INTERVAL = 0.5  # seconds between two looks whether swap is off, while a stop waits for it
STATUS_INTERVAL = 10.0  # seconds between two words on how we are to the service manager, at least
STREAM_PATIENCE = 600.0  # seconds that a save or a load may stand still: ssh may ask for a password
REFILLER_NICE = -20  # the reserve is refilled ahead of what ordinary programs do
READY_PATIENCE = 1.0  # seconds for the service manager to take our word, at each try
_DATA_ID_FAILS = "data_id is not written"
AGAIN = 1.0  # seconds between two tries of what could not be done so far


class Server:
    """One device with all that runs beside it."""

    def __init__(self, config: Config, shutdown: Callable[[], None]) -> None:
        """`shutdown` asks nbdkit to end and returns at once."""
        self.config = config
        self.device: Device
        self._shutdown = shutdown
        self._rundir: Rundir | None = None
        self._metrics_file: MetricsFile | None = None
        self._compactor: Compactor | None = None
        self._endpoint: Endpoint | None = None
        self._housekeeper: Housekeeper | None = None
        self._housekeeping: threading.Thread | None = None
        self._stopping = threading.Event()
        self._wake: tuple[int, int] = (-1, -1)
        self._started = time.monotonic()
        self._clients = 0
        self._clients_lock = threading.Lock()
        self._bound: list[tuple[str, os.stat_result]] = []
        self._leaving: Leaving | None = None
        self._failed = False
        self._serves = False
        self._log = Log(prepare=swap.warm_stack if config.swap == "local" else lambda: None)
        self._troubles = Troubles()
        self._files: StatsFiles | None = None
        self._undone: dict[str, Callable[[], None]] = {}
        self._undone_lock = threading.Lock()
        self._admission = Admission(self._troubles, lambda: self.config.client_limit, lambda: self._clients)
        self._refiller: threading.Thread | None = None
        self._corrupt = 0
        self._manager = notify.Manager()
        self._told: dict[str, int] = {}
        self._told_at = float("inf")  # nothing before we are ready
        self._loading = False

    def prepare(self) -> None:
        """Do all that can fail before nbdkit forks.

        Raises RundirError, CorruptionError when the self-test fails, MemoryError, SwapError, StateError.
        """
        # As nbdkit has it once it serves: who started us may end before we have said all.
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self_test()
        at_failing_exit(self._give_up)
        config = self.config
        if config.swap == "local":
            swap.prepare()
        if handover.takes_over():
            if config.state:
                state.look(config.state, config.disksize, config.verify)
            if config.metrics_file:
                MetricsFile(config.metrics_file, config.name)
            if config.swap == "local":
                swap.protect_process()  # nbdkit does not fork here; `start` then finds it done
            takeover.wait()
        if handover.must_be_left():  # or it was stopped: then the state is not for us
            self._rundir = Rundir(config.rundir)
        step("server.device")
        self.device = make_device(config)
        step("server.rundir")
        if self._rundir is None:
            self._rundir = Rundir(config.rundir)
        if config.metrics_file:
            try:
                self._metrics_file = MetricsFile(config.metrics_file, config.name)
                # In a hand-over nobody would serve if that failed: then the housekeeper does it.
                if not handover.takes_over():
                    self._metrics_file.make()
            except RundirError:
                self._failed = True
                self._remove_files()
                raise

    def start(self) -> None:
        """Start the threads; call it in the process that serves, on its main thread.

        Raises RundirError when this process, unlike the one that prepared, cannot write the run folder;
        SwapError.
        """
        assert self._rundir is not None
        with suppress(OSError):  # it only makes dumps smaller
            dump_little()
        try:
            threading.excepthook = self._thread_failed
            if self.config.swap == "local":
                swap.protect(self.device, self.config.reserve)
                swap.take_priority(swap.BESIDE)  # the threads below inherit it
                self._refiller = start_thread("zramd-refill", self._keep_reserve)
            self._log.start()
            self._try("the pid file is not written", self._rundir.write_pid)
            step("server.published")
            self._try("the place of the state is not written", self._write_state)
            self._corrupt = self.device.counters()["checksum_errors"]
            self._files = StatsFiles(self._rundir, self._metrics_file)
            self._try(_DATA_ID_FAILS, self._write_data_id, self._write_data_id_later)
            if self.config.stats_interval:
                self._try("stats files are not written", self._write_stats)
            inherited = sockets.inherited()
            listening = sockets.listening()
            sockets.keep_alive(listening)
            self._admission.begin(listening)
            self._bound = sockets.bound(listening)
            self._compactor = Compactor(self.device, self.config)
            self._compactor.start()
            if self.config.endpoint:
                path = self._rundir.file(CONTROL_SOCKET)
                try:
                    self._endpoint = Endpoint(path, self, self._troubles)
                except OSError as error:
                    raise RundirError(f"socket '{path}' cannot be made: {error.strerror}") from None
            self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._leaving = Leaving(
                self.config,
                self.device,
                self._admission,
                self._manager,
                signals=self._wake[0],
                clients=lambda: self._clients,
                shutdown=self._shutdown,
                stopping=self._stopping,
                clean_up=self._clean_up,
                endpoint=self._endpoint,
                reopen_log=self._write_log if BACKGROUND in os.environ else None,
                others=inherited,
                listening=tuple(listening),
            )
            self._housekeeper = self._make_housekeeper(self._leaving)
            self._housekeeping = start_thread("zramd", self._housekeep)
            # nbdkit's own handlers would only make it wait for its clients. Python's write the number into
            # the pipe at once, even while the main thread sits in nbdkit and runs no Python.
            signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
            for number in (*STOP_SIGNALS, sockets.HAND_OVER, LOOK_AGAIN):
                signal.signal(number, _ignore)
            if self.config.swap == "local":
                # Last: the threads above are less urgent, those that nbdkit starts for clients inherit it.
                swap.take_priority(swap.SERVE)
            if BACKGROUND in os.environ:
                self._try("the log is not written", self._write_log)
            self._serves = True
            # From here on nothing may raise: it is known that we serve.
            self._undone["no command has its turn with this server"] = self._give_turn
            self._do_undone()
            step("server.serves")
            self._undone["the service manager does not know what is stored"] = self._tell_status
            self._undone["the service manager does not know that zramd serves"] = self._tell_ready
            self._do_undone()
        except BaseException:
            self._failed = True
            self.stop()
            raise

    def stop(self) -> None:
        """End the threads and remove what was made in the run folder. Never raises."""
        self._stopping.set()
        ends: list[Callable[[], None]] = []
        if self._housekeeping is not None:
            ends += [self._wake_up, self._housekeeping.join]
        if self._compactor is not None:
            ends.append(self._compactor.stop)
        if self._refiller is not None:
            ends += [self.device.reserve_stop, self._refiller.join]
        if self._endpoint is not None:
            ends.append(self._endpoint.close)
        for end in (*ends, self._remove_files, self._log.stop):
            try:
                end()
            except Exception as error:  # what comes after it is to end all the same
                say(f"not all could be ended: {sentence(error) or repr(error)}")
        if self._leaving is not None and self._leaving.hands_over:
            os._exit(0)  # nbdkit would remove the socket, which the next server has

    def _clean_up(self) -> None:
        """Do of `stop` what another process may depend on."""
        self._remove_files()
        self._log.stop()

    def _give_up(self) -> None:
        """nbdkit ends without calling `stop`: it cannot listen, say. Once we serve, that is a crash."""
        if self._stopping.is_set():
            return
        if self._serves:
            self._log.stop()
        else:
            self._failed = True
            self.stop()

    def _remove_files(self) -> None:
        """Remove what stands for this server, but for what the next one needs, if one takes over."""
        if self._rundir is None:
            return
        with suppress(OSError):
            if self._metrics_file is not None and self._rundir.is_ours():
                self._metrics_file.remove()
        # A successor that fails leaves the socket and the folder to one that is as the old server was.
        left = self._leaving is not None and self._leaving.leaves_folder()
        if left or (self._failed and handover.takes_over()):
            self._rundir.leave()
            return
        sockets.unlink(self._bound)
        self._rundir.remove()

    def client_connects(self) -> None:
        """Let in a client that has just connected; its own thread calls this. Raises DeviceError."""
        with self._clients_lock:
            self._admission.connects()

    def client_opened(self) -> None:
        """Count a client; waits while the device is being reset, raises DeviceError while it is loaded."""
        with self._clients_lock:
            if self._loading:
                raise DeviceError(f"{self.config.name} is being loaded: connect when that is done")
            self._clients += 1
            self._admission.becomes_client()

    def client_closed(self) -> None:
        """Count a client that left."""
        with self._clients_lock:
            self._clients -= 1

    def snapshot(self) -> stats.Snapshot:
        """Return all numbers now."""
        return stats.take(
            self.device,
            name=self.config.name,
            comp_algorithm=self.config.comp_algorithm,
            version=__version__,
            started=self._started,
        )

    def classes(self) -> list[stats.ClassRow]:
        """Return the table of size classes now."""
        return stats.take_classes(self.device)

    def health(self) -> dict[str, Any]:
        """Return status (ok or degraded), its causes, the compactor's state, number of clients, process."""
        state = self._compactor.state if self._compactor else "stopped"
        causes = self._troubles.causes()
        if state.startswith("failed"):
            causes.append(f"background compaction {state}")
        return {
            "status": "degraded" if causes else "ok",
            "causes": causes,
            "compactor": state,
            "clients": self._clients,
            "pid": os.getpid(),
            "leaves_pid": 1,  # the file, in a hand-over: see zramd.contract.handover
        }

    def compact(self, timeout: float) -> int:
        """Compact now and return the pages freed; raises RuntimeError when the compactor does not run."""
        assert self._compactor is not None
        return self._compactor.compact_now(timeout)

    def settings(self) -> dict[str, Any]:
        """Return every setting as it is now."""
        return asdict(self.config)

    def change(self, name: str, text: str) -> Any:
        """Change a setting that can be while the device is served; return its value as it is then.

        Raises ConfigError for a value that cannot be used, and for a setting that stays as it is.
        """
        setting = find(name)
        if setting.fixed:
            raise ConfigError(f"{name} cannot be changed while the device is served: {setting.fixed}")
        value = parse_value(setting, text)
        if name == "mem_limit":
            self.device.mem_limit = value
            value = self.device.mem_limit  # whole pages
        with self._clients_lock:  # two changes at once
            self.config = replace(self.config, **{name: value})
        if self._compactor is not None:
            self._compactor.configure(self.config)
        self._wake_up()  # stats_interval
        return value

    def _wake_up(self) -> None:
        """Have the housekeeper look around."""
        if self._housekeeping is not None:
            with suppress(BlockingIOError):  # the pipe is full: it will
                os.write(self._wake[1], b"\0")

    def check(self) -> None:
        """Walk every structure of the device; raises CorruptionError."""
        self.device.check()

    def block(self, number: int) -> dict[str, int | str]:
        """Return what stands for a block; raises ValueError beyond the device's end."""
        return self.device.block(number)

    def reset(self) -> bool:
        """Drop all data and return True, or return False if a client is connected.

        Raises RundirError, with nothing dropped, when what names the data cannot be taken back.
        """
        with self._clients_lock:
            if self._clients or self._loading:
                return False
            self._withdraw_data_id()
            self.device.reset()
            self._publish_data_id()
            return True

    def save(self, fd: int, *, live: bool) -> None:
        """Write the device to a descriptor; raises SaveError, OSError."""
        step("server.saves")
        save_stream(self.device, fd, live=live, patience=STREAM_PATIENCE)

    def load(self, fd: int, begun: bytes, length: int) -> dict[str, int]:
        """Fill the empty device from a descriptor; raises ZramdError, MemoryError."""
        if not begun and length:
            _await_data(fd, STREAM_PATIENCE)  # meanwhile clients may come
        with self._clients_lock:
            if self._loading:
                raise DeviceError("the device is being loaded already")
            if self._clients:
                raise DeviceError("the device is in use: disconnect every client before a load")
            if self.device.counters()["pages_stored"]:
                raise DeviceError("the device is not empty: --force drops what it holds")
            self._withdraw_data_id()
            self._loading = True
        try:
            step("server.loads")
            return load_stream(self.device, fd, begun=begun, length=length, patience=STREAM_PATIENCE)
        finally:
            with self._clients_lock:
                self._loading = False
                self._publish_data_id()

    def reset_mem_used_max(self) -> None:
        """Forget the peak of the pool's size."""
        self.device.reset_mem_used_max()

    def _publish_data_id(self) -> None:
        """Tell which data the device holds, by which a client knows it again; soon, if that fails now.

        A kernel that swaps must not be connected to a server that holds other data than the one that died. So
        before data goes, its name is taken back: without one nobody knows which it is.
        """
        try:
            self._write_data_id()
        except Exception as error:
            self._troubles.begin(_DATA_ID_FAILS, error)
            self._undone[_DATA_ID_FAILS] = self._write_data_id_later

    def _write_data_id(self) -> None:
        assert self._rundir is not None
        self._rundir.publish(DATA_ID, self.device.data_id + "\n")

    def _write_data_id_later(self) -> None:
        with self._clients_lock:  # no reset comes between
            if not self._loading:  # else the load does it
                self._write_data_id()

    def _withdraw_data_id(self) -> None:
        assert self._rundir is not None
        self._rundir.withdraw(DATA_ID)

    def _try(self, failing: str, work: Callable[[], None], later: Callable[[], None] | None = None) -> None:
        """Do what one can serve without. If it fails for want of something, the housekeeper does it later.

        Raises what is no shortage, unless nobody would serve then: the server before us has left.
        """
        try:
            work()
        except (OSError, ZramdError, MemoryError) as error:
            if not is_shortage(error) and not handover.takes_over():
                raise
            self._troubles.begin(failing, error)
            self._undone[failing] = later or work

    def _do_undone(self) -> None:
        """Do what failed before, in the order in which it was noted; it stays undone if it fails again.

        Two threads may be at it when a server begins: the status is still to be told before READY=1.
        """
        with self._undone_lock:
            for failing in list(self._undone):
                work = self._undone.pop(failing)  # first: it may be noted again meanwhile
                try:
                    work()
                except Exception as error:
                    self._troubles.begin(failing, error)
                    self._undone.setdefault(failing, work)
                else:
                    self._troubles.over(failing)

    def _write_state(self) -> None:
        assert self._rundir is not None
        self._rundir.publish(STATE, self.config.state + "\n")

    def _write_log(self) -> None:
        assert self._rundir is not None
        self._log.write_to(self._rundir.open_log())

    def _give_turn(self) -> None:
        takeover.serving(self.config.rundir)

    def _tell_ready(self) -> None:
        self._manager.insist("READY=1", patience=READY_PATIENCE)

    def send_sockets(self, path: str) -> None:
        """Send the sockets on which clients are accepted to who listens at `path`. Raises OSError."""
        assert self._rundir is not None
        sockets.send(path, self._admission.sockets, "made" if self._rundir.made else "found")

    def _keep_reserve(self) -> None:
        name_thread("zramd-refill")
        # It needs the processor when requests do, but not what is set aside for them: see swap.take_priority.
        swap.warm_stack()
        swap.be_ordinary(REFILLER_NICE)
        self.device.reserve_keep()

    def _make_housekeeper(self, leaving: Leaving) -> Housekeeper:
        """Return who answers the endpoint's callers, writes the stats files, and stops nbdkit on a signal."""
        admission = self._admission
        chores = [
            Chore("descriptors cannot be counted", admission.watch_descriptors, admission.interval),
            Chore("clients cannot be counted", admission.watch_clients, lambda: admission.WATCH),
            Chore("what was left undone still fails", self._do_undone, lambda: AGAIN if self._undone else 0),
            Chore("stats files are not written", self._refresh_stats, lambda: self.config.stats_interval),
            Chore("corruption cannot be told", self._report_corruption, lambda: self.config.stats_interval),
            Chore("the way out is barred", leaving.try_again, lambda: leaving.refused * SWAPOFF_INTERVAL),
        ]
        keeper = Housekeeper(self._wake[0], self._stopping, self._troubles, leaving.obey, chores)
        if self._endpoint is not None:
            keeper.listen(self._endpoint.fileno(), self._endpoint.accept)
        return keeper

    def _housekeep(self) -> None:
        assert self._housekeeper is not None
        if self.config.swap == "local":
            swap.warm_stack()
        self._housekeeper.run()

    def _report_corruption(self) -> None:
        """Say so when blocks were found that were changed in memory."""
        errors = self.device.counters()["checksum_errors"]
        if errors > self._corrupt:
            say(
                f"{errors - self._corrupt} reads found a block that was changed in memory, the last one "
                f"block {self.device.corrupt_block}: test this machine's memory, and write the block again"
            )
        self._corrupt = errors

    def _refresh_stats(self) -> None:
        """Write the stats files if there is news, and tell the service manager now and then."""
        assert self._files is not None
        if self._files.are_due(self.device.counters()):
            self._write_stats()
        told_lately = time.monotonic() - self._told_at < STATUS_INTERVAL
        refused = self._leaving is not None and self._leaving.refused  # then that is what is told
        if self._files.written is not self._told and not told_lately and not refused:
            self._tell_status()

    def _write_stats(self) -> None:
        assert self._files is not None
        self._files.write(self.device.counters(), self.snapshot(), self.classes())

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Tell that a thread has died, of what nobody expected."""
        name = failure.thread.name if failure.thread is not None else "a thread"
        error = failure.exc_value
        self._troubles.begin(f"{name} has ended", repr(error) if error is None else error)

    def _tell_status(self) -> None:
        """Tell the service manager what is stored."""
        self._manager.tell(f"STATUS={stats.sentence(self.snapshot())}")
        self._told_at = time.monotonic()
        if self._files is not None:
            self._told = self._files.written


def _await_data(fd: int, seconds: float) -> None:
    """Wait until something comes from a descriptor, or its end."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(seconds * 1000)


def _ignore(number: int, frame: object) -> None:
    """Do nothing: the wakeup descriptor has carried the news."""
