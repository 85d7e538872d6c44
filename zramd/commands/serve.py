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
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

from zramd import __version__
from zramd.commands import Commands, add_device, say
from zramd.contract import handover, rundir
from zramd.control import client, life
from zramd.errors import ConfigError, DeviceError, RundirError, UsageError, ZramdError, sentence
from zramd.kernel import attached, kernelswap
from zramd.launch import background, fdstore
from zramd.launch.nbdkit import PRINTS, STANDARD_INPUT, Options, check, command, read_options
from zramd.launch.uris import uri
from zramd.process import inherited, interrupts, notify, pidfd
from zramd.process.steps import step
from zramd.settings import config, devices
from zramd.settings.config import Config
from zramd.settings.devices import Device

DEFAULT_SIZE = "1G"
READY_TIMEOUT = 30.0  # seconds after which the watcher gives up: nbdkit says itself what is wrong
STOP_TIMEOUT = 10.0  # seconds; a server needs one, a busy machine a few
KILL_TIMEOUT = 2.0  # seconds that a server which did not get so far has to end in its normal way
LOOK_TIMEOUT = 2.0  # seconds; one that does not answer is stopped all the same
_TOOK_OVER = "zramd: took over "  # what a server says that does well: zramd.server.making
_BEFORE_REASON = r"nbdkit: (error: )?(.*nbdkit_plugin\.py: \w+: error: )?"

_SHELL_FIRST = rb"""#!/bin/sh\n'''exec' "?((?<=")[^"\n]+|\S+)"""


def sudo(words: str) -> str:
    """Return a command of zramd that root must run, as this user has to write it."""
    if os.geteuid() == 0:
        return f"{_command()} {words}"
    called = os.path.exists(sys.argv[0])  # else by another program
    return f"sudo {_command(kernelswap.PATH) if called else 'zramd'} {words}"


def _command(path: str | None = None) -> str:
    """Return how to call zramd: in a checkout it is in .venv, off the PATH (of root: `path`)."""
    found = shutil.which("zramd") if path is None else shutil.which("zramd", path=path)
    if found and _runs(found):
        return "zramd"
    beside = os.path.join(os.path.dirname(sys.executable), "zramd")
    for place in (beside, shutil.which("zramd")):
        if place and _runs(place):
            return shlex.quote(place)
    return f"{shlex.quote(sys.executable)} -P -m zramd"


def _runs(script: str) -> bool:
    """Say whether a script is there and so is its interpreter: a folder with both may have been moved."""
    try:
        with open(script, "rb") as file:
            head = file.read(4096)
    except OSError:
        return False
    # pip writes the first where the path is long or has spaces.
    match = re.match(_SHELL_FIRST, head) or re.match(rb"#! *(\S+)", head)
    return match is None or os.path.exists(match[1])


def greeting(settings: Config, options: Options, pid: int) -> str:
    """Return what the user is told once the server answers: where it is, and three commands to try next."""
    where = uri(settings, options)
    folder = shlex.quote(settings.rundir)
    if not options.other_transport and options.values.get("--tls") != "require":  # the kernel has no TLS
        # Attaching is root's business, and root looks for a device by its name elsewhere than other users.
        usual = settings.rundir == f"{client.ROOTS}/{settings.name}"
        attach = sudo(f"attach {settings.name if usual else f'--rundir {folder}'}")
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


def is_ready(settings: Config, pid: int) -> bool:
    """Say whether the server that is process `pid` answers: it, and not another one of the same name."""
    return not _why_not_ready(settings, pid)


def _why_not_ready(settings: Config, pid: int) -> str:
    """Return why one has to wait for the server that is process `pid`, '' if it answers."""
    try:
        if rundir.holder(settings.rundir) != pid:
            return "it has not taken its run folder"
        if not settings.endpoint:
            # nbdkit makes its socket first, and it may be elsewhere.
            made = (f"{settings.rundir}/{name}" for name in (rundir.NBD_SOCKET, rundir.DATA_ID))
            return "" if any(map(os.path.exists, made)) else "it has not made its socket"
        status, answer = client.ask(settings.rundir, "GET", "/health", timeout=1)
    except (OSError, RundirError) as error:
        return f"its control socket: {sentence(error)}" if isinstance(error, OSError) else str(error)
    ours = status == 200 and re.search(rf'"pid": {pid}\b', answer) is not None
    return "" if ours else "another one answers"


def watch(pid: int, ready: Callable[[], bool], text: str) -> bool:
    """Print `text` once `ready` says so, and return True; give up silently when process `pid` has ended."""
    end = time.monotonic() + READY_TIMEOUT
    # It tells of the end at once: a caller may wait for the end of our output before it reaps that process.
    process = pidfd.open_number(pid)
    while process is not None and time.monotonic() < end:
        if ready():
            sys.stdout.write(text)
            sys.stdout.flush()
            return True
        if pidfd.has_ended(process, 0.02):
            break
    return False


def _start_watcher(settings: Config, text: str) -> None:
    """Run `watch` in a process that is nobody's child, so that nbdkit has none that it does not know."""
    pid = os.getpid()
    made = not os.path.lexists(settings.rundir)  # then zramd makes the run folder
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    try:
        if os.fork() == 0 and not watch(pid, lambda: is_ready(settings, pid), text):
            _clear(settings, pid, made)
    finally:
        os._exit(0)


def _clear(settings: Config, pid: int, made: bool) -> None:
    """Remove what a server has left that did not get so far as to serve: nbdkit may end without a word to it.

    It does so when it cannot listen, say on a port that is in use. Else that would look like one that died.
    """
    with suppress(OSError, ZramdError):
        turn = life.take(settings.rundir, settings.name)
        rundir.clear(settings.rundir, pid)
        turn.made = made
        turn.done()


def plan(
    name: str | None, size: str | None, words: list[str], nbdkit_words: list[str]
) -> tuple[Config, Options, list[str]]:
    """Return what to serve, nbdkit's own options, and its command line; `words` are key=value settings.

    Raises ConfigError, RundirError, UsageError, and ZramdError when nbdkit is missing.
    """
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
    if not kernelswap.find_program("nbdkit"):
        raise ZramdError("nbdkit is not installed: run 'apt-get install nbdkit nbdkit-plugin-python' as root")
    options = read_options(nbdkit_words)
    check(options)
    options.sockets = inherited.passed_sockets()
    return settings, options, command(settings, pairs, options)


def set_environment(settings: Config) -> None:
    """Set this process's environment as the server needs it."""
    inherited.for_server()
    # nbdkit hands paths on as UTF-8, whatever the locale, and a service has none: Python could not open them.
    os.environ["LC_ALL"] = "C.UTF-8"
    # One arena for all threads: with an arena each, memory goes on growing for thousands of connections.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    if settings.swap == "local":
        # Python's own allocator asks the kernel for a megabyte whenever it is out of one.
        os.environ["PYTHONMALLOC"] = "malloc"
        os.environ["LD_BIND_NOW"] = "1"


def serve(arguments: argparse.Namespace) -> int:
    """Become nbdkit, serving as told. Returns only by an exception: see `plan`."""
    size, words = arguments.size, arguments.settings
    if arguments.config is not None:
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
    inherited.close_others((*options.sockets, int(os.environ.get(handover.KEPT_FD, 0))), argv)
    # With -s, standard output is the client's; and a service manager has its own way to learn that we serve.
    if STANDARD_INPUT.isdisjoint(options.values) and "NOTIFY_SOCKET" not in os.environ:
        _start_watcher(settings, greeting(settings, options, os.getpid()))
    set_environment(settings)
    with suppress(FileNotFoundError, NotADirectoryError):  # then nobody is in the middle of anything
        turn = life.take(settings.rundir, settings.name)
        background.refuse_another(settings)
        background.give(turn.words(), turn.fd)
    background.clear_socket(options.values.get("-U", options.values.get("--unix", "")))
    step("serve.exec")
    os.execvp(argv[0], argv)


def _not_here(skipped: Exception) -> int:
    """Say that the device is not meant for this machine. To a service manager that is no failure."""
    if "NOTIFY_SOCKET" not in os.environ:
        raise skipped
    notify.Manager().insist(f"STATUS={skipped}", "READY=1")
    say(str(skipped))
    return 0


def start(arguments: argparse.Namespace) -> int:
    """Start a server in the background, wait until it answers, and say where it is.

    Raises as `plan`, and DeviceError with the server's reason when it does not get so far.
    """
    interrupts.interruptible()

    inherited.leave_manager()
    name, words = arguments.new_name, arguments.settings
    name = None if name is None else client.name_of(name)
    given = {config.find(word.partition("=")[0]).name for word in words}
    configured = None
    if arguments.size is None and "name" not in given:
        configured = _configured(name or str(config.find("name").default), sized="disksize" in given)
    if configured:
        words, name = configured.words(words), None
    settings, options, argv = plan(name, arguments.size, words, arguments.nbdkit_options)
    if settings.state == "systemd":
        raise UsageError(
            "state=systemd is for 'zramd serve' as a service: use a file such as /dev/shm/NAME.state"
        )
    for option in PRINTS & options.values.keys():
        raise UsageError(f"{option} makes nbdkit print something and end: run 'nbdkit {option}'")
    if not STANDARD_INPUT.isdisjoint(options.values):
        raise UsageError("a server in the background has no standard input to serve: use 'zramd serve'")
    set_environment(settings)
    # What nbdkit's options name may be relative to where we are. Else no file system is to be kept busy.
    folder = "." if arguments.nbdkit_options else "/"
    with (
        interrupts.told(lambda: f"{settings.name} is not started"),
        life.turn(settings.rundir, settings.name, make=True) as turn,
    ):
        background.refuse_another(settings)
        background.clear_socket(options.values.get("-U", options.values.get("--unix", "")))
        step("start.turn")
        pid = _begin(settings, argv, turn, folder)
        interrupts.finish()  # it serves, and is said to
    step("start.serves")
    lines = [("name", settings.name), ("pid", str(pid)), ("stats folder", settings.rundir)]
    if not options.other_transport:
        lines.append(("socket", f"{settings.rundir}/{rundir.NBD_SOCKET}"))
    lines.append(("NBD URI", uri(settings, options) or "as nbdkit was told"))
    print("".join(f"{what:<13} {value}\n" for what, value in lines), end="")
    return 0


def _configured(name: str, *, sized: bool) -> Device | None:
    """Return what zramd.conf has of a device, None if it has nothing and none is needed: a size was given.

    Raises ConfigError: where other devices are configured, one of another name is a mistake.
    """
    configuration = devices.load()
    if configuration.has(name):
        return configuration.find(name)
    if configuration.is_empty() or sized:
        return None
    try:
        return configuration.find(name)
    except ConfigError as error:
        raise ConfigError(f"{error}; --size starts one that is not configured") from None


def _begin(settings: Config, argv: list[str], turn: life.Turn, folder: str) -> int:
    """Start a server in the background, and return its process number once it answers; if not, it is gone.

    It stands in `folder`. Raises DeviceError with its reason.
    """
    end = time.monotonic() + READY_TIMEOUT
    environment = {**turn.words(), rundir.BACKGROUND: "1"}
    with interrupts.blocked():
        pid, process, errors = spawn(argv, lambda: background.give(environment, turn.fd), folder)
    if process is None:
        with open(errors, errors="replace") as last:
            raise DeviceError(f"{settings.name} does not start: {reason(last.read())}")
    try:
        step("start.spawned")
        said = read_until(errors, end)
        while why := _why_not_ready(settings, pid):
            if pidfd.has_ended(process):
                other = rundir.holder(settings.rundir)
                if other is not None:
                    raise rundir.in_use(settings.rundir, other)
                raise DeviceError(f"{settings.name} does not start: {reason(said)}")
            if time.monotonic() >= end:
                why += f"; it says: {background.last_words(settings.rundir) or reason(said)}"
                raise DeviceError(f"{settings.name} does not answer within {READY_TIMEOUT:g} seconds: {why}")
            time.sleep(0.01)
        return pid
    except BaseException:
        interrupts.end(process, KILL_TIMEOUT)
        rundir.clear(settings.rundir, pid)
        raise
    finally:
        os.close(process)
        os.close(errors)


def spawn(
    argv: list[str], prepare: Callable[[], None] = lambda: None, folder: str = "."
) -> tuple[int, int | None, int]:
    """Run a program as nobody's child, in a session of its own.

    Return its number, its pidfd (None if it has ended already), and its standard error.

    Nobody's child because nbdkit may ask the kernel to be ended together with its parent. It stands in
    `folder` and has no descriptors of ours; then `prepare` is called in it, which may give it some.
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
                to_errors = 2  # `prepare` may put something else in its place
                os.chdir(folder)
                inherited.leave_manager()
                inherited.close_others(words=argv)
                prepare()
                interrupts.unblock()
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
    pid = int(number)
    try:
        return pid, pidfd.open_number(pid), errors
    except OSError:  # it cannot be watched: it has only just begun, and holds nothing
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.close(errors)
        raise


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
    lines = [line for line in said.splitlines() if line.strip() and _TOOK_OVER not in line]
    errors = [line for line in lines if line.startswith("nbdkit: ")] or lines
    if errors and errors[-1].endswith("error running this script"):
        # Python has said why before, at the end of a traceback.
        errors = lines[: lines.index(errors[-1])] or errors
    if errors and errors[-1].strip(" :") == "MemoryError":
        return "not enough memory"
    return re.sub(_BEFORE_REASON, "", errors[-1], count=1) if errors else "it gave no reason"


def stop(arguments: argparse.Namespace) -> int:
    """Stop a server and wait for its end.

    Raises DeviceError when the kernel uses the device, and when the server does not end.
    """
    interrupts.interruptible()
    served = client.look(arguments.name, arguments.rundir)
    outcome = "is not stopped"
    with (
        interrupts.told(lambda: f"{served.name} {outcome}"),
        life.turn(served.path, served.name),
    ):
        served.look_again()
        step("stop.turn")
        refuse_in_use(served, "stop")
        if not arguments.force:
            _refuse_loss(served)
        process = served.process()
        outcome = "has been told to stop"
        process.signal(signal.SIGTERM)
        step("stop.told")
        try:
            ended = process.ended(STOP_TIMEOUT)
        except OSError as error:
            raise DeviceError(
                f"{served.name} has been told to stop; whether it has cannot be told: {sentence(error)}"
            ) from None
        if not ended:
            raise DeviceError(
                f"{served.name} has not stopped within {STOP_TIMEOUT:g} seconds: "
                f"'kill -QUIT {process.pid}' ends it whatever it waits for"
            )
        rundir.clear(served.path, process.pid)  # what it could not remove itself
    return 0


def _refuse_loss(served: client.Served) -> None:
    """Raise DeviceError if clients are connected who would lose what they have stored: there is no state."""
    try:
        clients = served.ask_json("GET", "/health", timeout=LOOK_TIMEOUT)["clients"]
        state = served.ask_json("GET", "/settings", timeout=LOOK_TIMEOUT).get("state")
    except DeviceError:  # it does not answer: it cannot be of use to anybody
        return
    if clients and not state:
        raise DeviceError(
            f"{served.name} has no state, and its data would be lost to those who use it "
            f"({clients} connected): disconnect them first, or use --force"
        )


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


def add(commands: Commands) -> None:
    """Add the verbs."""
    parser = commands.add_parser(
        "start",
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
        description="Stop a server and wait for its end. Without a state its data is lost: then it refuses "
        "while clients are connected. With one it is kept. "
        "Refuses while this machine's kernel swaps to the device or has it mounted.",
    )
    add_device(parser)
    parser.add_argument(
        "--force", action="store_true", help="stop it although clients are connected whose data is lost"
    )
    parser.set_defaults(run=stop)

    parser = commands.add_parser(
        "serve",
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
