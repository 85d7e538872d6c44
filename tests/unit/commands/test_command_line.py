"""The `zramd` command without a server: what it prints, how it refuses, what it imports, its man page."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path

import pytest
from support.numbers import FakeDevice
from support.server import PACKAGE_PARENT

from zramd.commands import VERBS, Parser, completion, listing, main, parser, verb_parser
from zramd.control import columns, life, servers
from zramd.control.human import human
from zramd.errors import UsageError
from zramd.kernel import attached, swap
from zramd.settings import config
from zramd.stats import numbers, prometheus, snapshots, texts

ROOT = Path(__file__).resolve().parents[3]


def python(code: str, **env: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT), **env},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout


# What is imported.


# What a server and the command line have in common.
SHARED = {
    "zramd.contract",
    "zramd.contract.handover",
    "zramd.contract.rundir",
    "zramd.errors",
    "zramd.lockfile",
    "zramd.meminfo",
    "zramd.resident",
    "zramd.kernel",
    "zramd.kernel.attached",
    "zramd.kernel.ublk",
    "zramd.kernel.swap",
    "zramd.process",
    "zramd.process.pidfd",
    "zramd.process.steps",
    "zramd.settings",
    "zramd.trusted",
}


def test_list_starts_fast(tmp_path: Path) -> None:
    """It imports nothing that takes long: that was measured to be most of its time."""
    code = (
        "import sys; from zramd.commands import main; main(['list', '-J']); "
        "print(*[name for name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={"XDG_RUNTIME_DIR": str(tmp_path), "PYTHONPATH": str(PACKAGE_PARENT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    imported = set(done.stderr.split())
    assert "zramd.commands.listing" in imported
    heavy = {"dataclasses", "difflib", "inspect", "shutil", "signal", "subprocess", "urllib", "logging"}
    # The settings, and what only a server needs: what it imports itself, but for what tells who serves.
    heavy |= {"zramd.settings.config", "zramd.settings.devices"}
    server = set(python("import sys, zramd.server.server; print(*sys.modules)").split())
    heavy |= {name for name in server if name.startswith("zramd.")} - SHARED
    assert {
        "zramd.stats.snapshots",
        "zramd.core.device.device",
        "zramd.server.leaving",
        "zramd.server.log",
    } <= heavy
    assert all(find_spec(name) for name in heavy), "a name that no module has is never imported"
    assert not heavy & imported


@pytest.mark.parametrize("word", ["--help", "--version", "no-verb"])
def test_what_needs_no_verb_imports_none(word: str) -> None:
    code = (
        "import sys; from zramd import commands\n"
        f"try: status = commands.main(['{word}'])\nexcept SystemExit as end: status = end.code\n"
        "print(status, *[name for name in sys.modules if name.startswith('zramd.commands')])"
    )
    status = "2" if word == "no-verb" else "0"
    assert python(code).splitlines()[-1].split() == [status, "zramd.commands"]


def test_a_verb_is_imported_when_it_is_called() -> None:
    code = (
        "import sys; from zramd import commands; commands.main(['stats', 'nobody'])\n"
        "print(*[name for name in sys.modules if name.startswith(('zramd.commands', 'zramd.top'))])"
    )
    imported = set(python(code).split())
    assert "zramd.commands.show" in imported
    assert imported == {"zramd.commands", "zramd.commands.show"}


def test_daemon_does_not_import_the_command_line() -> None:
    plugin = (PACKAGE_PARENT / "nbdkit_plugin.py").read_text()
    names = set(re.findall(r"from (zramd[.\w]*) import|import (zramd[.\w]*)", plugin))
    assert ("zramd.server.server", "") in names
    modules = "zramd.settings.config, zramd.server.server, zramd.core.system.threadstate"
    imported = set(python(f"import sys, {modules}; print(*sys.modules)").split())
    assert "zramd.server.endpoint" in imported
    unwanted = ("zramd.commands", "zramd.control.servers", "argparse", "dataclasses")
    if "release" in str(
        PACKAGE_PARENT
    ):  # others are built for this very Python, where Cython needs no numbers of it
        unwanted += ("inspect",)
    assert [name for name in imported if name.startswith(unwanted)] == []


def test_public_names_are_imported_when_asked_for() -> None:
    code = "import sys, zramd; print('zramd.core.device.device' in sys.modules, zramd.Device(1).disksize)"
    assert python(code) == "False 4096\n"
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        import zramd

        _ = zramd.Nothing  # type: ignore[attr-defined]


# The command line itself.


def every_parser() -> dict[str, Parser]:
    return dict(completion.tree())


def test_every_module_adds_verbs_that_do_something() -> None:
    for path, found in every_parser().items():
        if path and not any(isinstance(action, argparse._SubParsersAction) for action in found._actions):
            assert callable(found.get_default("run")), path
            assert found.description, path
    assert len(every_parser()) > len(VERBS)


@pytest.mark.parametrize("word", ["-V", "--version", "-h", "--help"])
def test_asked_for(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([word])
    assert caught.value.code == 0
    assert "zramd" in capsys.readouterr().out


def test_help_of_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for path in every_parser():
        with pytest.raises(SystemExit) as caught:
            main([*path.split(), "--help"])
        assert caught.value.code == 0
        text = capsys.readouterr().out
        assert text.startswith(f"usage: zramd {path}".rstrip())
    main_help = parser().format_help()
    assert "exit status:" in main_help
    for path in every_parser():
        assert path.split(" ")[0] in main_help


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["nope"], "unknown command 'nope': use one of list, start"),
        (["lst"], "unknown command 'lst': did you mean 'list'?"),
        (["list", "--nope"], "zramd list: unrecognized arguments: --nope: see 'zramd list --help'"),
        (["stats", "a", "b"], "zramd stats: unrecognized arguments: b: see 'zramd stats --help'"),
        (["--nope"], "zramd list: unrecognized arguments: --nope: see 'zramd list --help'"),
        (["list", "-o"], "zramd list: argument -o/--output: expected one argument: see 'zramd list --help'"),
        (["debug"], "zramd debug: the following arguments are required: PART: see 'zramd debug --help'"),
        (
            ["completion", "csh"],
            "zramd completion: argument SHELL: unknown word 'csh': use one of bash, zsh, fish: see ",
        ),
        (["debug", "nope"], "zramd debug: argument PART: unknown word 'nope': use one of "),
        (
            ["config", "nope"],
            "unknown word 'nope': use one of show, check, import: see 'zramd config --help'",
        ),
        (["list", "-o", ""], "zramd: unknown column '': use some of NAME"),
        (["stats", ""], "zramd: '' is not a device's name"),
        (["stats", "a b"], "zramd: 'a b' is not a device's name"),
        (["stats", "\udcff"], "zramd: '\\xff' is not a device's name"),
        (["stop", "a" * 65], "aa' is not a device's name"),
        (["detach", ""], "zramd: '' is not a device's name"),
        (["detach", "../x", "--if-attached"], "zramd: '../x' is not a device's name"),
        (["detach", "a" * 300], "aa' is not a device's name"),
        (["stop", "a", "--rundir", ""], "zramd stop: argument --rundir: '' is not a folder"),
        (["list", "--rundir="], "zramd list: argument --rundir: '' is not a folder"),
        (["install-units", "--root", ""], "zramd: --root '' is not a folder"),
        (["remove-units", "--root="], "zramd: --root '' is not a folder"),
        (
            ["start", "a", "rundir=/nowhere/a", "--", "-p", "65536"],
            "zramd: '65536' is not a port: use 1 to 65535",
        ),
        (
            ["serve", "rundir=/nowhere/a", "--", "--port=99999999"],
            "zramd: '99999999' is not a port: use 1 to",
        ),
        (["start", "a", "rundir=/nowhere/a", "--", "-v", "-p"], "zramd: nbdkit's option -p wants a value"),
        (["start", "a", "rundir=/nowhere/a", "--", "--tls"], "zramd: nbdkit's option --tls wants a value"),
        (
            ["serve", "rundir=/nowhere/a", "--", "-v", "memory"],
            "zramd: 'memory' is neither an option of nbdkit's",
        ),
        (
            ["start", "a", "rundir=/nowhere/a", "--", "--vers"],
            "zramd: --version makes nbdkit print something",
        ),
        (["start", "a", "rundir=/a\udcff"], "zramd: rundir: '/a\\xff' is not UTF-8"),
        (["start", "a", "rundir=/a", "state=\udcff"], "/\\xff' is not UTF-8"),
        (
            ["start", "a", "rundir=/a", "metrics_file=\udcff.prom"],
            "/\\xff.prom' is not UTF-8",
        ),
    ],
)
def test_wrong(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status: object = main(words)
    except SystemExit as caught:
        status = caught.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.count("\n") == 1


def test_settings_may_stand_anywhere() -> None:
    words = ["a=1", "x", "--size", "1G", "b=", "--", "-t", "4", "c=3"]
    found = verb_parser("start").parse_args(words)
    assert (found.new_name, found.size, found.settings) == ("x", "1G", ["a=1", "b="])
    assert found.nbdkit_options == ["-t", "4", "c=3"]
    found = verb_parser("set").parse_args(["--rundir", "/a=b", "x=1"])
    assert (found.rundir, found.settings) == ("/a=b", ["x=1"])


def test_without_a_place(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    assert main([]) == 0
    sentence = "zramd: no place to look for devices: set XDG_RUNTIME_DIR or give --rundir FOLDER\n"
    assert capsys.readouterr() == ("", sentence)
    assert main(["stats", "a"]) == 2
    assert capsys.readouterr().err == sentence


# The table.


@pytest.mark.parametrize(
    ("size", "text"),
    [
        # As util-linux 2.38.1 shows them.
        (0, "0B"),
        (65, "65B"),
        (1023, "1023B"),
        (4096, "4K"),
        (8192, "8K"),
        (1048576, "1M"),
        (1572864, "1.5M"),
        (67108864, "64M"),
        (1234571264, "1.1G"),
        (1073741824, "1G"),
        (1000000000000, "931.3G"),
        (1048575, "1024K"),
        (4 << 40, "4T"),
        ((1 << 64) - 1, "16E"),
    ],
)
def test_sizes(size: int, text: str) -> None:
    assert human(size) == text


def test_columns() -> None:
    def names(words: str | None, every: bool = False) -> list[str]:
        return [column.name for column in columns.columns(words, every)]

    assert names(None) == list(columns.DEFAULT)
    assert names("pid,Name") == ["PID", "NAME"]
    assert names("+PID") == [*columns.DEFAULT, "PID"]
    zramctl = (
        "NAME DISKSIZE DATA COMPR ALGORITHM STREAMS ZERO-PAGES TOTAL MEM-LIMIT MEM-USED MIGRATED MOUNTPOINT"
    )
    assert set(zramctl.split()) < set(names(None, every=True))
    for wrong in ("", "NAME,", "+", "NAME,NOPE"):
        with pytest.raises(UsageError, match="unknown column '"):
            names(wrong)


def test_table_and_raw() -> None:
    shown = columns.columns("name,data,mountpoint", False)
    rows = [["zram0", "64M", "/mnt/a b"], ["z", "1023.5K", ""]]
    assert listing.table(shown, rows, headings=True) == (
        "NAME     DATA MOUNTPOINT\nzram0     64M /mnt/a b\nz     1023.5K\n"
    )
    assert listing.raw(shown, rows, headings=False) == "zram0 64M /mnt/a\\x20b\nz 1023.5K -\n"


def test_every_column_has_a_cell() -> None:
    snapshot = snapshots.take(FakeDevice(), name="zram0", comp_algorithm="lz4", version="0", started=0.0)
    values = {**json.loads(texts.to_json(snapshot)), "clients": 1, "attached": "", "mountpoint": ""}
    values["front"] = "nbd"
    cells = {column.name: column.show(column.get(values), False) for column in columns.COLUMNS}
    assert [name for name, cell in cells.items() if not cell] == [
        *("MOUNTPOINT", "SWAP-USED", "DEAD", "REFRESHED", "ATTACHED")  # it is not attached
    ]
    assert (cells["DATA"], cells["COMPR"], cells["TOTAL"]) == ("40K", "6K", "8K")
    assert (cells["FRAG"], cells["COMP-RATIO"], cells["ZERO-PAGES"]) == ("75.00", "5.00", "3")
    assert cells["MEM-USED"] == cells["PEAK"] == "11.5G"
    values |= {"swap_used": 5, "dead_blocks": 0, "refresh_last_blocks": 7}
    cells = {column.name: column.show(column.get(values), False) for column in columns.COLUMNS}
    assert (cells["SWAP-USED"], cells["DEAD"], cells["REFRESHED"]) == ("5", "0", "7")


# The kernel's devices.


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A /sys/block with nbd0 of 1 MiB and nbd1 of 2 MiB connected, nbd1 and a partition in use."""
    for name, size, backend in (("nbd0", 2048, ""), ("nbd1", 4096, "zramd/b"), ("nbd2", 2048, None)):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "size").write_text(f"{size}\n")
        if backend is not None:
            (folder / "pid").write_text("1\n")
            (folder / "backend").write_text(f"{backend}\n")
    (tmp_path / "swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n/dev/nbd1 partition 2044 0 100\n")
    (tmp_path / "mounts").write_text("/dev/nbd0 /mnt/a\\040b ext4 rw 0 0\nproc /proc proc rw 0 0\n")
    monkeypatch.setattr(attached, "SYS_BLOCK", str(tmp_path))
    monkeypatch.setattr(swap, "SWAPS", str(tmp_path / "swaps"))
    monkeypatch.setattr(swap, "MOUNTS", str(tmp_path / "mounts"))
    return tmp_path


def test_attached(machine: Path) -> None:
    assert attached.devices("a", 1 << 20) == ["/dev/nbd0"]
    assert attached.devices("b", 2 << 20) == ["/dev/nbd1"]
    assert attached.devices("b", 0) == ["/dev/nbd1"]
    assert attached.devices("c", 2 << 20) == []  # it is known to be another's
    assert swap.uses("/dev/nbd1") == ["[SWAP]"]
    assert swap.uses("/dev/nbd0") == ["/mnt/a b"]
    assert swap.uses("/dev/nbd2") == []


def test_stop_is_refused_while_in_use(
    machine: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"run-a": ("a", 1 << 20), "run-b": ("b", 2 << 20)}  # the folder need not have the device's name
    monkeypatch.setattr(
        servers, "look", lambda name, rundir: servers.Served(f"run-{name}", "/no", os.getpid())
    )
    monkeypatch.setattr(life, "turn", lambda *words: nullcontext())
    monkeypatch.setattr(servers.Served, "look_again", lambda self: None)
    monkeypatch.setattr(
        servers.Served,
        "ask_json",
        lambda self, *words, **rest: dict(zip(("name", "disksize"), sizes[self.name], strict=True)),
    )
    monkeypatch.setattr("os.pidfd_open", lambda pid: pytest.fail("it would have been stopped"))
    assert main(["stop", "b"]) == 1
    assert capsys.readouterr().err == (
        "zramd: cannot stop b: /dev/nbd1 is in use as swap: run 'swapoff /dev/nbd1' first\n"
    )
    assert main(["stop", "a"]) == 1
    assert capsys.readouterr().err == (
        "zramd: cannot stop a: /dev/nbd0 is in use as '/mnt/a b': run 'umount /dev/nbd0' first\n"
    )


# The numbers' meanings.


def test_every_number_has_a_meaning() -> None:
    snapshot = snapshots.take(FakeDevice(), name="zram0", comp_algorithm="lz4", version="0", started=0.0)
    names = [number.name for number in numbers.NUMBERS]
    shown = json.loads(texts.to_json(snapshot))
    assert sorted(names) == sorted(shown.keys() - {*texts.ABOUT, "latency"})
    for number in numbers.NUMBERS:
        assert number.meaning.endswith(".")
    metrics = [number for number in numbers.NUMBERS if number.metric]
    assert len({number.metric for number in metrics}) == len(metrics) > 20
    swap = snapshots.take(
        FakeDevice(),
        name="zram0",
        comp_algorithm="lz4",
        version="0",
        started=0.0,
        swap=dict.fromkeys(numbers.SWAP, 1),
        front=dict.fromkeys(numbers.UBLK, 1),
    )
    text = prometheus.exposition(swap, [])
    for number in metrics:
        assert f"# HELP zramd_{number.metric} {number.meaning}\n" in text


@pytest.mark.parametrize("words", [["stats", "a\nb/"], ["stats", "a", "\x1b[2Jb\n"], ["a\tb"]])
def test_what_is_quoted_is_shown_and_not_carried_out(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A terminal would do what these bytes say."""
    with suppress(SystemExit):
        assert main(words) == 2
    error = capsys.readouterr().err
    assert error.endswith("\n")
    assert error[:-1].isprintable()


# The machine.


def man_sections() -> dict[str, str]:
    """The text about each verb in the man page."""
    text = (ROOT / "docs" / "zramd.1").read_text()
    text = text.partition(".Sh COMMANDS\n")[2].partition("\n.Sh FILES")[0]
    sections = {}
    for part in re.split(r"^\.It Ic ", text, flags=re.MULTILINE)[1:]:
        words = part.split("\n")[0].split()
        verb = " ".join(words[:2]) if words[0] in ("backing", "config", "debug") else words[0]
        sections[verb] = part
    return sections


def test_man_page_has_every_verb_and_option() -> None:
    sections = man_sections()
    verbs = {path: found for path, found in every_parser().items() if path and found.get_default("run")}
    assert list(sections) == list(verbs)
    for path, found in verbs.items():
        options = {
            option
            for action in found._actions
            for option in action.option_strings
            if option not in ("-h", "--help")
        }
        lines = re.findall(r"^\.It (Fl .*)$", sections[path], flags=re.MULTILINE)
        described = {f"-{word}" for line in lines for word in re.findall(r"Fl (-?[\w-]+)", line)}
        assert described == options, path


def test_man_page_is_well_formed() -> None:
    if not Path("/usr/bin/groff").exists():
        pytest.skip("groff is not installed")
    done = subprocess.run(
        ["groff", "-mdoc", "-ww", "-Tascii", "-z", str(ROOT / "docs" / "zramd.1")],
        env={"PATH": os.defpath},  # a sanitizer's preload is not for it
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert done.stderr == ""


# Completion.


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_knows_every_verb_and_setting(shell: str) -> None:
    script = completion.script(shell)
    for path, found in every_parser().items():
        assert (f'case "{path}"; set' if shell == "fish" else f'"{path}") offers="') in script
        for action in found._actions:
            for option in action.option_strings:
                assert option in script
    assert "mem_limit=" in script
    live = [setting.name for setting in config.SETTINGS if not setting.fixed]
    set_words = completion.words("set", every_parser()["set"])
    assert [word[:-1] for word in set_words if word.endswith("=")] == live


def test_completion_of_recompress_offers_what_the_server_takes() -> None:
    from zramd.server import words

    offered = [word for word in completion.words("recompress", every_parser()["recompress"]) if "=" in word]
    assert {word.partition("=")[0] for word in offered} == {
        "type",
        "threshold",
        "max_pages",
        "algo",
        "priority",
    }
    for word in offered:
        words.recompress(word if word[-1] != "=" else f"{word}1")


def test_completion_of_writeback_offers_what_the_server_takes() -> None:
    from zramd.server import words

    offered = [word for word in completion.words("writeback", every_parser()["writeback"]) if "=" in word]
    assert {word for word in offered if word.startswith("type=")} == {
        f"type={name}" for name in words.WRITE_TYPES
    }
    assert {word.partition("=")[0] for word in offered} == {"type", "page_index", "page_indexes"}
    for word in offered:
        words.writeback(
            {"page_index=": "page_index=1", "page_indexes=": "page_indexes=1-2"}.get(word, word), 3
        )


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_completion_is_a_good_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    script = completion.script(shell)
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_memory_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from zramd import commands
    from zramd.control import servers

    def fail(*arguments: object) -> None:
        raise MemoryError

    monkeypatch.setattr(servers, "look", fail)
    monkeypatch.setattr(servers, "find", fail)
    assert commands.main(["stop", "nobody"]) == 1
    assert capsys.readouterr().err.startswith("zramd: not enough memory for this command")


def test_a_library_that_does_not_load_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(verb: str) -> None:
        raise ImportError("x.so: cannot map zero-fill pages")

    monkeypatch.setattr("zramd.commands.verb_parser", fail)
    assert main(["list"]) == 1
    assert capsys.readouterr().err == (
        "zramd: cannot be loaded, perhaps for lack of memory: x.so: cannot map zero-fill pages\n"
    )


@pytest.mark.parametrize("entry", ["-m zramd list", "-c 'from zramd.commands import main'", "plugin"])
def test_an_interrupt_while_it_is_loaded_prints_nothing(tmp_path: Path, entry: str) -> None:
    """As it comes in the middle of an import: Python's own answer to it is a traceback."""
    interrupt = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), 0)\n"
    for name in ("argparse", "traceback"):
        (tmp_path / f"{name}.py").write_text(interrupt)
    plugin = PACKAGE_PARENT / "nbdkit_plugin.py"
    words = f"'{plugin}'" if entry == "plugin" else entry
    done = subprocess.run(
        ["bash", "-c", f"trap - INT; exec '{sys.executable}' -P {words}"],
        env={"PYTHONPATH": f"{tmp_path}:{PACKAGE_PARENT}", "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_after_the_work_is_done_changes_no_status(number: int) -> None:
    """It comes when Python has put its own handlers away: when what modules hold is dropped."""
    code = (
        "import os; from zramd.process import interrupts; interrupts.finish()\n"
        f"class Last: __del__ = lambda self, kill=os.kill, me=os.getpid(): kill(me, {int(number)})\n"
        "last = Last()"
    )
    env = {**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)}
    assert subprocess.run([sys.executable, "-P", "-c", code], env=env, check=False).returncode == 0
