"""Processes that are held at their named steps."""

import socket
import threading
from pathlib import Path

from support.run import wait_until


class Steps:
    """Holds processes at their named steps: see zramd.process.steps."""

    def __init__(self, path: Path) -> None:
        self.env = {"ZRAMD_STEPS": str(path)}
        self.held: set[str] = set()  # at which steps processes are to wait
        self.seen: list[tuple[int, str]] = []  # process and step, as they came
        self._links: list[tuple[str, socket.socket]] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(path))
        self._listener.listen(64)
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            try:
                link, _ = self._listener.accept()
            except OSError:
                return
            pid, name = link.makefile().readline().split()
            self.seen.append((int(pid), name))
            if name in self.held:
                self._links.append((name, link))
            else:
                link.close()

    def wait(self, name: str, timeout: float = 20.0) -> int:
        """Wait until a process is held at a step, and return its number."""
        wait_until(lambda: any(step == name for step, _ in self._links), timeout)
        return next(pid for pid, step in reversed(self.seen) if step == name)

    def release(self) -> None:
        """Let all go on, and hold nobody any more."""
        self.held.clear()
        for _, link in self._links:
            link.close()
        self._links.clear()

    def close(self) -> None:
        """End it."""
        self.release()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
