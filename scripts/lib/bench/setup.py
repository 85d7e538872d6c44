"""What a run is asked to do, and the sizes that follow from it."""

import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.results import NotMeasuredError, Report, Row

MIB = 1 << 20
GIB = 1 << 30
BLOCK = 4096
REQUEST = 128 << 10


@dataclass
class Setup:
    """The settings of a run; run folders are in `memory`, backings in `disk`, all else in `folder`.

    All of these go with it.
    """

    quick: bool
    rounds: int
    seconds: float  # one fio run
    threads: int | None
    corpus: Path  # the pages, once corpus.prepare has put them there
    folder: Path
    disk: Path
    memory: Path
    report: Report
    corpus_name: str = ""
    started: float = field(default_factory=time.monotonic)

    def pick(self, full: int, quick: int) -> int:
        """Return the size for this run."""
        return quick if self.quick else full

    def say(self, text: str) -> None:
        """Show progress."""
        print(f"{time.monotonic() - self.started:6.0f} s  {text}", file=sys.stderr, flush=True)

    def all_of(self, title: str, parts: Mapping[str, Callable[[], list[Row]]]) -> list[Row]:
        """Measure the parts in turn, and return their rows; the report says which cannot be measured."""
        rows: list[Row] = []
        for name, part in parts.items():
            self.say(f"{title}, {name}")
            try:
                rows += part()
            except NotMeasuredError as reason:
                self.report.skip(f"{title}, {name}: {reason}")
        return rows

    def compiled(self, source: Path, made: str, *options: str) -> Path:
        """Compile a C program into the folder, as a file `made`, and return that. Raises NotMeasuredError."""
        program = self.folder / made
        try:
            subprocess.run(
                ["cc", "-o", str(program), str(source), *options], check=True, capture_output=True, text=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            words = getattr(error, "stderr", "") or str(error)
            raise NotMeasuredError(f"{source.name} cannot be compiled: {' '.join(words.split())}") from None
        return program


Measure = Callable[[Setup], list[Row]]
