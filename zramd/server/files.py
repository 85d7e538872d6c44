"""What stands for a server in the file system, from its start to its end."""

import os
from collections.abc import Callable
from contextlib import suppress

from zramd.contract.rundir import Rundir
from zramd.server import sockets
from zramd.server.metricsfile import MetricsFile


class Files:
    """The run folder, the metrics file if there is one, and the sockets that nbdkit has made.

    bound: those sockets. are_left: whether the next server takes all of it over, asked in the end.
    """

    def __init__(self, rundir: Rundir, are_left: Callable[[], bool]) -> None:
        self.rundir = rundir
        self.metrics: MetricsFile | None = None  # metrics_file= is not given
        self.bound: list[tuple[str, os.stat_result]] = []
        self.are_left = are_left

    def remove(self) -> None:
        """Remove what stands for this server, but for what the next one needs, if one takes over."""
        with suppress(OSError):
            if self.metrics is not None and self.rundir.is_ours():
                self.metrics.remove()
        # A successor that fails leaves the socket and the folder to one that is as the old server was.
        if self.are_left():
            self.rundir.leave()
            return
        sockets.unlink(self.bound)
        self.rundir.remove()
