"""The `zramd` command: the table of its verbs, and what all verbs share.

A verb's module is imported when the verb is called; the overall help needs none. The module has
`add(commands)`, which adds the parsers of its verbs and sets `run` on each: a function that takes the parsed
arguments and returns the exit status. It raises ZramdError for what goes wrong.

`zramd list` takes longer to import than to work: so this module and those that it uses import what is heavy
inside their functions. All others have their imports at their heads.
"""

import _signal as signal  # type: ignore[import-not-found]  # what that module has too, without the time that it takes to import

# Ctrl-C ends the command at once until `main` knows what it means: an import would print a traceback.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import codecs
import io
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from zramd import __version__
from zramd.errors import UsageError, ZramdError, drop, printable, reason, say, sentence, tell
from zramd.process import inherited

TYPE_CHECKING = False  # what typing says too, without the time that it takes to import
if TYPE_CHECKING:
    from typing import NoReturn, TypeAlias

# Each verb, in the order of the help: the module that has it, and what the help says of it.
VERBS = {
    "list": ("zramd.commands.listing", "show the devices of this machine (the default)"),
    "start": ("zramd.commands.serve", "start a server in the background"),
    "stop": ("zramd.commands.serve", "stop a server; without a state its data is lost"),
    "serve": ("zramd.commands.serve", "serve a device in the foreground, until stopped"),
    "restart": ("zramd.commands.restart", "replace a running server by a new one, keeping all data"),
    "stats": ("zramd.commands.show", "print every number of a device with its meaning"),
    "classes": ("zramd.commands.show", "print the table of size classes"),
    "compact": ("zramd.commands.show", "compact the pool now"),
    "tiers": ("zramd.commands.tiers", "show what is hot, what is cold, and what is out on a disk"),
    "recompress": ("zramd.commands.tiers", "recompress blocks now, as zram does when it is asked to"),
    "idle": ("zramd.commands.tiers", "mark blocks as idle, as zram does"),
    "writeback": ("zramd.commands.tiers", "write blocks out to the backing device now, as zram does"),
    "bring-back": ("zramd.commands.tiers", "bring back into memory what is out on the backing device"),
    "set": ("zramd.commands.show", "change settings of a running device"),
    "check": ("zramd.commands.show", "walk every structure of a device"),
    "reset": ("zramd.commands.show", "drop all data of a device"),
    "dump": ("zramd.commands.show", "print the whole state as JSON, for a bug report"),
    "debug": ("zramd.commands.show", "look into a device"),
    "save": ("zramd.commands.saving", "save a device to a file"),
    "load": ("zramd.commands.saving", "load a saved device into a running one"),
    "backing": ("zramd.commands.backing", "look at a backing, make one ready, bring everything back from it"),
    "attach": (
        "zramd.commands.attach",
        "make a running device a block device of this kernel, and swap to it if asked",
    ),
    "detach": ("zramd.commands.attach", "take the kernel block device away again"),
    "refresh": ("zramd.commands.refresh", "give back the memory of what swap on a device has freed"),
    "top": ("zramd.commands.top", "watch a device live on the whole screen"),
    "doctor": ("zramd.commands.doctor", "check whether this machine is ready"),
    "config": ("zramd.commands.config", "show, check or import the configuration of devices"),
    "install-units": ("zramd.commands.units", "write the systemd units of this installation"),
    "remove-units": ("zramd.commands.units", "remove the systemd units again"),
    "guest-tool": ("zramd.commands.guest", "write what a guest needs that swaps to a zramd disk"),
    "completion": (
        "zramd.commands.completion",
        "print a completion script for your shell",
    ),
}

EXIT_STATUS = """\
exit status:
  0  done
  1  it failed, or what you asked about is not well: one sentence on standard error says why
  2  the command line is wrong
"""


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse makes one for each argument that is added, and imports much just for width and colours."""

    def __init__(self, prog: str) -> None:
        try:
            width = os.get_terminal_size().columns
        except OSError:
            width = 80
        super().__init__(prog, width=max(width, 40) - 2)

    def _set_color(self, color: bool) -> None:
        """Python 3.14 has help in colours. Ours has none, with every Python."""

    @property
    def _theme(self) -> object:
        """The colours of Python 3.14: none. They are imported for who prints help, not for every command."""
        return import_module("_colorize").get_theme(force_no_color=True).argparse

    @staticmethod
    def _decolor(text: str) -> str:
        return text

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Wrap a description, but one that has lines of its own."""
        if "\n" in text:
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, and that knows words which argparse does not.

    settings: takes key=value words, anywhere among the options, as `arguments.settings`.
    pairs: takes such words that are no settings; these are offered by completion.
    nbdkit_options: takes what follows -- as `arguments.nbdkit_options`.
    more: returns what the help ends with; it is called only when somebody reads it.
    """

    def __init__(
        self,
        *,
        settings: bool = False,
        pairs: Sequence[str] = (),
        nbdkit_options: bool = False,
        more: Callable[[], str] = lambda: "",
        **rest: object,
    ) -> None:
        super().__init__(formatter_class=_Formatter, **rest)  # type: ignore[arg-type]
        self.takes_settings = settings
        self.pairs = pairs
        self.takes_nbdkit_options = nbdkit_options
        self._more = more

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Take the words out that argparse would not understand, and let it do the rest."""
        words = list(sys.argv[1:] if args is None else args)
        namespace = namespace or argparse.Namespace()
        if self.takes_nbdkit_options:
            split = words.index("--") if "--" in words else len(words)
            words, namespace.nbdkit_options = words[:split], words[split + 1 :]
        if self.takes_settings or self.pairs:
            values = self._values(words)
            settings = [
                place
                for place, word in enumerate(words)
                if "=" in word and word[0] not in "-/." and place not in values
            ]
            namespace.settings = [words[place] for place in settings]
            words = [word for place, word in enumerate(words) if place not in settings]
        return super().parse_known_args(words, namespace)

    def _values(self, words: list[str]) -> set[int]:
        """Return the places of words that are the value of the option before them."""
        options = {name for name, action in self._option_string_actions.items() if action.nargs != 0}
        values: set[int] = set()
        for place, word in enumerate(words[:-1]):
            long = word.startswith("--") and len(word) > 2  # it may be shortened, as argparse has it
            known = any(name.startswith(word) for name in options) if long else word in options
            if known and place not in values:
                values.add(place + 1)
        return values

    def format_help(self) -> str:
        """Return the help, with what `more` returns at its end."""
        return f"{super().format_help()}{self._more()}"

    def _check_value(self, action: argparse.Action, value: object) -> None:
        """Refuse what is none of the choices; how argparse says that differs from one Python to the next."""
        if action.choices is not None and value not in action.choices:
            choices = ", ".join(map(str, action.choices))
            raise argparse.ArgumentError(action, f"unknown word '{value}': use one of {choices}")

    def error(self, message: str) -> "NoReturn":
        """End with status 2 and one sentence."""
        tell(f"{self.prog}: {printable(message)}: see '{self.prog} --help'")
        self.exit(2)


Commands: "TypeAlias" = "argparse._SubParsersAction[Parser]"


def parser() -> Parser:
    """Return the parser of what is written in the place of a verb: --help and --version."""
    made = Parser(
        prog="zramd",
        usage="zramd [-h] [-V] COMMAND ...",
        description="A compressed RAM block device in userspace. Without a command: list.",
        more=_overview,
    )
    made.add_argument("-V", "--version", action="version", version=f"zramd {__version__}")
    return made


def _overview() -> str:
    """Return what the help says of the verbs, and of how all of them end."""
    width = max(map(len, VERBS))
    verbs = "".join(f"  {verb:<{width}}  {text}\n" for verb, (_, text) in VERBS.items())
    return (
        f"\ncommands:\n{verbs}\n'zramd COMMAND --help' says more, and man zramd everything.\n\n{EXIT_STATUS}"
    )


def verb_parser(verb: str) -> Parser:
    """Return the parser of a verb of VERBS; its module is imported for it."""
    commands = Parser(prog="zramd").add_subparsers()
    import_module(VERBS[verb][0]).add(commands)
    made: Parser = commands.choices[verb]
    return made


def add_device(parser: Parser) -> None:
    """Add the words that say which device: NAME, or --rundir FOLDER for one in an unusual place."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="the device, as 'zramd list' names it")
    parser.add_argument(
        "--rundir", metavar="FOLDER", type=folder, help="its run folder, if it is not in the usual place"
    )


def add_rundirs(parser: Parser) -> None:
    """Add --rundir, as often as wanted, for a verb that shows several devices."""
    parser.add_argument(
        "--rundir",
        metavar="FOLDER",
        type=folder,
        action="append",
        default=[],
        help="show the device in this run folder",
    )


def folder(text: str) -> str:
    """Return a FOLDER as it was written: '' is a shell's variable that is not set, and means no folder."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a folder: give one, or leave the option out")
    return text


def parts(of: Parser) -> dict[str, Parser]:
    """Return the parsers of a verb's own verbs by their names, such as `show` of `zramd config`."""
    for action in of._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 2 for what the user wrote wrong and 1 for what else went wrong."""
    try:
        if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        inherited.complete_standard()
        inherited.forget_others()
        _prepare_output()
        try:
            return _flush(_run(sys.argv[1:] if argv is None else argv))
        except SystemExit as end:  # argparse has printed what it was asked for, or said what is wrong
            raise SystemExit(_flush(int(end.code or 0))) from None
    except BrokenPipeError:  # the reader of our output has seen enough
        drop(1)
        return 1
    except ZramdError as error:
        say(str(error))
        return error.exit_code
    except OSError as error:
        say(_why(error))
        return 1
    except ImportError as error:
        say(f"cannot be loaded, perhaps for lack of memory: {error}")
        return 1
    except MemoryError:
        say("not enough memory for this command: free some, or raise 'ulimit -v'")
        return 1
    except KeyboardInterrupt as interrupt:
        return 128 + getattr(interrupt, "number", 2)  # as a shell has it for what a signal ended


def _run(words: list[str]) -> int:
    """Do what the words say; return the exit status."""
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help", "-V", "--version")):
        words = ["list", *words]
    if words[0].startswith("-"):
        parser().parse_args(words[:1])  # and ends
    _check_verb(words[0])
    made = verb_parser(words[0])
    arguments = made.parse_args(words[1:])
    status: int = arguments.run(arguments)
    return status


def _why(error: OSError) -> str:
    """Return the sentence for an error of the system that no verb has expected."""
    try:
        sys.stdout.flush()
    except OSError as failed:  # it is what failed
        drop(1)
        return f"the answer cannot be printed to standard output: {reason(failed)}"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        try:
            os.getcwd()
        except FileNotFoundError:
            return "the folder in which this runs is gone: change to another one"
    return sentence(error) or str(error)


def _flush(status: int) -> int:
    """Have all that was printed written; return the exit status. What was done is done, whatever happens."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        drop(1)
        say(f"it is done, but cannot be printed to standard output: {reason(error)}")
        return status or 1
    return status


def _prepare_output() -> None:
    """Have standard output take a path whose bytes are no text as they are, and never an exception.

    It is always buffered (PYTHONUNBUFFERED): what cannot be printed is then told from what went wrong.
    """
    codecs.register_error("zramd", _as_it_came)
    output = sys.stdout
    if isinstance(output, io.TextIOWrapper):
        if isinstance(output.buffer, io.RawIOBase):
            sys.stdout = os.fdopen(1, "w", encoding=output.encoding, errors="zramd", closefd=False)
        else:
            output.reconfigure(errors="zramd")


def _as_it_came(error: UnicodeError) -> tuple[bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    codes = [ord(letter) for letter in error.object[error.start : error.end]]
    raw = [bytes([code - 0xDC00]) if 0xDC80 <= code <= 0xDCFF else b"?" for code in codes]
    return b"".join(raw), error.end


def _check_verb(word: str) -> None:
    """Raise UsageError for a word that is no verb."""
    if word in VERBS:
        return
    from difflib import get_close_matches

    close = get_close_matches(word, VERBS, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"use one of {', '.join(VERBS)}"
    raise UsageError(f"unknown command '{word}': {hint}")
