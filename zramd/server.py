"""The server's life: prepare before nbdkit forks, start after, stop when nbdkit ends.

prepare   self-test, device, run folder        errors reach the user's terminal
start     pid file, signals, threads           compactor, and housekeeping: endpoint, stats files, stop
stop      threads end, the run folder goes
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from zramd import __version__, handover, notify, sockets, state, stats, swap
from zramd.admission import LOOK_AGAIN, Admission
from zramd.compactor import Compactor
from zramd.config import Config, find
from zramd.config import value as parse_value
from zramd.core.device import Device
from zramd.core.process import at_failing_exit, dump_little, name_thread
from zramd.core.saving import load as load_stream
from zramd.core.saving import save as save_stream
from zramd.endpoint import Endpoint
from zramd.errors import (
    ConfigError,
    DeviceError,
    RundirError,
    ZramdError,
    is_shortage,
    sentence,
)
from zramd.housekeeping import Chore, Housekeeper
from zramd.log import Log, say
from zramd.making import make_device, self_test
from zramd.metricsfile import MetricsFile
from zramd.published import StatsFiles
from zramd.rundir import BACKGROUND, CONTROL_SOCKET, DATA_ID, LOG, STATE, Rundir
from zramd.steps import step
from zramd.threads import start_thread
from zramd.trouble import Troubles

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # those nbdkit stops on
# Seconds after a stop signal. nbdkit then refuses new requests, but waits for its clients to leave.
STOP_READING = 0.1  # it has answered what was under way: clients see the end of the connection
STOP_WRITING = 0.5  # a client that does not take its answers is cut off
STOP_WAITING = 0.9  # nbdkit is stuck: leave without it
# Seconds in a hand-over.
HANDSHAKES = 1.0  # those who are connecting get done at most, while all others are served
LOOKS = 20  # a millisecond apart: nobody is connecting if all of them say so
QUIET = 0.2  # a moment in which no client waits for an answer is looked for
HANDING_OVER = 0.2  # a client that does not take its answers is cut off; it asks again
SWAPOFF_INTERVAL = 0.5  # seconds between two looks whether swap is off, while a stop waits for it
STATUS_INTERVAL = 10.0  # seconds between two words on how we are to the service manager, at least
STREAM_PATIENCE = 600.0  # seconds that a save or a load may stand still: ssh may ask for a password
KEEPER_NICE = -20  # the reserve is refilled ahead of what ordinary programs do
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
        self._inherited: frozenset[int] = frozenset()
        self._listening: list[int] = []
        self._bound: list[tuple[str, os.stat_result]] = []
        self._hands_over = False
        self._failed = False
        self._serves = False
        self._cut = socket.SHUT_RD
        self._signals = b""
        self._log = Log(prepare=swap.warm_stack if config.swap == "local" else lambda: None)
        self._troubles = Troubles()
        self._files: StatsFiles | None = None
        self._undone: dict[str, Callable[[], None]] = {}
        self._admission = Admission(self._troubles, lambda: self.config.client_limit, lambda: self._clients)
        self._keeper: threading.Thread | None = None
        self._stop_refused = False
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
            handover.wait()
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
                self._keeper = start_thread("zramd-keeper", self._keep_reserve)
            self._log.start()
            self._try("the pid file is not written", self._rundir.write_pid)
            step("server.published")
            if self.config.state:
                self._try("the place of the state is not written", self._write_state)
            self._corrupt = self.device.counters()["checksum_errors"]
            self._files = StatsFiles(self._rundir, self._metrics_file)
            self._try(_DATA_ID_FAILS, self._write_data_id, self._write_data_id_later)
            if self.config.stats_interval:
                self._try("stats files are not written", self._write_stats)
            self._inherited = sockets.inherited()
            self._listening = sockets.listening()
            sockets.keep_alive(self._listening)
            self._admission.begin(self._listening)
            self._bound = sockets.bound(self._listening)
            if sockets.has_filters():
                # A request that sleeps in a filter wakes up when its client's connection is shut, and is
                # answered by an error, if it can be answered. It cannot then, and is sent again.
                self._cut = socket.SHUT_RDWR
            self._compactor = Compactor(self.device, self.config)
            self._compactor.start()
            if self.config.endpoint:
                path = self._rundir.file(CONTROL_SOCKET)
                try:
                    self._endpoint = Endpoint(path, self)
                except OSError as error:
                    raise RundirError(f"socket '{path}' cannot be made: {error.strerror}") from None
            self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            self._housekeeper = self._make_housekeeper()
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
                log = self._rundir.file(LOG)
                self._try("the log is not written", lambda: self._log.write_to(log))
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
        if self._keeper is not None:
            ends += [self.device.reserve_stop, self._keeper.join]
        if self._endpoint is not None:
            ends.append(self._endpoint.close)
        for end in (*ends, self._remove_files, self._log.stop):
            try:
                end()
            except Exception as error:  # what comes after it is to end all the same
                say(f"not all could be ended: {sentence(error) or repr(error)}")
        if self._hands_over:
            os._exit(0)  # nbdkit would remove the socket, which the next server has

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
        if (self._hands_over and not self._is_stopped()) or (self._failed and handover.takes_over()):
            self._rundir.leave()
            return
        sockets.unlink(self._bound)
        self._rundir.remove()

    def _is_stopped(self) -> bool:
        """Say whether a signal to stop has come during a hand-over: then there is nothing to hand over."""
        with suppress(BlockingIOError):
            self._signals += os.read(self._wake[0], 64)
        return any(number in STOP_SIGNALS for number in self._without_hangup(self._signals))

    def client_connects(self) -> None:
        """Let in who has just connected; called by the thread that serves him. Raises DeviceError."""
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
            "leaves_pid": 1,  # the file, in a hand-over: see zramd.handover
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
        """Do what failed before; it stays undone if it fails again.

        Two threads may be at it when a server begins.
        """
        for failing in list(self._undone):
            work = self._undone.pop(failing, None)
            if work is None:  # the other thread does it
                continue
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

    def _give_turn(self) -> None:
        handover.serving(self.config.rundir)

    def _tell_ready(self) -> None:
        self._manager.insist("READY=1", patience=READY_PATIENCE)

    def send_sockets(self, path: str) -> None:
        """Send the sockets on which clients are accepted to who listens at `path`. Raises OSError."""
        assert self._rundir is not None
        sockets.send(path, self._admission.sockets, "made" if self._rundir.made else "found")

    def _keep_reserve(self) -> None:
        name_thread("zramd-keeper")
        # It needs the processor when requests do, but not what is set aside for them: see swap.take_priority.
        swap.warm_stack()
        swap.be_ordinary(KEEPER_NICE)
        self.device.reserve_keep()

    def _make_housekeeper(self) -> Housekeeper:
        """Return who answers the endpoint's callers, writes the stats files, and stops nbdkit on a signal."""
        admission = self._admission
        chores = [
            Chore("descriptors cannot be counted", admission.watch_descriptors, admission.interval),
            Chore("clients cannot be counted", admission.watch_clients, lambda: admission.WATCH),
            Chore("what was left undone still fails", self._do_undone, lambda: AGAIN if self._undone else 0),
            Chore("stats files are not written", self._refresh_stats, lambda: self.config.stats_interval),
            Chore("corruption cannot be told", self._report_corruption, lambda: self.config.stats_interval),
            Chore(
                "the way out is barred", self._leave_if_free, lambda: self._stop_refused * SWAPOFF_INTERVAL
            ),
        ]
        keeper = Housekeeper(self._wake[0], self._stopping, self._troubles, self._obey, chores)
        if self._endpoint is not None:
            keeper.listen(self._endpoint.fileno(), self._endpoint.accept)
        return keeper

    def _housekeep(self) -> None:
        assert self._housekeeper is not None
        if self.config.swap == "local":
            swap.warm_stack()
        self._housekeeper.run()

    def _obey(self, signals: bytes) -> None:
        """Leave if the signals say so and it may be."""
        signals = self._signals = self._without_hangup(signals)
        if not any(number in (*STOP_SIGNALS, sockets.HAND_OVER) for number in signals):
            return
        self._hands_over = bool(self.config.state) and sockets.HAND_OVER in signals
        if self._hands_over or self._may_leave(signals):
            self._surely(self._leave)

    def _leave_if_free(self) -> None:
        if self._may_leave(b""):
            self._surely(self._leave)

    def _surely(self, leave: Callable[[], None]) -> None:
        """End, whatever fails on the way."""
        try:
            self._admission.use_spare()
            leave()
            return
        except Exception as error:
            say(f"left without farewell: {sentence(error) or repr(error)}")
        try:
            self._remove_files()
            self._log.stop()
        finally:  # whatever these raise
            os._exit(0)

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
        if self._files.written is not self._told and not told_lately and not self._stop_refused:
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

    def _may_leave(self, signals: bytes) -> bool:
        """Say whether to stop now: the kernel must not lose what it has swapped out.

        If it would, remember that a stop is wanted, and say what to do.
        """
        if self.config.swap != "local" or not self._clients or signal.SIGQUIT in signals:
            return True
        self._stop_refused = True  # if it cannot be told, ask again
        devices = " ".join(swap.devices_in_use(self.config.disksize))
        if devices and signals:
            self._manager.tell(f"STATUS=stopping once 'swapoff {devices}' was run")
            say(
                f"{devices} is in use as swap: stopping once 'swapoff {devices}' was run "
                "(SIGQUIT stops at once and loses what is swapped out)"
            )
        self._stop_refused = bool(devices)
        return not devices

    def _without_hangup(self, signals: bytes) -> bytes:
        """Return the signals; in the background without SIGHUP, which has the log opened again.

        There is no terminal that could hang up then, and programs that rotate logs mean that by it.
        """
        if BACKGROUND not in os.environ or signal.SIGHUP not in signals:
            return signals
        assert self._rundir is not None
        try:
            self._log.write_to(self._rundir.file(LOG))
        except OSError as error:
            say(f"the log cannot be opened again: {error}")
        return bytes(number for number in signals if number != signal.SIGHUP)

    def _leave(self) -> None:
        """End nbdkit, in a way that does no harm to clients that connect again if the data stays."""
        if self.config.state:
            self._let_clients_go()
        elif self._clients:
            say(f"stopping while clients are connected ({self._clients}): their data ends with this server")
        self._end()

    def _let_clients_go(self) -> None:
        """Cut off all clients, each with all that it has asked answered if that goes fast.

        nbdkit answers what it reads after a shutdown by errors. So it is told only when no client is left.
        A client that is cut off connects again at once. But one that is cut off while it connects takes that
        for a server that is not there, and qemu then sleeps for a second: so those who have begun get done.
        """
        step("server.leaves")
        if self._endpoint is not None:
            self._endpoint.close()  # a save that is under way would be waited for like a client
        sockets.stop_accepting(self._listening, sockets.HAND_OVER)
        self._await_handshakes()
        self._await_quiet()
        end = time.monotonic() + HANDING_OVER
        while sockets.shut_clients(self._inherited, self._cut):
            if time.monotonic() > end:
                sockets.shut_clients(self._inherited, socket.SHUT_RDWR)
                break
            time.sleep(0.001)
        step("server.left")

    def _await_handshakes(self) -> None:
        """Wait until the main thread accepts nobody any more, and all whom it has accepted are our clients.

        nbdkit closes the socket of a client who leaves before it tells us. Until then he may stand for one
        who is connecting: so look again and again.
        """
        end = time.monotonic() + HANDSHAKES
        poll = select.poll()
        poll.register(self._wake[0], select.POLLIN)
        while poll.poll(max(end - time.monotonic(), 0) * 1000):
            signals = os.read(self._wake[0], 64)
            self._signals += signals
            if sockets.HAND_OVER in signals:
                break
        looks = 0
        while looks < LOOKS and time.monotonic() < end:
            looks = looks + 1 if sockets.count_clients(self._inherited) == self._clients else 0
            time.sleep(0.001)

    def _await_quiet(self) -> None:
        """Wait for a moment in which no client waits for an answer, if there is one soon, and cut all off.

        Linux' own client shuts a connection on which it cannot send. What it has sent already and has no
        answer to it sends again only when that times out: after a second or two. All else it sends at once.
        """
        end = time.monotonic() + QUIET
        with sockets.clients(self._inherited) as clients:
            done = -1
            while time.monotonic() < end:
                before = done
                done, at_work = self.device.pressure()[3:]
                if at_work or any(sockets.unread(client) for client in clients):
                    done = -1
                elif done == before:  # nor is nbdkit just about to begin or to answer one
                    break
                time.sleep(0.0002)
            for client in clients:
                with suppress(OSError):
                    client.shutdown(self._cut)

    def _end(self) -> None:
        """End nbdkit within a second, in its normal way if it can: then it calls `stop`."""
        self._manager.tell("STOPPING=1")
        self._shutdown()
        if self._stopping.wait(STOP_READING):
            return
        # What is under way is still answered after this: only reading ends.
        sockets.shut_clients(self._inherited, socket.SHUT_RD)
        if self._stopping.wait(STOP_WRITING - STOP_READING):
            return
        sockets.shut_clients(self._inherited, socket.SHUT_RDWR)
        if self._stopping.wait(STOP_WAITING - STOP_WRITING):
            return
        self._remove_files()
        self._log.stop()
        os._exit(0)


def _await_data(fd: int, seconds: float) -> None:
    """Wait until something comes from a descriptor, or its end."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.poll(seconds * 1000)


def _ignore(number: int, frame: object) -> None:
    """Do nothing: the wakeup descriptor has carried the news."""
