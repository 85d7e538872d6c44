"""The phases of a server that has a backing: blocks leave memory for it, are read there, and come back."""

import errno
import json
import os
import random
import shutil
import time

from phases import (
    Load,
    Phase,
    Restart,
    Save,
    Start,
    Stop,
    TakeOver,
    _expect_done,
    _expect_sentence,
    _try,
)
from supervisor import Rule
from support.client import NbdSocket
from world import BLOCK, PATIENCE, World, ensure

DISK = 16 << 20
UNREADABLE = "blocks that are out cannot be read"  # of health: it may be told for minutes
PASS = 60.0  # seconds until a pass has ended: it goes at the pace of a disk that others use, too
FAILED = (errno.EIO, errno.ENOMEM, errno.ENOSPC)  # what a client may be told of a block that is out


def numbers(world: World, patience: float = PATIENCE) -> dict[str, int | str]:
    """Return the section of the statistics, {} if there is no answer."""
    status, text = world.ask("GET", "/stats", patience=patience)
    found: dict[str, int | str] = json.loads(text)["writeback"] if status == 200 else {}
    return found


def move(world: World, path: str, body: str, patience: float = PATIENCE) -> None:
    """Ask for blocks to go out or to come back, and wait until that is over.

    With less than the usual patience, as calls go on failing, it waits for no longer than that.
    """
    status, _ = world.ask("POST", path, body, patience)
    end = time.monotonic() + (patience if patience < PATIENCE else PASS)
    while status == 200 and time.monotonic() < end:
        reason = numbers(world, patience).get("reason", "under way")
        if "under way" not in str(reason) and "being brought back" not in str(reason):
            return
        time.sleep(0.02)


def send_out(world: World, first: int = 0, last: int = 63) -> None:
    """Have blocks go out while nothing fails."""
    move(world, "/writeback", f"page_indexes={first}-{last}")
    ensure(numbers(world).get("out_pages"), f"nothing goes out: {numbers(world)}")


def read(world: World, client: NbdSocket, block: int) -> None:
    """Read a block: what it holds, or an error. Raises Violation, OSError."""
    error = client.ask(client.READ, block * BLOCK, BLOCK)
    if error:
        ensure(error in FAILED, f"a read of block {block} is answered by error {error}")
        return
    found = client.receive(BLOCK)
    ensure(
        found == world.known.get(block, bytes(BLOCK)) or found in world.unsure.get(block, ()),
        f"block {block} reads wrong",
    )


def write_part(world: World, client: NbdSocket, block: int) -> None:
    """Change a few bytes of a block. Raises OSError."""
    world.version += 1
    part = world.version.to_bytes(8, "little") * 8
    before = world.known[block]
    world.expect(block, [before[:512] + part + before[512 + len(part) :]])
    error = client.ask(client.WRITE, block * BLOCK + 512, len(part), part)
    world.settle(block, [before[:512] + part + before[512 + len(part) :]], error)


class WriteBack(Phase):
    """Blocks go out, are read, changed and trimmed there, and come back."""

    name = "writeback"
    disk = DISK
    bad = DISK // 4  # bytes of extents that failed

    def prepare(self, world: World) -> None:
        world.health = ("ok", UNREADABLE)
        if int(numbers(world).get("backing_bad") or 0) > self.bad and world.state:
            world.check_restart("server")  # what could not be written is tried again then
            self.pid = world.pid
        client = world.stand()
        for block in range(1000, 1032, 8):
            ensure(world.write(client, block, 8) == 0, "a write fails")

    def act(self, world: World, patience: float) -> None:
        move(world, "/writeback", "page_indexes=1000-1031", patience)

        def work(client: NbdSocket) -> None:
            for block in range(1000, 1008):
                read(world, client, block)
            write_part(world, client, 1009)
            world.write(client, 1010)
            world.discard(client, client.TRIM, 1012, 2)

        _try(world, work, patience)
        move(world, "/bring_back", "", patience)
        move(world, "/writeback", "page_indexes=1000-1015", patience)

    def judge(self, world: World, rule: Rule) -> None:
        if not rule.hits:
            self.again(world, rule)
            ensure(numbers(world).get("out_pages"), f"nothing goes out: {numbers(world)}")
            ensure(numbers(world).get("brought_back"), f"nothing comes back: {numbers(world)}")
        super().judge(world, rule)

    def again(self, world: World, rule: Rule) -> None:
        """Act with patience, if that was short for a call that would go on failing, and none was made."""
        if rule.lasting:
            self.act(world, PATIENCE)


class Reclaim(WriteBack):
    """A backing that is full of what is mostly dead: extents are emptied into others."""

    name = "reclaim"
    thorough = plain = False
    disk = 2 << 20
    bad = 0

    def prepare(self, world: World) -> None:
        super().prepare(world)
        client = world.stand()
        dice = random.Random(world.version)
        for block in range(100, 1000, 20):
            ensure(world.write(client, block, 20) == 0, "a write fails")
        move(world, "/writeback", "page_indexes=100-999")
        for block in range(100, 1000):
            if dice.random() < 0.7:
                ensure(world.discard(client, client.TRIM, block) == 0, "a trim fails")
        self.moved = numbers(world)["reclaimed_bytes"]

    def act(self, world: World, patience: float) -> None:
        move(world, "/writeback", "page_indexes=1000-1031", patience)

    def judge(self, world: World, rule: Rule) -> None:
        if not rule.hits:
            self.again(world, rule)
            ensure(numbers(world)["reclaimed_bytes"] != self.moved, f"nothing moves: {numbers(world)}")
        Phase.judge(self, world, rule)


class BackedSave(Save):
    """A live save of what is out: what cannot be read is missing there, and nothing else."""

    name = "backed save"
    thorough = plain = False
    disk = DISK
    may_lose = True

    def prepare(self, world: World) -> None:
        world.health = ("ok", UNREADABLE)
        if int(str(numbers(world).get("out_pages") or 0)) < 20:
            send_out(world)


class BackedLoad(Load):
    """A reset of a device whose blocks are out, a load, and the first that go out after it."""

    name = "backed load"
    thorough = plain = False
    disk = DISK

    def prepare(self, world: World) -> None:
        world.health = ("ok", UNREADABLE)
        send_out(world)
        super().prepare(world)

    def act(self, world: World, patience: float) -> None:
        super().act(world, patience)
        move(world, "/writeback", "page_indexes=0-63", max(patience, 2))


class BackedStart(Start):
    """`zramd start` of an empty device with a blank backing."""

    name = "backed start"
    disk = DISK


class BackedTakeOver(TakeOver):
    """`zramd start` with a state of a server that was killed, and the backing on which its blocks are."""

    name = "backed takes"
    disk = DISK

    def fill(self, world: World) -> None:
        super().fill(world)
        send_out(world)


class BackedRestart(Restart):
    """`zramd restart` of a server whose blocks are out."""

    name = "backed again"
    disk = DISK

    def prepare(self, world: World) -> None:
        super().prepare(world)
        send_out(world)


class BackedStop(Stop):
    """`zramd stop` of a server whose blocks are out."""

    name = "backed stop"
    disk = DISK

    def prepare(self, world: World) -> None:
        super().prepare(world)
        send_out(world)


class BackingCommands(Phase):
    """`zramd backing format`, `show` and `allow`."""

    name = "backing"
    live = thorough = False
    disk = DISK
    programs = ("format-command", "show-command", "allow-command")

    def prepare(self, world: World) -> None:
        world.forget()
        self.root = world.folder / "root"
        shutil.rmtree(self.root, ignore_errors=True)
        (self.root / "etc").mkdir(parents=True)
        (self.root / "etc" / "zramd.conf").write_text(f"[faulty]\nsize = 1G\nbacking = {world.backing}\n")

    def act(self, world: World, patience: float) -> None:
        path = world.backing
        self.ended = {
            name: world.command("backing", name, *words, name=name, env={"ZRAMD_ROOT": str(self.root)})
            for name, words in (("format", [path]), ("show", ["--json", path]), ("allow", ["faulty"]))
        }

    def judge(self, world: World, rule: Rule) -> None:
        for ended in self.ended.values():
            _expect_done(ended, rule)
            if ended.status:
                _expect_sentence(ended)
        world.check_said(rule)
        if self.ended["show"].status == 0:
            json.loads(self.ended["show"].out)
        folder = self.root / "etc/systemd/system/zramd@faulty.service.d"
        left = sorted(os.listdir(folder)) if folder.exists() else []
        ensure(left in ([], ["zramd-backing.conf"]), f"left beside the drop-in: {left}")
        for words in (["format", world.backing], ["show", world.backing], ["allow", "faulty"]):
            again = world.command("backing", *words, name="tool", env={"ZRAMD_ROOT": str(self.root)})
            ensure(again.status == 0, f"it does not work afterwards: {again}")


BACKING_PHASES: tuple[type[Phase], ...] = (
    BackedStart,
    BackedTakeOver,
    WriteBack,
    Reclaim,
    BackedSave,
    BackedLoad,
    BackedRestart,
    BackedStop,
    BackingCommands,
)
