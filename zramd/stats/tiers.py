"""The section `tiers` of stats.json: what is hot and what is cold, and what the background makes of it.

Some are numbers of the device too, and stand in zramd.stats.numbers with their metrics. Server and command
line use the table. `ages` is beside it: rows of a bound and a number of blocks.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from zramd.stats.numbers import Number

TIERS = (
    Number("hot_pages", "blocks", "Blocks that the hot compressor has made smaller.", "hot_pages"),
    Number("hot_data_size", "bytes", "Payloads of the hot blocks.", "hot_data_bytes"),
    Number("cold_pages", "blocks", "Blocks recompressed because nobody asked for them."),
    Number("cold_data_size", "bytes", "Payloads of the cold blocks."),
    Number("raw_pages", "blocks", "Blocks stored raw."),
    Number("tried_pages", "blocks", "Hot and raw blocks that recompression could not shrink.", "tried_pages"),
    Number("same_pages", "blocks", "Blocks of one repeated word: no memory."),
    Number("recompressed", "blocks", "Blocks made cold, those hot again included."),
    Number("recompress_useless", "blocks", "Blocks that recompression could not shrink; each is tried once."),
    Number("promoted", "blocks", "Cold blocks made hot, as they were read again and again."),
    Number("recompressed_minute", "blocks", "Blocks made cold in the last minute."),
    Number("promoted_minute", "blocks", "Cold blocks made hot in the last minute."),
    Number("saved_bytes", "bytes", "Payload by which blocks became smaller when they became cold."),
    Number(
        "cpu_seconds", "seconds", "Processor time spent on recompression.", "recompression_cpu_seconds_total"
    ),
    Number("recompression", "", "The setting: the cold compressor, or off."),
    Number("cold_age", "seconds", "The setting: when a block counts as cold.", "cold_age_seconds"),
    Number("mode", "", "How eager it is: calm, wanted (memory is short), full, paused or off."),
    Number("reason", "", "Why it does not do more right now."),
)
AGES_MEANING = (
    "Stored blocks by the seconds since somebody asked for them, at most; 'more', and 'idle' for marked."
)
MODES = ("calm", "wanted", "full", "paused", "off")


class Age(NamedTuple):
    """A row of ages."""

    bound: str  # seconds as text, 'more', or 'idle'
    blocks: int


def ages(section: dict[str, Any]) -> Iterator[Age]:
    """Yield the rows of ages, the youngest first."""
    for bound, blocks in section["ages"]:
        yield Age("more" if bound is None else str(bound), blocks)
