"""What becomes cold, when, and how much at a time."""

from typing import Any, NamedTuple

from zramd.settings.config import Config

KINDS = frozenset({"huge", "idle"})  # what a pass by hand can be narrowed down to


class Pass(NamedTuple):
    """A pass by hand, as zram's `recompress` means it."""

    kinds: frozenset[str] = frozenset()  # out of KINDS, a block is of all of them; empty: every block
    threshold: int = 0  # bytes: smaller payloads are left alone
    max_pages: int = 0  # most blocks that are tried, 0: all


class Tiers:
    """Makes blocks cold that nobody asks for, and hot again what is read again and again."""

    def __init__(self, device: Any, config: Config) -> None:
        self._device = device
        self._config = config

    def submit(self, wanted: Pass) -> None:
        """Queue a pass by hand, and do not wait for it.

        Raises DeviceError, one sentence, when recompression is off, or when too many passes are queued.
        """

    def mark_idle(self, seconds: float | None) -> None:
        """Mark blocks idle that nobody has asked for in so many seconds, None: all.

        A request takes the mark off.
        """

    def numbers(self) -> dict[str, Any]:
        """Return the section `tiers` of stats.json; nothing is waited for.

        ages: rows [upper bound in seconds, blocks]; the bound of the last two is None (more) and "idle" (marked).
        mode: calm, wanted, full, off or paused. reason: one sentence, why it does not do more right now.
        """
        return {
            **dict.fromkeys(("hot_pages", "hot_data_size", "cold_pages", "cold_data_size", "raw_pages"), 0),
            **dict.fromkeys(("tried_pages", "same_pages"), 0),
            "ages": [[10, 0], [30, 0], [60, 0], [300, 0], [600, 0], [1800, 0], [3600, 0], [21600, 0], [None, 0], ["idle", 0]],
            **dict.fromkeys(("recompressed", "recompress_useless", "promoted", "recompressed_minute"), 0),
            **dict.fromkeys(("promoted_minute", "saved_bytes"), 0),
            "cpu_seconds": 0.0,
            "recompression": "zstd(level=5)",
            "cold_age": 300,
            "mode": "calm",
            "reason": "nothing has been cold for long enough",
        }
