"""What is left when a start, a stop, a restart or a load is interrupted at any of its steps, by a signal to
either side or by a second command. (Saves: test_save_command.py. Many at random, under load: tests/stress.)

`ENDS` is the promise. Each row: during which command; at which step (see zramd.process.steps) whoever reaches
it is held; who is hit there: the command, the old server, or the process at the step; by what, a signal or
another command; who serves in the end; and what the interrupted command says.

    old, new    the server that was there before, or a later one: with the data
    nobody      and a start with the same state finds the data
    either      a new one if the second command says so, else nobody: the old one is about to end by itself

    done        status 0, and what it prints is true
    interrupted status 128 + signal, and one sentence that is true
    failed      status 1, and one sentence
    killed      nothing
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.client import NbdSocket
from support.run import wait_until
from support.steps import Steps

from zramd.contract import rundir

ENDS = """
# during  at                whom      what                  serves   says
start     start.turn        command   INT,TERM,HUP          nobody   interrupted
start     start.turn        command   KILL                  nobody   killed
start     start.spawned     command   INT,TERM,HUP          nobody   interrupted
start     start.spawned     command   KILL                  new      killed
start     server.device     command   INT,TERM,HUP          nobody   interrupted
start     server.device     command   KILL                  new      killed
start     server.device     process   TERM,KILL             nobody   failed
start     server.rundir     command   INT                   nobody   interrupted
start     server.rundir     process   KILL                  nobody   failed
start     server.published  command   INT                   nobody   interrupted
start     server.published  process   KILL                  nobody   failed
start     start.serves      command   INT,TERM,HUP          new      done
start     start.serves      command   KILL                  new      killed
start     start.turn        second    start,stop,restart    new      done
start     server.device     second    start,stop,restart    new      done
stop      stop.turn         command   INT,TERM,HUP          old      interrupted
stop      stop.turn         command   KILL                  old      killed
stop      stop.turn         process   KILL                  old      killed
stop      stop.turn         second    start,stop,restart    nobody   done
stop      stop.told         command   INT,TERM,HUP          nobody   interrupted
stop      stop.told         command   KILL                  nobody   killed
stop      stop.told         second    start                 either   done
stop      stop.told         second    restart,stop          nobody   done
stop      server.leaves     command   INT                   nobody   interrupted
stop      server.leaves     command   KILL                  nobody   killed
stop      server.leaves     old       KILL                  nobody   done
restart   restart.turn      command   INT,TERM,HUP          old      interrupted
restart   restart.turn      command   KILL                  old      killed
restart   restart.turn      old       TERM,KILL             nobody   failed
restart   restart.sockets   command   INT,TERM,HUP          old      interrupted
restart   restart.sockets   command   KILL                  old      killed
restart   restart.sockets   old       TERM,KILL             nobody   failed
restart   restart.spawned   command   INT,TERM,HUP          old      interrupted
restart   restart.spawned   command   KILL                  old      killed
restart   restart.spawned   old       TERM                  nobody   failed
restart   restart.spawned   old       KILL                  new      done
restart   restart.ready     command   INT,TERM,HUP          old      interrupted
restart   restart.ready     command   KILL                  old      killed
restart   restart.ready     old       TERM                  nobody   failed
restart   restart.ready     old       KILL                  new      done
restart   restart.ready     second    start                 new      done
restart   restart.ready     second    stop                  nobody   done
restart   restart.ready     second    restart               new      done
restart   successor.go      command   INT,TERM,HUP          new      done
restart   successor.go      command   KILL                  new      killed
restart   successor.go      old       TERM                  nobody   failed
restart   successor.go      old       KILL                  new      done
restart   successor.go      process   KILL                  old      failed
restart   successor.told    command   INT,TERM,HUP          new      done
restart   successor.told    command   KILL                  new      killed
restart   successor.told    process   KILL                  new      failed
restart   successor.told    second    stop                  nobody   done
restart   successor.told    second    start,restart         new      done
restart   server.leaves     command   INT,TERM,HUP          new      done
restart   server.leaves     command   KILL                  new      killed
restart   server.leaves     old       TERM                  nobody   failed
restart   server.leaves     old       KILL                  new      done
restart   server.left       old       TERM                  nobody   failed
restart   server.left       old       KILL                  new      done
restart   successor.alone   command   INT                   new      done
restart   successor.alone   command   KILL                  new      killed
restart   successor.alone   process   KILL                  new      failed
restart   successor.alone   second    stop                  nobody   done
restart   successor.alone   second    start                 new      done
restart   server.device     command   KILL                  new      killed
restart   server.device     process   KILL                  new      failed
restart   server.device     process   TERM                  new      failed
restart   server.published  process   KILL                  new      failed
restart   server.serves     command   INT                   new      done
restart   restart.serves    command   INT,TERM,HUP          new      done
restart   restart.serves    command   KILL                  new      killed
"""
ROWS = [
    (during, at, whom, what, serves, says)
    for during, at, whom, whats, serves, says in (
        line.split() for line in ENDS.splitlines() if line and line[0] != "#"
    )
    for what in whats.split(",")
]
NAME = "held"
BLOCK = b"what was answered" * 256


class World:
    """One device, with a state, in folders of its own."""

    def __init__(self, tmp_path: Path, memory_folder: Path, steps: Steps) -> None:
        self.name = NAME
        self.rundir = tmp_path / "run"
        self.socket = self.rundir / "nbd.sock"
        self.memory = memory_folder
        self.state = memory_folder / "state"
        self.steps = steps

    def begin(self, verb: str, *words: str) -> "subprocess.Popen[str]":
        """Run a command on it."""
        if verb == "start":
            words = (NAME, "--size", "16M", f"rundir={self.rundir}", f"state={self.state}", *words)
        else:
            words = ("--rundir", str(self.rundir), *words)
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "zramd", verb, *words],
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **self.steps.env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, verb: str) -> tuple[int, str, str]:
        """Run it to its end."""
        return ended(self.begin(verb))

    @property
    def pid(self) -> int:
        return rundir.holder(str(self.rundir)) or 0

    def processes(self) -> list[int]:
        """All servers of it that there are."""
        found = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if words[0] == b"nbdkit" and f"rundir={self.rundir}".encode() in words:
                found.append(int(name))
        return found

    def read(self) -> bytes:
        nbd = NbdSocket(self)  # type: ignore[arg-type]
        data = nbd.read(0, len(BLOCK))
        nbd.close()
        return data

    def write(self) -> None:
        nbd = NbdSocket(self)  # type: ignore[arg-type]
        assert nbd.ask(nbd.WRITE, 0, len(BLOCK), BLOCK) == 0
        nbd.close()


def ended(process: "subprocess.Popen[str]") -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture
def world(tmp_path: Path, memory_folder: Path, steps: Steps) -> Iterator[World]:
    made = World(tmp_path, memory_folder, steps)
    yield made
    steps.release()
    for pid in made.processes():
        os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(("during", "at", "whom", "what", "serves", "says"), ROWS)
def test_ends(world: World, during: str, at: str, whom: str, what: str, serves: str, says: str) -> None:
    old = 0
    if during != "start":
        status, _, err = world.run("start")
        assert (status, err) == (0, "")
        old = world.pid
        world.write()
    before = len(world.steps.seen)
    world.steps.held.add(at)
    command = world.begin(during)
    held = world.steps.wait(at)
    second = None
    if whom == "second":
        second = world.begin(what)
        # It gets as far as it can: it refuses, or waits for its turn.
        wait_until(lambda: second.poll() is not None or (second.pid, "turn.waits") in world.steps.seen)
    else:
        target = {"command": command.pid, "old": old, "process": held}[whom]
        os.kill(target, getattr(signal, f"SIG{what}"))
        if what == "KILL" or (whom, at) == ("old", "restart.turn"):
            wait_until(lambda: is_gone(target) or target == command.pid)
    world.steps.release()
    status, out, err = ended(command)
    other = ended(second) if second else (0, "", "")
    steps = world.steps.seen[before:]
    assert "Traceback" not in err + other[2]

    # One server, or none; what was hit may take a moment to end, or to serve.
    wait_until(lambda: world.processes() == ([world.pid] if world.pid else []))
    if serves == "new" and world.pid == old:
        wait_until(lambda: world.pid not in (0, old))
    if serves in ("nobody", "old"):
        time.sleep(0.2)
    pid = world.pid
    end = "nobody" if not pid else "old" if pid == old else "new"
    if serves == "either":
        serves = "new" if other[0] == 0 else "nobody"
    assert end == serves, (end, status, out, err, other, steps)
    # A server's last moment comes after that of its pid file.
    wait_until(lambda: world.processes() == ([pid] if pid else []))

    # What was said is true.
    if says == "done":
        assert (status, err) == (0, "")
        if during == "start" and not second:
            assert f"pid           {pid}\n" in out
        if during == "restart" and (second is None or what == "start"):
            assert f"pid           {pid}\n" in out
    elif says == "interrupted":
        assert status == 128 + getattr(signal, f"SIG{what}")
        sentence = {
            "nobody": (f"{NAME} is not started", f"{NAME} has been told to stop"),
            "old": (f"{NAME} goes on as before", f"{NAME} is not stopped"),
        }[end]
        told = world.rundir.name if during != "start" else NAME
        assert err in [f"zramd: interrupted: {text.replace(NAME, told)}\n" for text in sentence] + [
            f"zramd: interrupted: {text}\n" for text in sentence
        ]
    elif says == "failed":
        assert status == 1
        assert err.startswith("zramd: ")
        assert err.count("\n") == 1
        assert ("goes on as before" in err) == (end == "old"), err
        assert ("is served as before, by a new process" in err) == (end == "new" and during == "restart"), err
    elif says == "killed":
        assert status == -signal.SIGKILL
    if second and what == "start" and other[0] == 0:
        assert f"pid           {pid}\n" in other[1]
    if second and what == "start" and other[0]:
        assert "is in use by a running server" in other[2]
    if second and what == "stop" and other[0] == 0:
        assert end == "nobody"
    if second and other[0]:
        assert other[0] == 1
        assert other[2].count("\n") == 1

    # The data is there, and nothing else.
    if not pid:
        left = sorted(os.listdir(world.rundir)) if world.rundir.exists() else []
        assert not left or rundir.PID in left, left
        assert world.run("start")[::2] == (0, "")
    if during != "start":
        assert world.read() == BLOCK
    assert set(os.listdir(world.rundir)) <= rundir._OURS | {rundir.PID}
    assert world.run("stop") == (0, "", "")
    wait_until(lambda: not world.processes())
    # What a killed process had made in a place of the user's choice stays, but empty.
    assert not world.rundir.exists() or (what == "KILL" and not os.listdir(world.rundir))
    assert os.listdir(world.memory) == ["state"]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
