"""The server's life: prepare before nbdkit forks, start after, stop when nbdkit ends.

Without nbdkit the same comes in one process, see zramd.server.__main__.

prepare   self-test, device, run folder        errors reach the user's terminal
start     pid file, signals, threads           worker, and housekeeping: endpoint, stats files, stop
stop      threads end, the run folder goes
"""

import gc
import os
import signal
import threading
from contextlib import suppress
from functools import partial

from zramd.contract import handover
from zramd.contract.rundir import BACKGROUND, CONTROL_SOCKET, STATE, Rundir, budget_file
from zramd.core.system.process import at_failing_exit, dump_little, name_thread, trim_heap
from zramd.core.system.threads import start_thread
from zramd.errors import RundirError, reason
from zramd.kernel import protection
from zramd.process import notify
from zramd.process.steps import step
from zramd.server import opening, sockets, takeover
from zramd.server.admission import LOOK_AGAIN
from zramd.server.ending import Ends
from zramd.server.endpoint import Endpoint
from zramd.server.files import Files
from zramd.server.fronts.front import Front
from zramd.server.housekeeping import Chore, Housekeeper
from zramd.server.leaving import STOP_SIGNALS, Leaving
from zramd.server.log import Log
from zramd.server.metricsfile import MetricsFile
from zramd.server.opening import Made
from zramd.server.published import StatsFiles
from zramd.server.reports import Reports
from zramd.server.selftest import self_test
from zramd.server.service import Service
from zramd.server.trouble import Troubles
from zramd.settings.config import Config

SWAPOFF_INTERVAL = 0.5  # seconds between two looks whether swap is off, while a stop waits for it
REFILLER_NICE = -20  # the reserve is refilled ahead of what ordinary programs do
# Seconds that a stop waits for what is being written to the backing. A write that nobody waits for is lost
# with no harm: its blocks are in memory. But the kernel ends no process before the disk has answered it.
DISK_PATIENCE = 1.0
AGAIN = 1.0  # seconds between two tries of what could not be done so far


def prepare(config: Config, front: Front) -> "Prepared":
    """Do all that can fail before nbdkit forks, for clients that come by `front`.

    Raises RundirError, CorruptionError when the self-test fails, MemoryError, SwapError, StateError,
    BackingError, BudgetError, UblkError.
    """
    # As nbdkit has it once it serves: what started us may end before we have said all.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    self_test(config)
    log = Log(prepare=protection.warm_stack if config.swap == "local" else lambda: None)
    ends = Ends()
    ends.add(log.stop)
    at_failing_exit(lambda: _give_up(ends, log))
    try:
        made, files = _have_all(config, front, ends)
    except BaseException:
        ends.fail()
        raise
    return Prepared(config, made, files, log, ends, front)


def _have_all(config: Config, front: Front, ends: Ends) -> tuple[Made, Files]:
    """Take device and run folder, after the server before this one if it takes over."""
    if config.swap == "local":
        protection.prepare()
    if handover.takes_over():
        opening.look(config)
        if config.metrics_file:
            MetricsFile(config.metrics_file, config.name)
        front.prepare(config)
        if config.swap == "local":
            protection.protect_process()  # nbdkit does not fork here; `start` then finds it done
            # Until we serve nothing may be free but what is set aside.
            protection.take_priority(protection.BESIDE)
        takeover.wait(config.rundir)
    if handover.must_be_left():  # or it was stopped: then the state is not for us
        files = _take_folder(config, ends)
        step("server.device")
        made = opening.make_device(config)
        step("server.rundir")
    else:
        step("server.device")
        made = opening.make_device(config)
        step("server.rundir")
        files = _take_folder(config, ends)
    front.take(config, made.device)
    if config.metrics_file:
        files.metrics = MetricsFile(config.metrics_file, config.name)
        # In a hand-over nobody would serve if that failed: then the housekeeper does it.
        if not handover.takes_over():
            files.metrics.make()
    return made, files


def _take_folder(config: Config, ends: Ends) -> Files:
    """Take the run folder; in the end it goes, unless this server fails to take over."""
    files = Files(Rundir(config.rundir), lambda: ends.failed and handover.takes_over())
    ends.add(files.remove)
    return files


def _give_up(ends: Ends, log: Log) -> None:
    """nbdkit ends without calling `stop`: it cannot listen, say. Once we serve, that is a crash."""
    if ends.stopping.is_set():
        return
    if ends.serves:
        log.stop()
    else:
        ends.fail()


class Prepared:
    """A server that has all it needs, in the process from which nbdkit forks the one that serves."""

    def __init__(
        self,
        config: Config,
        made: Made,
        files: Files,
        log: Log,
        ends: Ends,
        front: Front,
    ) -> None:
        self.config = config
        self.device = made.device
        self.backing = made.backing
        self.member = made.member
        self.files = files
        self.log = log
        self.ends = ends
        self.front = front

    def start(self) -> "Serving":
        """Start the threads; call it in the process that serves, on its main thread.

        Raises RundirError when this process, unlike the one that prepared, cannot write the run folder;
        SwapError.
        """
        try:
            return Serving(self)
        except BaseException:
            self.ends.fail()
            raise


class Serving:
    """One device with all that runs beside it.

    service: what clients and callers ask for.
    """

    def __init__(self, prepared: Prepared) -> None:
        """Begin to serve: see Prepared.start."""
        self._config = config = prepared.config
        self._device = device = prepared.device
        self._files = files = prepared.files
        self._log = log = prepared.log
        self._ends = ends = prepared.ends
        self._troubles = troubles = Troubles()
        self._manager = notify.Manager()
        self._front = front = prepared.front
        self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.service = service = Service(
            config,
            device,
            files.rundir,
            troubles,
            front,
            self._wake_up,
            backing=prepared.backing,
            member=prepared.member,
        )
        undone = service.undone
        with suppress(OSError):  # it only makes dumps smaller
            dump_little()
        threading.excepthook = self._thread_failed
        if config.swap == "local":
            protection.protect(device, config.reserve)
            protection.take_priority(protection.BESIDE)  # the threads below inherit it
            refiller = start_thread("zramd-refill", self._refill)
            ends.add(refiller.join)
            ends.add(device.reserve_stop)
        log.start()
        undone.attempt("the pid file is not written", files.rundir.write_pid)
        step("server.published")
        undone.attempt("the place of the state is not written", self._write_state)
        stats_files = StatsFiles(files.rundir, files.metrics)
        self._reports = reports = Reports(device, stats_files, self._manager, service.snapshot)
        service.publish_data_id()
        # One that takes over does it soon. It takes longer than all else that clients wait for here: 180 of
        # 390 ms in an emulated guest.
        if config.stats_interval and not handover.takes_over():
            undone.attempt("stats files are not written", reports.write)
        front.begin(service)
        files.bound = front.files()
        if config.listen:
            undone.attempt("the service manager does not keep the sockets", self._store_sockets)
        endpoint = self._make_endpoint()
        service.worker.start()
        ends.add(service.worker.stop)
        if service.out_worker is not None:
            service.out_worker.start()
            ends.add(partial(service.out_worker.stop, patience=DISK_PATIENCE))
        self._leaving = leaving = Leaving(
            config,
            front,
            self._manager,
            signals=self._wake[0],
            clients=lambda: service.clients,
            stopping=ends.stopping,
            clean_up=self._clean_up,
            endpoint=endpoint,
            reopen_log=self._write_log if BACKGROUND in os.environ else None,
        )
        ends.add(self._leave_budget)
        failed = files.are_left
        files.are_left = lambda: leaving.leaves_folder() or failed()
        self._housekeeper = self._make_housekeeper()
        if endpoint is not None:
            self._housekeeper.listen(endpoint.fileno(), endpoint.accept)
        # nbdkit's own handlers would only make it wait for its clients. Python's write the number into
        # the pipe at once, even while the main thread sits in nbdkit and runs no Python. And before anybody
        # is answered: who knows that we serve may end us.
        signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        for number in (*STOP_SIGNALS, sockets.HAND_OVER, LOOK_AGAIN):
            signal.signal(number, _ignore)
        housekeeping = start_thread("zramd", self._housekeep)
        ends.add(housekeeping.join)
        ends.add(self._wake_up)
        if config.swap == "local":
            # Last: the threads above are less urgent, those that nbdkit starts for clients inherit it.
            protection.take_priority(protection.SERVE)
        if BACKGROUND in os.environ:
            undone.attempt("the log is not written", self._write_log)
        ends.serves = True
        # From here on nothing may raise: it is known that we serve.
        undone.add("no command has its turn with this server", self._give_turn)
        undone.do()
        step("server.serves")
        if config.swap != "local":
            gc.collect()
            trim_heap()  # what the start has needed and nothing else does
        undone.add("the service manager does not know what is stored", reports.status)
        undone.add("the service manager does not know that zramd serves", reports.ready)
        undone.do()

    def stop(self) -> None:
        """End the threads and remove what was made in the run folder. Never raises."""
        self._ends.run()
        if self._leaving.hands_over:
            os._exit(0)  # nbdkit would remove the socket, which the next server has
        if self.service.out_worker is not None and self.service.out_worker.is_alive:
            os._exit(0)  # nbdkit would take the memory away in which it goes on once the disk answers

    def _clean_up(self) -> None:
        """Do of `stop` what another process may depend on."""
        self._files.remove()
        self._log.stop()

    def _make_endpoint(self) -> Endpoint | None:
        """Return the control socket, None with endpoint=off. Raises RundirError."""
        if not self._config.endpoint:
            return None
        path = self._files.rundir.file(CONTROL_SOCKET)
        try:
            endpoint = Endpoint(path, self.service, self._troubles)
        except OSError as error:
            raise RundirError(f"socket '{path}' cannot be made: {reason(error)}") from None
        self._ends.add(endpoint.close)
        return endpoint

    def _make_housekeeper(self) -> Housekeeper:
        """Return what answers callers, writes the stats files, and ends the server on a signal."""
        service, leaving, reports = self.service, self._leaving, self._reports
        undone = service.undone

        def stats_interval() -> float:
            return service.config.stats_interval

        chores = [
            *self._front.chores(),
            Chore("what was left undone still fails", undone.do, lambda: AGAIN if undone else 0),
            Chore(
                "stats files are not written",
                lambda: reports.refresh(quiet=leaving.refused),  # then that is what is told
                stats_interval,
            ),
            Chore("corruption cannot be reported", reports.corruption, stats_interval),
            *self._budgets_chores(),
            Chore("the stop cannot go on", leaving.try_again, lambda: leaving.refused * SWAPOFF_INTERVAL),
        ]
        return Housekeeper(self._wake[0], self._ends.stopping, self._troubles, leaving.obey, chores)

    def _budgets_chores(self) -> list[Chore]:
        member = self.service.member
        if member is None:
            return self._without_budget()
        from zramd.server import budget  # which is there already

        tidy = partial(member.tidy, self._device)
        return [Chore("the budget is not looked after", tidy, lambda: budget.INTERVAL)]

    def _without_budget(self) -> list[Chore]:
        """Return what takes the device out of a budget in which servers with its state had a part.

        Not before we serve: what it reads may be on the very swap that waits for us.
        """
        if not self._config.state or not os.path.exists(budget_file(self._config.rundir)):
            return []
        due = [1.0]  # second

        def once() -> None:
            from zramd.server import budget  # only here: most servers have none

            due.clear()
            budget.leave_out(self._config)

        return [Chore("the budget is not looked after", once, lambda: sum(due))]

    def _leave_budget(self) -> None:
        """Let others have what this device takes of the budget, unless another server goes on with it."""
        if self.service.member is not None and not self._leaving.hands_over:
            self.service.member.leave(self._device)

    def _wake_up(self) -> None:
        """Have the housekeeper look around."""
        with suppress(BlockingIOError):  # the pipe is full: it will
            os.write(self._wake[1], b"\0")

    def _write_state(self) -> None:
        self._files.rundir.publish(STATE, self._config.state + "\n")

    def _store_sockets(self) -> None:
        """Have the service manager keep what clients come by: they queue while a service is restarted."""
        for fd in self._front.listening:
            self._manager.store(handover.listens(self._config.listen), fd)

    def _write_log(self) -> None:
        self._log.write_to(self._files.rundir.open_log())

    def _give_turn(self) -> None:
        takeover.serving(self._config.rundir)

    def _refill(self) -> None:
        name_thread("zramd-refill")
        # It needs the processor when requests do, but not what is set aside for them: see take_priority.
        protection.warm_stack()
        protection.be_ordinary(REFILLER_NICE)
        self._device.reserve_keep()

    def _housekeep(self) -> None:
        if self._config.swap == "local":
            protection.warm_stack()
        self._housekeeper.run()

    def _thread_failed(self, failure: threading.ExceptHookArgs) -> None:
        """Tell that a thread has died, of what nobody expected."""
        name = failure.thread.name if failure.thread is not None else "a thread"
        error = failure.exc_value
        self._troubles.begin(f"{name} has ended", repr(error) if error is None else error)


def _ignore(number: int, frame: object) -> None:
    """Do nothing: the wakeup descriptor has carried the news."""
