"""The phases of a server's life: what is done while calls fail, and what must hold after each.

A live phase is done again and again with one server. The others begin with a server of their own each time.
"""

import json
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import calls
from supervisor import Rule
from support.client import NbdSocket
from support.run import talk
from world import BLOCK, PATIENCE, SIZE, Ended, World, ensure, eventually

from zramd import Device
from zramd.core.device.saving import load as load_stream
from zramd.errors import CorruptObjectError, SaveError

LASTING_PATIENCE = 0.7  # seconds to wait for an answer while a call fails for as long as we wait
_CLIENT_CALLS = ("nbdkit", "nbdkit+")  # threads whose failing calls may end a client's connection


class Phase:
    """One part of a server's life."""

    name = ""
    live = True
    thorough = True  # whether each place has all its errors: see plan.rules
    plain = True  # of a live phase: whether it is also tried without a state
    settings: tuple[str, ...] = ()
    disk = 0  # bytes of a backing; 0: there is none
    programs: tuple[str, ...] = ("server",)  # whose calls are to fail

    def prepare(self, world: World) -> None:
        """Do what the action begins with; nothing fails meanwhile."""

    def act(self, world: World, patience: float) -> None:
        """Do what calls are to fail in. Raises Violation for a wrong answer, never for none."""
        raise NotImplementedError

    def judge(self, world: World, rule: Rule) -> None:
        """Look whether all holds that must. Raises Violation."""
        world.check_said(rule)
        world.check_serving(self.pid, rule.place.thread in _CLIENT_CALLS or rule.lasting)

    def begin(self, world: World) -> None:
        """Start a server and fill it, for a live phase."""
        ended = world.start(*self.settings)
        ensure(ended.status == 0, f"start does not work: {ended}")
        self.pid = world.pid
        client = world.stand()
        for block in range(0, 64, 8):
            ensure(world.write(client, block, 8) == 0, "a write fails")
        world.check_serving(self.pid, True)


def _try(world: World, work: Callable[[NbdSocket], None], patience: float) -> None:
    """Let the standing client work; it connects again once."""
    for _ in range(2):
        try:
            client = world.stand(patience)
            client.sock.settimeout(patience)
            work(client)
            return
        except (OSError, AssertionError):
            world.drop()


class Serve(Phase):
    """Two clients: connect, read, write, trim, zero, ask for the status of blocks, leave."""

    name = "serve"

    def act(self, world: World, patience: float) -> None:
        dice = random.Random(world.version)
        first = 64 + world.version % 1500

        def work(client: NbdSocket) -> None:
            world.write(client, first, 8)
            world.write(client, first + 8)
            world.discard(client, client.TRIM, first, 4)
            world.discard(client, client.WRITE_ZEROES, first + 4, 2)
            world.verify(client.read)
            client.ask(client.FLUSH, 0, 0)

        _try(world, work, patience)
        with suppress(OSError, AssertionError):
            other = world.connect(patience)
            world.write(other, 2000 + dice.randrange(500), 2)
            _expect_read(world, other)
            other.close()
        _block_status(world, patience)


def _expect_read(world: World, client: NbdSocket) -> None:
    block = next(block for block in world.known if block not in world.unsure)
    if client.ask(client.READ, block * BLOCK, BLOCK) == 0:
        ensure(client.receive(BLOCK) == world.known[block], f"block {block} reads wrong")


def _block_status(world: World, patience: float) -> None:
    import nbd

    handle = nbd.NBD()
    handle.add_meta_context("base:allocation")
    # libnbd has no time limit of its own.
    with suppress(nbd.Error):
        handle.aio_connect_uri(f"nbd+unix:///{world.name}?socket={world.socket}")
        end = time.monotonic() + patience
        while handle.aio_is_connecting() and time.monotonic() < end:
            handle.poll(50)
        if not handle.aio_is_ready():
            return
        found: list[int] = []
        cookie = handle.aio_block_status(SIZE // 2, 0, lambda *about: found.extend(about[2]) or 0)
        while not handle.aio_command_completed(cookie) and time.monotonic() < end:
            handle.poll(50)
        handle.aio_disconnect()


class Stats(Phase):
    """The control socket's answers, and the stats files."""

    name = "stats"

    def act(self, world: World, patience: float) -> None:
        limit = "32M" if world.version % 2 else "30M"
        for method, path, body in (
            ("GET", "/health", ""),
            ("GET", "/stats", ""),
            ("GET", "/mm_stat", ""),
            ("GET", "/classes", ""),
            ("GET", "/metrics", ""),
            ("GET", "/block/1", ""),
            ("GET", "/settings", ""),
            ("PUT", "/mem_limit", limit),
            ("POST", "/mem_used_max", "0"),
            ("POST", "/check", ""),
        ):
            status, text = world.ask(method, path, body, patience)
            ensure(status in (0, 200) or status >= 400, f"{path} answers {status}")
            if path == "/check" and status == 200:
                ensure(json.loads(text)["sound"], f"/check says {text}")
        before = _mtime(world)
        with suppress(OSError, AssertionError):
            world.write(world.stand(patience), 100)
        end = time.monotonic() + min(patience, 0.5)
        while _mtime(world) == before and time.monotonic() < end:
            time.sleep(0.01)


def _mtime(world: World) -> int:
    try:
        return os.stat(world.rundir / "metrics.prom").st_mtime_ns
    except OSError:
        return 0


class Compaction(Phase):
    """A compaction on demand of a pool full of holes, beside a client."""

    name = "compaction"

    def prepare(self, world: World) -> None:
        client = world.stand()
        dice = random.Random(world.version)
        for block in range(1000, 1400, 8):
            ensure(world.write(client, block, 8) == 0, "a write fails")
        for block in range(1000, 1400):
            if dice.random() < 0.6:
                ensure(world.discard(client, client.TRIM, block) == 0, "a trim fails")

    def act(self, world: World, patience: float) -> None:
        world.ask("POST", "/compact", patience=max(patience, 2))

        def work(client: NbdSocket) -> None:
            world.write(client, 100)

        _try(world, work, patience)


class Save(Phase):
    """A live save; a stream that ends too early must not pass for a whole one."""

    name = "save"
    may_lose = False  # whether a block may be missing that could not be read

    def act(self, world: World, patience: float) -> None:
        try:
            stream = talk(world.rundir / "control.sock", b"GET /save/live HTTP/1.1\r\n\r\n", max(patience, 2))
        except OSError:
            return
        head, _, body = stream.partition(b"\r\n\r\n")
        if b" 200 " not in head:
            world.said.append(body.decode(errors="replace"))
            return
        _check_stream(world, body, may_lose=self.may_lose)


def _check_stream(world: World, body: bytes, must_load: bool = False, may_lose: bool = False) -> None:
    """Whatever loads without an error holds everything; it may have to load. Raises Violation.

    may_lose: blocks may be missing, which read as errors.
    """
    copy = Device(SIZE)
    with open(os.memfd_create("stream"), "r+b", buffering=0) as file:
        file.write(body)
        file.seek(0)
        try:
            load_stream(copy, file.fileno(), begun=b"", length=-1, patience=10)
        except SaveError as error:
            ensure(not must_load, f"what was saved does not load: {error}")
            return

    def read(offset: int, length: int) -> bytes:
        data = bytearray(length)
        for at in range(0, length, BLOCK):
            try:
                copy.read(memoryview(data)[at : at + BLOCK], offset + at)
            except CorruptObjectError as error:
                ensure(may_lose, f"what was saved lacks a block: {error}")
                data[at : at + BLOCK] = world.known.get((offset + at) // BLOCK, bytes(BLOCK))
        return bytes(data)

    world.verify(read)


class Load(Phase):
    """A reset, then a load of what was saved; a load that fails leaves an empty device that can be loaded."""

    name = "load"

    def begin(self, world: World) -> None:
        super().begin(world)
        self.stream = _save(world)
        self.content = dict(world.known)

    def prepare(self, world: World) -> None:
        world.drop()
        eventually(lambda: '"clients": 0' in world.ask("GET", "/health")[1], "a client stays")
        self.loaded = self.reset = False

    def act(self, world: World, patience: float) -> None:
        patience = max(patience, 2)
        id_before = _data_id(world)
        status, text = world.ask("POST", "/reset", patience=patience)
        self.reset = status == 200
        # Until it is answered, old or empty.
        for block in list(world.known):
            world.unsure.setdefault(block, set()).add(bytes(BLOCK))
        if self.reset:
            world.known = {block: bytes(BLOCK) for block in world.known}
            world.unsure.clear()
            ensure(_data_id(world) != id_before, "the data is gone, and its data_id is still told")
        else:
            return
        status, text = _put(world, self.stream, patience)
        for block, part in self.content.items():
            world.unsure.setdefault(block, set()).add(part)
        if status == 200:
            self.loaded = True
            world.known = dict(self.content)
            world.unsure.clear()
        elif text:
            world.said.append(text)

    def judge(self, world: World, rule: Rule) -> None:
        world.check_said(rule)
        if not self.loaded:
            # What nobody waited for is still taken from the queue, and carried out.
            eventually(
                lambda: world.ask("POST", "/reset")[0] == 200, "reset is refused after a load that failed"
            )
            world.said.clear()
            ensure(_put(world, self.stream, PATIENCE)[0] == 200, "a load is refused after one that failed")
            world.known = dict(self.content)
            world.unsure.clear()
        world.check_serving(self.pid, True)


def _data_id(world: World) -> str:
    try:
        return (world.rundir / "data_id").read_text()
    except OSError:
        return ""


def _save(world: World) -> bytes:
    stream = talk(world.rundir / "control.sock", b"GET /save/live HTTP/1.1\r\n\r\n", PATIENCE)
    return stream.partition(b"\r\n\r\n")[2]


def _put(world: World, stream: bytes, patience: float) -> tuple[int, str]:
    head = f"PUT /load HTTP/1.1\r\nContent-Length: {len(stream)}\r\n\r\n".encode()
    try:
        answer = talk(world.rundir / "control.sock", head + stream, patience)
        return int(answer.split()[1]), answer.partition(b"\r\n\r\n")[2].decode()
    except (OSError, IndexError, ValueError):
        return 0, ""


def _expect_done(ended: Ended, rule: Rule) -> None:
    """Where nothing failed, nothing may be refused: what is recorded then is all that there is to do."""
    ensure(rule.hits or ended.status == 0, f"it does not work although nothing fails: {ended}")


class Start(Phase):
    """`zramd start`, of an empty device."""

    name = "start"
    ended: Ended
    live = thorough = False
    programs = ("server", "server-command")

    def prepare(self, world: World) -> None:
        world.forget()

    def act(self, world: World, patience: float) -> None:
        self.ended = world.start()

    def judge(self, world: World, rule: Rule) -> None:
        _expect_done(self.ended, rule)
        if self.ended.status == 0:
            ensure(world.pid, f"it says that it serves: {self.ended}")
            world.check_said(rule)
        else:
            self.check_failed(world, rule)
            again = world.start()
            ensure(again.status == 0, f"the next start does not work: {again}")
        if world.known:
            world.verify(world.stand().read)
        _fill(world)
        world.check_serving(world.pid, True)
        world.check_stop()

    def check_failed(self, world: World, rule: Rule) -> None:
        """A start that fails says why in one sentence and leaves nothing."""
        _expect_sentence(self.ended)
        world.check_said(rule)
        eventually(lambda: not world.alive(), "a server is left after a start that failed")
        there = sorted(os.listdir(world.rundir)) if world.rundir.exists() else []
        ensure(not there, f"left in the run folder: {there}")


def _fill(world: World) -> None:
    client = world.stand()
    for block in range(0, 64, 8):
        ensure(world.write(client, block, 8) == 0, "a write fails")


def _copy(state: Path, to: Path) -> None:
    """Copy a state with its holes: it is 9 GB of address space in memory, and a few pages."""
    subprocess.run(["cp", "--sparse=always", state, to], check=True)


class TakeOver(Start):
    """`zramd start` with a state of a server that was killed."""

    name = "take over"

    def prepare(self, world: World) -> None:
        assert world.state is not None
        kept = world.folder / "kept"
        if not kept.exists():
            ended = world.start()
            ensure(ended.status == 0, f"start does not work: {ended}")
            self.fill(world)
            self.known = dict(world.known)
            world.kill()
            _copy(world.state, kept)
            self.on_disk = world.backing.read_bytes() if world.backing else b""
            shutil.rmtree(world.rundir)
        _copy(kept, world.state)
        if world.backing:
            world.write_backing(self.on_disk)
        world.known = dict(self.known)
        world.unsure.clear()
        world.drop()

    def fill(self, world: World) -> None:
        """Write what is to be taken over."""
        _fill(world)


class Restart(Phase):
    """`zramd restart` beside a client that connects again."""

    name = "restart"
    ended: Ended
    live = thorough = False
    programs = ("server", "restart", "restart-command")

    def prepare(self, world: World) -> None:
        if not world.pid:
            ended = world.start()
            ensure(ended.status == 0, f"start does not work: {ended}")
            _fill(world)
        self.before = world.pid

    def act(self, world: World, patience: float) -> None:
        self.ended = world.command("restart", "--rundir", world.rundir, name="restart")
        if world.pid != self.before:
            world.log_seen = 0

    def judge(self, world: World, rule: Rule) -> None:
        _expect_done(self.ended, rule)
        pid = world.pid
        ensure("Traceback" not in self.ended.err, f"a traceback: {self.ended.err}")
        if self.ended.status == 0:
            ensure(pid not in (0, self.before), f"it says that a new server serves: {self.ended}")
        else:
            _expect_sentence(self.ended)
        world.check_said(rule)
        if not pid and rule.lasting and "is not served" in self.ended.err:
            # Neither it nor another one could go on as long as that lasted. It must say where the data is.
            ensure(
                "the data is still in its state" in self.ended.err,
                f"it does not say where the data is: {self.ended}",
            )
            again = world.start()
            ensure(again.status == 0, f"the next start does not work: {again}")
            pid = world.pid
        ensure(pid, f"nobody serves any more: {self.ended}")
        eventually(lambda: world.alive() == [pid], f"not one server is left: {world.alive()}, {pid} serves")
        world.note_process()
        world.drop()
        world.check_serving(pid, True)
        left = world.rundir / "sockets.sock"
        if left.exists() and _keeps_files("restart-command", rule):
            # Its removal failed as well, for as long as the command ran: then the next one removes it.
            world.check_restart()
        ensure(not left.exists(), "sockets.sock is left in the run folder")


class Stop(Phase):
    """`zramd stop` with a client connected."""

    name = "stop"
    ended: Ended
    live = thorough = False
    programs = ("server", "stop-command")

    def prepare(self, world: World) -> None:
        world.forget()
        if not world.pid:
            ended = world.start()
            ensure(ended.status == 0, f"start does not work: {ended}")
        _fill(world)
        self.before = world.pid

    def act(self, world: World, patience: float) -> None:
        self.ended = world.command("stop", "--rundir", world.rundir, name="stop")

    def judge(self, world: World, rule: Rule) -> None:
        _expect_done(self.ended, rule)
        ensure("Traceback" not in self.ended.err, f"a traceback: {self.ended.err}")
        world.check_said(rule)
        world.drop()
        if self.ended.status == 0:
            world.check_gone()
            return
        _expect_sentence(self.ended)
        if "has been told to stop" in self.ended.err:
            eventually(lambda: not world.pid, "it was told to stop and serves")
        if world.pid:
            world.check_stop()
        else:
            world.check_gone()


class SaveCommand(Phase):
    """`zramd save` into a file: it holds all, or is not there."""

    name = "save command"
    thorough = False
    programs = ("save-command",)

    def act(self, world: World, patience: float) -> None:
        self.file = world.folder / "saved"
        self.file.unlink(missing_ok=True)
        words = ["save", "--live", "--rundir", world.rundir, self.file]
        self.ended = world.command(*words, name="save")

    def judge(self, world: World, rule: Rule) -> None:
        _expect_done(self.ended, rule)
        if self.ended.status == 0:
            world.said.clear()  # what is in the file, and that a client writes
            _check_stream(world, self.file.read_bytes(), must_load=True)
        else:
            _expect_sentence(self.ended)
            if self.file.exists():  # only what makes its name durable has failed
                _check_stream(world, self.file.read_bytes(), must_load=True)
        left = [path.name for path in world.folder.glob("saved.*")]
        if left and _keeps_files("save-command", rule):  # as long as the command ran
            (world.folder / left.pop()).unlink()
        ensure(not left, f"a part of a file is left: {left}")
        super().judge(world, rule)


class LoadCommand(Load):
    """`zramd load` from a file: all of it, or an empty device that can be loaded."""

    name = "load command"
    thorough = False
    programs = ("load-command",)

    def act(self, world: World, patience: float) -> None:
        file = world.folder / "saved"
        file.write_bytes(self.stream)
        self.ended = world.command("load", "--force", "--rundir", world.rundir, file, name="load")
        self.loaded = self.ended.status == 0
        if self.loaded:
            world.known = dict(self.content)
            world.unsure.clear()
            return
        # Nothing, all of it, or what there was before.
        for block in list(world.known):
            world.unsure.setdefault(block, set()).update(
                (bytes(BLOCK), self.content.get(block, bytes(BLOCK)))
            )

    def judge(self, world: World, rule: Rule) -> None:
        _expect_done(self.ended, rule)
        if self.ended.status:
            _expect_sentence(self.ended)
        super().judge(world, rule)


def _keeps_files(program: str, rule: Rule) -> bool:
    """Say whether the program may be refused to remove a file for as long as it runs."""
    return rule.lasting and rule.place.program == program and rule.error in calls.ERRORS["unlink"]


def _expect_sentence(ended: Ended) -> None:
    """A command that fails says why, in one sentence."""
    ensure("Traceback" not in ended.err, f"a traceback: {ended.err}")
    ensure(ended.status == 1, f"not status 1: {ended}")
    ensure(ended.err.startswith("zramd: ") and ended.err.count("\n") == 1, f"not one sentence: {ended}")


PHASES: tuple[type[Phase], ...] = (
    Start,
    Serve,
    Stats,
    Compaction,
    Save,
    SaveCommand,
    Load,
    LoadCommand,
    TakeOver,
    Restart,
    Stop,
)
