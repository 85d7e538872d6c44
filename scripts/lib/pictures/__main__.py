"""Draws the pictures of `zramd top`, from what was recorded of a real server; see scripts/pictures."""

import argparse
import sys
import time
from pathlib import Path

from pictures import record, top

ROOT = Path(__file__).resolve().parents[3]
PAGES = ROOT / "build" / "bench" / "corpus-64M"  # scripts/bench keeps its memory pages there too


def main() -> int:
    """Draw what the command line asks for; return the exit status."""
    parser = argparse.ArgumentParser(prog="scripts/pictures", add_help=False)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "docs" / "pictures")
    parser.add_argument("--record", action="store_true")
    arguments = parser.parse_args()
    started = time.monotonic()

    def say(words: str) -> None:
        print(f"{time.monotonic() - started:6.0f} s  {words}", file=sys.stderr, flush=True)

    try:
        if arguments.record:
            record.make(PAGES, top.RECORD, say)
        arguments.folder.mkdir(parents=True, exist_ok=True)
        for name, picture in top.pictures().items():
            (arguments.folder / name).write_text(picture)
            say(f"{arguments.folder / name}: {len(picture.encode()) / 1000:.0f} kB")
    except (OSError, record.NotRecordedError, top.NotDrawnError) as error:
        print(f"scripts/pictures: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
