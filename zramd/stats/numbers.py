"""Every number that a server shows, in one table: what it is, and where it comes from.

A number that the core counts anew needs a line here, and is then in stats.json, in `zramd stats`, in
Prometheus' text if it names a metric, and in docs/reference.md. Server and command line use the table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

Value: TypeAlias = int | float | None
Values: TypeAlias = dict[str, Any]  # by the names of NUMBERS


class Number(NamedTuple):
    """One number of stats.json: its unit, what it means, and the Prometheus metric that shows it too.

    Whatever is neither `derived` nor of the process (MEASURED), its machine's swap (SWAP) or its front (UBLK)
    is a counter of the core's: see Device.counters().
    """

    name: str
    unit: str  # as a person reads it; '' for a count of things that the meaning names
    meaning: str
    metric: str = ""  # without the prefix zramd_; '': none, or one that is made of several numbers
    scale: float = 1  # the metric's value for each of the number's
    derived: Callable[[Values], Value] | None = None  # from the others


def _total(n: Values) -> int:
    total: int = n["mem_used_total"] + n["reserve_bytes"] + n["metadata_bytes"]
    return total


def _frag_ratio(n: Values) -> float:
    return 100 * n["compr_data_size"] / n["mem_used_total"] if n["mem_used_total"] else 100.0


def _occupancy(n: Values) -> float:
    return 100 * n["objs_used"] / n["objs_allocated"] if n["objs_allocated"] else 100.0


def _compression_ratio(n: Values) -> float | None:
    return n["orig_data_size"] / n["mem_used_total"] if n["mem_used_total"] else None


def _dead_blocks(n: Values) -> int | None:
    """Return what is stored and is not swap's any more. A page of one word is used, and takes nothing."""
    if n["swap_used"] is None:
        return None
    dead: int = max(0, n["pages_stored"] - n["same_pages"] - n["swap_used"])
    return dead


# Every number there is, in the order in which they are shown.
NUMBERS = (
    Number("disksize", "bytes", "Size of the device before compression.", "disksize_bytes"),
    Number("orig_data_size", "bytes", "Data stored, before compression.", "orig_data_bytes"),
    Number("compr_data_size", "bytes", "Payloads in the pool, after compression.", "compr_data_bytes"),
    Number("mem_used_total", "bytes", "Pages of the pool in use.", "mem_used_bytes"),
    Number("mem_used_max", "bytes", "Peak of the pool's pages in use.", "mem_used_max_bytes"),
    Number("mem_limit", "bytes", "Most that the pool may take, 0 for no limit.", "mem_limit_bytes"),
    Number(
        "budget",
        "bytes",
        "Most that the pools of all devices of the budget may take, 0 for no budget.",
        "budget_bytes",
    ),
    Number(
        "budget_used",
        "bytes",
        "Of the budget, what its devices have or what is kept for them.",
        "budget_used_bytes",
    ),
    Number("budget_granted", "bytes", "Of the budget, what this device may take.", "budget_granted_bytes"),
    Number(
        "metadata_bytes",
        "bytes",
        "Memory beside the pool: slots, handle cells and everything else.",
        "metadata_bytes",
    ),
    Number("reserve_bytes", "bytes", "Memory kept ready for pages to come.", "reserve_bytes"),
    Number(
        "total_bytes",
        "bytes",
        "All memory for data: pool, reserve and metadata.",
        derived=_total,
    ),
    Number(
        "resident_bytes",
        "bytes",
        "Resident memory of the server process.",
        "process_resident_bytes",
    ),
    Number(
        "frag_ratio",
        "percent",
        "Share of the pool's pages that payload fills, higher is better; 100 % when it is empty.",
        "frag_ratio",
        0.01,
        derived=_frag_ratio,
    ),
    Number(
        "occupancy",
        "percent",
        "Share of the places on resident pages that hold an object; 100 % when there are none.",
        "pool_occupancy_ratio",
        0.01,
        derived=_occupancy,
    ),
    Number(
        "compression_ratio",
        "",
        "Bytes stored for each byte of pool; none while it is empty.",
        "compression_ratio",
        derived=_compression_ratio,
    ),
    Number("pages_stored", "blocks", "Blocks that hold data."),
    Number(
        "same_pages", "blocks", "Blocks that hold one repeated word and take no pool memory.", "same_pages"
    ),
    Number("huge_pages", "blocks", "Blocks stored raw.", "huge_pages"),
    Number("huge_pages_since", "blocks", "Blocks stored raw since the start, including those freed since."),
    Number("cold_pages", "blocks", "Blocks recompressed because nobody asked for them.", "cold_pages"),
    Number("cold_data_size", "bytes", "Payloads of the cold blocks.", "cold_data_bytes"),
    Number(
        "recompressed", "blocks", "Blocks made cold, those hot again included.", "recompressed_pages_total"
    ),
    Number(
        "recompress_useless",
        "blocks",
        "Blocks that recompression could not shrink; each is tried once.",
        "recompressed_in_vain_pages_total",
    ),
    Number(
        "recompress_saved",
        "bytes",
        "Payload by which blocks became smaller when they became cold.",
        "recompression_saved_bytes_total",
    ),
    Number(
        "promoted",
        "blocks",
        "Cold blocks made hot, as they were read again and again.",
        "promoted_pages_total",
    ),
    Number("out_pages", "blocks", "Blocks on the backing device, and not in memory.", "out_pages"),
    Number("out_data_size", "bytes", "Payloads of the blocks that are out.", "out_data_bytes"),
    Number(
        "written_out",
        "blocks",
        "Blocks that went out, those that came back included.",
        "written_out_pages_total",
    ),
    Number(
        "brought_back",
        "blocks",
        "Blocks that came back into memory, as they were read again.",
        "brought_back_pages_total",
    ),
    Number("bd_reads", "bytes", "Bytes read from the backing device.", "backing_read_bytes_total"),
    Number("bd_writes", "bytes", "Bytes written to the backing device.", "backing_written_bytes_total"),
    Number(
        "reclaimed_bytes",
        "bytes",
        "Of bd_writes, what was moved to empty other extents.",
        "backing_reclaimed_bytes_total",
    ),
    Number(
        "bd_read_errors",
        "reads",
        "Reads that the backing device refused, or answered with other data.",
        "backing_read_errors_total",
    ),
    Number(
        "bd_write_errors",
        "writes",
        "Writes that the backing device refused.",
        "backing_write_errors_total",
    ),
    Number("objs_allocated", "objects", "Places for objects on the pool's resident pages."),
    Number("objs_used", "objects", "Objects in the pool."),
    Number("zspages", "zspages", "Runs of pages that hold the objects."),
    Number(
        "freeable_pages",
        "pages",
        "Pool memory that a whole compaction would free now, including pages kept for the next writes.",
        "freeable_bytes",
        4096,
    ),
    Number("num_compactions", "runs", "Compactions that freed something.", "compaction_runs_total"),
    Number(
        "limit_compactions",
        "runs",
        "Writes that compacted first because of mem_limit.",
        "compaction_limit_runs_total",
    ),
    Number("objects_migrated", "objects", "Objects moved by compaction.", "compaction_moved_objects_total"),
    Number("bytes_migrated", "bytes", "Bytes moved by compaction.", "compaction_moved_bytes_total"),
    Number("pages_compacted", "pages", "Pages freed by compaction.", "compaction_freed_pages_total"),
    Number("compact_ns", "ns", "Time spent compacting.", "compaction_seconds_total", 1e-9),
    Number("reads", "requests", "Read requests served."),
    Number("writes", "requests", "Write requests served."),
    Number("trims", "requests", "Trim requests served."),
    Number("zeroes", "requests", "Write-zeroes requests served."),
    Number("read_bytes", "bytes", "Bytes that clients have read."),
    Number("written_bytes", "bytes", "Bytes that clients have written."),
    Number("requests_inflight", "requests", "Requests being served now.", "requests_inflight"),
    Number("failed_reads", "requests", "Read requests that failed."),
    Number("failed_writes", "requests", "Write requests that failed, mostly for lack of room."),
    Number("invalid_io", "requests", "Requests beyond the device's end."),
    Number("notify_free", "blocks", "Blocks freed by trim and zero.", "freed_blocks_total"),
    Number("reserve_misses", "pages", "Pages that were not ready when needed.", "reserve_misses_total"),
    Number(
        "checksum_errors", "reads", "Reads that found a block changed in memory.", "checksum_errors_total"
    ),
    Number(
        "lost_blocks",
        "blocks",
        "Blocks whose place was changed in memory, so that nothing leads to them.",
        "lost_blocks",
    ),
    Number("recovered_blocks", "blocks", "Blocks taken over from the state.", "recovered_blocks"),
    Number(
        "leaked_objects", "objects", "Objects without a block, freed at the start.", "recovery_leaked_objects"
    ),
    Number("recovery_ms", "ms", "Time that taking over the state took.", "recovery_seconds", 1e-3),
    Number(
        "swap_used",
        "blocks",
        "Blocks that swap of this machine uses; none where it does not swap to the device.",
        "swap_used_blocks",
    ),
    Number(
        "dead_blocks",
        "blocks",
        "Blocks that take memory, or are out, and that swap of this machine has freed, at least: "
        "'zramd refresh'.",
        "dead_blocks",
        derived=_dead_blocks,
    ),
    Number(
        "refreshed_blocks",
        "blocks",
        "Blocks that refreshes of swap have given back since it was attached, at most.",
        "refreshed_blocks_total",
    ),
    Number("refresh_last_blocks", "blocks", "Of these, blocks that the last refresh gave back."),
    Number(
        "ublk_requests",
        "requests",
        "Requests of the kernel's that front=ublk has answered; none with another front.",
        "ublk_requests_total",
    ),
    Number("ublk_enters", "calls", "System calls that these took.", "ublk_system_calls_total"),
    Number(
        "ublk_resent",
        "answers",
        "Of these, answers that the kernel had no memory to take, and that were given again.",
        "ublk_resent_total",
    ),
    Number("ublk_away", "requests", "Of these, requests that waited for the backing.", "ublk_away_total"),
    Number(
        "ublk_lost",
        "places",
        "Places for requests that the kernel has taken back for a reason that is not known.",
        "ublk_lost_total",
    ),
    Number("uptime", "seconds", "Time since the server started.", "uptime_seconds"),
)

MEASURED = ("uptime", "resident_bytes")  # of the process
SWAP = ("swap_used", "refreshed_blocks", "refresh_last_blocks")  # of this machine's kernel
UBLK = ("ublk_requests", "ublk_enters", "ublk_resent", "ublk_away", "ublk_lost")  # of the front of that name
_DERIVED = {number.name: number.derived for number in NUMBERS if number.derived}
COUNTED = tuple(each.name for each in NUMBERS if each.name not in (*MEASURED, *SWAP, *UBLK, *_DERIVED))


def derive(values: Values) -> Values:
    """Return the numbers with those that follow from others."""
    return values | {name: derived(values) for name, derived in _DERIVED.items()}
