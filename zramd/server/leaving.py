"""How a server ends: when it may, and what its clients see of it.

A signal asks for it. Without a state the data ends with the server, and so do the connections. With a state
(state=) another server will hold the same data, so clients are let go in a way that they see only as a pause.
SIGUSR1 (sockets.HAND_OVER) asks for that.

1. The front lets them go: see zramd.server.fronts.
2. The process ends, by Serving.stop. In a hand-over the run folder stays for the successor.
"""

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress

from zramd.errors import ZramdError, sentence
from zramd.kernel import swap
from zramd.process import notify
from zramd.process.steps import step
from zramd.server import sockets
from zramd.server.endpoint import Endpoint
from zramd.server.fronts.front import Front
from zramd.server.log import say
from zramd.settings.config import Config

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # those nbdkit stops on, too


class Leaving:
    """Ends one server, once a signal asks for it and it may.

    hands_over: whether a successor has asked for it. refused: whether a stop waits until swap is off.
    """

    def __init__(
        self,
        config: Config,
        front: Front,
        manager: notify.Manager,
        *,
        signals: int,
        clients: Callable[[], int],
        stopping: threading.Event,
        clean_up: Callable[[], None],
        endpoint: Endpoint | None = None,
        reopen_log: Callable[[], None] | None = None,
    ) -> None:
        """Take what a server ends with.

        signals: the pipe that gets the numbers of signals. clients: returns how many clients there are.
        stopping: set when the process ends in its normal way.
        clean_up: does what that way would do in the end; called if it hangs.
        reopen_log: what SIGHUP means in the background, None in the foreground.
        """
        self.hands_over = False
        self.refused = False
        self._config = config
        self._front = front
        self._pipe = signals
        self._signals = b""  # those that have come since the housekeeper read the pipe, too
        self._clients = clients
        self._stopping = stopping
        self._clean_up = clean_up
        self._endpoint = endpoint
        self._manager = manager
        self._reopen_log = reopen_log

    def obey(self, signals: bytes) -> None:
        """Leave if these signals say so, and if that is allowed."""
        signals = self._signals = self._without_hangup(signals)
        if not any(number in (*STOP_SIGNALS, sockets.HAND_OVER) for number in signals):
            return
        self.hands_over = bool(self._config.state) and sockets.HAND_OVER in signals
        if self.hands_over or self.may_leave(signals):
            self.surely(self.leave)

    def try_again(self) -> None:
        """Leave if the stop that was refused is allowed by now."""
        if self.may_leave(b""):
            self.surely(self.leave)

    def may_leave(self, signals: bytes) -> bool:
        """Say whether to stop now: the kernel must not lose what it has swapped out.

        If it would, remember that a stop is wanted, and if `signals` are new, say what to do. Raises OSError
        when that is not known; then the stop is remembered too.
        """
        if self._config.swap != "local" or not self._clients() or signal.SIGQUIT in signals:
            return True
        self.refused = True  # if it is not known, ask again
        devices = self._front.swap_devices()
        if devices and signals:
            command = swap.swapoff_command(devices, self._config.name)
            self._manager.tell(f"STATUS=stopping as soon as '{command}' has run")
            say(
                f"{' '.join(devices)} is in use as swap: stopping as soon as '{command}' has run "
                "(SIGQUIT stops at once and loses what is swapped out)"
            )
        self.refused = bool(devices)
        return not devices

    def surely(self, leave: Callable[[], None]) -> None:
        """End by `leave`; if that fails, end the process all the same."""
        try:
            self._front.use_spare()
            leave()
            return
        except Exception as error:
            say(f"ended without letting clients go: {sentence(error) or repr(error)}")
        try:
            self._clean_up()
        finally:  # whatever that raises
            os._exit(0)

    def leave(self) -> None:
        """End the process; if the data stays, in a way that does no harm to clients that connect again."""
        if self._config.state:
            self._let_clients_go()
        elif clients := self._clients():
            say(f"stopping while clients are connected ({clients}): their data ends with this server")
        self._end()

    def leaves_folder(self) -> bool:
        """Say whether the run folder is for a successor: not if a signal to stop has come meanwhile."""
        if not self.hands_over:
            return False
        with suppress(BlockingIOError):
            self._signals += os.read(self._pipe, 64)
        return not any(number in STOP_SIGNALS for number in self._without_hangup(self._signals))

    def _without_hangup(self, signals: bytes) -> bytes:
        """Return the signals; in the background without SIGHUP, which has the log opened again.

        There is no terminal that could hang up then, and programs that rotate logs mean that by it.
        """
        if self._reopen_log is None or signal.SIGHUP not in signals:
            return signals
        try:
            self._reopen_log()
        except (OSError, ZramdError) as error:
            say(f"the log cannot be opened again: {sentence(error)}")
        return bytes(number for number in signals if number != signal.SIGHUP)

    def _let_clients_go(self) -> None:
        step("server.leaves")
        if self._endpoint is not None:
            self._endpoint.close()  # a save that is under way would be waited for like a client
        self._signals += self._front.let_go(self._pipe)
        step("server.left")

    def _end(self) -> None:
        """End within a second, in the normal way if that works: then Serving.stop is called."""
        self._manager.tell("STOPPING=1")
        if not self._front.end(self._stopping):
            self._clean_up()
            os._exit(0)
