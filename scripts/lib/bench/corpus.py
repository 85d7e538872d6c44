"""The memory pages that are stored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from bench.results import NotMeasuredError
from bench.setup import BLOCK, MIB, REQUEST, Setup

MAKER = Path(__file__).parents[2] / "capture_pages"


def prepare(setup: Setup, given: Path | None, kept: Path) -> None:
    """Put the pages where `setup.corpus` says: those of the file `given`, else of one made once in `kept`.

    Left out are pages of one repeated word, which zramd stores without lz4, and what is less than a
    request at the end. Raises NotMeasuredError when there is no corpus.
    """
    source = given or kept / f"corpus-{setup.pick(64, 8)}M"
    if given is None and not source.exists():
        setup.say("capturing memory pages")
        kept.mkdir(parents=True, exist_ok=True)
        _capture(source, setup.pick(64, 8))
    try:
        data = source.read_bytes()
    except OSError as error:
        raise NotMeasuredError(f"no memory pages: {error}") from None
    pages = [data[at : at + BLOCK] for at in range(0, len(data) // BLOCK * BLOCK, BLOCK)]
    pages = [page for page in pages if page != page[:8] * (BLOCK // 8)]
    if setup.quick:
        pages = pages[: 8 * MIB // BLOCK]
    del pages[len(pages) // (REQUEST // BLOCK) * (REQUEST // BLOCK) :]
    if not pages:
        raise NotMeasuredError(f"no memory pages: '{source}' has fewer than 128 KiB of them")
    setup.corpus.write_bytes(b"".join(pages))
    setup.corpus_name = str(given) if given else "a capture of this machine"


def _capture(target: Path, mib: int) -> None:
    done = subprocess.run([sys.executable, MAKER, target, str(mib)], capture_output=True, text=True)
    if done.returncode:
        raise NotMeasuredError(f"no memory pages: {' '.join(done.stderr.split())}")


def requests(setup: Setup) -> list[memoryview]:
    """Return the pages in pieces of one request."""
    view = memoryview(setup.corpus.read_bytes())
    return [view[at : at + REQUEST] for at in range(0, len(view), REQUEST)]


def pages(setup: Setup) -> list[bytes]:
    """Return the pages one by one."""
    data = setup.corpus.read_bytes()
    return [data[at : at + BLOCK] for at in range(0, len(data), BLOCK)]
