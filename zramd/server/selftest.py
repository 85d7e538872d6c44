"""A small device shows that the core works here, before a large one is served."""

from zramd.core.device.device import Device
from zramd.errors import CorruptionError
from zramd.settings import codecs
from zramd.settings.config import Config


def self_test(config: Config) -> None:
    """Store, read, overwrite, drop, recompress and compact a few blocks on a tiny device, by its codecs.

    Raises CorruptionError when what comes back is not what was stored, MemoryError.
    """
    size = 16 * 4096
    cold_level = codecs.cold_level(config.recompression)
    device = Device(size, codec=config.codec.name, level=config.codec.level, cold_level=cold_level)
    raw = bytes((i * i * 31 + i // 7) & 0xFF for i in range(4096))
    expected = bytearray(size)
    patterns = (b"\xa5" * 4096, b"zramd selftest, " * 256, raw, b"0123456789abcdef" * 256 * 4)
    for block, pattern in enumerate(patterns):
        start = block * 4096 + 100 * block  # most of them straddle blocks
        device.write(pattern, start)
        expected[start : start + len(pattern)] = pattern
    device.trim(4096, 4096)
    expected[4096:8192] = bytes(4096)
    if cold_level:
        device.cool(0, 16)
    device.compact()
    found = bytearray(size)
    device.read(found, 0)
    if found != expected:
        raise CorruptionError("self-test failed: the device does not return what was written to it")
    device.check()
