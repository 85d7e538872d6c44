"""Starts the server's threads."""

import threading
import time
from collections.abc import Callable
from typing import Any

_PAUSE = 0.05  # seconds between two tries


def start_thread(
    name: str, work: Callable[..., Any], *arguments: Any, patience: float = 2.0
) -> threading.Thread:
    """Start a thread that the process's end does not wait for; return it.

    Raises RuntimeError if there are too many threads, still after `patience` seconds: a server that was here
    before may be about to end.
    """
    end = time.monotonic() + patience
    while True:
        thread = threading.Thread(target=work, args=arguments, name=name, daemon=True)
        try:
            thread.start()
            return thread
        except RuntimeError:
            if time.monotonic() >= end:
                raise
            time.sleep(_PAUSE)
