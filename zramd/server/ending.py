"""What a server ends with: all that was begun, the last first."""

import threading
from collections.abc import Callable

from zramd.errors import sentence
from zramd.server.log import say


class Ends:
    """What is to be done when a server ends, in whichever way it does.

    stopping: set when it ends. serves: whether it has got so far. failed: whether it did not.
    """

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self.serves = False
        self.failed = False
        self._ends: list[Callable[[], None]] = []

    def add(self, end: Callable[[], None]) -> None:
        """Have `end` called in the end, before what was added earlier."""
        self._ends.append(end)

    def run(self) -> None:
        """End all. Never raises."""
        self.stopping.set()
        while self._ends:
            end = self._ends.pop()
            try:
                end()
            except Exception as error:  # what comes after it is to end all the same
                say(f"not everything could be shut down: {sentence(error) or repr(error)}")

    def fail(self) -> None:
        """End all, of a server that does not get so far as to serve."""
        self.failed = True
        self.run()
