"""NBD: nbdkit accepts the clients, and has threads for them. Nothing of it is on a request's path.

How clients see only a pause when a server leaves whose state another one will have (a successor that asked
for it, by sockets.HAND_OVER, has the listening sockets already):

1. Nobody is accepted any more. New connections queue in the listening sockets, and the successor takes them.
2. Clients in the middle of their handshake finish it. One that is cut off there takes the server for gone:
   qemu would sleep for a second before it tries again.
3. We look for a moment at which no client waits for an answer, but not for long. Linux' own client repeats a
   request that got no answer only after a second or two.
4. All connections are shut for reading. What was read is still answered; then the clients connect again.
"""

import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from zramd.core.device.device import Device
from zramd.errors import say
from zramd.kernel import swap
from zramd.server import sockets
from zramd.server.admission import Admission
from zramd.server.fronts.front import END, Front
from zramd.server.housekeeping import Chore
from zramd.settings import network

if TYPE_CHECKING:
    from zramd.server.service import Service

# Seconds after a stop signal. nbdkit then refuses new requests, but waits for its clients to leave.
STOP_READING = 0.1  # it has answered what was under way: clients see the end of the connection
STOP_WRITING = 0.5  # a client that does not take its answers is cut off
# Seconds in a hand-over.
HANDSHAKES = 1.0  # the most that handshakes may take, while all other clients are served
LOOKS = 20  # a millisecond apart: no client is in its handshake if all of them say so
QUIET = 0.2  # the most that we look for a moment in which no client waits for an answer
HANDING_OVER = 0.2  # a client that does not take its answers is cut off; it asks again
IDLE_LOOKS = 10  # in the time of client_idle
MAX_IDLE_INTERVAL = 60.0  # seconds between two of them


class Nbd(Front):
    """nbdkit's clients. admission: who is let in; from `begin` on."""

    name = "nbd"
    admission: Admission

    def __init__(self, shutdown: Callable[[], None]) -> None:
        """`shutdown` asks nbdkit to end, and returns at once."""
        self._shutdown = shutdown
        self._service: Service
        self._device: Device
        self._others: frozenset[int] = frozenset()  # sockets that are no clients
        self._cut = socket.SHUT_RD
        self._places: list[int] = []  # where nbdkit has its listening sockets

    def begin(self, service: "Service") -> None:
        """See Front.begin; call it before there is any other socket."""
        self.serve(service)
        self._others = sockets.inherited()
        self._places = sockets.listening()
        sockets.keep_alive(self._places)
        self.admission.begin(self._places)
        # A request that sleeps in a filter wakes up when its client's connection is shut, and is answered by
        # an error, if it can be answered. If writing is shut too it cannot, and the client sends it again.
        self._cut = socket.SHUT_RDWR if sockets.has_filters() else socket.SHUT_RD

    def serve(self, service: "Service") -> None:
        """Be the front of a service that clients reach on whatever sockets there are."""
        self._service = service
        self._device = service.device
        # Where our own kernel swaps, it has no memory to spare for many answers at once.
        greets = None if service.config.swap == "local" else service.wake_up
        self.admission = Admission(
            service.troubles,
            lambda: service.config.client_limit,
            lambda: service.clients,
            greets,
            lambda: service.config.handshake_limit,
        )

    @property
    def listening(self) -> tuple[int, ...]:  # type: ignore[override]
        """Those on which clients are accepted, also while nbdkit does not have them."""
        return tuple(self.admission.sockets)

    def files(self) -> list[tuple[str, Any]]:
        """See Front.files."""
        return sockets.bound(self._places)

    def client_connects(self) -> None:
        """Let in a client that has just connected; its own thread calls this. Raises DeviceError."""
        with self.admission.lock:
            self.admission.connects()

    def client_opened(self) -> None:
        """Count a client; waits while the device is being reset, raises DeviceError while it is loaded."""
        with self.admission.lock:
            self._service.client_opened()
            self.admission.becomes_client()

    def client_closed(self) -> None:
        """Count a client that left."""
        self._service.client_closed()

    def chores(self) -> list[Chore]:
        """See Front.chores."""
        admission = self.admission
        return [
            Chore("descriptors cannot be counted", admission.watch_descriptors, admission.interval),
            Chore("clients cannot be counted", admission.watch_clients, admission.watch_interval),
            Chore("idle clients cannot be found", self._end_idle, self._idle_interval),
            Chore(
                "clients' send buffers cannot be set",
                lambda: admission.greet(self._others),
                admission.greet_interval,
            ),
        ]

    def _end_idle(self) -> None:
        """Cut off clients over TCP that have asked for nothing for as long as client_idle says."""
        if ended := sockets.end_idle(self._others, self._service.config.client_idle):
            say(f"{ended} idle client{'s were' if ended > 1 else ' was'} cut off, as client_idle has it")

    def _idle_interval(self) -> float:
        return min(self._service.config.client_idle / IDLE_LOOKS, MAX_IDLE_INTERVAL)

    def health(self) -> dict[str, Any]:
        """See Front.health; and where it listens, how clients prove who they are, and who is in between."""
        config = self._service.config
        return {
            **super().health(),
            "listen": config.listen,
            "tls": network.tls(config.tls).way,
            "handshakes": self.admission.handshakes,
        }

    def swap_devices(self) -> list[str]:
        """See Front.swap_devices. Whether they are ours, their size tells."""
        return swap.nbd_devices(self._service.config.disksize)

    def use_spare(self) -> None:
        """See Front.use_spare."""
        self.admission.use_spare()

    def let_go(self, signals: int) -> bytes:
        """Cut off all clients, once all that they have asked is answered, if that does not take long.

        nbdkit answers by errors what it reads after a shutdown. So it is called only when no client is left.
        """
        sockets.stop_accepting(self._places, sockets.HAND_OVER)
        seen = self._await_handshakes(signals)
        self.admission.leave()
        self.await_quiet()
        end = time.monotonic() + HANDING_OVER
        while sockets.shut_clients(self._others, self._cut):
            if time.monotonic() > end:
                sockets.shut_clients(self._others, socket.SHUT_RDWR)
                break
            time.sleep(0.001)
        return seen

    def _await_handshakes(self, signals: int) -> bytes:
        """Wait until nbdkit accepts nobody any more, and all whom it has accepted are clients.

        nbdkit closes the socket of a client that leaves before it tells us. Until it does, our count may
        include a client that has gone, so we want LOOKS equal counts in a row. Returns the signals that came.
        """
        end = time.monotonic() + HANDSHAKES
        poll = select.poll()
        poll.register(signals, select.POLLIN)
        seen = b""
        while sockets.HAND_OVER not in seen and poll.poll(max(end - time.monotonic(), 0) * 1000):
            seen += os.read(signals, 64)
        looks = 0
        while looks < LOOKS and time.monotonic() < end:
            looks = looks + 1 if sockets.count_clients(self._others) == self._service.clients else 0
            time.sleep(0.001)
        return seen

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
                done, at_work = self._device.pressure()[3:5]
                if at_work or any(sockets.unread(client) for client in clients):
                    done = -1
                elif done == before:  # nor is nbdkit just about to begin or to answer one
                    break
                time.sleep(0.0002)
            for client in clients:
                with suppress(OSError):
                    client.shutdown(self._cut)

    def end(self, stopping: threading.Event) -> bool:
        """End nbdkit within a second, in its normal way if it can: then it calls Serving.stop."""
        self.admission.leave()
        self._shutdown()
        if stopping.wait(STOP_READING):
            return True
        # What is under way is still answered after this: only reading ends.
        sockets.shut_clients(self._others, socket.SHUT_RD)
        if stopping.wait(STOP_WRITING - STOP_READING):
            return True
        sockets.shut_clients(self._others, socket.SHUT_RDWR)
        return stopping.wait(END - STOP_WRITING)
