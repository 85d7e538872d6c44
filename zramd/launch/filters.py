"""Which of nbdkit's filters keep what clients have written, so that it would end with the server."""

import os

from zramd.errors import DeviceError

# Those of nbdkit 1.32 to 1.46 that hand on all that is written before they answer it.
_HAND_ON = frozenset(
    (
        *(
            "blocksize",
            "blocksize-policy",
            "bzip2",
            "cacheextents",
            "checkwrite",
            "count",
            "ddrescue",
            "delay",
        ),
        *("error", "evil", "exitlast", "exitwhen", "exportname", "extentlist", "fua", "gzip", "indexed-gzip"),
        *("ip", "limit", "log", "luks", "lzip", "multi-conn", "nocache", "noextents", "nofilter"),
        *("noparallel", "nozero", "offset", "openonce", "partition", "pause", "protect", "qcow2dec", "rate"),
        *("readahead", "readonly", "retry", "retry-request", "rotational", "scan", "spinning", "stats"),
        *("swab", "tar", "time-limit", "tls-fallback", "truncate", "xz"),
    )
)
# cow has all that was written in a file of its own, cache by default too, ext2 parts of a file system.


def names(words: list[str]) -> list[str]:
    """Return the filters on a command line of nbdkit, however they are written."""
    found = []
    rest = iter(words)
    for word in rest:
        option, equals, value = word.partition("=")
        if len(option) > 3 and "--filter".startswith(option):  # getopt takes a part of it, too
            found.append(_plain(value if equals else next(rest, "")))
    return found


def _plain(name: str) -> str:
    """Return a filter's name: it may be given as a path."""
    base = os.path.basename(name)
    return base.removeprefix("nbdkit-").removesuffix(".so").removesuffix("-filter") if "/" in name else name


def refuse(device: str, words: list[str]) -> None:
    """Raise DeviceError for a filter that keeps answered writes to itself, or may do so."""
    for name in names(words):
        if name == "cache":
            modes = [word.partition("=")[2] for word in words if word.startswith("cache=")]
            if modes[-1:] == ["writethrough"]:
                continue
            raise DeviceError(
                f"{device} has nbdkit's filter 'cache', and what it has not written yet would be lost: "
                "only with cache=writethrough a restart keeps all"
            )
        if name not in _HAND_ON:
            raise DeviceError(
                f"{device} has nbdkit's filter '{name}', and what that keeps of what clients have written "
                "would be lost: stop it when nobody needs that any more"
            )
