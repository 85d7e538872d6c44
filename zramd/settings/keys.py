"""The keys of a section in zramd.conf that are not settings of the server, and which words mean what."""

from collections.abc import Callable

from zramd.errors import ConfigError
from zramd.settings import amounts, codecs, config, expression
from zramd.settings.config import Setting

MOST_AREAS = 24  # as `zramd attach --areas` has it
DEFAULT_SIZE = "min(ram / 2, 4096)"  # zram-generator's

# zram-generator's words for settings of zramd.
TWINS = {
    "zram-size": "disksize",
    "zram-resident-limit": "mem_limit",
    "compression-algorithm": "comp_algorithm",
}
# Words of zram-generator that zramd refuses, and what to do instead.
REFUSED = {
    "mount-point": "zramd mounts nothing: use attach = device, and mkfs and mount in a unit of your own",
    "zram-fraction": "it is obsolete: use zram-size = ram * FRACTION",
    "max-zram-size": "it is obsolete: use zram-size = min(…, MEGABYTES)",
    "memory-limit": "it is obsolete: use host-memory-limit",
    "name": "the section's name is the device's: remove it",
}


def _priority(text: str) -> int:
    priority = amounts.whole(text, -1, 32767)
    if priority is None:
        raise ConfigError(f"'{text}' is not a priority: use -1 (the kernel chooses) to 32767 (used first)")
    return priority


def _swapon_options(text: str) -> str:
    words = [word for word in (part.strip() for part in text.split(",")) if word]
    for word in words:
        if word.startswith("pri="):
            raise ConfigError(f"'{word}': use swap-priority = {word[4:]} instead")
        if word not in ("discard", "discard=once", "discard=pages", "defaults", "nofail", "noauto"):
            raise ConfigError(
                f"'{word}' is not an option of swapon: use discard, discard=once or discard=pages"
            )
    return ",".join(words)


def _attach(text: str) -> str:
    if text not in ("swap", "device", "no"):
        raise ConfigError(f"'{text}' is not a way to attach: use swap, device or no")
    return text


def _whole(low: int, high: int, unit: str) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = amounts.whole(text, low, high)
        if number is None:
            raise ConfigError(f"'{text}' is out of range: use {low} to {high} {unit}")
        return number

    return parse


def _fs_type(text: str) -> str:
    if text != "swap":
        raise ConfigError(
            f"'{text}' is not made by zramd: use attach = device, and mkfs in a unit of your own"
        )
    return text


def table(ram: int) -> tuple[Setting, ...]:
    """Return the keys that are not settings of the server; `ram`, for expressions, in megabytes."""
    seconds = _whole(0, 1_000_000, "seconds")

    def size(text: str) -> int:
        return expression.size(text, ram)

    def limit(text: str) -> int | None:
        return None if text == "none" else size(text)

    def timeout(text: str) -> int | None:
        return None if text == "auto" else seconds(text)

    def areas(text: str) -> int | None:
        return None if text == "auto" else _whole(1, MOST_AREAS, "areas")(text)

    return (
        Setting(
            "zram-size", size, DEFAULT_SIZE, "ram / 4", "size of the device, an expression; 0: no device"
        ),
        Setting(
            "zram-resident-limit", size, "0", "ram / 8", "most memory of the pool, an expression; 0: any"
        ),
        Setting("host-memory-limit", limit, "none", "8192", "no device where there is more memory than this"),
        Setting(
            "compression-algorithm",
            codecs.pair,
            "lz4",
            "lz4 zstd(level=4)",
            "comp_algorithm, and perhaps recompression after it, as zram-generator writes them",
        ),
        Setting(
            "attach", _attach, "swap", "no", "what this machine's kernel does with it: swap, device or no"
        ),
        Setting("fs-type", _fs_type, "swap", "swap", "for zram-generator's sake: swap is all there is"),
        Setting("swap-priority", _priority, "100", "32767", "-1 to 32767, higher is used first"),
        Setting(
            "swap-areas", areas, "auto", "8", "areas that swap is divided into, 1 to 24; auto: by the size"
        ),
        Setting("options", _swapon_options, "discard", "discard", "options of swapon, comma-separated"),
        Setting(
            "timeout", timeout, "auto", "2", "seconds after which a lost connection's request is sent again"
        ),
        Setting(
            "dead-conn-timeout", seconds, "120", "600", "seconds for which requests wait for another server"
        ),
        Setting(
            "connections", _whole(1, 16, "connections"), "1", "2", "connections of the kernel to the server"
        ),
    )


def canonical(key: str) -> str:
    """Return the name of what `key`, perhaps an alias, means; raises ConfigError with the nearest key."""
    from difflib import get_close_matches

    settings = {name: s.name for s in config.SETTINGS for name in (s.name, *s.aliases) if s.name != "name"}
    known = {setting.name for setting in table(1)}
    if key in known:
        return key
    if key in settings:
        return settings[key]
    close = get_close_matches(key, [*known, *settings], n=1)
    hint = f"did you mean '{close[0]}'?" if close else "docs/zramd.conf has all keys"
    raise ConfigError(f"unknown key '{key}': {hint}")


def no_commands(key: str) -> str:
    """Return why zram-generator's set!VARIABLE is not honoured."""
    variable = key.removeprefix("set!")
    return f"zramd runs no commands: write the value where '{variable}' is used"
