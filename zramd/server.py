"""The server's life: prepare before nbdkit forks, start after, stop when nbdkit ends.

prepare   self-test, device, run folder        errors reach the user's terminal
start     pid file, signals, threads           compactor, and housekeeping: endpoint, stats files, stop
stop      threads end, the run folder goes
"""

import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any

from zramd import __version__, handover, notify, prometheus, sockets, state, stats, swap
from zramd.compactor import Compactor
from zramd.config import Config, find
from zramd.config import value as parse_value
from zramd.core.device import Device
from zramd.core.process import name_thread
from zramd.core.saving import load as load_stream
from zramd.core.saving import save as save_stream
from zramd.endpoint import Endpoint
from zramd.errors import ConfigError, CorruptionError, DeviceError, RundirError, StateError
from zramd.metricsfile import MetricsFile
from zramd.rundir import BACKGROUND, CONTROL_SOCKET, DATA_ID, LOG, STATE, Rundir
from zramd.steps import step

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
REFRESH = 30.0  # seconds after which unchanged stats files are written again: their age shows that we live


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
        self._housekeeper: threading.Thread | None = None
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
        self._cut = socket.SHUT_RD
        self._signals = b""
        self._written: dict[str, int] = {}
        self._written_at = 0.0
        self._complained = False
        self._log = swap.Log()
        self._keeper: threading.Thread | None = None
        self._stop_refused = False
        self._corrupt = 0
        self._manager = notify.Manager()
        self._told = self._written
        self._told_at = float("inf")  # nothing before we are ready
        self._loading = False

    def prepare(self) -> None:
        """Do all that can fail before nbdkit forks.

        Raises RundirError, CorruptionError when the self-test fails, MemoryError, SwapError, StateError.
        """
        # As nbdkit has it once it serves: who started us may end before we have said all.
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)
        self_test()
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
        self.device = self._make_device()
        step("server.rundir")
        if self._rundir is None:
            self._rundir = Rundir(config.rundir)
        if config.metrics_file:
            try:
                self._metrics_file = MetricsFile(config.metrics_file, config.name)
            except RundirError:
                self._failed = True
                self._remove_files()
                raise

    def _make_device(self) -> Device:
        """Return the device, with what is in the state if there is one."""
        config = self.config
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
                progress=lambda done, total: _say(f"taking over state '{path}': {100 * done // total} %"),
            )
        except CorruptionError as error:
            raise StateError(
                f"state '{path}' contradicts itself ({error}): "
                "restore a copy, or remove the file to start empty"
            ) from None
        finally:
            os.close(fd)  # the device has one of its own, and the lock with it
        if device.dropped:
            _say(f"a load into state '{path}' was not completed: what it had of it was dropped")
        counters = device.counters()
        if counters["lost_blocks"]:
            _say(
                f"{counters['lost_blocks']} blocks of state '{path}' are lost: what leads to them was "
                "changed in memory; reading them is an error until they are written again"
            )
        if counters["recovered_blocks"]:
            _say(
                f"took over {counters['recovered_blocks']} blocks from state '{path}' in "
                f"{counters['recovery_ms']} ms; {counters['leaked_objects']} objects without a block freed"
            )
        return device

    def start(self) -> None:
        """Start the threads; call it in the process that serves, on its main thread.

        Raises RundirError when this process, unlike the one that prepared, cannot write the run folder;
        SwapError.
        """
        assert self._rundir is not None
        try:
            if self.config.swap == "local":
                swap.protect(self.device, self.config.reserve)
                self._keeper = threading.Thread(target=self._keep_reserve, name="zramd-keeper", daemon=True)
                self._keeper.start()
                self._log.start()
            self._rundir.write_pid()
            step("server.published")
            if self.config.state:
                self._rundir.publish(STATE, self.config.state + "\n")
            self._corrupt = self.device.counters()["checksum_errors"]
            self._publish_data_id()
            if self.config.stats_interval:
                self._write_stats()
            self._inherited = sockets.inherited()
            self._listening = sockets.listening()
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
            self._housekeeper = threading.Thread(target=self._housekeep, name="zramd", daemon=True)
            self._housekeeper.start()
            # nbdkit's own handlers would only make it wait for its clients. Python's write the number into
            # the pipe at once, even while the main thread sits in nbdkit and runs no Python.
            signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
            for number in (*STOP_SIGNALS, sockets.HAND_OVER):
                signal.signal(number, _ignore)
            if self.config.swap == "local":
                # Last: the threads above stay ordinary, those that nbdkit starts for clients inherit it.
                swap.take_priority()
            if BACKGROUND in os.environ:
                self._log.start()
                self._log.write_to(self._rundir.file(LOG))
            handover.serving(self.config.rundir)
            step("server.serves")
            self._tell_status()
            self._manager.tell("READY=1")
        except BaseException:
            self._failed = True
            self.stop()
            raise

    def stop(self) -> None:
        """End the threads and remove what was made in the run folder."""
        self._stopping.set()
        if self._housekeeper is not None:
            os.write(self._wake[1], b"\0")
            self._housekeeper.join()
        if self._compactor is not None:
            self._compactor.stop()
        if self._keeper is not None:
            self.device.reserve_stop()
            self._keeper.join()
        if self._endpoint is not None:
            self._endpoint.close()
        self._remove_files()
        self._log.stop()
        if self._hands_over:
            os._exit(0)  # nbdkit would remove the socket, which the next server has

    def _remove_files(self) -> None:
        """Remove what stands for this server, but for what the next one needs, if one takes over."""
        if self._rundir is None:
            return
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

    def client_opened(self) -> None:
        """Count a client; waits while the device is being reset, raises DeviceError while it is loaded."""
        with self._clients_lock:
            if self._loading:
                raise DeviceError(f"{self.config.name} is being loaded: connect when that is done")
            self._clients += 1

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

    def health(self) -> dict[str, str | int]:
        """Return status (ok or degraded), the compactor's state, the number of clients and the process."""
        state = self._compactor.state if self._compactor else "stopped"
        status = "degraded" if state.startswith("failed") else "ok"
        return {
            "status": status,
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
        if self._housekeeper is not None:
            os.write(self._wake[1], b"\0")  # stats_interval
        return value

    def check(self) -> None:
        """Walk every structure of the device; raises CorruptionError."""
        self.device.check()

    def block(self, number: int) -> dict[str, int | str]:
        """Return what stands for a block; raises ValueError beyond the device's end."""
        return self.device.block(number)

    def reset(self) -> bool:
        """Drop all data and return True, or return False if a client is connected."""
        with self._clients_lock:
            if self._clients or self._loading:
                return False
            self.device.reset()
            self._publish_data_id()
            return True

    def save(self, fd: int, *, live: bool) -> None:
        """Write the device to a descriptor; raises SaveError, OSError."""
        step("server.saves")
        save_stream(self.device, fd, live=live, patience=STREAM_PATIENCE)

    def load(self, fd: int, begun: bytes, length: int) -> dict[str, int]:
        """Fill the empty device from a descriptor; raises DeviceError, SaveError, PoolFullError."""
        with self._clients_lock:
            if self._loading:
                raise DeviceError("the device is being loaded already")
            if self._clients:
                raise DeviceError("the device is in use: disconnect every client before a load")
            if self.device.counters()["pages_stored"]:
                raise DeviceError("the device is not empty: --force drops what it holds")
            self._loading = True
        try:
            step("server.loads")
            return load_stream(self.device, fd, begun=begun, length=length, patience=STREAM_PATIENCE)
        finally:
            self._publish_data_id()
            with self._clients_lock:
                self._loading = False

    def reset_mem_used_max(self) -> None:
        """Forget the peak of the pool's size."""
        self.device.reset_mem_used_max()

    def _publish_data_id(self) -> None:
        """Tell which data the device holds, by which a client knows it again.

        A kernel that swaps must not be connected to a server that holds other data than the one that died.
        """
        assert self._rundir is not None
        self._rundir.publish(DATA_ID, self.device.data_id + "\n")

    def send_sockets(self, path: str) -> None:
        """Send the sockets on which clients are accepted to who listens at `path`. Raises OSError."""
        assert self._rundir is not None
        sockets.send(path, self._listening, "made" if self._rundir.made else "found")

    def _keep_reserve(self) -> None:
        name_thread("zramd-keeper")
        # It needs the processor when requests do, but not what is set aside for them: see swap.take_priority.
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), KEEPER_NICE)
        swap.warm_stack()
        self.device.reserve_keep()

    def _housekeep(self) -> None:
        """Answer the endpoint's callers, write the stats files, and stop nbdkit when a signal says so."""
        name_thread("zramd")
        if self.config.swap == "local":
            swap.warm_stack()
        poll = select.poll()
        poll.register(self._wake[0], select.POLLIN)
        if self._endpoint is not None:
            poll.register(self._endpoint, select.POLLIN)
        due = time.monotonic()
        while not self._stopping.is_set():
            interval = self.config.stats_interval
            due = min(due, time.monotonic() + interval)
            timeout = max(due - time.monotonic(), 0) * 1000 if interval else None
            if self._stop_refused:
                timeout = SWAPOFF_INTERVAL * 1000
            for fd, _ in poll.poll(timeout):
                if fd != self._wake[0]:
                    assert self._endpoint is not None
                    self._endpoint.accept()
                elif any(signals := os.read(fd, 64)):
                    signals = self._signals = self._without_hangup(signals)
                    self._hands_over = bool(self.config.state) and sockets.HAND_OVER in signals
                    if any(signals) and (self._hands_over or self._may_leave(signals)):
                        self._leave()
                        return
            if self._stop_refused and self._may_leave(b""):
                self._leave()
                return
            if interval and time.monotonic() >= due:
                due = time.monotonic() + interval
                self._refresh_stats()
                self._report_corruption()
                told_lately = time.monotonic() - self._told_at < STATUS_INTERVAL
                if self._written is not self._told and not told_lately and not self._stop_refused:
                    self._tell_status()

    def _report_corruption(self) -> None:
        """Say so when blocks were found that were changed in memory."""
        errors = self.device.counters()["checksum_errors"]
        if errors > self._corrupt:
            _say(
                f"{errors - self._corrupt} reads found a block that was changed in memory, the last one "
                f"block {self.device.corrupt_block}: test this machine's memory, and write the block again"
            )
        self._corrupt = errors

    def _refresh_stats(self) -> None:
        """Write the stats files if there is news; complain once when that fails."""
        try:
            if self._write_stats():
                self._complained = False
        except RundirError as error:
            if not self._complained:
                print(f"zramd: stats files are not written: {error}", file=sys.stderr, flush=True)
            self._complained = True

    def _write_stats(self) -> bool:
        """Write the stats files unless nothing changed lately; return whether they were written."""
        assert self._rundir is not None
        counters = self.device.counters()
        if counters == self._written and time.monotonic() - self._written_at < REFRESH:
            return False
        snapshot, classes = self.snapshot(), self.classes()
        publish = self._rundir.publish
        publish("mm_stat", stats.mm_stat(snapshot))
        publish("io_stat", stats.io_stat(snapshot))
        publish("frag_ratio", stats.frag_ratio(snapshot))
        publish("stats.json", stats.to_json(snapshot))
        publish("classes", stats.classes_table(classes))
        metrics = prometheus.exposition(snapshot, classes)
        publish("metrics.prom", metrics)
        if self._metrics_file is not None:
            self._metrics_file.publish(metrics)
        self._written, self._written_at = counters, time.monotonic()
        return True

    def _tell_status(self) -> None:
        """Tell the service manager what is stored."""
        self._manager.tell(f"STATUS={stats.sentence(self.snapshot())}")
        self._told, self._told_at = self._written, time.monotonic()

    def _may_leave(self, signals: bytes) -> bool:
        """Say whether to stop now: the kernel must not lose what it has swapped out.

        If it would, remember that a stop is wanted, and say what to do.
        """
        if self.config.swap != "local" or not self._clients or signal.SIGQUIT in signals:
            return True
        devices = " ".join(swap.devices_in_use(self.config.disksize))
        if devices and signals:
            self._manager.tell(f"STATUS=stopping once 'swapoff {devices}' was run")
            print(
                f"zramd: {devices} is in use as swap: stopping once 'swapoff {devices}' was run "
                "(SIGQUIT stops at once and loses what is swapped out)",
                file=sys.stderr,
                flush=True,
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
            _say(f"the log cannot be opened again: {error}")
        return bytes(number for number in signals if number != signal.SIGHUP)

    def _leave(self) -> None:
        """End nbdkit, in a way that does no harm to clients that connect again if the data stays."""
        if self.config.state:
            self._let_clients_go()
        elif self._clients:
            _say(f"stopping while clients are connected ({self._clients}): their data ends with this server")
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
        os._exit(0)


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


def _say(text: str) -> None:
    with suppress(OSError):  # nobody reads it any more
        print(f"zramd: {text}", file=sys.stderr, flush=True)


def _ignore(number: int, frame: object) -> None:
    """Do nothing: the wakeup descriptor has carried the news."""
