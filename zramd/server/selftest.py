"""A small device shows that the core works here, before a large one is served."""

from zramd.core.device.device import Device
from zramd.errors import CorruptionError


def self_test() -> None:
    """Store, read, overwrite, drop and compact a few blocks on a tiny device.

    Raises CorruptionError when what comes back is not what was stored.
    """
    size = 16 * 4096
    device = Device(size)
    raw = bytes((i * i * 31 + i // 7) & 0xFF for i in range(4096))
    expected = bytearray(size)
    patterns = (b"\xa5" * 4096, b"zramd selftest, " * 256, raw, b"0123456789abcdef" * 256 * 4)
    for block, pattern in enumerate(patterns):
        start = block * 4096 + 100 * block  # most of them straddle blocks
        device.write(pattern, start)
        expected[start : start + len(pattern)] = pattern
    device.trim(4096, 4096)
    expected[4096:8192] = bytes(4096)
    device.compact()
    found = bytearray(size)
    device.read(found, 0)
    if found != expected:
        raise CorruptionError("self-test failed: the device does not return what was written to it")
    device.check()
