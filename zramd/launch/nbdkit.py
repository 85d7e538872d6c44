"""nbdkit's command line: which of its options the user gave after `--`, and what it is started with."""

import os
import re
from collections.abc import Collection

import zramd
from zramd.contract import rundir
from zramd.errors import UsageError
from zramd.launch import tlsfiles
from zramd.process import inherited
from zramd.settings import config, network
from zramd.settings.config import Config

# nbdkit's options that choose another transport than the socket in the run folder.
TRANSPORTS = {
    "-p",
    "--port",
    "-i",
    "--ip-addr",
    "--ipaddr",
    "-s",
    "--single",
    "--stdin",
    "-U",
    "--unix",
    "--vsock",
}
PRINTS = {"--help", "--version", "-V", "--dump-plugin", "--dump-config", "--short-options", "--long-options"}
STANDARD_INPUT = {"-s", "--single", "--stdin"}
# What a server takes less with. One arena for all threads: with an arena each, memory goes on growing for
# thousands of connections. And no columns of Python's code: a traceback has the lines.
LEAN = {"MALLOC_ARENA_MAX": "1", "PYTHONNODEBUGRANGES": "1"}
# For each client, with several threads. nbdkit's own 16 queue for the interpreter: docs/benchmarks.md.
THREADS = 4
# nbdkit's options whose value is the next word, if it is not attached with '='.
_SHORT_WITH_VALUE = "DegiPptuU"
_SHORT_WITHOUT = "46fnorsvV"
_LONG_WITH_VALUE = {
    "--debug",
    "--export",
    "--export-name",
    "--exportname",
    "--filter",
    "--group",
    "--ip-addr",
    "--ipaddr",
    "--log",
    "--mask-handshake",
    "--pid-file",
    "--pidfile",
    "--port",
    "--run",
    "--selinux-label",
    "--threads",
    "--timeout",
    "--tls",
    "--tls-certificates",
    "--tls-psk",
    "--unix",
    "--user",
}
_LONG_WITHOUT = {
    "--dump-config",
    "--dump-plugin",
    "--exit-with-parent",
    "--fg",
    "--foreground",
    "--help",
    "--ipv4-only",
    "--ipv6-only",
    "--long-options",
    "--newstyle",
    "--new-style",
    "--no-fork",
    "--no-mc",
    "--no-mode-conversion",
    "--no-sr",
    "--old-style",
    "--oldstyle",
    "--print-uri",
    "--read-only",
    "--readonly",
    "--short-options",
    "--single",
    "--stdin",
    "--swap",
    "--tls-verify-peer",
    "--verbose",
    "--version",
    "--vsock",
}
_FILTER_PARAMETER = r"(?s)[A-Za-z][A-Za-z0-9._-]*=.*"


class Options:
    """nbdkit's options as the user gave them after `--`, looked through once."""

    def __init__(self) -> None:
        self.before: list[str] = []  # options, to stand before the plugin's name
        self.after: list[str] = []  # filters' parameters, to stand after it
        self.values: dict[str, str] = {}  # option → its value, '' if it has none
        self.stray = ""  # a word that is no option's value and no parameter
        self.incomplete = ""  # an option without the value that it wants
        self.sockets: list[int] = []  # that a service manager has passed, to be served instead of one of ours

    @property
    def other_transport(self) -> bool:
        """Whether nbdkit's options say where to listen, instead of the run folder's socket or `listen`."""
        return not TRANSPORTS.isdisjoint(self.values) or bool(self.sockets)


def read_options(words: list[str], leave_out: Collection[str] = ()) -> Options:
    """Sort the words that are meant for nbdkit; `leave_out` are options that are not wanted."""
    options = Options()
    rest = iter(words)
    known = True  # whether the last option is: another one may have a value
    for word in rest:
        if not word.startswith("-"):
            if re.fullmatch(_FILTER_PARAMETER, word):
                options.after.append(word)
            else:
                options.before.append(word)
                options.stray = options.stray or (word if known else "")
            known = True
            continue
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            name, value = word[:2], word[2:]
            wants_value = name[1:] in _SHORT_WITH_VALUE and not value
        else:
            name = _full(name)
            wants_value = name in _LONG_WITH_VALUE and not equals
        known = name in _LONG_WITH_VALUE | _LONG_WITHOUT or name[1:] in [*_SHORT_WITH_VALUE, *_SHORT_WITHOUT]
        given = [word]
        if wants_value:
            following = next(rest, None)
            if following is None:
                options.incomplete = name
            else:
                value = following
                given.append(value)
        if name not in leave_out:
            options.before += given
            options.values[name] = value
    return options


def check(options: Options) -> None:
    """Raise UsageError for what nbdkit would take for something else than was meant.

    A word by itself, or one that an option lacks, would be its plugin; and of a port's number the C library
    takes the last 16 bits.
    """
    if options.stray:
        raise UsageError(f"'{options.stray}' is neither an option of nbdkit's nor a filter's key=value")
    if options.incomplete:
        raise UsageError(f"nbdkit's option {options.incomplete} wants a value")
    port = options.values.get("-p", options.values.get("--port", ""))
    if port.isascii() and port.isdigit() and "--vsock" not in options.values and not _is_port(port):
        raise UsageError(f"'{port}' is not a port: use 1 to 65535")


def _is_port(digits: str) -> bool:
    return len(digits.lstrip("0")) <= 5 and int(digits) < 1 << 16


def _full(name: str) -> str:
    """Return the long option that is meant: nbdkit takes the beginning of one as well."""
    known = _LONG_WITH_VALUE | _LONG_WITHOUT
    meant = [option for option in known if option.startswith(name)]
    return meant[0] if name not in known and len(meant) == 1 else name


def command(settings: Config, pairs: list[tuple[str, str]], options: Options) -> list[str]:
    """Return nbdkit's command line. Raises ConfigError for files of TLS that cannot be used."""
    plugin = ["python", plugin_path(), *(f"{key}={value}" for key, value in absolute(settings, pairs))]
    before = [*threads(settings, options), *options.before]
    return ["nbdkit", "-f", *transport(settings, options), *before, *plugin, *options.after]


def refuse_twice(settings: Config, options: Options) -> None:
    """Raise UsageError for what both `listen` and nbdkit's options say, or what those would undo."""
    if not settings.listen:
        return
    for option in options.values:
        if option in TRANSPORTS | tlsfiles.OPTIONS | {"-o", "--old-style", "--oldstyle"}:
            raise UsageError(
                f"nbdkit's option {option} and listen={settings.listen} both say how clients "
                "come: leave one out"
            )
        if option in ("-u", "--user") and network.tls(settings.tls).way == "psk":
            raise UsageError(
                f"nbdkit's option {option} would have it read the keys as another user: "
                "start zramd as that user"
            )
    if options.sockets:
        raise UsageError(
            f"listen={settings.listen}, but sockets were passed on which to listen "
            "(LISTEN_FDS): leave one out"
        )


def transport(settings: Config, options: Options) -> list[str]:
    """Return nbdkit's options for where it listens, and for TLS. Raises ConfigError."""
    if not settings.listen:
        return [] if options.other_transport else ["-U", f"{settings.rundir}/{rundir.NBD_SOCKET}"]
    where = network.address(settings.listen)
    host = ["-i", where.host] if where.host else []
    place = [] if options.sockets else [*host, "-p", str(where.port)]
    return [*place, *tlsfiles.options(settings)]


def threads(settings: Config, options: Options) -> list[str]:
    """Return the option that limits each client's threads; nothing where it is one, or the user's choice."""
    given = not {"-t", "--threads"}.isdisjoint(options.values)
    model = settings.thread_model
    # What auto means, the plugin decides, which knows nbdkit; one with a thread for each client ignores this.
    several = model == "parallel" or (model == "auto" and settings.backing)
    return [f"--threads={THREADS}"] if several and not given else []


def absolute(settings: Config, pairs: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the settings with paths that hold wherever the server stands."""
    found = [(key, config.find(key), value) for key, value in pairs]
    return [
        (key, getattr(settings, setting.name) if setting.is_path else value) for key, setting, value in found
    ]


def plugin_path() -> str:
    """Return where nbdkit_plugin.py is: beside the package, in a checkout as in site-packages."""
    return os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(zramd.__file__))), "nbdkit_plugin.py")


def set_environment(settings: Config) -> None:
    """Set this process's environment as the server needs it."""
    inherited.for_server()
    # nbdkit hands paths on as UTF-8, whatever the locale, and a service has none: Python could not open them.
    os.environ["LC_ALL"] = "C.UTF-8"
    for name, value in LEAN.items():
        os.environ.setdefault(name, value)
    if settings.swap == "local":
        # Python's own allocator asks the kernel for a megabyte whenever it is out of one.
        os.environ["PYTHONMALLOC"] = "malloc"
        os.environ["LD_BIND_NOW"] = "1"
