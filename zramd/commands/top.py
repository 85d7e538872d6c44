"""`zramd top`: a device live, on the whole screen. zramd.top.view draws, zramd.top.terminal shows."""

import argparse
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from zramd.commands import Commands, add_device
from zramd.contract import rundir
from zramd.contract.exchange import TIMEOUT
from zramd.contract.rundir import COMPACT_TIMEOUT
from zramd.control import servers
from zramd.control.samples import Sample, Watch, take
from zramd.errors import DeviceError, ZramdError
from zramd.settings import amounts
from zramd.top import cells, view
from zramd.top.cells import Glyphs
from zramd.top.terminal import Terminal
from zramd.top.view import KEYS, Frame, screen

INTERVALS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)  # seconds; what + and - go through
DEFAULT_INTERVAL = 1.0  # seconds
PATIENCE = 3.0  # seconds after which a server that does not answer is said not to
MESSAGE_TIME = 4.0  # seconds that a message stays


def interval(text: str) -> float:
    """Return an interval in seconds as written; raises ArgumentTypeError for one that cannot be used."""
    seconds = amounts.number(text, INTERVALS[0], INTERVALS[-1])
    if seconds is None:
        raise argparse.ArgumentTypeError(
            f"'{text}' is not an interval: use {INTERVALS[0]:g} to {INTERVALS[-1]:g} seconds"
        )
    return seconds


class Top:
    """What is shown and what is going on, from the first frame to the last.

    Servers are asked by threads, each of which puts its answer into `_answers` and wakes the loop: keys work
    while a server takes its time.
    """

    def __init__(self, terminal: Terminal, served: servers.Served, seconds: float) -> None:
        self.terminal = terminal
        self.interval = seconds
        self.paused = False
        self.help = False
        self.end = 0  # the number of the signal that ends it
        self.stopped = False  # it was told to wait in the background
        self._quit = False
        self._resized = False
        self._glyphs = glyphs(terminal.colours)
        self._message, self._message_until = "", 0.0
        self._answers: deque[Callable[[], None]] = deque()
        self._compacting = False
        self._wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._show(served)

    def _show(self, served: servers.Served) -> None:
        """Begin with a device."""
        self.served = served
        self.watch = Watch()
        self.lost = ""
        self._due = 0.0
        self._asked: float | None = None  # when the question was put that is still open
        self._devices = self._others()

    @property
    def name(self) -> str:
        """The device's own name, which that of its run folder need not be."""
        return self.watch.sample.stats["name"] if self.watch.sample else self.served.name

    def _others(self) -> list[servers.Served]:
        """Return all devices that the keys go through, by name: those that live, and this one."""
        try:
            living = [served for served in servers.every() if served.pid is not None]
        except DeviceError:
            living = []
        if self.served.path not in (served.path for served in living):
            living.append(self.served)
        return sorted(living, key=lambda served: served.name)

    def run(self) -> int:
        """Show the device until a key or a signal ends it; return the exit status."""
        signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP, signal.SIGWINCH)
        before = {number: signal.signal(number, self._signal) for number in signals}
        try:
            with self.terminal:
                while not self._quit and not self.end:
                    wait = self._step()
                    ready, _, _ = select.select([self.terminal.fileno(), self._wake[0]], [], [], wait)
                    if self.terminal.fileno() in ready:
                        for key in self.terminal.read_keys():
                            self.press(key)
                    if self._wake[0] in ready:
                        os.read(self._wake[0], 4096)
                    if self.stopped:
                        self._stop()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return 128 + self.end if self.end not in (0, signal.SIGINT) else 0

    def _signal(self, number: int, frame: object) -> None:
        if number == signal.SIGWINCH:
            self._resized = True
        elif number == signal.SIGTSTP:
            self.stopped = True
        else:
            self.end = number
        self._wake_up()

    def _wake_up(self) -> None:
        with suppress(BlockingIOError):  # then it is awake enough
            os.write(self._wake[1], b"\0")

    def _stop(self) -> None:
        """Wait in the background, as Ctrl-Z asks, with the terminal as it was."""
        self.stopped = False
        self.terminal.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        self.terminal.enter()

    def _step(self) -> float:
        """Do what is due, and draw; return the seconds until something is due again."""
        while self._answers:
            self._answers.popleft()()
        if self._resized:
            self._resized = False
            self.terminal.redraw()
        now = time.monotonic()
        if not self.paused and self._asked is None and now >= self._due:
            self._due = max(self._due + self.interval, now)
            self._ask()
        if self._asked is not None and now - self._asked > PATIENCE and not self.lost:
            self.lost = f"{self.name} does not answer: waiting for it"
        if now >= self._message_until:
            self._message = ""
        self.terminal.draw(screen(self.frame(), *self.terminal.size(), self._glyphs))
        times = [self._message_until] if self._message else []
        if self._asked is not None:
            times.append(self._asked + PATIENCE if not self.lost else now + PATIENCE)
        elif not self.paused:
            times.append(self._due)
        return max(min(times, default=now + 60) - now, 0.01)

    def frame(self) -> Frame:
        """Return what the view is to draw."""
        paths = [served.path for served in self._devices]
        return Frame(
            self.name,
            self.watch,
            self.interval,
            paused=self.paused,
            help=self.help,
            message=self._message,
            lost=self.lost,
            devices=(paths.index(self.served.path) + 1, len(paths)),
        )

    def say(self, words: str) -> None:
        """Show a message for a while."""
        self._message, self._message_until = words, time.monotonic() + MESSAGE_TIME

    def press(self, key: str) -> None:
        """Do what a key stands for."""
        if key in ("q", "Q", "end", "\x03"):
            self._quit = True
        elif key == "?" or (self.help and key in ("h", "\x1b", "\r", "\n")):
            self.help = not self.help
        elif key == "h":
            self.help = True
        elif key == " ":
            self.paused = not self.paused
            self._due = 0.0
        elif key == "c":
            self._compact()
        elif key in ("next", "previous"):
            self._turn(1 if key == "next" else -1)
        elif key in "+=":
            self._set_interval(next((i for i in INTERVALS if i > self.interval), INTERVALS[-1]))
        elif key in "-_":
            self._set_interval(next((i for i in reversed(INTERVALS) if i < self.interval), INTERVALS[0]))

    def _set_interval(self, seconds: float) -> None:
        self.interval = seconds
        self._due = 0.0
        self.say(f"every {seconds:g} seconds" if seconds != 1 else "every second")

    def _turn(self, by: int) -> None:
        self._devices = self._others()
        if len(self._devices) == 1:
            self.say("there is no other device")
            return
        paths = [served.path for served in self._devices]
        self._show(self._devices[(paths.index(self.served.path) + by) % len(paths)])

    # --------------------------------------------------------------------------------------------------------
    # asking servers

    def _start(self, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Do `work` in a thread; the loop then calls `done` with what it returned, or its ZramdError."""

        def run() -> None:
            try:
                answer: Any = work()
            except ZramdError as error:
                answer = error
            except (ValueError, KeyError, TypeError):
                answer = DeviceError(f"{self.name} speaks of other things: is it of another version?")
            self._answers.append(lambda: done(answer))
            self._wake_up()

        threading.Thread(target=run, daemon=True).start()

    def _ask(self) -> None:
        watch, served = self.watch, self.served
        self._asked = time.monotonic()

        def done(answer: Sample | ZramdError) -> None:
            if self.watch is watch:  # else it is another device's by now
                self._asked = None
                self._take(answer)

        self._start(lambda: take(servers.find(served.name, served.path)), done)

    def _take(self, answer: Sample | ZramdError) -> None:
        if isinstance(answer, ZramdError):
            self._devices = self._others()
            # Whatever it is: the server is away, and may come back.
            try:
                living = rundir.holder(self.served.path) is not None
            except ZramdError:
                living = True
            self.lost = (
                str(answer) if living else f"the server of {self.name} has ended: waiting for it to come back"
            )
            return
        if self.watch.add(answer) or self.lost:
            self.say(f"{self.name} is served by process {answer.stats['pid']}")
        self.lost = ""

    def _compact(self) -> None:
        if self._compacting:
            return
        self._compacting = True
        served, name = self.served, self.name
        self.say(f"compacting {name}")
        self._message_until += COMPACT_TIMEOUT

        def done(answer: dict[str, Any] | ZramdError) -> None:
            self._compacting = False
            if isinstance(answer, ZramdError):
                self.say(str(answer))
                return
            pages = answer["pages_freed"]
            self.say(f"{name}: {pages} pages freed, frag ratio {answer['frag_ratio']:.2f}%")
            self._due = 0.0

        timeout = COMPACT_TIMEOUT + TIMEOUT
        self._start(lambda: served.ask_json("POST", "/compact", timeout=timeout), done)


def glyphs(colours: int) -> Glyphs:
    """Return the characters to draw with, by what standard output can take and how many colours there are."""
    # The console's fonts have few of the characters.
    if "utf" not in (sys.stdout.encoding or "").lower() or os.environ.get("TERM") == "linux":
        return cells.ASCII
    return cells.COLOUR if colours >= 256 else cells.MONO


def once(served: servers.Served, seconds: float | None) -> int:
    """Print the screen once: rates since the server's start, or over some seconds."""
    watch = Watch()
    sample = take(served)
    watch.add(sample)
    if seconds:
        time.sleep(seconds)
        watch.add(take(served))
    try:
        width, height = os.get_terminal_size(sys.stdout.fileno())
    except OSError:
        width, height = 0, 0
    columns = os.environ.get("COLUMNS", "")
    width = min(int(columns), 1000) if columns.isdecimal() else width
    width, height = max(width or 80, view.MIN_WIDTH), 24 if height < 24 else height
    frame = view.Frame(sample.stats["name"], watch, seconds or 0, keys=False)
    for line in view.body(frame, width, height - 1, glyphs(0)):
        print(cells.plain(line).rstrip())
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Show a device, the first one if none is named. Raises DeviceError."""
    if arguments.name is None and arguments.rundir is None:
        living = [served for served in servers.every() if served.pid is not None]
        if not living:
            raise DeviceError("no device is served: 'zramd start NAME --size 1G' starts one")
        served = living[0]
    else:
        served = servers.find(arguments.name, arguments.rundir)
    if arguments.once:
        return once(served, arguments.interval)
    return Top(Terminal(), served, arguments.interval or DEFAULT_INTERVAL).run()


def _help() -> str:
    keys = "".join(f"  {key:<6}  {meaning}\n" for key, _, meaning in KEYS)
    return f"""
keys:
{keys}
NO_COLOR=1 in the environment: no colours. With --once the rates are means since the server's start, or over
an interval if one is given.
"""


def add(commands: Commands) -> None:
    """Add the verb."""
    parser = commands.add_parser(
        "top",
        description="Watch a device live: memory, fragmentation, requests, compaction, and its size classes.",
        more=_help,
    )
    add_device(parser)
    parser.add_argument(
        "-i",
        "--interval",
        metavar="SECONDS",
        type=interval,
        help=f"seconds between two looks, {INTERVALS[0]:g} to {INTERVALS[-1]:g} [{DEFAULT_INTERVAL:g}]",
    )
    parser.add_argument("-1", "--once", action="store_true", help="print it once, as text, and end")
    parser.set_defaults(run=run)
