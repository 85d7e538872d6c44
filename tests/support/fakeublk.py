"""The kernel of shim_ublk.c, which must be preloaded: its disks, what goes wrong there, and clients."""

import ctypes
import os

from zramd.core.ublk.control import Control, Info
from zramd.core.ublk.queues import Queues

CONTROL = "/dev/null"  # which is there for everybody; what is said to it the fake kernel hears
READ, WRITE, FLUSH, DISCARD, WRITE_SAME, ZEROES = range(6)
NOUNMAP = 1 << 15
BLOCK = 4096


class Kernel:
    """The fake kernel of this process."""

    def __init__(self) -> None:
        self.library = library = ctypes.CDLL(os.environ["SHIM_UBLK"])
        library.fake_violation.restype = ctypes.c_char_p
        library.fake_allocations.restype = ctypes.c_long
        library.fake_batch.argtypes = [*[ctypes.c_uint] * 2, ctypes.c_uint64, ctypes.c_uint, ctypes.c_void_p]
        library.fake_io.argtypes = [*[ctypes.c_uint] * 3, ctypes.c_uint64, ctypes.c_uint, ctypes.c_void_p]

    def disk(self, queues: Queues, size: int, *, recovers: bool = False) -> "FakeDisk":
        """Make a disk of `size` bytes, have it served, and start it."""
        number, depth, max_io = queues.geometry
        with Control(CONTROL) as control:
            info = control.add(queues=number, depth=depth, max_io_bytes=max_io, recovers=recovers)
            control.set_params(info.number, size, max_io_bytes=max_io)
            disk = FakeDisk(self, info)
            disk.serve(queues)
            control.start(info.number, os.getpid())
        return disk

    def no_memory(self, every: int) -> None:
        """Have no memory for one answer in so many; 0: always have some."""
        self.library.fake_enomem(every)

    @property
    def violation(self) -> str:
        """What a real kernel would have taken amiss first."""
        words: bytes = self.library.fake_violation()
        return words.decode()


class FakeDisk:
    """One that was started. Its clients wait as those of a real one do."""

    def __init__(self, kernel: Kernel, info: Info) -> None:
        self.library = kernel.library
        self.info = info
        self.number = info.number

    def serve(self, queues: Queues) -> None:
        """Have it served; the descriptor is closed at once, as by who passes it on."""
        fd = self.library.fake_open(self.number)
        try:
            queues.serve(fd)
        finally:
            os.close(fd)

    def request(
        self, what: int, offset: int, size: int, data: bytes = b"", queue: int = 0
    ) -> tuple[int, bytes]:
        """What a request of bytes gives: (bytes or -errno, what was read)."""
        buffer = ctypes.create_string_buffer(data, max(len(data), size if what == READ else 1))
        result = self.library.fake_io(self.number, queue, what, offset >> 9, size >> 9, buffer)
        return result, buffer.raw if what == READ else b""

    def read(self, offset: int, size: int = BLOCK, queue: int = 0) -> bytes:
        """Read bytes; it must succeed."""
        result, data = self.request(READ, offset, size, queue=queue)
        assert result == size, result
        return data

    def write(self, data: bytes, offset: int, queue: int = 0) -> None:
        """Write bytes; it must succeed."""
        result, _ = self.request(WRITE, offset, len(data), data, queue)
        assert result == len(data), result

    def read_together(self, offset: int, count: int, queue: int = 0) -> bytes:
        """Read blocks, each by a client of its own, who all come at the same time; each must succeed."""
        buffer = ctypes.create_string_buffer(count * BLOCK)
        assert self.library.fake_batch(self.number, queue, offset >> 9, count, buffer) == 0
        return buffer.raw

    @property
    def fetched(self) -> int:
        """How many tags the kernel has, or has given out."""
        found: int = self.library.fake_fetched(self.number)
        return found

    def stop(self) -> None:
        """Stop it: the kernel gives all tags back."""
        with Control(CONTROL) as control:
            control.stop(self.number)

    def delete(self) -> None:
        """Delete it, stopping it first."""
        with Control(CONTROL) as control:
            control.delete(self.number, wait=False)
