"""What a run is asked to do, and the sizes that follow from it."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bench.results import Report, Row

MIB = 1 << 20
GIB = 1 << 30
BLOCK = 4096
REQUEST = 128 << 10


@dataclass
class Setup:
    """The settings of a run; sockets and files are in `folder`, backings in `disk`; both go with it."""

    quick: bool
    rounds: int
    seconds: float  # one fio run
    threads: int | None
    corpus: Path  # the pages, once corpus.prepare has put them there
    folder: Path
    disk: Path
    report: Report
    corpus_name: str = ""
    started: float = field(default_factory=time.monotonic)

    def pick(self, full: int, quick: int) -> int:
        """Return the size for this run."""
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """Show progress."""
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", file=sys.stderr, flush=True)


Measure = Callable[[Setup], list[Row]]
