"""The verbs of the `zramd` command, through the real command against a real server."""

import json
import os
import pty
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.run import wait_until
from support.run import zramd_command as zramd
from support.server import PACKAGE_PARENT, NbdkitProcess

from zramd.contract import rundir
from zramd.core.device import codec, frames
from zramd.stats import numbers

Serve = Callable[..., NbdkitProcess]
BLOCK = 4096


def said(*words: object) -> str:
    """Run the command, see that it succeeds in silence, and return what it prints."""
    done = zramd(*words)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def refused(*words: object, status: int = 1) -> str:
    """Run the command, see that it prints one sentence and ends with `status`, and return the sentence."""
    done = zramd(*words)
    assert (done.returncode, done.stdout) == (status, ""), done
    assert done.stderr.startswith("zramd: ")
    assert done.stderr.count("\n") == 1
    return done.stderr.removeprefix("zramd: ").rstrip("\n")


def at(served: NbdkitProcess) -> tuple[str, str]:
    return "--rundir", str(served.rundir)


def fill(served: NbdkitProcess, blocks: int) -> None:
    """Write compressible blocks, one repeated word and noise, and leave."""
    dice = random.Random(1)
    client = NbdSocket(served)
    for block in range(blocks):
        data = dice.randbytes(dice.randrange(100, 3000)).ljust(BLOCK, b"\0")
        assert client.ask(client.WRITE, block * BLOCK, BLOCK, data) == 0
    assert client.ask(client.WRITE, blocks * BLOCK, BLOCK, b"\xa5" * BLOCK) == 0
    assert client.ask(client.WRITE, (blocks + 1) * BLOCK, BLOCK, dice.randbytes(BLOCK)) == 0
    client.close()
    wait_until(lambda: served.clients() == 0)


@pytest.fixture
def name() -> str:
    """A device's name that nobody else has."""
    return f"test{os.getpid()}"


@pytest.fixture
def place(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the command finds devices without being told; the servers that a test left there are ended."""
    if os.geteuid() == 0:
        folder = Path("/run/zramd")
    else:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        folder = tmp_path / "zramd"
    yield folder
    for path in folder.glob(f"{name}*"):
        pid = rundir.holder(str(path))
        if pid:
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(path)


class TestList:
    def test_table(self, serve: Serve) -> None:
        served = serve(disksize="100M")
        fill(served, 100)
        numbers = served.stats()
        head, line = said("list", *at(served)).splitlines()
        assert head.split() == [
            "NAME",
            "ALGORITHM",
            "DISKSIZE",
            "DATA",
            "COMPR",
            "TOTAL",
            "STREAMS",
            "MOUNTPOINT",
            "FRAG",
        ]
        name, algorithm, disksize, data, *_, frag = line.split()
        assert (name, algorithm, disksize, data) == ("zram0", "lz4", "100M", "408K")
        assert float(frag) == pytest.approx(numbers["frag_ratio"], abs=0.01)
        assert head.index("DISKSIZE") + len("DISKSIZE") == line.index("100M") + len("100M")

    def test_bytes_and_raw(self, serve: Serve) -> None:
        served = serve(disksize="100M")
        fill(served, 10)
        numbers = served.stats()
        columns = "name,disksize,compr,peak,mountpoint,attached,pid,clients"
        line = said("list", "-b", "-n", "--raw", "-o", columns, *at(served))
        assert line.split(" ") == [
            *("zram0", "104857600", str(numbers["compr_data_size"]), str(numbers["mem_used_max"])),
            *("-", "-", str(served.process.pid), "0\n"),
        ]
        every = said("list", "--raw", "--output-all", *at(served)).splitlines()
        assert [len(line.split(" ")) for line in every] == [26, 26]

    def test_json(self, serve: Serve) -> None:
        served = serve(disksize="100M")
        shown = json.loads(said("--json", "-o", "+PID", *at(served)))
        assert shown == {
            "devices": [
                {
                    **{"name": "zram0", "algorithm": "lz4", "disksize": "100M", "data": "0B"},
                    **{"compr": "0B", "total": "0B", "streams": os.cpu_count(), "mountpoint": None},
                    "frag": 100.0,
                    "pid": served.process.pid,
                }
            ]
        }
        shown = json.loads(said("list", "-J", "-b", "-o", "DISKSIZE,COMP-RATIO", *at(served)))
        assert shown == {"devices": [{"disksize": 104857600, "comp-ratio": None}]}

    def test_unknown_column(self) -> None:
        assert refused("list", "-o", "NAME,foo", status=2).startswith(
            "unknown column 'FOO': use some of NAME,"
        )

    def test_finds_devices_and_says_which_have_died(self, place: Path, name: str) -> None:
        said("start", f"{name}a", "--size", "1M")
        said("start", f"{name}b", "--size", "2M")
        # Others may have devices there, too.
        shown = zramd("list", "--raw", "-n", "-o", "NAME,DISKSIZE").stdout
        rows = [line.split() for line in shown.splitlines()]
        assert [row for row in rows if row[0].startswith(name)] == [[f"{name}a", "1M"], [f"{name}b", "2M"]]
        bare = zramd().stdout
        assert bare.startswith("NAME ")
        assert f"\n{name}a " in bare
        os.kill(int((place / f"{name}b" / "pid").read_text()), signal.SIGKILL)
        wait_until(lambda: zramd("list", f"{name}b").returncode == 1)
        done = zramd()
        assert f"\n{name}a " in done.stdout
        assert f"{name}b " not in done.stdout
        assert done.returncode == 1
        remedy = f"start it again, or remove what it left behind by 'rm -r {place}/{name}b'"
        sentence = f"the server of {name}b has died, and its data with it: {remedy}"
        assert f"zramd: {sentence}\n" in done.stderr
        for verb in ("stats", "stop", "compact", "check", "dump"):
            assert refused(verb, f"{name}b") == sentence
        said("start", f"{name}b", "--size", "3M")
        assert said("list", "-n", "--raw", "-o", "DISKSIZE", f"{name}b") == "3M\n"
        said("stop", f"{name}a")
        said("stop", f"{name}b")
        assert not (place / f"{name}a").exists()

    def test_one_that_hangs(self, place: Path, name: str) -> None:
        said("start", f"{name}a", "--size", "1M")
        said("start", f"{name}b", "--size", "1M")
        pid = int((place / f"{name}a" / "pid").read_text())
        os.kill(pid, signal.SIGSTOP)
        done = zramd()
        os.kill(pid, signal.SIGCONT)
        assert f"{name}a does not answer within 2 seconds: look at its process, {pid}\n" in done.stderr
        assert f"\n{name}b " in done.stdout

    def test_what_does_not_exist(self, place: Path, name: str, tmp_path: Path) -> None:
        assert refused("list", name).startswith(f"there is no device '{name}': ")
        assert refused("stats", name).startswith(f"there is no device '{name}': ")
        assert refused("stats", "--rundir", tmp_path).startswith(f"no server has used '{tmp_path}'")
        assert refused("stats", status=2).startswith("which device? ")
        assert refused("stats", "../x", status=2).startswith("'../x' is not a device's name")


class TestStart:
    def test_start_and_stop(self, place: Path, name: str) -> None:
        shown = dict(line.split(maxsplit=1) for line in said("start", name, "--size", "64M").splitlines()[:2])
        folder = place / name
        assert shown == {"name": name, "pid": (folder / "pid").read_text().strip()}
        pid = int(shown["pid"])
        assert os.getsid(pid) != os.getsid(0)
        assert os.readlink(f"/proc/{pid}/fd/0") == "/dev/null"
        text = said("stats", name)
        assert text.startswith(f"{name}: zramd ")
        assert f"(pid {pid})" in refused("start", name)
        assert said("stop", name) == ""
        assert not folder.exists()
        with suppress(FileNotFoundError, ProcessLookupError):
            assert "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]

    def test_it_answers_when_start_returns(self, place: Path, name: str) -> None:
        text = said("start", name, "mem_limit=4M", "--size", "8M", "--", "-t", "2")
        uri = f"nbd+unix:///{name}?socket={place}/{name}/nbd.sock"
        assert f"NBD URI       {uri}\n" in text
        shown = subprocess.run(["nbdinfo", "--size", uri], capture_output=True, text=True, check=True)
        assert int(shown.stdout) == 8 << 20
        assert json.loads(said("stats", name, "--json"))["mem_limit"] == 4 << 20
        said("stop", name)

    def test_log(self, place: Path, name: str) -> None:
        """What the server says later is in its folder, and does not disturb it."""
        said("start", name, "--size", "1M")
        log = place / name / "log"
        assert log.read_text() == ""
        subprocess.run(
            ["nbdinfo", f"nbd+unix:///other?socket={place}/{name}/nbd.sock"], capture_output=True, check=False
        )
        wait_until(lambda: "export 'other' does not exist" in log.read_text())
        assert said("check", name).startswith(f"{name} is sound")
        said("stop", name)

    def test_without_an_endpoint(self, place: Path, name: str) -> None:
        said("start", name, "--size", "1M", "endpoint=off")
        assert refused("stats", name).endswith("it is starting, stopping, or runs with endpoint=off")
        said("stop", name)

    @pytest.mark.parametrize(
        ("words", "status", "sentence"),
        [
            (["--", "-s"], 2, "a server in the background has no standard input to serve"),
            (["--size", "1X"], 2, "disksize: '1X' is not a size"),
            (["colour=red"], 2, "unknown setting 'colour': use one of"),
            (["rundir=/proc/x"], 1, "rundir '/proc/x' cannot be used: no such file or directory"),
            (["--", "--badopt"], 1, "does not start: unrecognized option '--badopt'"),
        ],
    )
    def test_reason(self, place: Path, name: str, words: list[str], status: int, sentence: str) -> None:
        assert sentence in refused("start", name, *words, status=status)
        assert not (place / name).exists()

    def test_reason_in_the_words_of_nbdkit(self, place: Path, name: str) -> None:
        """One nbdkit calls the filter by its name, a newer one by its file."""
        sentence = refused("start", name, "--", "--filter=nonesuch", status=1)
        assert f"{name} does not start: cannot open filter " in sentence
        assert "nonesuch" in sentence
        assert not (place / name).exists()

    def test_reason_that_comes_late(self, place: Path, name: str, tmp_path: Path) -> None:
        """What fails after nbdkit listens is told too: here the endpoint's socket."""
        folder = tmp_path / "run"
        (folder / "control.sock").mkdir(parents=True)
        folder.chmod(0o700)
        sentence = refused("start", name, f"rundir={folder}")
        assert sentence.startswith(f"{name} does not start: ")
        assert "is a directory" in sentence

    def test_stop_that_takes_too_long(self, serve: Serve) -> None:
        served = serve()
        served.process.send_signal(signal.SIGSTOP)
        code = (
            "import sys; from zramd.commands import main; from zramd.control import busy; "
            "from zramd.launch import lifecycle; "
            "lifecycle.STOP_TIMEOUT = busy.LOOK_TIMEOUT = 0.2; sys.exit(main())"
        )
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, "stop", *at(served)],
            env={**os.environ, "PYTHONPATH": str(PACKAGE_PARENT)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        served.process.send_signal(signal.SIGCONT)
        assert done.returncode == 1
        assert "has not stopped within 0.2 seconds: 'kill -QUIT " in done.stderr


class TestShow:
    def test_stats(self, serve: Serve) -> None:
        served = serve()
        (line,) = (line for line in said("stats", *at(served)).splitlines() if "compression_ratio" in line)
        assert line.split()[:2] == ["compression_ratio", "-"]
        fill(served, 50)
        text = said("stats", *at(served))
        for number in numbers.NUMBERS:
            (line,) = [line for line in text.splitlines() if line.startswith(f"{number.name} ")]
            assert number.meaning in line
            assert not number.unit or f" {number.unit} " in line
        assert f" {52 * BLOCK} bytes " in text
        values = json.loads(said("stats", "-J", *at(served)))
        assert values["pages_stored"] == 52
        assert values.keys() == served.stats().keys()

    def test_classes(self, serve: Serve) -> None:
        served = serve()
        fill(served, 50)
        assert said("classes", *at(served)) == served.request("GET", "/classes")[1]
        rows = json.loads(said("classes", "--json", *at(served)))
        assert sum(row["obj_used"] for row in rows) == 51
        assert sum(row["pages_used"] for row in rows) * BLOCK == served.stats()["mem_used_total"]

    def test_compact(self, serve: Serve) -> None:
        served = serve(compaction="off")
        fill(served, 2000)
        client = NbdSocket(served)
        for block in random.Random(2).sample(range(2000), 1300):
            assert client.ask(client.TRIM, block * BLOCK, BLOCK) == 0
        before = served.stats()
        words = said("compact", *at(served)).split()
        after = served.stats()
        pages = int(words[0])
        assert words[1:3] == ["pages", f"({pages * BLOCK}"]
        # The end of a compaction also gives back what was kept for the next write.
        assert 0 < pages * BLOCK <= before["mem_used_total"] - after["mem_used_total"]
        assert float(words[10]) == round(before["frag_ratio"], 2)
        assert float(words[12]) == round(after["frag_ratio"], 2) > float(words[10])
        assert after["freeable_pages"] == 0

    def test_set(self, serve: Serve) -> None:
        served = serve()
        words = ["mem_limit=1M", "compaction=off", "compaction_interval=0.5", "stats_interval=0"]
        text = said("set", *at(served), *words)
        assert text == "mem_limit=1048576\ncompaction=off\ncompaction_interval=0.5\nstats_interval=0\n"
        assert served.stats()["mem_limit"] == 1 << 20
        assert json.loads(served.request("GET", "/health")[1])["compactor"] == "off"
        settings = json.loads(said("dump", *at(served)))["settings"]
        assert settings["mem_limit"] == 1 << 20
        assert settings["compaction_interval"] == 0.5

    def test_set_takes_effect(self, serve: Serve) -> None:
        """Compaction that is switched on compacts; stats files that are switched on are written."""
        served = serve(compaction="off", stats_interval="0")
        fill(served, 2000)
        client = NbdSocket(served)
        for block in random.Random(2).sample(range(2000), 1300):
            assert client.ask(client.TRIM, block * BLOCK, BLOCK) == 0
        before = served.stats()
        assert (before["freeable_pages"] > 100, before["pages_compacted"]) == (True, 0)
        assert not (served.rundir / "mm_stat").exists()
        said("set", *at(served), "compaction=on", "compaction_interval=0.05", "stats_interval=0.05")
        # Not all that is freeable: objects are lent to larger classes only in one that was asked for.
        wait_until(lambda: served.stats()["pages_compacted"] > 100)
        wait_until((served.rundir / "mm_stat").exists)

    def test_bad_set(self, serve: Serve) -> None:
        served = serve()
        assert refused("set", *at(served), status=2).startswith("nothing to set")
        assert "'x' is not a size" in refused("set", *at(served), "compaction=off", "mem_limit=x", status=2)
        sentence = refused("set", *at(served), "size=1G", status=2)
        assert sentence.startswith("disksize cannot be changed while the device is served: clients were told")
        assert "did you mean 'mem_limit'?" in refused("set", *at(served), "memlimit=1G", status=2)
        sentence = refused("set", *at(served), "mem_limit=1G", "compaction=off", "mem_limit=2G", status=2)
        assert sentence == "mem_limit='2G' is a second value: mem_limit is already '1G'"
        assert json.loads(served.request("GET", "/health")[1])["compactor"] != "off"
        assert json.loads(served.request("GET", "/settings")[1])["mem_limit"] == 0

    def test_check(self, serve: Serve) -> None:
        served = serve()
        fill(served, 200)
        assert said("check", *at(served)).startswith(f"{served.rundir.name} is sound (checked in ")

    def test_reset(self, serve: Serve) -> None:
        served = serve()
        fill(served, 20)
        client = NbdSocket(served)
        assert refused("reset", *at(served)).endswith(
            "device is in use: disconnect every client before a reset"
        )
        assert served.stats()["pages_stored"] == 22
        client.close()
        wait_until(lambda: served.clients() == 0)
        assert said("reset", *at(served)) == ""
        assert served.stats()["pages_stored"] == 0

    def test_dump(self, serve: Serve) -> None:
        served = serve(comp_algorithm="lz4(level=4)")
        fill(served, 20)
        state = json.loads(said("dump", *at(served)))
        assert state["settings"]["comp_algorithm"] == "lz4(level=4)"
        assert state["stats"]["pages_stored"] == 22
        assert sum(row["obj_used"] for row in state["classes"]) == 21
        assert state["health"]["status"] == "ok"
        assert state["pid"] == served.process.pid
        assert state["kernel"].startswith("Linux ")
        assert state["nbdkit"][0].isdigit()
        assert state["attached"] == {}

    def test_block(self, serve: Serve) -> None:
        served = serve(disksize="1M")
        fill(served, 20)
        text = said("debug", "block", *at(served), 3)
        assert "bytes 12288 to 16383" in text
        assert "kind          lz4: compressed" in text
        assert "word          0xa5a5a5a5a5a5a5a5\n" in said("debug", "block", *at(served), 20)
        assert "payload_bytes 4096\n" in said("debug", "block", *at(served), 21)
        assert "hole: never written" in said("debug", "block", *at(served), 22)
        values = json.loads(said("debug", "block", *at(served), 3, "--json"))
        assert 100 < values["payload_bytes"] < values["class_size"] <= 3100
        assert refused("debug", "block", *at(served), 256, status=2).endswith(
            "block 256 is not on the device, which has blocks 0 to 255"
        )
        assert "'x' is not a block's number" in refused("debug", "block", *at(served), "x", status=2)


class TestDoctor:
    def test_this_machine_is_ready(self) -> None:
        done = zramd("doctor")
        assert (done.returncode, done.stderr) == (0, "")
        assert "ok       nbdkit " in done.stdout
        found = json.loads(said("doctor", "--json"))
        assert found["ready"]
        levels = {finding["name"]: finding["level"] for finding in found["findings"]}
        assert levels["nbdkit's python plugin"] == levels["zramd's core"] == levels["run folder"] == "ok"
        assert all(finding["remedy"] for finding in found["findings"] if finding["level"] != "ok")
        texts = {finding["name"]: finding["text"] for finding in found["findings"]}
        assert f"with lz4 {codec.LZ4_VERSION} and zstd {frames.ZSTD_VERSION}, in" in texts["zramd's core"]

    def test_without_nbdkit(self, tmp_path: Path) -> None:
        done = zramd("doctor", env={"PATH": str(tmp_path)})
        assert done.returncode == 1
        assert "problem  nbdkit " in done.stdout
        assert "apt-get install --no-install-recommends nbdkit nbdkit-plugin-python" in done.stdout

    def test_core_for_another_python(self, tmp_path: Path) -> None:
        """nbdkit's Python does not find a core that it can load."""
        package = tmp_path / "lib"
        subprocess.run(["cp", "-r", PACKAGE_PARENT, package], check=True)
        for path in (package / "zramd" / "core").rglob("*.so"):
            path.rename(path.with_name(path.name.split(".")[0] + ".cpython-27-x86_64-linux-gnu.so"))
        done = zramd("doctor", env={"PYTHONPATH": str(package)})
        assert done.returncode == 1, done
        assert "problem  zramd's core" in done.stdout
        assert "nbdkit cannot load it: zramd is not built for nbdkit's Python 3." in done.stdout


def test_reader_that_has_seen_enough(serve: Serve) -> None:
    served = serve()
    command = [sys.executable, "-P", "-m", "zramd", "dump", *at(served)]
    done = subprocess.run(
        ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "-", *command], capture_output=True, timeout=60
    )
    assert done.stderr == b""


def in_bash(line: str, folder: Path) -> str:
    """What is offered at the end of `line`; so are the next two."""
    script = """
        set -u
        eval "$(cat completion)"
        compopt() { :; }
        read -ra COMP_WORDS <<<"$1"
        [[ $1 != *' ' ]] || COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
        COMPREPLY=()
        _zramd
        ((${#COMPREPLY[@]} == 0)) || printf '%s\\n' "${COMPREPLY[@]}"
    """
    return run_shell(["bash", "--norc", "-c", script, "-", line], folder)


def in_fish(line: str, folder: Path) -> str:
    return run_shell(["fish", "--no-config", "-c", "source completion; complete -C $argv[1]", line], folder)


def run_shell(command: list[str], folder: Path) -> str:
    env = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=folder, env=env)
    assert done.stderr == ""
    return done.stdout


def in_zsh(line: str, folder: Path) -> str:
    """Only at a terminal does it complete: this presses the tab key, and writes down what is added."""
    (folder / "setup").write_text("""
        autoload -Uz compinit && compinit -u -D && source completion
        compadd() {
            if [[ ${@[1,(i)(-|--)]} != *-(O|A|D)\\ * ]]; then
                local -a hits
                builtin compadd -O hits "$@"
                print -rl -- $hits >>offered
            fi
            builtin compadd "$@"
        }
        finish() { mv offered done }
        comppostfuncs=(finish)
        touch offered
    """)
    (folder / "done").unlink(missing_ok=True)
    ours, theirs = pty.openpty()
    env = {**os.environ, "HOME": str(folder), "TERM": "dumb"}
    shell = subprocess.Popen(
        ["zsh", "-fi", "+m"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=env,
        start_new_session=True,
    )
    try:
        os.write(ours, f"source setup\n{line}\t".encode())
        wait_until(lambda: (folder / "done").exists(), 20)
        return (folder / "done").read_text()
    finally:
        shell.kill()
        shell.wait()
        os.close(theirs)
        os.close(ours)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(place: Path, name: str, tmp_path: Path, shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    offer = {"bash": in_bash, "zsh": in_zsh, "fish": in_fish}[shell]

    def complete(line: str) -> list[str]:
        return sorted(word.rstrip("/") for word in offer(line, tmp_path).split())

    (tmp_path / "completion").write_text(said("completion", shell))
    (tmp_path / "here").mkdir()
    said("start", name, "--size", "1M")
    assert complete("zramd st") == ["start", "stats", "stop"]
    assert "list" in complete("zramd ")
    assert complete(f"zramd stats {name[:-1]}") == [name]
    assert complete(f"zramd debug block {name[:-1]}") == [name]
    assert "block" in complete("zramd debug ")
    assert complete("zramd stats --js") == ["--json"]
    assert complete("zramd start mem_") == ["mem_limit="]
    assert complete(f"zramd set {name} dis") == []
    assert complete(f"zramd set {name} mem") == ["mem_limit="]
    assert complete("zramd list -o PE") == ["PEAK"]
    assert complete("zramd list --output PE") == ["PEAK"]
    assert complete("zramd list --rundir h") == ["here"]
    assert shell in complete("zramd completion ")
    assert complete("zramd start --size ") == []
    said("stop", name)
    assert complete(f"zramd stats {name[:-1]}") == []
