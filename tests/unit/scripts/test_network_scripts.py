"""The scripts of docs/network: what they do in which order, what they refuse, and how they say so.

The programs that they call only write down that they were called, and a disk is a name. With real disks,
which are the memory of other hosts, tests/vm/test_network.py runs them.
"""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((ROOT / "docs/network").glob("*.sh"))
PAGE = 66  # lines
PROGRAMS = (
    "mdadm",
    "mkswap",
    "swapon",
    "swapoff",
    "blkdiscard",
    "pvcreate",
    "vgcreate",
    "lvcreate",
    "vgremove",
)
# What is a disk: a shell's own [ would want a device of the kernel's. /dev/vdx is none, all else is there.
BLOCK = """
[() {
    case $1 in
    -b) builtin [ "$2" != /dev/vdx ] && builtin [ "$2" != "$GONE" ] ;;
    -e) builtin [ "$2" = "$VOLUME" ] ;;
    *) builtin [ "$@" ;;
    esac
}
set -- $WORDS
. $SCRIPT
"""
DETAIL = """/dev/md0:
    Number   Major   Minor   RaidDevice State
       0     254       16        0      active sync   /dev/vdb
       1     254       32        -      faulty   /dev/vdc
"""


class World:
    """Programs that do nothing, and a log of what was asked of them."""

    def __init__(self, folder: Path) -> None:
        self.bin = folder / "bin"
        self.bin.mkdir()
        self.log = folder / "log"
        for program in PROGRAMS:
            self.put(program, "")
        (folder / "detail").write_text(DETAIL)
        self.put(
            "mdadm", f"case $* in '--detail /dev/md'?) cat {folder}/detail ;; *--re-add*) exit 1 ;; esac"
        )
        self.put("pvs", "printf '  /dev/vdb\\n  /dev/vdc\\n'", logged=False)
        kinds = "*/dev/full) echo ext4 ;; */dev/half) echo linux_raid_member ;; */dev/both) exit 8 ;;"
        self.put("blkid", f"case $* in {kinds} *) exit 2 ;; esac", logged=False)
        self.put("dd", "", logged=False)
        self.put("id", "echo ${USER_ID-0}", logged=False)

    def put(self, program: str, does: str, *, logged: bool = True) -> None:
        """Have a program that does what is said, once it has written down that it was called."""
        note = f'echo "{program} $*" >>{self.log}\n' if logged else ""
        path = self.bin / program
        path.write_text(f"#!/bin/sh\n{note}{does}\n")
        path.chmod(0o755)

    def run(self, script: str, *words: str, **variables: str) -> "subprocess.CompletedProcess[str]":
        """Run a script with the words."""
        environment = {"PATH": f"{self.bin}:/usr/bin:/bin", "GONE": "", "VOLUME": "", **variables}
        environment |= {"WORDS": " ".join(words), "SCRIPT": str(ROOT / "docs/network" / script)}
        return subprocess.run(
            ["bash", "-c", BLOCK], env=environment, capture_output=True, text=True, check=False, timeout=60
        )

    def calls(self) -> list[str]:
        """What was called since, but for what only looks."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith("mdadm --detail")]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


OF_MIRROR = "use make DISK1 DISK2, out DISK, back DISK, look or end; --help says what they do"
OF_MOVE = "use make DISK, to DISK or end; --help says what they do"
OF_STRIPES = "use md DISK..., lvm DISK... or end; --help says what they do"
NO_MDADM = "mdadm is missing: install the package of that name"
NO_DISK = "'/dev/vdx' is no disk: 'lsblk' lists those that are there"


def not_empty(disk: str) -> str:
    return f"'{disk}' is not empty: if it is the disk that you mean, run 'wipefs --all {disk}' first"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_is_the_head_of_the_script(script: Path, word: str) -> None:
    done = subprocess.run(["sh", script, word], capture_output=True, text=True, check=True, timeout=60)
    head = script.read_text().partition("\nset -eu")[0].splitlines()[1:]
    assert done.stdout.splitlines() == [line[2:] for line in head]
    assert f"\n  {script.name} end " in done.stdout
    assert len(script.read_text().splitlines()) <= PAGE
    assert script.stat().st_mode & 0o111 == 0o111


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("mirror.sh", (), OF_MIRROR),
        ("mirror.sh", ("make", "/dev/vdb"), OF_MIRROR),
        ("mirror.sh", ("make", "/dev/vdb", "/dev/vdx"), NO_DISK),
        ("mirror.sh", ("make", "/dev/half", "/dev/vdb"), not_empty("/dev/half")),
        ("mirror.sh", ("make", "/dev/vdb", "/dev/full"), not_empty("/dev/full")),
        # blkid finds signatures of two kinds, and says so by its status alone.
        ("mirror.sh", ("make", "/dev/both", "/dev/vdb"), not_empty("/dev/both")),
        ("mirror.sh", ("back", "/dev/both"), not_empty("/dev/both")),
        ("move.sh", ("make", "/dev/both"), not_empty("/dev/both")),
        ("stripe.sh", ("md", "/dev/vdb", "/dev/both"), not_empty("/dev/both")),
        ("stripe.sh", ("lvm", "/dev/both", "/dev/vdb"), not_empty("/dev/both")),
        ("mirror.sh", ("back", "/dev/full"), not_empty("/dev/full")),
        ("move.sh", ("to",), OF_MOVE),
        ("move.sh", ("to", "/dev/half"), not_empty("/dev/half")),
        ("move.sh", ("make", "/dev/full"), not_empty("/dev/full")),
        ("move.sh", ("make", "/dev/vdx"), NO_DISK),
        ("stripe.sh", ("md",), OF_STRIPES),
        ("stripe.sh", ("lvm", "/dev/vdb", "/dev/full"), not_empty("/dev/full")),
        ("stripe.sh", ("md", "/dev/vdx"), NO_DISK),
    ],
)
def test_what_cannot_be_meant_is_refused(
    world: World, script: str, words: tuple[str, ...], says: str
) -> None:
    """In one sentence, and before anything is touched."""
    done = world.run(script, *words)
    assert (done.returncode, done.stderr) == (1, f"{script}: {says}\n")
    assert world.calls() == []


@pytest.mark.parametrize(
    ("script", "words", "says"),
    [
        ("mirror.sh", "look", "there is no mirror '/dev/md7': 'make' one, or name it by MD="),
        ("move.sh", "end", "there is no '/dev/md7': 'make' it, or name it by MD="),
        ("stripe.sh", "end", "there is neither '/dev/zramd/swap' nor '/dev/md7': name it by MD="),
    ],
)
def test_there_is_none(world: World, script: str, words: str, says: str) -> None:
    done = world.run(script, words, MD="/dev/md7", GONE="/dev/md7")
    assert (done.returncode, done.stderr) == (1, f"{script}: {says}\n")
    assert world.calls() == []


@pytest.mark.parametrize(
    ("script", "words", "missing"),
    [
        ("mirror.sh", "look", NO_MDADM),
        ("move.sh", "end", NO_MDADM),
        ("stripe.sh", "lvm /dev/vdb", "lvcreate is missing: install mdadm or lvm2"),
    ],
)
def test_root_and_programs(world: World, script: str, words: str, missing: str) -> None:
    done = world.run(script, words, USER_ID="1000")
    assert (done.returncode, done.stderr) == (1, f"{script}: only root can do that\n")
    for program in ("mdadm", "lvcreate"):
        (world.bin / program).unlink()
    done = world.run(script, words)
    assert (done.returncode, done.stderr) == (1, f"{script}: {missing}\n")
    assert world.calls() == []


SWAP = ["mkswap {}", "swapon --discard --priority 100 {}"]
MIRROR = "mdadm --create /dev/md0 --run --level=1 --raid-devices=2"


def swap_on(device: str) -> list[str]:
    return [line.format(device) for line in SWAP]


def test_a_mirror(world: World) -> None:
    assert world.run("mirror.sh", "make", "/dev/vdb", "/dev/vdc").returncode == 0
    how = "--bitmap=internal --assume-clean"
    assert world.calls() == [f"{MIRROR} {how} /dev/vdb /dev/vdc", *swap_on("/dev/md0")]
    assert world.run("mirror.sh", "make", "/dev/vdb", "/dev/vdc", WRITE_MOSTLY="1").returncode == 0
    assert world.calls()[0] == f"{MIRROR} {how} /dev/vdb --write-mostly /dev/vdc"
    assert world.run("mirror.sh", "out", "/dev/half").returncode == 0
    assert world.calls() == ["mdadm /dev/md0 --fail /dev/half"]
    assert world.run("mirror.sh", "back", "/dev/half").returncode == 0
    back = ["--remove failed", "--re-add /dev/half", "--add /dev/half"]
    assert world.calls() == [*(f"mdadm /dev/md0 {words}" for words in back), "mdadm --wait /dev/md0"]
    world.put("blkdiscard", '[ "$2" != /dev/vdc ]')
    done = world.run("mirror.sh", "end")
    assert (done.returncode, done.stderr) == (0, "mirror.sh: the host of '/dev/vdc' is gone\n")
    gone = [f"blkdiscard --force {disk}" for disk in ("/dev/vdb", "/dev/vdc")]
    assert world.calls() == ["swapoff /dev/md0", "mdadm --stop /dev/md0", *gone]


def test_a_mirror_that_lacks_a_half(world: World) -> None:
    world.put("mdadm", "case $* in *--test*) exit 1 ;; esac")
    world.put("cat", "echo md0 : active raid1", logged=False)
    done = world.run("mirror.sh", "look")
    assert (done.returncode, done.stdout) == (1, "md0 : active raid1\n")
    assert done.stderr == "mirror.sh: '/dev/md0' lacks a half: 'back' takes it in again\n"
    done = world.run("mirror.sh", "back", "/dev/vdb")
    assert done.returncode == 1
    assert done.stderr == "mirror.sh: '/dev/md0' still lacks a half: see 'mirror.sh look'\n"


def test_a_half_whose_host_does_not_serve(world: World) -> None:
    """It is waited for, and then nothing is done to the mirror."""
    world.put("dd", "exit 1", logged=False)
    world.put("timeout", 'shift; "$@" & sleep 0.1; kill $!; exit 124', logged=False)
    done = world.run("mirror.sh", "back", "/dev/half")
    says = "mirror.sh: '/dev/half' does not answer: look whether its host serves (qemu tries every 16 s)\n"
    assert (done.returncode, done.stderr) == (1, says)
    assert world.calls() == []


COPIED = ["mdadm --grow /dev/md0 --raid-devices=2 --add /dev/vdc", "mdadm --wait /dev/md0"]


def without(disk: str) -> list[str]:
    """How a disk is taken out of a mirror that lacks none then."""
    grown = "mdadm --grow /dev/md0 --raid-devices=1 --force"
    return [f"mdadm /dev/md0 --fail {disk}", f"mdadm /dev/md0 --remove {disk}", grown]


def test_a_move(world: World) -> None:
    assert world.run("move.sh", "make", "/dev/vdb").returncode == 0
    made = "mdadm --create /dev/md0 --run --force --level=1 --raid-devices=1 --bitmap=none /dev/vdb"
    assert world.calls() == [made, *swap_on("/dev/md0")]
    assert world.run("move.sh", "to", "/dev/vdc").returncode == 0
    assert world.calls() == [*COPIED, *without("/dev/vdb"), "blkdiscard --force /dev/vdb"]
    assert world.run("move.sh", "end").returncode == 0
    assert world.calls() == ["swapoff /dev/md0", "mdadm --stop /dev/md0", "blkdiscard --force /dev/vdb"]


def test_a_move_that_fails_leaves_swap_where_it_is(world: World, tmp_path: Path) -> None:
    world.put("mdadm", f"case $* in *--test*) exit 1 ;; --detail*) cat {tmp_path}/detail ;; esac")
    done = world.run("move.sh", "to", "/dev/vdc")
    assert done.returncode == 1
    assert done.stderr == "move.sh: '/dev/vdc' does not have all: swap stays on '/dev/vdb'\n"
    assert world.calls() == [*COPIED, *without("/dev/vdc")]


def test_stripes(world: World) -> None:
    assert world.run("stripe.sh", "md", "/dev/vdb", "/dev/vdc", "/dev/vdd").returncode == 0
    made = "mdadm --create /dev/md0 --run --level=0 --raid-devices=3 --chunk=64 /dev/vdb /dev/vdc /dev/vdd"
    assert world.calls() == [made, *swap_on("/dev/md0")]
    assert world.run("stripe.sh", "end").returncode == 0
    gone = [f"blkdiscard --force {disk}" for disk in ("/dev/vdb", "/dev/vdc")]
    assert world.calls() == ["swapoff /dev/md0", "mdadm --stop /dev/md0", *gone]
    assert world.run("stripe.sh", "lvm", "/dev/vdb", "/dev/vdc").returncode == 0
    assert world.calls() == [
        "pvcreate --quiet /dev/vdb /dev/vdc",
        "vgcreate --quiet zramd /dev/vdb /dev/vdc",
        "lvcreate --quiet --stripes 2 --stripesize 64k --extents 100%FREE --name swap zramd",
        *swap_on("/dev/zramd/swap"),
    ]
    assert world.run("stripe.sh", "end", VOLUME="/dev/zramd/swap").returncode == 0
    assert world.calls() == ["swapoff /dev/zramd/swap", "vgremove --quiet --force zramd", *gone]
