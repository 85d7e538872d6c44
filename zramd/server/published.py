"""What a server shows of itself in files: the statistics, and which data it holds."""

import time

from zramd.contract.rundir import Rundir
from zramd.server import words
from zramd.server.metricsfile import MetricsFile
from zramd.stats import prometheus, snapshots, texts

REFRESH = 30.0  # seconds after which unchanged files are written again: their age shows that we live


class StatsFiles:
    """The statistics in the run folder, and the metrics beside it if there are any."""

    def __init__(self, rundir: Rundir, metrics_file: MetricsFile | None) -> None:
        self._rundir = rundir
        self._metrics_file = metrics_file
        self.written: dict[str, int] = {}  # the counters that the files show
        self._written_at = 0.0

    def are_due(self, counters: dict[str, int]) -> bool:
        """Say whether there is something new to be written, or the files are old."""
        return counters != self.written or time.monotonic() - self._written_at >= REFRESH

    def write(
        self, counters: dict[str, int], snapshot: snapshots.Snapshot, classes: list[snapshots.ClassRow]
    ) -> None:
        """Write the files. Raises RundirError when one of them cannot be written."""
        publish = self._rundir.publish
        publish("disksize", f"{snapshot.values['disksize']}\n")
        publish("comp_algorithm", words.comp_algorithm(snapshot.comp_algorithm))
        publish("recomp_algorithm", words.recomp_algorithm(snapshot.recompression))
        publish("mm_stat", texts.mm_stat(snapshot))
        publish("backing_dev", texts.backing_dev(snapshot))
        publish("bd_stat", texts.bd_stat(snapshot))
        publish("io_stat", texts.io_stat(snapshot))
        publish("frag_ratio", texts.frag_ratio(snapshot))
        publish("stats.json", texts.to_json(snapshot))
        publish("classes", texts.classes_table(classes))
        metrics = prometheus.exposition(snapshot, classes)
        publish("metrics.prom", metrics)
        if self._metrics_file is not None:
            self._metrics_file.publish(metrics)
        self.written, self._written_at = counters, time.monotonic()
