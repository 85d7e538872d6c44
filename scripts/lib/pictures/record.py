"""A device in use, as its server reports it: real memory pages, written, overwritten, trimmed and compacted.

A story of some 90 seconds, the same each time but for what the machine makes of it: guests fill a swap
device; one of them ends, and its pages are trimmed; another takes its place, and ends while the rest go on.
"""

import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zramd
from pictures import samples
from zramd.contract import rundir
from zramd.control import servers
from zramd.control.samples import Sample, take
from zramd.control.samples import rates as between
from zramd.errors import DeviceError, ZramdError

if TYPE_CHECKING:
    from multiprocessing.synchronize import Event

NAME, SIZE, LIMIT = "swap0", "2G", "1G"
BACKING = 512 << 20  # bytes
# In half a minute as in days: what nobody asks for becomes cold, and then goes out.
AGES = {"cold_age": "10", "writeback_age": "20", "writeback_limit": "off"}
BLOCK = 4096
CLUSTER = 16  # blocks that are swapped out together, as Linux does by default
CLUSTERS = (1750 << 20) // BLOCK // CLUSTER
SHOWN = 80  # samples, one each second: more than the screen is wide
FILL_TIMEOUT = 60.0  # seconds
ZEROS = 10  # percent of the pages; of the captured ones none repeats one word
PACKAGE_PARENT = Path(zramd.__file__).parent.parent
MAKER = Path(__file__).resolve().parents[2] / "capture_pages"


class NotRecordedError(Exception):
    """There is no record; the message says why."""


def make(pages: Path, target: Path, say: Callable[[str], None]) -> None:
    """Record a device in use into `target`, with the memory pages in a file that is made if it is missing.

    Raises NotRecordedError, OSError.
    """
    if not pages.exists():
        say("capturing memory pages")
        pages.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run([sys.executable, MAKER, pages], capture_output=True, text=True)
        if done.returncode:
            raise NotRecordedError(f"no memory pages: {' '.join(done.stderr.split())}")
    say("recording")
    filled = multiprocessing.Event()
    with (
        tempfile.TemporaryDirectory(prefix="zramd-pictures-") as folder,
        _backing(pages.parent / "pictures-backing") as backing,
        _serve(Path(folder), backing) as served,
    ):
        others, guest = (
            multiprocessing.Process(
                target=work, args=(served.file(rundir.NBD_SOCKET), pages, filled), daemon=True
            )
            for work in (_guests, _another_guest)
        )
        started = time.monotonic()
        others.start()
        guest.start()
        taken = []
        while guest.is_alive() and others.is_alive():
            time.sleep(max(started + len(taken) + 1 - time.monotonic(), 0))
            try:
                taken.append(take(served))
            except ZramdError as error:
                raise NotRecordedError(str(error)) from None
        lives = others.is_alive()
        for work in (others, guest):
            work.terminate()
            work.join()
    if not lives or guest.exitcode:
        raise NotRecordedError("a client has failed: see what it says above")
    for sample in taken:
        sample.stats["writeback"]["backing"] = backing.name  # where it was is nobody's business
    samples.write(target, _best(taken))
    say(f"{target}: {target.stat().st_size / 1000:.0f} kB")


def _best(taken: list[Sample]) -> list[Sample]:
    """Return the samples up to the last in which there is something to see everywhere."""
    counters = ("reads", "writes", "trims", "objects_migrated", "pages_compacted")
    for end in range(len(taken), 1, -1):
        rates = between(*taken[end - 2 : end]).per_second
        if all(rates[counter] for counter in counters):
            return taken[max(end - SHOWN, 0) : end]
    raise NotRecordedError("there is no second in which all was at work")


@contextmanager
def _backing(path: Path) -> Iterator[Path]:
    """Make a file that can be a backing, and remove it."""
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        try:
            os.posix_fallocate(fd, 0, BACKING)
        finally:
            os.close(fd)
        yield path
    finally:
        path.unlink()


@contextmanager
def _serve(folder: Path, backing: Path) -> Iterator[servers.Served]:
    """Serve a device, with its run folder below `folder`."""
    path = folder / NAME
    command = [sys.executable, "-P", "-m", "zramd", "serve", "--name", NAME, "--size", SIZE]
    server = subprocess.Popen(
        [
            *command,
            f"mem_limit={LIMIT}",
            f"rundir={path}",
            f"backing={backing}",
            *(f"{key}={value}" for key, value in AGES.items()),
        ],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        yield _wait(server, path)
    finally:
        server.terminate()
        server.wait()


def _wait(server: "subprocess.Popen[bytes]", path: Path) -> servers.Served:
    end = time.monotonic() + 20
    while server.poll() is None and time.monotonic() < end:
        try:
            served = servers.find(NAME, str(path))
            take(served)
            return served
        except DeviceError:
            time.sleep(0.05)
    raise NotRecordedError("zramd serve does not begin to serve: see what it says above")


# ------------------------------------------------------------------------------------------------------------
# clients, each a process of its own


class Guest:
    """A client that swaps."""

    def __init__(self, socket: str, pages: Path, seed: int) -> None:
        import nbd  # type: ignore[import-not-found]

        self.dice = random.Random(seed)
        self._swapped: list[int] = []  # clusters
        data = pages.read_bytes()
        self._pages = [data[at : at + BLOCK] for at in range(0, len(data) // BLOCK * BLOCK, BLOCK)]
        self._client: Any = nbd.NBD()
        self._client.connect_uri(f"nbd+unix:///{NAME}?socket={socket}")

    def swap_out(self, cluster: int) -> None:
        """Swap a cluster of pages out."""
        zeros = bytes(BLOCK)
        data = b"".join(
            zeros if self.dice.randrange(100) < ZEROS else self.dice.choice(self._pages)
            for _ in range(CLUSTER)
        )
        self._client.pwrite(data, cluster * CLUSTER * BLOCK)
        self._swapped.append(cluster)

    def shuffled(self) -> list[int]:
        """Return all clusters in some order."""
        clusters = list(range(CLUSTERS))
        self.dice.shuffle(clusters)
        return clusters

    def page_in(self) -> None:
        """Swap one page in."""
        block = self.dice.choice(self._swapped) * CLUSTER + self.dice.randrange(CLUSTER)
        self._client.pread(BLOCK, block * BLOCK)

    def page_out(self) -> None:
        """Swap one page out, where another one was."""
        block = self.dice.choice(self._swapped) * CLUSTER + self.dice.randrange(CLUSTER)
        self._client.pwrite(self.dice.choice(self._pages), block * BLOCK)

    def free(self, cluster: int, share: float) -> None:
        """Trim some of the pages of a cluster."""
        for block in range(cluster * CLUSTER, (cluster + 1) * CLUSTER):
            if self.dice.random() < share:
                self._client.trim(BLOCK, block * BLOCK)


def _paced(seconds: float, per_second: float) -> Iterator[None]:
    """Yield as often as that, evenly; less often if what is done takes longer. 0: as fast as it goes."""
    started = time.monotonic()
    done = 0
    while (now := time.monotonic()) < started + seconds:
        if per_second and done > (now - started) * per_second:
            time.sleep(0.001)
            continue
        done += 1
        yield


def _guests(socket: str, pages: Path, filled: "Event") -> None:
    """Fill the device; then go on in small."""
    guest = Guest(socket, pages, 1)
    for _, cluster in zip(_paced(FILL_TIMEOUT, 1400), guest.shuffled(), strict=False):
        guest.swap_out(cluster)
    filled.set()
    while True:
        for seconds, per_second in ((6, 5000), (4, 2000), (5, 8000), (3, 4000)):
            for _ in _paced(seconds, per_second):
                if guest.dice.randrange(3):
                    guest.page_in()
                else:
                    guest.page_out()


def _another_guest(socket: str, pages: Path, filled: "Event") -> None:
    """End, begin, and end again: memory becomes free in the holes between what the others have."""
    guest = Guest(socket, pages, 2)
    clusters = guest.shuffled()
    half = len(clusters) // 2
    filled.wait()
    time.sleep(15)
    for _, cluster in zip(_paced(9, 2500), clusters[:half], strict=False):
        guest.free(cluster, 0.6)
    time.sleep(10)
    for _, cluster in zip(_paced(18, 900), clusters[:half], strict=False):
        guest.swap_out(cluster)
    time.sleep(5)
    for _, cluster in zip(_paced(14, 600), clusters[half:], strict=False):
        guest.free(cluster, 0.5)
    time.sleep(5)
