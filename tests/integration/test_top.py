"""`zramd top` in a real terminal (tmux), before a real server with real requests and compaction."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.run import wait_until
from support.server import NbdkitProcess
from test_commands import at, refused, zramd

from zramd.contract import rundir
from zramd.control import samples, servers
from zramd.control.human import human
from zramd.top.cells import number

Serve = Callable[..., NbdkitProcess]
BLOCK = 4096


class Tmux:
    """A terminal with a shell in it, on a tmux server of its own."""

    def __init__(self, folder: Path, width: int = 80, height: int = 24) -> None:
        self._socket = folder / "tmux.sock"
        environment = {
            **os.environ,
            "LC_ALL": "C.UTF-8",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONSAFEPATH": "1",
        }
        for name in ("NO_COLOR", "TMUX", "COLUMNS", "LINES"):
            environment.pop(name, None)
        shell = "exec env PS1='prompt> ' bash --norc --noprofile"  # tmux' own shell forgets PS1
        command = ["new-session", "-d", "-x", str(width), "-y", str(height), shell]
        self._run("-u", "-f", "/dev/null", *command, env=environment)

    def _run(self, *words: str, env: dict[str, str] | None = None) -> str:
        done = subprocess.run(
            ["tmux", "-S", str(self._socket), *words], env=env, capture_output=True, text=True, timeout=30
        )
        assert (done.returncode, done.stderr) == (0, ""), words
        return done.stdout

    def start(self, *words: object, term: str = "screen-256color", **env: str) -> None:
        """Begin the command, and wait until it shows a device."""
        settings = " ".join(f"{name}={value}" for name, value in {"TERM": term, **env}.items())
        command = " ".join(map(str, words))
        self.type(f"clear; echo before; {settings} {sys.executable} -m zramd top {command}\n")
        wait_until(lambda: any(line.startswith("size") for line in self.lines()))

    def type(self, text: str) -> None:
        """Press keys, one for each character."""
        self._run("send-keys", "-l", text)

    def press(self, key: str) -> None:
        """Press a key by tmux's name for it."""
        self._run("send-keys", key)

    def text(self, *options: str) -> str:
        """What the screen shows."""
        return self._run("capture-pane", "-p", *options)

    def lines(self) -> list[str]:
        return self.text().split("\n")[:-1]

    def line(self, word: str) -> str:
        """The line that begins with a word, '' without one."""
        return next((line for line in self.lines() if line.startswith(word)), "")

    def shows(self, words: str, timeout: float = 10.0) -> None:
        """Wait until the screen shows some words."""
        end = time.monotonic() + timeout
        while words not in (seen := self.text()):
            if time.monotonic() > end:
                pytest.fail(f"'{words}' is not there:\n{seen}")
            time.sleep(0.05)

    def resize(self, width: int, height: int) -> None:
        self._run("resize-window", "-x", str(width), "-y", str(height))

    def format(self, text: str) -> str:
        """What tmux knows of the terminal."""
        return self._run("display-message", "-p", text).strip()

    def process(self) -> int:
        """The process number of the command."""
        shell = self.format("#{pane_pid}")
        return int(Path(f"/proc/{shell}/task/{shell}/children").read_text().split()[0])

    def is_as_before(self, status: int) -> None:
        """See that the command has ended with `status` and left the terminal as it was."""
        wait_until(lambda: self.format("#{alternate_on}") == "0")
        self.shows("prompt>")
        assert self.line("before") == "before", "what was on the screen is back"
        assert "Traceback" not in self.text()
        assert self.format("#{cursor_flag}") == "1"
        self.type("echo status $?, $(stty -a | grep -owE -- '-?(icanon|echo|isig)' | tr '\\n' ' ')\n")
        self.shows(f"status {status}, isig icanon echo")

    def close(self) -> None:
        subprocess.run(["tmux", "-S", str(self._socket), "kill-server"], capture_output=True, timeout=30)


@pytest.fixture
def tmux(tmp_path: Path) -> Iterator[Tmux]:
    if shutil.which("tmux") is None:
        pytest.skip("tmux is not installed")
    terminal = Tmux(tmp_path)
    try:
        terminal.shows("prompt>")
        yield terminal
    finally:
        terminal.close()


def fill(served: NbdkitProcess, blocks: int = 4000) -> None:
    """Write blocks of all sizes, and trim two of three, so that there is much to compact."""
    dice = random.Random(1)
    noise = dice.randbytes(1 << 16)
    connection = NbdSocket(served)
    for block in range(blocks):
        start = dice.randrange(len(noise) - BLOCK)
        data = noise[start : start + dice.randrange(40, 3900)].ljust(BLOCK, b"\0")
        assert connection.ask(connection.WRITE, block * BLOCK, BLOCK, data) == 0
    for block in dice.sample(range(blocks), blocks * 2 // 3):
        assert connection.ask(connection.TRIM, block * BLOCK, BLOCK) == 0
    connection.close()


def groups(tmux: Tmux) -> dict[str, int]:
    """The zspages of each fullness group, as the screen shows them."""
    found = {}
    for line in tmux.lines():
        if match := re.match(r" *(\d+%) .{60} +(\d+)", line):
            found[match[1]] = int(match[2])
    return found


def told(served: NbdkitProcess) -> dict[str, int]:
    """The zspages of each fullness group, by the last line of the server's own table."""
    header, *_, total = served.request("GET", "/classes")[1].splitlines()
    names = header.split()[2:13]
    return dict(zip(names, map(int, total.split()[1:12]), strict=True))


class TestScreen:
    def test_shows_the_numbers_and_compacts(self, serve: Serve, tmux: Tmux) -> None:
        served = serve(disksize="100M", mem_limit="32M", compaction="off", recompression="off")
        fill(served)
        tmux.start(*at(served))
        assert tmux.lines()[0].startswith(f" zram0  100M lz4  pid {served.process.pid}  up 0:")

        def shown() -> bool:
            """All as the server tells it now: it gives back the pages that it kept some time after a fill."""
            now = served.stats()
            return (
                f"{human(now['orig_data_size'])}  5% of 100M" in tmux.line("stored")
                and human(now["total_bytes"]) in tmux.line("spent")
                and f"payload {human(now['compr_data_size'])} " in tmux.lines()[3]
                and f"limit 32M: {100 * now['mem_used_total'] / (32 << 20):.0f}%" in tmux.lines()[3]
                and f"{now['frag_ratio']:.2f}%" in tmux.line("frag")
                and f"{now['occupancy']:.2f}%" in tmux.line("in use")
                and f" {number(now['freeable_pages'])} freeable" in tmux.line("compact")
                and groups(tmux) == told(served)
            )

        wait_until(shown)
        before = served.stats()
        assert before["freeable_pages"] > 100, "this test wants something to compact"

        tmux.press("c")
        tmux.shows("pages freed, frag ratio")
        after = served.stats()
        # (Some of it may be the pages kept after a fill, which go by themselves after a while.)
        assert before["mem_used_total"] - after["mem_used_total"] >= before["freeable_pages"] * 4096
        tmux.shows(f"zram0: {after['pages_compacted']} pages freed, frag ratio {after['frag_ratio']:.2f}%")
        wait_until(lambda: f"{after['frag_ratio']:.2f}%" in tmux.line("frag"))
        assert f" {number(after['pages_compacted'])} in all" in tmux.line("compact")
        assert groups(tmux) == told(served)
        assert groups(tmux) != {}

    def test_moved_and_gained_are_seen_while_compaction_runs(self, serve: Serve, tmux: Tmux) -> None:
        served = serve(compaction="off", recompression="off")  # then the map has a row for each group
        fill(served)
        before = told(served)
        tmux.start(*at(served), "-i 2")
        samples_shown = re.compile(r"compact +(\S+) moved/s +(\S+) freed/s")
        assert samples_shown.match(tmux.line("compact"))
        # So that the next look comes after the compaction: the rates are over the time between.
        served.request("POST", "/compact")
        after = told(served)
        gained = {name: after[name] - before[name] for name in after}

        def shown() -> bool:
            lines = tmux.lines()
            expected = {f"{name:>4}": f"{gain:+d}" for name, gain in gained.items() if gain}
            rows = {line[:4]: line.split()[-1] for line in lines if line[:4] in expected}
            moved = samples_shown.match(tmux.line("compact"))
            return rows == expected and moved is not None and moved[1] != "0" and moved[2] != "0"

        wait_until(shown)

    def test_rates(self, serve: Serve, tmux: Tmux) -> None:
        served = serve(disksize="64M")
        ended = threading.Event()

        def work() -> None:
            connection = NbdSocket(served)
            while not ended.wait(0.005):
                assert connection.ask(connection.WRITE, 0, BLOCK, b"x" * BLOCK) == 0
                connection.read(0, 2 * BLOCK)
            connection.close()

        worker = threading.Thread(target=work)
        worker.start()
        try:
            tmux.start(*at(served), "-i 0.5")
            wait_until(lambda: " 1 client " in tmux.lines()[0])

            def agrees() -> bool:
                """What is shown is the rate of two seconds. (A busy machine has uneven ones.)"""
                first, started = served.stats(), time.monotonic()
                time.sleep(2)
                last, seconds = served.stats(), time.monotonic() - started
                right = []
                for verb, counter in (("read", "reads"), ("write", "writes")):
                    match = re.match(rf"{verb} +(\d+\.?\d*)/s +(\S+)/s.* (\d+)$", tmux.line(verb))
                    assert match, tmux.text()
                    rate = (last[counter] - first[counter]) / seconds
                    right.append(float(match[1]) == pytest.approx(rate, rel=0.5))
                    assert "█" in tmux.line(verb), "the highest of the history reaches the top"
                    assert float(match[3]) >= float(match[1])
                return all(right)

            wait_until(agrees, 60)
        finally:
            ended.set()
            worker.join()
        wait_until(lambda: re.match(r"write +0/s", tmux.line("write")))
        assert " 0 clients " in tmux.lines()[0]

    def test_help_pause_and_interval(self, serve: Serve, tmux: Tmux) -> None:
        served = serve()
        tmux.start(*at(served))
        tmux.press("?")
        tmux.shows("zramd top: one device, live")
        tmux.press("?")
        wait_until(lambda: tmux.line("stored"))
        tmux.press("Space")
        tmux.shows("PAUSED")
        shown = tmux.lines()[1:]
        connection = NbdSocket(served)
        assert connection.ask(connection.WRITE, 0, BLOCK, os.urandom(BLOCK)) == 0
        connection.close()
        time.sleep(1.5)
        assert tmux.lines()[1:] == shown, "it stands still"
        tmux.press("Space")
        wait_until(lambda: "4K" in tmux.line("stored"))
        assert "PAUSED" not in tmux.text()
        tmux.press("+")
        tmux.shows("every 2s")
        for _ in range(3):
            tmux.press("-")
        tmux.shows("every 0.2s")

    @pytest.mark.parametrize("size", [(60, 16), (80, 23), (100, 30), (200, 50)])
    def test_resize(self, serve: Serve, tmux: Tmux, size: tuple[int, int]) -> None:
        served = serve()
        tmux.start(*at(served))
        tmux.resize(*size)
        wait_until(lambda: tmux.lines()[-1].startswith(" q  quit"))
        lines = tmux.lines()
        assert len(lines) == size[1]
        assert max(map(len, lines)) <= size[0]
        assert lines[0].rstrip().endswith("every 1s")
        assert len(lines[0]) == size[0], "all of the width is used"
        assert [
            len([line for line in lines if line.startswith(word)]) for word in ("stored", "size", " q ")
        ] == [
            1,
            1,
            1,
        ], "nothing of the old screen is left"

    def test_too_small_and_back(self, serve: Serve, tmux: Tmux) -> None:
        served = serve()
        tmux.start(*at(served))
        tmux.resize(50, 10)
        tmux.shows("50x10 is too small: 60x16 is needed")
        tmux.resize(80, 24)
        wait_until(lambda: tmux.line("stored"))

    @pytest.mark.parametrize(
        ("term", "environment", "colours"),
        [
            ("screen-256color", {}, r"\x1b\[38;5;75m"),
            ("linux", {}, r"\x1b\[36m"),
            ("screen-256color", {"NO_COLOR": "1"}, None),
            ("vt100", {}, None),
        ],
    )
    def test_colours(
        self, serve: Serve, tmux: Tmux, term: str, environment: dict[str, str], colours: str | None
    ) -> None:
        served = serve()
        fill(served, 500)
        tmux.start(*at(served), term=term, **environment)
        shown = tmux.text("-e")
        if colours is None:
            assert not re.search(r"\x1b\[[0-9;]*(?<![0-9])(?:3[0-8]|4[0-8])(?![0-9])[0-9;]*m", shown)
        else:
            assert re.search(colours, shown)
        assert ("#" in tmux.line("stored")) == (term == "linux"), "the console's font lacks the blocks"

    def test_terminal_without_unicode(self, serve: Serve, tmux: Tmux) -> None:
        served = serve()
        fill(served, 500)
        tmux.start(*at(served), LC_ALL="POSIX", PYTHONCOERCECLOCALE="0", PYTHONUTF8="0")
        assert tmux.text().isascii()
        assert "#" in tmux.line("stored")


class TestEnd:
    @pytest.mark.parametrize("key", ["q", "C-c"])
    def test_key(self, serve: Serve, tmux: Tmux, key: str) -> None:
        served = serve()
        tmux.start(*at(served))
        assert tmux.format("#{alternate_on} #{cursor_flag}") == "1 0"
        tmux.press(key)
        tmux.is_as_before(0)

    def test_signal(self, serve: Serve, tmux: Tmux) -> None:
        served = serve()
        tmux.start(*at(served))
        os.kill(tmux.process(), signal.SIGTERM)
        tmux.is_as_before(128 + signal.SIGTERM)

    def test_background_and_back(self, serve: Serve, tmux: Tmux) -> None:
        served = serve()
        tmux.start(*at(served))
        tmux.press("C-z")
        tmux.shows("Stopped")
        assert tmux.line("before")
        tmux.type("fg\n")
        wait_until(lambda: tmux.line("stored"))
        tmux.press("q")
        tmux.is_as_before(0)


class TestServer:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
    def test_end_and_return(self, serve: Serve, tmux: Tmux, number: int) -> None:
        served = serve()
        fill(served, 300)
        tmux.start(*at(served), "-i 0.2")
        stored = tmux.line("stored").split()[-4]
        served.stop(number)
        tmux.shows("the server of zram0 has ended: waiting for it to come back")
        assert stored in tmux.line("stored"), "the last numbers stay"
        back = serve(rundir=served.rundir)
        tmux.shows(f"is served by process {back.process.pid}")
        wait_until(lambda: "0B" in tmux.line("stored"))
        assert "has ended" not in tmux.text()
        tmux.press("q")
        tmux.is_as_before(0)

    def test_that_does_not_answer(self, serve: Serve, tmux: Tmux) -> None:
        served = serve()
        tmux.start(*at(served), "-i 0.2")
        served.process.send_signal(signal.SIGSTOP)
        try:
            tmux.shows("does not answer: waiting for it", timeout=20)
            tmux.press("?")
            tmux.shows("one device, live", timeout=1)  # keys work meanwhile
        finally:
            served.process.send_signal(signal.SIGCONT)
        tmux.press("?")
        wait_until(lambda: tmux.line("stored") and "does not answer" not in tmux.text())

    def test_another_device(
        self, serve: Serve, tmux: Tmux, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        environment = {}
        if os.geteuid():
            monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
            environment["XDG_RUNTIME_DIR"] = str(tmp_path)
        names = [f"top{os.getpid()}{letter}" for letter in "ab"]
        for name in names:
            serve(name=name, rundir=f"{rundir.base()}/{name}", disksize="8M")
        tmux.start(names[0], **environment)
        for key, name in (("Tab", names[1]), ("Left", names[0]), ("Right", names[1])):
            tmux.press(key)
            wait_until(lambda name=name: tmux.lines()[0].startswith(f" {name} "))
        assert re.search(r"device \d+/\d+", tmux.text())


class TestOnce:
    def test_text(self, serve: Serve) -> None:
        served = serve(disksize="100M", compaction="off")
        fill(served, 500)
        numbers = served.stats()
        done = zramd("top", "--once", *at(served))
        assert (done.returncode, done.stderr) == (0, "")
        lines = done.stdout.splitlines()
        assert len(lines) == 23
        assert max(map(len, lines)) <= 80
        assert "\x1b" not in done.stdout
        assert f" {numbers['frag_ratio']:.2f}%" in lines[5]
        assert human(numbers["orig_data_size"]) in lines[1]
        assert re.fullmatch(r"tiers +\S+ +\S hot \S+ \d+%  \S cold 0B 0%  \S raw \S+ \d+%", lines[4])
        writes = re.match(r"write +(\S+)/s", lines[8])
        assert writes
        assert writes[1] != "0", "means since the start"

    def test_over_an_interval(self, serve: Serve) -> None:
        served = serve()
        fill(served, 500)
        started = time.monotonic()
        done = zramd("top", "-1", "-i", "0.5", *at(served))
        assert time.monotonic() - started >= 0.5
        assert re.search(r"^write +0/s", done.stdout, re.MULTILINE), "nothing was written in that time"

    def test_width(self, serve: Serve) -> None:
        served = serve()
        done = zramd("top", "--once", *at(served), env={"COLUMNS": "120"})
        assert max(map(len, done.stdout.splitlines())) > 100


class TestRefusals:
    def test_no_terminal(self, serve: Serve) -> None:
        served = serve()
        words = "standard input is not a terminal: 'zramd top --once' draws without one"
        assert refused("top", *at(served), status=2) == words

    @pytest.mark.parametrize("term", ["dumb", "nonsense", ""])
    def test_terminal_that_cannot(self, serve: Serve, tmux: Tmux, term: str) -> None:
        served = serve()
        command = " ".join(("top", *at(served)))
        tmux.resize(400, 24)
        tmux.type(f"clear; TERM={term} {sys.executable} -m zramd {command}; echo status $?\n")
        tmux.shows("status 2")
        assert f"zramd: TERM='{term}' is not a terminal that can show a screen: set TERM to" in tmux.text()
        assert "Traceback" not in tmux.text()

    @pytest.mark.parametrize("text", ["0", "61", "-1", "fast", "nan", "inf", ""])
    def test_interval(self, text: str) -> None:
        done = zramd("top", f"--interval={text}")
        assert (done.returncode, done.stdout) == (2, "")
        assert f"'{text}' is not an interval: use 0.1 to 60 seconds" in done.stderr
        assert done.stderr.count("\n") == 1

    def test_no_such_device(self, tmp_path: Path) -> None:
        assert refused("top", "nobody9").startswith("there is no device 'nobody9'")
        assert refused("top", "--rundir", str(tmp_path)).startswith("no server has used")

    def test_no_device_at_all(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from zramd.commands import main

        monkeypatch.setattr(rundir, "base", lambda: str(tmp_path))
        assert main(["top"]) == 1


def test_sample_of_a_real_server(serve: Serve) -> None:
    served = serve()
    fill(served, 300)
    taken = samples.take(servers.find(None, str(served.rundir)))
    numbers = served.stats()
    for name in ("orig_data_size", "mem_used_total", "frag_ratio", "writes", "notify_free"):
        assert taken.stats[name] == numbers[name]
    assert taken.groups() == told(served)
    assert taken.clients == 0
