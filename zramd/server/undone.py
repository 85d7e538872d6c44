"""What one can serve without, and could not be done yet, for lack of something: it is tried again."""

import threading
from collections.abc import Callable

from zramd.contract import handover
from zramd.errors import ZramdError, is_shortage
from zramd.server.trouble import Troubles


class Undone:
    """Work by the trouble that it is while it is not done, in the order in which it was noted."""

    def __init__(self, troubles: Troubles) -> None:
        self._troubles = troubles
        self._work: dict[str, Callable[[], None]] = {}
        self._lock = threading.Lock()

    def __bool__(self) -> bool:
        return bool(self._work)

    def attempt(
        self, failing: str, work: Callable[[], None], later: Callable[[], None] | None = None
    ) -> None:
        """Do what one can serve without; if it fails for lack of something, `later` or `work` is to do.

        Raises what is no shortage, unless nobody would serve then: the server before us has left.
        """
        try:
            work()
        except (OSError, ZramdError, MemoryError) as error:
            if not is_shortage(error) and not handover.takes_over():
                raise
            self.failed(failing, error, later or work)

    def failed(self, failing: str, error: BaseException, work: Callable[[], None]) -> None:
        """Note that something has failed, and what is to do about it."""
        self._troubles.begin(failing, error)
        self._work[failing] = work

    def add(self, failing: str, work: Callable[[], None]) -> None:
        """Note that something is to be done."""
        self._work[failing] = work

    def do(self) -> None:
        """Do all of it; what fails again stays undone.

        Two threads may be at it when a server begins: the status must still be sent before READY=1.
        """
        with self._lock:
            for failing in list(self._work):
                work = self._work.pop(failing)  # first: it may be noted again meanwhile
                try:
                    work()
                except Exception as error:
                    self._troubles.begin(failing, error)
                    self._work.setdefault(failing, work)
                else:
                    self._troubles.over(failing)
