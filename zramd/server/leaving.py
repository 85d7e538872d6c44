"""How a server ends: when it may, and what its clients see of it.

A signal asks for it. Without a state the data ends with the server, and so do the connections. With a state
(state=) another server will hold the same data, so clients are let go in a way that they see only as a pause.
SIGUSR1 (sockets.HAND_OVER) asks for that; a successor that sends it has the listening sockets already.

1. Nobody is accepted any more. New connections queue in the listening sockets, and the successor takes them.
2. Clients in the middle of their handshake finish it. One that is cut off there takes the server for gone:
   qemu would sleep for a second before it tries again.
3. We look for a moment at which no client waits for an answer, but not for long. Linux' own client repeats a
   request that got no answer only after a second or two.
4. All connections are shut for reading. What was read is still answered; then the clients connect again.
5. nbdkit ends, which calls Server.stop. In a hand-over the run folder stays for the successor.
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from zramd.core.device.device import Device
from zramd.errors import ZramdError, sentence
from zramd.kernel import swap
from zramd.process import notify
from zramd.process.steps import step
from zramd.server import sockets
from zramd.server.admission import Admission
from zramd.server.endpoint import Endpoint
from zramd.server.log import say
from zramd.settings.config import Config

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)  # those nbdkit stops on
# Seconds after a stop signal. nbdkit then refuses new requests, but waits for its clients to leave.
STOP_READING = 0.1  # it has answered what was under way: clients see the end of the connection
STOP_WRITING = 0.5  # a client that does not take its answers is cut off
STOP_WAITING = 0.9  # nbdkit is stuck: leave without it
# Seconds in a hand-over.
HANDSHAKES = 1.0  # the most that handshakes may take, while all other clients are served
LOOKS = 20  # a millisecond apart: no client is in its handshake if all of them say so
QUIET = 0.2  # the most that we look for a moment in which no client waits for an answer
HANDING_OVER = 0.2  # a client that does not take its answers is cut off; it asks again


class Leaving:
    """Ends one server, once a signal asks for it and it may.

    hands_over: whether a successor has asked for it. refused: whether a stop waits until swap is off.
    """

    def __init__(
        self,
        config: Config,
        device: Device,
        admission: Admission,
        manager: notify.Manager,
        *,
        signals: int,
        clients: Callable[[], int],
        shutdown: Callable[[], None],
        stopping: threading.Event,
        clean_up: Callable[[], None],
        endpoint: Endpoint | None = None,
        reopen_log: Callable[[], None] | None = None,
        others: frozenset[int] = frozenset(),
        listening: tuple[int, ...] = (),
    ) -> None:
        """Take what a server ends with. Raises OSError.

        signals: the pipe that gets the numbers of signals. clients: returns how many clients there are.
        shutdown: asks nbdkit to end, and returns at once. nbdkit then has `stopping` set.
        clean_up: does what nbdkit would have the server do in the end; called if nbdkit hangs.
        reopen_log: what SIGHUP means in the background, None in the foreground.
        others: the sockets that are no clients. listening: those on which nbdkit accepts.
        """
        self.hands_over = False
        self.refused = False
        self._config = config
        self._device = device
        self._pipe = signals
        self._signals = b""  # those that have come since the housekeeper read the pipe, too
        self._clients = clients
        self._shutdown = shutdown
        self._stopping = stopping
        self._clean_up = clean_up
        self._admission = admission
        self._endpoint = endpoint
        self._manager = manager
        self._reopen_log = reopen_log
        self._others = others
        self._listening = listening
        # A request that sleeps in a filter wakes up when its client's connection is shut, and is answered by
        # an error, if it can be answered. If writing is shut too it cannot, and the client sends it again.
        self._cut = socket.SHUT_RDWR if sockets.has_filters() else socket.SHUT_RD

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
        devices = swap.nbd_devices(self._config.disksize)
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
            self._admission.use_spare()
            leave()
            return
        except Exception as error:
            say(f"ended without letting clients go: {sentence(error) or repr(error)}")
        try:
            self._clean_up()
        finally:  # whatever that raises
            os._exit(0)

    def leave(self) -> None:
        """End nbdkit; if the data stays, in a way that does no harm to clients that connect again."""
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
        """Cut off all clients, once all that they have asked is answered, if that does not take long.

        nbdkit answers by errors what it reads after a shutdown. So it is called only when no client is left.
        """
        step("server.leaves")
        if self._endpoint is not None:
            self._endpoint.close()  # a save that is under way would be waited for like a client
        sockets.stop_accepting(self._listening, sockets.HAND_OVER)
        self._await_handshakes()
        self.await_quiet()
        end = time.monotonic() + HANDING_OVER
        while sockets.shut_clients(self._others, self._cut):
            if time.monotonic() > end:
                sockets.shut_clients(self._others, socket.SHUT_RDWR)
                break
            time.sleep(0.001)
        step("server.left")

    def _await_handshakes(self) -> None:
        """Wait until nbdkit accepts nobody any more, and all whom it has accepted are clients.

        nbdkit closes the socket of a client that leaves before it tells us. Until it does, our count may
        include a client that has gone, so we want LOOKS equal counts in a row.
        """
        end = time.monotonic() + HANDSHAKES
        poll = select.poll()
        poll.register(self._pipe, select.POLLIN)
        while poll.poll(max(end - time.monotonic(), 0) * 1000):
            signals = os.read(self._pipe, 64)
            self._signals += signals
            if sockets.HAND_OVER in signals:
                break
        looks = 0
        while looks < LOOKS and time.monotonic() < end:
            looks = looks + 1 if sockets.count_clients(self._others) == self._clients() else 0
            time.sleep(0.001)

    def await_quiet(self) -> None:
        """Cut off all clients at a moment in which none of them waits for an answer, if one comes soon.

        Linux' own client shuts a connection on which it cannot send. What it has sent already and has no
        answer to it sends again only when that times out: after a second or two. All else it sends at once.
        """
        end = time.monotonic() + QUIET
        with sockets.clients(self._others) as clients:
            done = -1
            while time.monotonic() < end:
                before = done
                done, at_work = self._device.pressure()[3:]
                if at_work or any(sockets.unread(client) for client in clients):
                    done = -1
                elif done == before:  # nor is nbdkit just about to begin or to answer one
                    break
                time.sleep(0.0002)
            for client in clients:
                with suppress(OSError):
                    client.shutdown(self._cut)

    def _end(self) -> None:
        """End nbdkit within a second, in its normal way if it can: then it calls Server.stop."""
        self._manager.tell("STOPPING=1")
        self._shutdown()
        if self._stopping.wait(STOP_READING):
            return
        # What is under way is still answered after this: only reading ends.
        sockets.shut_clients(self._others, socket.SHUT_RD)
        if self._stopping.wait(STOP_WRITING - STOP_READING):
            return
        sockets.shut_clients(self._others, socket.SHUT_RDWR)
        if self._stopping.wait(STOP_WAITING - STOP_WRITING):
            return
        self._clean_up()
        os._exit(0)
