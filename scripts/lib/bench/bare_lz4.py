"""lz4 alone, in a C program that is compiled here: the mark for what is measured in process."""

import subprocess
from pathlib import Path
from typing import Self

from bench.results import NotMeasuredError
from bench.setup import Setup
from zramd import Zsmalloc

SOURCE = Path(__file__).with_name("lz4.c")


def _program(setup: Setup) -> Path:
    """Return it, compiled once a run; raises NotMeasuredError."""
    program = setup.folder / "bench_lz4"
    return program if program.exists() else setup.compiled(SOURCE, program.name, "-O2", "-llz4", "-pthread")


class BareLz4:
    """The C program with one file loaded; use it in a `with`, whose end ends it."""

    def __init__(self, setup: Setup, data: Path) -> None:
        """Start it with the blocks of `data`; raises NotMeasuredError."""
        # What zramd stores raw is raw here too.
        command = [str(_program(setup)), str(data), str(Zsmalloc().max_payload)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.version, *numbers = self._answer().split()
            self.blocks, self.stored_bytes, self.raw_blocks = map(int, numbers)
        except BaseException:
            self.close()
            raise

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NotMeasuredError(f"{SOURCE.stem} ended with status {self._process.wait()}")
        return line

    def seconds(self, what: str, threads: int = 1, passes: int = 1) -> float:
        """Return what it takes to `compress` or `decompress` all blocks `passes` times with `threads`."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{what} {threads} {passes}\n")
        self._process.stdin.flush()
        return int(self._answer()) / 1e9

    def close(self) -> None:
        """End it."""
        self._process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        # After an interrupt it may be in the middle of a pass: nobody waits for that.
        self._process.kill()
        self.close()
