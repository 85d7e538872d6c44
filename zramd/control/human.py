"""Numbers as people read them."""

_LETTERS = "BKMGTPE"


def human(size: int) -> str:
    """Return a size in bytes as util-linux does: at most one decimal, a letter for the power of 1024."""
    power = min(max(size.bit_length() - 1, 0) // 10, 6)
    whole, rest = divmod(size, 1 << 10 * power)
    tenths = (rest * 1000 // (1 << 10 * power) + 50) // 100
    if tenths == 10:
        whole, tenths = whole + 1, 0
    return f"{whole}.{tenths}{_LETTERS[power]}" if tenths else f"{whole}{_LETTERS[power]}"


def spelled(size: int) -> str:
    """Return bytes with the largest unit that leaves at least 1, spelled out, with at most one decimal."""
    power = max(0, (size.bit_length() - 1) // 10)
    return f"{size / 1024**power:.1f}".removesuffix(".0") + f" {('bytes', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"
