"""The section `writeback` of stats.json: what is out, on the backing device, and how it goes there.

There is none without a backing device. Some are numbers of the device too, and stand in zramd.stats.numbers
with their metrics. Server and command line use the table.
"""

from zramd.stats.numbers import Number, Values

EXTENT = 64 << 10  # bytes that are allowed at a time
SUPERBLOCK = EXTENT  # bytes at the beginning of a backing device that never hold records

WRITEBACK = (
    Number("backing", "", "The setting: the backing device, or file."),
    Number("backing_size", "bytes", "Size of the backing device, in whole extents.", "backing_size_bytes"),
    Number("backing_free", "bytes", "Extents of the backing device that are free.", "backing_free_bytes"),
    Number("backing_bad", "bytes", "Extents given up after a write error.", "backing_bad_bytes"),
    Number("out_pages", "blocks", "Blocks on the backing device, and not in memory."),
    Number("out_data_size", "bytes", "Payloads of the blocks that are out."),
    Number(
        "out_live_bytes",
        "bytes",
        "Room that blocks which are out take in their extents.",
        "backing_live_bytes",
    ),
    Number("bd_reads", "bytes", "Bytes read from the backing device."),
    Number("bd_writes", "bytes", "Bytes written to the backing device."),
    Number("written_out", "blocks", "Blocks that went out, those that came back included."),
    Number("brought_back", "blocks", "Blocks that came back into memory, as they were read again."),
    Number("written_out_minute", "blocks", "Blocks that went out in the last minute."),
    Number("brought_back_minute", "blocks", "Blocks that came back in the last minute."),
    Number("reclaimed_bytes", "bytes", "Of bd_writes, what was moved to empty other extents."),
    Number("bd_read_errors", "reads", "Reads that the backing device refused, or answered with other data."),
    Number("bd_write_errors", "writes", "Writes that the backing device refused."),
    Number(
        "writeback_age",
        "seconds",
        "The setting: when a block that nobody asks for goes out.",
        "writeback_age_seconds",
    ),
    Number(
        "writeback_limit",
        "bytes",
        "The setting: most that is written a day, 0 for no limit.",
        "writeback_limit_bytes",
    ),
    Number(
        "limit_left",
        "bytes",
        "What may be written now; none without a limit.",
        "writeback_limit_left_bytes",
    ),
    Number(
        "mode", "", "How eager it is: calm, wanted (memory is short), full, paused or off (brought back)."
    ),
    Number("reason", "", "Why it does not do more right now."),
)


def used(section: Values) -> int:
    """Return the bytes of the extents that hold records."""
    held: int = section["backing_size"] - SUPERBLOCK - section["backing_free"] - section["backing_bad"]
    return max(held, 0)


def allowed(section: Values) -> int | None:
    """Return the bytes that may be written now, 0 where that is less than an extent; None: any number."""
    left: int | None = section["limit_left"]
    return left if left is None or left >= EXTENT else 0
