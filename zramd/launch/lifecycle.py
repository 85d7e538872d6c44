"""A server's life as its user sees it: serve, start, stop.

With `serve`, the process that the user started is the server in the end (nbdkit, or Python without it), so
Ctrl-C, systemd and `kill` reach it.
"""

import os
import signal
import time
from contextlib import suppress
from typing import NamedTuple

from zramd.contract import handover, rundir
from zramd.control import busy, life, servers
from zramd.errors import ConfigError, DeviceError, UsageError, ZramdError, say, sentence
from zramd.kernel import swap
from zramd.launch import (
    addresses,
    background,
    fdstore,
    inplace,
    installed,
    nbdkit,
    spawn,
    tlsfiles,
    ublkserver,
    watcher,
)
from zramd.process import inherited, interrupts, notify, pidfd
from zramd.process.steps import step
from zramd.settings import config, devices
from zramd.settings.config import Config
from zramd.settings.devices import ConfiguredDevice

DEFAULT_SIZE = "1G"
STOP_TIMEOUT = 10.0  # seconds; a server needs one, a busy machine a few
KILL_TIMEOUT = 2.0  # seconds that a server which did not get so far has to end in its normal way


def plan(
    name: str | None,
    size: str | None,
    words: list[str],
    nbdkit_words: list[str],
    *,
    for_others: bool = False,
) -> tuple[Config, nbdkit.Options, list[str]]:
    """Return what to serve, nbdkit's own options, and the command line; `words` are key=value settings.

    `for_others`: zramd.conf says that this machine does not attach it. Raises ConfigError, RundirError,
    UsageError, and ZramdError when nbdkit is missing.
    """
    settings, pairs = _wanted(name, size, words)
    pid = rundir.holder(settings.rundir)
    if pid is not None:
        raise rundir.in_use(settings.rundir, pid)
    options = nbdkit.read_options(nbdkit_words)
    options.sockets = inherited.passed_sockets()
    settings, argv = _line(settings, pairs, options, for_others=for_others)
    return settings, options, argv


def _wanted(name: str | None, size: str | None, words: list[str]) -> tuple[Config, list[tuple[str, str]]]:
    """Return what to serve, and that as pairs for a command line."""
    given = (("disksize", size), ("name", name))
    pairs = [(key, value) for key, value in given if value is not None]
    for word in words:
        key, _, value = word.partition("=")
        pairs.append((key, value))
    if not any(config.find(key).name == "disksize" for key, _ in pairs):
        pairs.append(("disksize", DEFAULT_SIZE))
    given_rundir = next((value for key, value in pairs if config.find(key).name == "rundir"), None)
    if devices.is_roots(given_rundir):
        names = {config.find(key).name for key, _ in pairs}
        pairs += [pair for pair in devices.shared().items() if pair[0] not in names]
    settings = config.parse(pairs)
    if given_rundir is None:
        pairs.append(("rundir", settings.rundir))
    return settings, pairs


def _line(
    settings: Config,
    pairs: list[tuple[str, str]],
    options: nbdkit.Options,
    *,
    for_others: bool,
    for_sockets: bool = False,
) -> tuple[Config, list[str]]:
    """Return the settings, with the front that was chosen if it was to be, and the command line.

    for_sockets: the sockets in `options` are those of `listen`, and there already.
    """
    if settings.front == "auto":
        front = ublkserver.choose(settings, options, for_others=for_others)
        settings = settings._replace(front=front)
    pairs = [(key, settings.front if key == "front" else value) for key, value in pairs]
    if settings.front == "ublk":
        ublkserver.check(options)
        return settings, ublkserver.command(nbdkit.absolute(settings, pairs))
    if not swap.find_program("nbdkit"):
        raise ZramdError(f"nbdkit is not installed: {installed.how_to_install()}")
    nbdkit.check(options)
    if settings.listen and not for_sockets:
        nbdkit.refuse_twice(settings, options)
        addresses.check(settings)
    return settings, nbdkit.command(settings, pairs, options)


def serve(
    name: str | None, size: str | None, words: list[str], nbdkit_words: list[str], configured: str | None
) -> None:
    """Become the server, serving as told; `configured` is a device of zramd.conf.

    Where a server serves that was on standby for one that has crashed, this one takes over from it. Raises as
    `plan`, and DeviceError when that cannot be. Returns only if the device is not meant for this machine,
    which is no failure to a service manager.
    """
    for_others = False
    if configured is not None:
        try:
            device = devices.find(configured)
        except devices.SkippedError as skipped:
            _not_here(skipped)
            return
        words = device.words([*words, *([] if size is None else [f"disksize={size}"])])
        size, for_others = None, not device.attached
    kept = fdstore.take_out()  # before anybody takes it for a socket
    settings, pairs = _wanted(name, size, words)
    before = inplace.find(settings)
    if before is None:
        options = nbdkit.read_options(nbdkit_words)
        options.sockets = inherited.passed_sockets()
        if kept.listens and kept.listens != handover.listens(settings.listen):
            fdstore.let_go(kept.listens, options.sockets)
            options.sockets, kept = [], kept._replace(listens="")
    else:
        settings = settings._replace(front=before.front(settings.front))
        options = before.options(settings, nbdkit_words)
    settings, argv = _line(
        settings, pairs, options, for_others=for_others, for_sockets=bool(before or kept.listens)
    )
    if settings.state == handover.SYSTEMD:
        fdstore.prepare(kept.memory, -1 if before is None else before.memory_file())
    inherited.close_others((*options.sockets, int(os.environ.get(handover.KEPT_FD, 0))), argv)
    # With -s, standard output is the client's; and a service manager has its own way to learn that we serve.
    if nbdkit.STANDARD_INPUT.isdisjoint(options.values) and "NOTIFY_SOCKET" not in os.environ:
        watcher.start(settings, watcher.greeting(settings, options, os.getpid()))
    nbdkit.set_environment(settings)
    if before is not None:
        before.hand_over(options)
    else:
        with suppress(FileNotFoundError, NotADirectoryError):  # then nobody is in the middle of anything
            turn = life.take(settings.rundir, settings.name, make=tlsfiles.has_own(settings))
            background.refuse_another(settings)
            background.give(turn.words(), turn.fd)
        background.clear_socket(options.values.get("-U", options.values.get("--unix", "")))
    tlsfiles.put(settings, argv)
    step("serve.exec")
    os.execvp(argv[0], argv)


def _not_here(skipped: Exception) -> None:
    """Say that the device is not meant for this machine. To a service manager that is no failure."""
    if "NOTIFY_SOCKET" not in os.environ:
        raise skipped
    notify.Manager().insist(f"STATUS={skipped}", "READY=1")
    say(str(skipped))


class Started(NamedTuple):
    """A server in the background that answers."""

    settings: Config
    options: nbdkit.Options
    pid: int


def start(name: str | None, size: str | None, words: list[str], nbdkit_words: list[str]) -> Started:
    """Start a server in the background, and wait until it answers; `size` is as a user writes it.

    Raises as `plan`, UsageError, and DeviceError with the server's reason when it does not get so far.
    """
    interrupts.interruptible()

    inherited.leave_manager()
    name = None if name is None else servers.name_of(name)
    given = {config.find(word.partition("=")[0]).name for word in words}
    configured = None
    if size is None and "name" not in given:
        configured = _configured(name or str(config.find("name").default), sized="disksize" in given)
    if configured:
        words, name = configured.words(words), None
    for_others = configured is not None and not configured.attached
    settings, options, argv = plan(name, size, words, nbdkit_words, for_others=for_others)
    if settings.state == "systemd":
        raise UsageError(
            "state=systemd is for 'zramd serve' as a service: use a file such as /dev/shm/NAME.state"
        )
    for option in nbdkit.PRINTS & options.values.keys():
        raise UsageError(f"{option} makes nbdkit print something and end: run 'nbdkit {option}'")
    if not nbdkit.STANDARD_INPUT.isdisjoint(options.values):
        raise UsageError("a server in the background has no standard input to serve: use 'zramd serve'")
    nbdkit.set_environment(settings)
    # What nbdkit's options name may be relative to where we are. Else no file system is to be kept busy.
    folder = "." if nbdkit_words else "/"
    with (
        interrupts.told(lambda: f"{settings.name} is not started"),
        life.turn(settings.rundir, settings.name, make=True) as turn,
    ):
        background.refuse_another(settings)
        background.clear_socket(options.values.get("-U", options.values.get("--unix", "")))
        step("start.turn")
        tlsfiles.put(settings, argv)
        pid = _begin(settings, argv, turn, folder)
        interrupts.finish()  # it serves, and is said to
    step("start.serves")
    return Started(settings, options, pid)


def _configured(name: str, *, sized: bool) -> ConfiguredDevice | None:
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
    end = time.monotonic() + spawn.READY_TIMEOUT
    environment = {**turn.words(), rundir.BACKGROUND: "1"}
    with interrupts.blocked():
        pid, process, errors = spawn.spawn(argv, lambda: background.give(environment, turn.fd), folder)
    if process is None:
        with open(errors, errors="replace") as last:
            raise DeviceError(f"{settings.name} does not start: {spawn.reason(last.read())}")
    try:
        step("start.spawned")
        said = spawn.read_until(errors, end)
        while why := spawn.why_not_ready(settings, pid):
            if pidfd.has_ended(process):
                other = rundir.holder(settings.rundir)
                if other is not None:
                    raise rundir.in_use(settings.rundir, other)
                raise DeviceError(f"{settings.name} does not start: {spawn.reason(said)}")
            if time.monotonic() >= end:
                why += f"; it says: {background.last_words(settings.rundir) or spawn.reason(said)}"
                raise DeviceError(
                    f"{settings.name} does not answer within {spawn.READY_TIMEOUT:g} seconds: {why}"
                )
            time.sleep(0.01)
        return pid
    except BaseException:
        interrupts.end(process, KILL_TIMEOUT)
        rundir.clear(settings.rundir, pid)
        raise
    finally:
        os.close(process)
        os.close(errors)


def stop(name: str | None, folder: str | None, *, force: bool) -> None:
    """Stop a server and wait for its end; with `force` although clients lose their data.

    Raises DeviceError when the kernel uses the device, and when the server does not end.
    """
    interrupts.interruptible()
    served = servers.look(name, folder)
    outcome = "is not stopped"
    with (
        interrupts.told(lambda: f"{served.name} {outcome}"),
        life.turn(served.path, served.name),
    ):
        served.look_again()
        step("stop.turn")
        busy.refuse(served, "stop")
        if not force:
            _refuse_loss(served)
        process = served.process()
        outcome = "has been told to stop"
        process.signal(signal.SIGTERM)
        step("stop.told")
        try:
            ended = process.ended(STOP_TIMEOUT)
        except OSError as error:
            raise DeviceError(
                f"{served.name} has been told to stop; it is not known whether it has: {sentence(error)}"
            ) from None
        if not ended:
            raise DeviceError(
                f"{served.name} has not stopped within {STOP_TIMEOUT:g} seconds: "
                f"'kill -QUIT {process.pid}' ends it whatever it waits for"
            )
        rundir.clear(served.path, process.pid)  # what it could not remove itself


def _refuse_loss(served: servers.Served) -> None:
    """Raise DeviceError if clients are connected that would lose their data, as there is no state."""
    try:
        clients = served.ask_json("GET", "/health", timeout=busy.LOOK_TIMEOUT)["clients"]
        state = served.ask_json("GET", "/settings", timeout=busy.LOOK_TIMEOUT).get("state")
    except DeviceError:  # it does not answer: it cannot be of use to anybody
        return
    if clients and not state:
        raise DeviceError(
            f"{served.name} has no state, and its clients would lose its data "
            f"({clients} connected): disconnect them first, or use --force"
        )
