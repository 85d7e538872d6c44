"""A server under test, what its clients know of it, and what must hold whatever has failed."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from supervisor import Program, Rule, Supervisor
from support import backings
from support.client import NbdSocket
from support.content import block_content
from support.run import talk

from zramd.contract import rundir
from zramd.server import opening
from zramd.settings import config

BLOCK = 4096
SIZE = 32 << 20
PATIENCE = 4.0  # seconds: what has not come by then does not come
LOG_PATIENCE = 1.0  # seconds until the log has what the server said
ENV = {"PYTHONDONTWRITEBYTECODE": "1"}

UNREADABLE = "it is out, and the backing cannot be read there"
# What the log says of lines that came before what failed.
HELD_BACK = re.compile(r"^zramd: \d+ lines more like these were held back$", re.M)
# Words by which a message names a cause, beside those of strerror.
SYNONYMS = {
    # libc says the second of a thread; of a block that is out, only that is told which cannot be read.
    "ENOMEM": ("memory", "temporarily unavailable", UNREADABLE),
    "EAGAIN": ("thread", "process", "memory"),
    "ENOBUFS": ("buffer",),
    "EMFILE": ("too many open files", "descriptor"),
    "ENFILE": ("too many open files", "descriptor"),
    "EIO": (UNREADABLE,),
}


class Violation(Exception):
    """A promise that was not kept."""


def ensure(condition: object, sentence: str) -> None:
    """Raise Violation with the sentence unless the condition holds."""
    if not condition:
        raise Violation(sentence)


def eventually(look: Callable[[], object], sentence: str, patience: float = PATIENCE) -> None:
    """Wait until `look` says yes; an OSError says no. Raises Violation."""
    end = time.monotonic() + patience
    last: object = None
    while True:
        try:
            last = look()
            if last:
                return
        except OSError as error:
            last = error
        ensure(time.monotonic() < end, f"{sentence} within {patience:g} s ({last!r})")
        time.sleep(0.01)


class Ended:
    """What a command has left: status, output and errors."""

    def __init__(self, program: Program, patience: float = 60.0) -> None:
        try:
            self.out, self.err = program.process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            program.process.kill()
            program.process.communicate()
            raise Violation(f"the command has not ended within {patience:g} s") from None
        self.status = program.process.returncode

    def __repr__(self) -> str:
        return f"status {self.status}, stdout {self.out!r}, stderr {self.err!r}"


class World:
    """A device on tmpfs, with all that its clients were answered."""

    name = "faulty"

    def __init__(
        self, with_state: bool, *settings: str, inside: Path = Path("/dev/shm"), disk: int = 0
    ) -> None:
        """`inside` is where its folder is made; `disk`: bytes of its backing, 0: it has none."""
        self.prefix: list[str] = []  # words before each command, such as prlimit's
        self.folder = Path(tempfile.mkdtemp(dir=inside, prefix="zramd-faults-"))
        self.rundir = self.folder / "run"
        self.socket = self.rundir / "nbd.sock"
        self.state = self.folder / "state" if with_state else None
        self.settings = [f"rundir={self.rundir}", "stats_interval=0.1", *settings]
        if self.state:
            self.settings.append(f"state={self.state}")
        self.backing: Path | None = None
        if disk:
            self.backing = backings.preallocated(_disk_folder(), disk)
            self.settings += [f"backing={self.backing}", "writeback_limit=off"]
        self.health = ("ok",)  # words for what may be said of it
        self.supervisor = Supervisor(
            [
                (str(self.rundir), "R"),
                (str(self.folder), "T"),
                *([(str(self.backing.parent), "B")] if self.backing else []),
            ]
        )
        self.known: dict[int, bytes] = {}  # block → what was answered to be there
        self.unsure: dict[int, set[bytes]] = {}  # block → what may be there instead, as no answer came
        self.standing: NbdSocket | None = None
        self.was_cut = 0  # how often the standing client had to connect again
        self.said: list[str] = []  # what was told to users since the last look
        self.last_said = ""
        self.log_seen = 0
        self.version = 0

    # Life

    def command(
        self,
        *words: object,
        name: str = "tool",
        patience: float = 60.0,
        env: dict[str, str] | None = None,
    ) -> Ended:
        """Run the zramd command under supervision, to its end."""
        argv = [*self.prefix, sys.executable, "-P", "-m", "zramd", *words]
        program = self.supervisor.run(
            name,
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **ENV, **(env or {})},
        )
        ended = Ended(program, patience)
        if ended.err:
            self.said.append(ended.err)
        return ended

    def start(self, *settings: str, name: str = "server") -> Ended:
        """Start the server as a user does."""
        words = ["start", self.name, "--size", "32M", *self.settings, *settings]
        self.supervisor.lasting_threads = frozenset()
        ended = self.command(*words, name=name)
        self.log_seen = 0
        if ended.status == 0:
            self.note_process()
        return ended

    def note_process(self) -> None:
        """Remember which process serves now, and which threads it has for good."""
        pid = self.pid
        if pid:
            # A thread that answers a caller is named as the one that accepts them.
            eventually(lambda: list(self.threads().values()).count("zramd") == 1, "a caller's thread stays")
            ours = {tid for tid, name in self.threads().items() if name.startswith("zramd")}
            self.supervisor.lasting_threads = frozenset(ours | {pid})

    @property
    def pid(self) -> int:
        """The process that holds the run folder, 0 for none."""
        return rundir.holder(str(self.rundir)) or 0

    def threads(self) -> dict[int, str]:
        """Number and name of each thread of the server."""
        found = {}
        for tid in os.listdir(f"/proc/{self.pid}/task"):
            with suppress(OSError):
                found[int(tid)] = Path(f"/proc/{self.pid}/task/{tid}/comm").read_text().strip()
        return found

    def alive(self) -> list[int]:
        """Which of the servers that were noted, or are found by their folder, run."""
        found = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            with suppress(OSError):
                words = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
                if f"rundir={self.rundir}".encode() in words and words[0].endswith(b"nbdkit"):
                    found.append(int(entry))
        return found

    def kill(self) -> None:
        """End every process of this world by force."""
        for pid in self.alive():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with suppress(Violation):
            eventually(lambda: not self.alive(), "killed servers are not gone", 10)

    def close(self) -> None:
        """Remove all."""
        if self.standing:
            self.standing.sock.close()
        self.kill()
        self.supervisor.close()
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.backing:
            shutil.rmtree(self.backing.parent, ignore_errors=True)

    # Talking to it

    def ask(self, method: str, path: str, body: str = "", patience: float = PATIENCE) -> tuple[int, str]:
        """One HTTP request; (0, reason) when there is no answer."""
        text = f"{method} {path} HTTP/1.1\r\nHost: zramd\r\nContent-Length: {len(body)}\r\n\r\n{body}"
        try:
            answer = talk(self.rundir / "control.sock", text.encode(), patience).decode()
            head, _, content = answer.partition("\r\n\r\n")
            status = int(head.split()[1])
        except (OSError, IndexError, ValueError) as error:
            return 0, repr(error)
        if status >= 400:
            self.said.append(content)
        return status, content

    def connect(self, patience: float = PATIENCE) -> NbdSocket:
        """Another client. Raises OSError."""
        return NbdSocket(self, patience)  # type: ignore[arg-type]

    def stand(self, patience: float = PATIENCE) -> NbdSocket:
        """The client that stays; it connects again if it was cut off. Raises OSError."""
        if self.standing is None:
            self.standing = self.connect(patience)
        return self.standing

    def drop(self) -> None:
        """Forget the standing client: its connection has ended."""
        if self.standing is not None:
            self.standing.sock.close()
            self.standing = None
            self.was_cut += 1

    def forget(self) -> None:
        """Begin with nothing: no content is expected, and the state file is gone."""
        self.known.clear()
        self.unsure.clear()
        if self.state and self.state.exists():
            self.state.unlink()
        if self.backing:
            self.write_backing(bytes(1 << 20))

    def write_backing(self, data: bytes) -> None:
        """Write to the beginning of the backing, which stays the file that it is."""
        assert self.backing is not None
        with self.backing.open("r+b") as file:
            file.write(data)

    def write(self, client: NbdSocket, block: int, count: int = 1, version: int | None = None) -> int:
        """Write blocks that tell their version; return the answer's error. Raises OSError."""
        if version is None:
            self.version += 1
            version = self.version
        parts = [block_content(block + i, version) for i in range(count)]
        self.expect(block, parts)
        error = client.ask(client.WRITE, block * BLOCK, count * BLOCK, b"".join(parts))
        self.settle(block, parts, error)
        return error

    def discard(self, client: NbdSocket, command: int, block: int, count: int = 1) -> int:
        """Trim or zero blocks; return the answer's error. Raises OSError."""
        parts = [bytes(BLOCK)] * count
        self.expect(block, parts)
        error = client.ask(command, block * BLOCK, count * BLOCK)
        self.settle(block, parts, error)
        return error

    def expect(self, block: int, parts: list[bytes]) -> None:
        """Until there is an answer, each block may be as before or as wanted."""
        for number, part in enumerate(parts, block):
            self.unsure.setdefault(number, set()).add(part)

    def settle(self, block: int, parts: list[bytes], error: int) -> None:
        """Take note of an answer."""
        for number, part in enumerate(parts, block):
            if not error:
                self.known[number] = part
                self.unsure.pop(number, None)

    def verify(self, read: Callable[[int, int], bytes]) -> None:
        """Read everything that was ever answered. Raises Violation."""
        blocks = sorted(self.known.keys() | self.unsure.keys())
        if not blocks:
            return
        last = blocks[-1] + 1
        data = b"".join(read(at * BLOCK, min(256, last - at) * BLOCK) for at in range(0, last, 256))
        for block in blocks:
            found = data[block * BLOCK : (block + 1) * BLOCK]
            wanted = self.known.get(block, bytes(BLOCK))
            if found != wanted:
                ensure(found in self.unsure.get(block, ()), f"block {block}: what was answered is lost")
            self.known[block] = found
            self.unsure.pop(block, None)

    # What must hold

    def log(self) -> str:
        """What the server has said since the last look."""
        try:
            data = (self.rundir / "log").read_bytes()
        except OSError:
            return ""
        text = data[self.log_seen :].decode(errors="replace")
        self.log_seen = len(data)
        return text

    def forget_said(self) -> None:
        """What was said before does not count."""
        self.log()
        self.said.clear()

    def check_said(self, rule: Rule) -> None:
        """What users were told has no traceback and names the cause."""
        self.last_said = HELD_BACK.sub("", "\n".join([*self.said, self.log()]))
        self.said.clear()
        if rule.hits and self.last_said.strip() and rule.error != "short":
            words = [os.strerror(getattr(errno, rule.error)).lower(), *SYNONYMS.get(rule.error, ())]
            if rule.place.call.startswith("clone"):
                words.append("thread")

            def named() -> bool:
                self.last_said += self.log()  # whose thread may have met the same shortage, and comes later
                return any(word in self.last_said.lower() for word in words)

            with suppress(Violation):
                eventually(named, "", LOG_PATIENCE)
            ensure(named(), f"the cause is not named: {_tail(self.last_said)}")
        ensure("Traceback" not in self.last_said, f"a traceback: {_tail(self.last_said)}")

    def check_serving(self, pid: int, may_cut: bool) -> None:
        """The same process serves old and new clients, with everything; its counters are told again."""
        ensure(
            self.pid == pid, f"process {pid} does not serve any more: {_tail(self.last_said + self.log())}"
        )
        answer = (0, "")

        def healthy() -> bool:
            nonlocal answer
            answer = self.ask("GET", "/health", patience=2)
            return any(words in answer[1] for words in self.health)

        try:
            eventually(healthy, "/health is not ok")
        except Violation as violation:
            raise Violation(f"{violation}: {answer}; said: {_tail(self.last_said + self.log())}") from None
        self.said.clear()
        before = self.was_cut
        for turn in range(2):
            try:
                client = self.stand()
                self.verify(client.read)
                break
            except (OSError, AssertionError) as error:
                self.drop()
                ensure(turn == 0, f"an old client is not served: {error!r}")
        ensure(may_cut or self.was_cut == before, "a client was cut off that has nothing to do with it")
        try:
            other = self.connect()
            ensure(self.write(other, 4000) == 0, "a new client cannot write")
            ensure(
                other.read(4000 * BLOCK, BLOCK) == self.known[4000],
                "a new client does not read what it wrote",
            )
            other.close()
        except (OSError, AssertionError) as error:
            raise Violation(f"a new client is not served: {error!r}") from None
        writes = json.loads(self.ask("GET", "/stats")[1])["writes"]

        def told() -> bool:
            return bool(json.loads((self.rundir / "stats.json").read_text())["writes"] >= writes)

        eventually(told, "the stats files do not follow", 3)
        tasks = {int(tid) for tid in os.listdir(f"/proc/{pid}/task")}
        ensure(self.supervisor.lasting_threads <= tasks, "a thread of the server has died")

    def check_restart(self, name: str = "tool") -> None:
        """It can be restarted, with all data; the new one is called `name` in places."""
        before = self.pid
        ended = self.command("restart", "--rundir", self.rundir, name=name)
        ensure(ended.status == 0, f"restart does not work afterwards: {ended}")
        ensure(self.pid not in (0, before), "restart left the old server or none")
        self.note_process()
        self.log_seen = 0
        self.drop()
        self.verify(self.stand().read)

    def check_stop(self) -> None:
        """It can be stopped, leaves nothing, and its state has everything."""
        # Without a state it refuses beside a client, whose data would be lost.
        ended = self.command("stop", "--rundir", self.rundir, *([] if self.state else ["--force"]))
        ensure(ended.status == 0, f"stop does not work afterwards: {ended}")
        self.drop()
        self.check_gone()

    def check_gone(self) -> None:
        """No process and no file is left but the state, and that has everything."""
        eventually(lambda: not self.alive(), "a server is left")
        there = sorted(path.name for path in self.rundir.iterdir()) if self.rundir.exists() else []
        ensure(not there, f"left in the run folder: {there}")
        if self.state is None:
            self.known.clear()
            self.unsure.clear()
        elif self.known or self.unsure:
            self.check_state()

    def check_state(self) -> None:
        """A new server finds everything in the state."""
        assert self.state is not None
        pairs = dict(pair.split("=", 1) for pair in [*self.settings, f"size={SIZE}"])
        made = opening.make_device(config.parse(pairs.items()))
        device = made.device
        if made.backing:
            os.close(made.backing._opened.fd)

        def read(offset: int, length: int) -> bytes:
            data = bytearray(length)
            device.read(data, offset)
            return bytes(data)

        self.verify(read)
        device.check()


def _disk_folder() -> Path:
    for place in (None, "/var/tmp"):
        folder = Path(tempfile.mkdtemp(dir=place, prefix="zramd-faults-"))
        if backings.has_direct_io(folder):
            return folder
        folder.rmdir()
    raise Violation("neither the folder for temporary files nor /var/tmp has direct I/O, as backings need it")


def _tail(text: str) -> str:
    return text.strip()[-600:]
