"""What tests write."""

import random
from functools import lru_cache


@lru_cache(maxsize=1 << 14)  # 64 MiB: who compares a whole device does it again and again
def block_content(block: int, version: int) -> bytes:
    """What only this version of this block holds, of every kind; version 0: a hole."""
    if version == 0:
        return bytes(4096)
    rnd = random.Random(block << 32 | version)
    kind = rnd.randrange(8)
    if kind == 0:
        return (block << 32 | version).to_bytes(8, "little") * 512
    head = b"%08d %08d " % (block, version)
    size = 4000 if kind <= 2 else rnd.randrange(50, 3600)
    data = rnd.randbytes(size)
    if kind % 2 == 0:
        data = data.hex().encode()[:size]  # which lz4 cannot compress, and zstd can
    return (head + data + bytes(4096))[: 4096 - 18] + head


def digits(dice: random.Random, size: int = 4096) -> bytes:
    """What lz4 leaves as it is, and zstd halves."""
    return dice.randbytes(size // 2).hex().encode()


def of_each_kind(dice: random.Random) -> tuple[bytes, ...]:
    """Blocks: two that only zstd gets smaller, whole and in part; one that lz4 does; of one word; raw."""
    return (
        digits(dice),
        digits(dice)[: dice.randrange(600, 4000)].ljust(4096, b"\0"),
        dice.randbytes(1000).ljust(4096, b"\0"),
        dice.randbytes(8) * 512,
        dice.randbytes(4096),
    )


def compressible(seed: int, size: int = 700) -> bytes:
    """A block that is stored as a little more than `size` bytes."""
    return random.Random(seed).randbytes(size) + bytes(4096 - size)


def noise(seed: int) -> bytes:
    """A block that is stored raw."""
    return random.Random(seed).randbytes(4096)
