"""`zramd serve`: check the settings, say what to try next, and become nbdkit. `zramd start` and `stop`.

With `serve`, the process that the user started is nbdkit in the end, so Ctrl-C, systemd and `kill` reach it.
What is printed once the server answers comes from a small watcher process beside it.

With `start`, nbdkit's standard error is a pipe to us. The server turns to a file of its own once it serves:
the pipe's end tells that, and what came before it why a server did not get so far.
"""

import argparse
import os
import re
import select
import sys
import time
from collections.abc import Callable, Collection
from contextlib import suppress

from zramd import __version__, attached, client, kernelswap, rundir
from zramd.commands import add_device
from zramd.errors import DeviceError, UsageError, ZramdError

TYPE_CHECKING = False  # what typing says too, without the time that it takes to import
if TYPE_CHECKING:
    from zramd.commands import Commands
    from zramd.config import Config

DEFAULT_SIZE = "1G"
READY_TIMEOUT = 30.0  # seconds after which the watcher gives up: nbdkit says itself what is wrong
STOP_TIMEOUT = 10.0  # seconds; a server needs one, a busy machine a few
LOOK_TIMEOUT = 2.0  # seconds; one that does not answer is stopped all the same
_BEFORE_REASON = r"nbdkit: (error: )?(.*nbdkit_plugin\.py: \w+: error: )?"

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
_STANDARD_INPUT = {"-s", "--single", "--stdin"}
# nbdkit's options whose value is the next word, if it is not attached with '='.
_SHORT_WITH_VALUE = "DegiPptuU"
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
    "--tls-certificates",
    "--tls-psk",
    "--unix",
    "--user",
}
_FILTER_PARAMETER = r"(?s)[A-Za-z][A-Za-z0-9._-]*=.*"


class Options:
    """nbdkit's options as the user gave them after `--`, looked through once."""

    def __init__(self) -> None:
        self.before: list[str] = []  # options, to stand before the plugin's name
        self.after: list[str] = []  # filters' parameters, to stand after it
        self.values: dict[str, str] = {}  # option → its value, '' if it has none

    @property
    def other_transport(self) -> bool:
        """Whether something else than the socket in the run folder is served."""
        return not TRANSPORTS.isdisjoint(self.values) or "LISTEN_FDS" in os.environ


def read_options(words: list[str], leave_out: Collection[str] = ()) -> Options:
    """Sort the words that are meant for nbdkit; `leave_out` are options that are not wanted."""
    options = Options()
    rest = iter(words)
    for word in rest:
        if not word.startswith("-"):
            (options.after if re.fullmatch(_FILTER_PARAMETER, word) else options.before).append(word)
            continue
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            name, value = word[:2], word[2:]
            wants_value = name[1:] in _SHORT_WITH_VALUE and not value
        else:
            wants_value = name in _LONG_WITH_VALUE and not equals
        given = [word]
        if wants_value and (value := next(rest, "")):
            given.append(value)
        if name not in leave_out:
            options.before += given
            options.values[name] = value
    return options


def command(settings: "Config", pairs: list[tuple[str, str]], options: Options) -> list[str]:
    """Return nbdkit's command line."""
    socket_option = [] if options.other_transport else ["-U", f"{settings.rundir}/{rundir.NBD_SOCKET}"]
    plugin = ["python", plugin_path(), *(f"{key}={value}" for key, value in pairs)]
    return ["nbdkit", "-f", *socket_option, *options.before, *plugin, *options.after]


def plugin_path() -> str:
    """Return where nbdkit_plugin.py is: beside the package, in a checkout as in site-packages."""
    return os.path.join(os.path.dirname(os.path.dirname(rundir.__file__)), "nbdkit_plugin.py")


def uri(settings: "Config", options: Options) -> str:
    """Return the NBD URI that clients use, '' if nbdkit's options leave it open."""
    from urllib.parse import quote

    given = options.values
    scheme = "nbds" if given.get("--tls") == "require" else "nbd"
    path = given.get("-U", given.get("--unix", ""))
    if not options.other_transport:
        path = f"{settings.rundir}/{rundir.NBD_SOCKET}"
    if path and path != "-":
        return f"{scheme}+unix:///{settings.name}?socket={quote(os.path.abspath(path))}"
    port = given.get("-p", given.get("--port", "10809"))
    if "--vsock" in given:
        return f"{scheme}+vsock://1:{port}/{settings.name}"
    if {"-p", "--port", "-i", "--ipaddr", "--ip-addr"}.isdisjoint(given):
        return ""
    host = given.get("-i", given.get("--ipaddr", given.get("--ip-addr", "localhost")))
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/{settings.name}"


def _command() -> str:
    """Return how to call zramd from where the user stands: in a checkout it is in .venv, off his PATH."""
    import shlex
    import shutil

    beside = os.path.join(os.path.dirname(sys.executable), "zramd")
    return "zramd" if shutil.which("zramd") or not os.path.exists(beside) else shlex.quote(beside)


def greeting(settings: "Config", options: Options, pid: int) -> str:
    """Return what the user is told once the server answers: where it is, and three commands to try next."""
    import shlex

    where = uri(settings, options)
    folder = shlex.quote(settings.rundir)
    sudo = "" if os.geteuid() == 0 else "sudo "
    if not options.other_transport:
        # Attaching is root's business, and root looks for a device by its name elsewhere than other users.
        usual = settings.rundir == f"/run/zramd/{settings.name}"
        attach = f"{sudo}{_command()} attach {settings.name if usual else f'--rundir {folder}'}"
    elif where:
        attach = f"nbdinfo {shlex.quote(where)}"
    else:
        attach = "see nbdkit's options that you gave"
    return (
        f"zramd {__version__} serves {settings.name}, {settings.disksize} bytes\n"
        f"  NBD URI       {where or 'as nbdkit was told'}\n"
        f"  stats folder  {settings.rundir}\n"
        "try next:\n"
        f"  attach        {attach}\n"
        f"  read stats    cat {folder}/mm_stat {folder}/frag_ratio\n"
        f"  stop          Ctrl-C, or: kill {pid}\n"
    )


def is_ready(settings: "Config") -> bool:
    """Say whether the server answers."""
    if not settings.endpoint:
        return os.path.exists(f"{settings.rundir}/{rundir.NBD_SOCKET}")
    try:
        status, answer = client.ask(settings.rundir, "GET", "/health", timeout=1)
    except OSError:
        return False
    return status == 200 and "status" in answer


def watch(pid: int, ready: Callable[[], bool], text: str) -> None:
    """Print `text` once `ready` says so; give up silently when process `pid` has ended."""
    end = time.monotonic() + READY_TIMEOUT
    ended = select.poll()
    try:
        # Tells of the end at once, even while the parent has not asked for its status: a caller that waits
        # for the end of our output would wait for us, and we for it.
        ended.register(os.pidfd_open(pid), select.POLLIN)
    except ProcessLookupError:
        return
    while time.monotonic() < end:
        if ready():
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        if ended.poll(20):
            return


def _start_watcher(settings: "Config", text: str) -> None:
    """Run `watch` in a process that is nobody's child, so that nbdkit has none that it does not know."""
    pid = os.getpid()
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        if os.fork() == 0:
            watch(pid, lambda: is_ready(settings), text)
    finally:
        os._exit(0)


def plan(
    name: str | None, size: str | None, words: list[str], nbdkit_words: list[str]
) -> "tuple[Config, Options, list[str]]":
    """Return what to serve, nbdkit's own options, and its command line; `words` are key=value settings.

    Raises ConfigError, RundirError, and ZramdError when nbdkit is missing.
    """
    import shutil

    from zramd import config

    given = (("disksize", size), ("name", name))
    pairs = [(key, value) for key, value in given if value is not None]
    for word in words:
        key, _, value = word.partition("=")
        pairs.append((key, value))
    if not any(config.find(key).name == "disksize" for key, _ in pairs):
        pairs.append(("disksize", DEFAULT_SIZE))
    settings = config.parse(pairs)
    if not any(config.find(key).name == "rundir" for key, _ in pairs):
        pairs.append(("rundir", settings.rundir))
    pid = rundir.holder(settings.rundir)
    if pid is not None:
        raise rundir.in_use(settings.rundir, pid)
    if shutil.which("nbdkit") is None:
        raise ZramdError("nbdkit is not installed: run 'apt-get install nbdkit nbdkit-plugin-python' as root")
    options = read_options(nbdkit_words)
    return settings, options, command(settings, pairs, options)


def set_environment(settings: "Config") -> None:
    """Set this process's environment as the server needs it."""
    # One arena for all threads: with an arena each, memory goes on growing for thousands of connections.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    if settings.swap == "local":
        # Python's own allocator asks the kernel for a megabyte whenever it is out of one.
        os.environ["PYTHONMALLOC"] = "malloc"
        os.environ["LD_BIND_NOW"] = "1"
    os.environ.pop("PYTHONHOME", None)  # nbdkit's Python is not the one that this was meant for


def serve(arguments: argparse.Namespace) -> int:
    """Become nbdkit, serving as told. Returns only by an exception: see `plan`."""
    from zramd import fdstore, handover

    size, words = arguments.size, arguments.settings
    if arguments.config is not None:
        from zramd import devices

        try:
            device = devices.find(arguments.config)
        except devices.SkippedError as skipped:
            return _not_here(skipped)
        words = device.words([*words, *([] if size is None else [f"disksize={size}"])])
        size = None
    kept = fdstore.take_out()  # before anybody takes it for a socket
    settings, options, argv = plan(arguments.name, size, words, arguments.nbdkit_options)
    if settings.state == handover.SYSTEMD:
        fdstore.prepare(kept)
    # With -s, standard output is the client's; and a service manager has its own way to learn that we serve.
    if _STANDARD_INPUT.isdisjoint(options.values) and "NOTIFY_SOCKET" not in os.environ:
        _start_watcher(settings, greeting(settings, options, os.getpid()))
    set_environment(settings)
    os.execvp(argv[0], argv)


def _not_here(skipped: Exception) -> int:
    """Say that the device is not meant for this machine. To a service manager that is no failure."""
    from zramd import notify

    if "NOTIFY_SOCKET" not in os.environ:
        raise skipped
    notify.Manager().insist(f"STATUS={skipped}", "READY=1")
    print(f"zramd: {skipped}", file=sys.stderr)
    return 0


def start(arguments: argparse.Namespace) -> int:
    """Start a server in the background, wait until it answers, and say where it is.

    Raises as `plan`, and DeviceError with the server's reason when it does not get so far.
    """
    import signal

    name, words = arguments.new_name, arguments.settings
    if name is not None and arguments.size is None:
        from zramd import devices

        configuration = devices.load()
        if configuration.has(name):
            words, name = configuration.find(name).words(words), None
    settings, options, argv = plan(name, arguments.size, words, arguments.nbdkit_options)
    if settings.state == "systemd":
        raise UsageError(
            "state=systemd is for 'zramd serve' as a service: use a file such as /dev/shm/NAME.state"
        )
    if not _STANDARD_INPUT.isdisjoint(options.values):
        raise UsageError("a server in the background has no standard input to serve: use 'zramd serve'")
    set_environment(settings)
    os.environ[rundir.BACKGROUND] = "1"
    end = time.monotonic() + READY_TIMEOUT
    pid, errors = spawn(argv)
    try:
        said = read_until(errors, end)
        while not is_ready(settings):
            if rundir.holder(settings.rundir) is None:
                raise DeviceError(f"{settings.name} does not start: {reason(said)}")
            if time.monotonic() >= end:
                raise DeviceError(f"{settings.name} does not answer within {READY_TIMEOUT:g} seconds")
            time.sleep(0.01)
    except BaseException:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        raise
    lines = [("name", settings.name), ("pid", str(pid)), ("stats folder", settings.rundir)]
    if not options.other_transport:
        lines.append(("socket", f"{settings.rundir}/{rundir.NBD_SOCKET}"))
    lines.append(("NBD URI", uri(settings, options) or "as nbdkit was told"))
    print("".join(f"{what:<13} {value}\n" for what, value in lines), end="")
    return 0


def spawn(argv: list[str], prepare: Callable[[], None] = lambda: None) -> tuple[int, int]:
    """Run a program as nobody's child, in a session of its own; return its number and its standard error.

    Nobody's child because nbdkit may ask the kernel to be ended together with its parent. `prepare` is called
    in the new process before it becomes the program.
    """
    errors, to_errors = os.pipe()
    numbers, to_numbers = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            between = os.getpid()
            pid = os.fork()
            if pid:
                os.write(to_numbers, b"%d" % pid)
            else:
                while os.getppid() == between:
                    time.sleep(0.001)
                null = os.open(os.devnull, os.O_RDWR)
                for source, target in ((null, 0), (null, 1), (to_errors, 2)):
                    os.dup2(source, target)
                prepare()
                os.execvp(argv[0], argv)
        except OSError as error:
            os.write(to_errors, f"{argv[0]}: {error}\n".encode())
        finally:
            os._exit(1)
    os.close(to_errors)
    os.close(to_numbers)
    os.waitpid(child, 0)
    with open(numbers, "rb") as file:
        number = file.read()
    if not number:  # and never 0: a signal to that ends our whole process group
        with open(errors, errors="replace") as said:
            raise DeviceError(f"no process can be started for it: {said.read().strip()}")
    return int(number), errors


def read_until(reader: int, end: float) -> str:
    """Return what comes from a pipe until its end, or until `end` on the clock of time.monotonic()."""
    said = b""
    poll = select.poll()
    poll.register(reader, select.POLLIN)
    while poll.poll(max(end - time.monotonic(), 0) * 1000):
        data = os.read(reader, 4096)
        if not data:
            break
        said += data
    return said.decode(errors="replace")


def reason(said: str) -> str:
    """Return the sentence in what nbdkit has said before it ended."""
    lines = [line for line in said.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("nbdkit: ")] or lines
    return re.sub(_BEFORE_REASON, "", errors[-1], count=1) if errors else "it gave no reason"


def stop(arguments: argparse.Namespace) -> int:
    """Stop a server and wait for its end.

    Raises DeviceError when the kernel uses the device, and when the server does not end.
    """
    import signal

    served = client.find(arguments.name, arguments.rundir)
    pid = served.pid or 0
    refuse_in_use(served, "stop")
    process = os.pidfd_open(pid)
    if rundir.holder(served.path) == pid:  # it has not ended and left its number to another process
        signal.pidfd_send_signal(process, signal.SIGTERM)
    ended = select.poll()
    ended.register(process, select.POLLIN)
    if not ended.poll(STOP_TIMEOUT * 1000):
        raise DeviceError(
            f"{served.name} has not stopped within {STOP_TIMEOUT:g} seconds: "
            f"'kill -QUIT {pid}' ends it whatever it waits for"
        )
    return 0


def refuse_in_use(served: client.Served, what: str, more: str = "") -> None:
    """Raise DeviceError when this machine's kernel swaps to a device or has it mounted.

    `more` ends the sentence.
    """
    try:
        stats = served.ask_json("GET", "/stats", timeout=LOOK_TIMEOUT)
        name, size = stats["name"], stats["disksize"]
    except DeviceError:  # it does not answer: then only what `zramd attach` has made is known
        name, size = served.name, 0
    for device in attached.devices(name, size):
        for use in kernelswap.uses(device):
            command, what_for = ("swapoff", "swap") if use == kernelswap.SWAP else ("umount", f"'{use}'")
            raise DeviceError(
                f"cannot {what} {name}: {device} is in use as {what_for}: "
                f"run '{command} {device}' first{more}"
            )


def _settings_help() -> str:
    from zramd import config

    return (
        f"\nsettings [default]:\n{config.help_text()}\n"
        "Sizes take K, M, G, T, P or E. What follows -- goes to nbdkit: a TCP port, TLS, filters.\n"
        "Without it nothing listens on the network.\n\n"
        "examples:\n"
        "  zramd serve\n"
        "  zramd serve --name swap0 --size 8G mem_limit=2G\n"
        "  zramd serve --config zram0 mem_limit=2G\n"
        "  zramd serve -- -p 10809 --tls=require --tls-certificates=/etc/pki/zramd\n"
        "  zramd start swap0 --size 8G mem_limit=2G\n"
        "  zramd start zram0\n"
    )


def add(commands: "Commands") -> None:
    """Add the verbs."""
    parser = commands.add_parser(
        "start",
        help="start a server in the background",
        usage="zramd start [NAME] [--size SIZE] [key=value ...] [-- NBDKIT-OPTIONS]",
        description="Serve a compressed device in the background; wait until it answers, print where it is. "
        "What it has to say goes to the file 'log' in its run folder. Without --size, a NAME that "
        "/etc/zramd.conf has is started as configured there; key=value overrides.",
        more=_settings_help,
        settings=True,
        nbdkit_options=True,
    )
    parser.add_argument("new_name", metavar="NAME", nargs="?", help="name of the device [zram0]")
    parser.add_argument("--size", help=f"size of the device before compression [{DEFAULT_SIZE}]")
    parser.set_defaults(run=start)

    parser = commands.add_parser(
        "stop",
        help="stop a server: its data is lost",
        description="Stop a server and wait for its end. Its data is lost. "
        "Refuses while this machine's kernel swaps to the device or has it mounted.",
    )
    add_device(parser)
    parser.set_defaults(run=stop)

    parser = commands.add_parser(
        "serve",
        help="serve a device in the foreground, until stopped",
        usage="zramd serve [--config NAME | --name NAME] [--size SIZE] [key=value ...] [-- NBDKIT-OPTIONS]",
        description="Serve a compressed device in the foreground, on a unix socket in the run folder.",
        more=_settings_help,
        settings=True,
        nbdkit_options=True,
    )
    parser.add_argument(
        "--config", metavar="NAME", help="serve the device that /etc/zramd.conf has under this name"
    )
    parser.add_argument("--name", help="name of the device and of the NBD export [zram0]")
    parser.add_argument("--size", help=f"size of the device before compression [{DEFAULT_SIZE}]")
    parser.set_defaults(run=serve)
