"""`zramd attach`, `detach` and `restart` of servers by ublk in a real virtual machine; who is killed when.

The scenes are in ublkattach.py, and run in a guest with Debian 13's kernel. `ENDS` is as in
test_vm_interruption.py, but all its rows are slow; one kind of them is a further one:

    recovery    the server was killed and another is there: the keeper is held at a step of giving it the
                device. Whoever is hit there, the next server, and the next attach, go on from there.
"""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from guests import small_guest
from vm import probe
from vm.guest import PATIENCE, Guest

SUITE = "trixie"  # the first whose kernel has ublk
TIMEOUT = 300.0  # seconds for a scene, on a machine that is busy
NOTHING = [[], [], [], []]  # of devices, records, keepers and swap
pytestmark = pytest.mark.timeout(900)

ENDS = """
# during   at                   whom     what       end      says         second
  attach   attach.turn          command  TERM,KILL  nothing  -
  attach   keeper.recorded      command  TERM,KILL  nothing  -
  attach   keeper.recorded      process  TERM,KILL  nothing  failed
  attach   keeper.added         command  TERM,KILL  nothing  -
  attach   keeper.added         process  KILL       nothing  failed
  attach   keeper.added         both     KILL       alone    killed
  attach   keeper.added         server   KILL       nothing  failed
  attach   keeper.added         second   attach     attached done         failed
  attach   keeper.added         second   detach     attached done         failed
  attach   keeper.added         second   restart    attached done         done
  attach   keeper.opened        command  TERM,KILL  nothing  -
  attach   keeper.opened        process  KILL       nothing  failed
  attach   keeper.opened        both     KILL       alone    killed
  attach   keeper.opened        server   KILL       nothing  failed
  attach   keeper.given         command  TERM,KILL  nothing  -
  attach   keeper.given         process  KILL       nothing  failed
  attach   keeper.given         both     KILL       alone    killed
  attach   keeper.given         server   KILL       nothing  failed
  attach   keeper.noted         command  TERM,KILL  nothing  -
  attach   keeper.noted         process  KILL       nothing  failed
  attach   keeper.noted         both     KILL       alone    killed
  attach   keeper.noted         server   KILL       nothing  failed
  attach   keeper.ready         command  TERM,KILL  nothing  -
  attach   keeper.ready         process  KILL       nothing  failed
  attach   keeper.ready         server   KILL       attached done
  attach   attach.attached      command  TERM       nothing  interrupted
  attach   attach.attached      command  KILL       attached killed
  attach   attach.attached      keeper   KILL       nothing  failed
  attach   attach.attached      server   KILL       attached done
  attach   attach.attached      second   detach     nothing  failed       done
  attach   attach.attached      second   restart    attached done         done
  swap     swap.made            command  TERM       nothing  interrupted
  swap     swap.made            command  KILL       attached killed
  swap     swap.made            server   KILL       swapped  done
  swap     attach.used          command  TERM,KILL  swapped  -
  detach   detach.begun         command  TERM,KILL  attached -
  detach   detach.begun         keeper   KILL       nothing  done
  detach   detach.begun         server   KILL       nothing  done
  detach   detach.free          command  TERM,KILL  attached -
  detach   detach.free          server   KILL       nothing  done
  detach   detach.disconnected  command  KILL       alone    killed
  detach   detach.disconnected  second   attach     attached done         done
  swapoff  detach.begun         command  TERM,KILL  swapped  -
  swapoff  detach.free          command  TERM,KILL  attached -
  areas    swap.on              command  KILL       half     killed
  areas    swap.on              server   KILL       areas    done
  areasoff swap.off             command  KILL       half     killed
  refresh  refresh.off          process  KILL       areas    done
  refresh  refresh.off          server   KILL       areas    done
  recovery keeper.recovers      server   KILL       attached
  recovery keeper.recovers      keeper   KILL       attached
  recovery keeper.recovers      both     KILL       attached
  recovery keeper.recovering    keeper   KILL       attached
  recovery keeper.recovering    server   KILL       attached
  recovery keeper.recovering    both     KILL       attached
  recovery keeper.opened        keeper   KILL       attached
  recovery keeper.opened        server   KILL       attached
  recovery keeper.opened        both     KILL       attached
  recovery keeper.given         keeper   KILL       attached
  recovery keeper.given         server   KILL       attached
  recovery keeper.given         both     KILL       attached
"""


def rows() -> Iterator[Any]:
    """The table's rows, one for each signal or command."""
    for line in ENDS.splitlines():
        if line.startswith(" "):
            during, at, whom, whats, end, *says = line.split()
            for what in whats.split(","):
                yield pytest.param([during, at, whom, what, end], says, id=f"{during}-{at}-{whom}-{what}")


@pytest.fixture(scope="module")
def booted() -> Iterator[Guest]:
    """A booted guest that plays scenes; its module is not loaded yet."""
    with small_guest(SUITE) as guest:
        guest.run("mkdir -p /dev/shm && mount -t tmpfs -o noswap none /dev/shm")
        guest.run("mkfifo /tmp/ask /tmp/tell")
        for program in ("interruptions.py", "ublkattach.py"):
            guest.put(f"/tmp/{program}", Path(__file__).with_name(program).read_bytes())
        player = f"ZRAMD_PATIENCE={PATIENCE:g} /usr/bin/python3 /tmp/ublkattach.py /tmp/ask /tmp/tell"
        guest.run(f"{player} </dev/null >/tmp/log 2>&1 &")
        yield guest
        print(guest.run("cat /tmp/log"))


@pytest.fixture(scope="module")
def guest(booted: Guest) -> Guest:
    """The guest with its module."""
    for path in booted.machine.images.ublk_modules:
        booted.run(f"grep -q ^ublk_drv /proc/modules || insmod {path}")
    return booted


def ask(guest: Guest, words: str) -> dict[str, Any]:
    """What a scene or a row has found."""
    alive, log = guest.try_run("grep -q '[u]blkattach.py' /proc/[0-9]*/cmdline || ! cat /tmp/log")
    assert alive == 0, log
    found: dict[str, Any] = json.loads(guest.run(f"echo {words} >/tmp/ask; cat /tmp/tell", TIMEOUT))
    print(json.dumps(found))
    assert "error" not in found
    return found


@pytest.mark.slow
def test_before_the_module_is_loaded(booted: Guest) -> None:
    found = ask(booted, "scene without_the_module")
    assert "module ublk_drv cannot be loaded (modprobe is not installed)" in found["attach"]
    assert found["left"] == NOTHING


@pytest.mark.slow
def test_without_io_uring(guest: Guest) -> None:
    """A sentence names the kernel's setting, whoever needs it."""
    found = ask(guest, "scene without_io_uring")
    assert "io_uring_disabled" in found["attach"]
    assert "io_uring_disabled" in found["start"]
    assert found["left"] == NOTHING


@pytest.mark.slow
def test_several_devices(guest: Guest) -> None:
    """Each has its own data and number; another program's is left alone."""
    found = ask(guest, "scene two")
    assert "/dev/ublkb7 exists already" in found["foreign"]
    assert "one is served by ublk, and '/dev/nbd0' is not a ublk device" in found["nbd"]
    assert "one is served by ublk, where --connections means nothing" in found["option"]
    assert found["first"] == "/dev/ublkb0"
    assert "/dev/ublkb0 exists already" in found["in use"]
    assert found["second"] == "/dev/ublkb5"
    assert "one is attached as /dev/ublkb0 already" in found["again"]
    assert found["read"] == ["one.one.", "two.two."]
    assert "/dev/ublkb0" in found["list"]
    assert "/dev/ublkb5" in found["list"]
    assert found["there"]
    assert found["left"] == NOTHING


@pytest.mark.slow
def test_swap(guest: Guest) -> None:
    found = ask(guest, "scene swapped")
    assert found["on"] == "/dev/ublkb0"
    assert found["swaps"] == ["/dev/ublkb0 7"]
    assert "/dev/ublkb0 is in use as swap: 'zramd detach --swapoff one'" in found["detach"]
    assert "/dev/ublkb0 is in use as swap" in found["stop"]
    assert found["areas"] == ["/dev/ublkb0p1 100", "/dev/ublkb0p2 99", "/dev/ublkb0p3 98"]
    assert "/dev/ublkb0 is in use as swap: 'zramd detach --swapoff one'" in found["detach areas"]
    assert "/dev/ublkb0 is mounted on '/run/place': run 'umount /run/place' first" in found["mounted"]
    assert found["left"] == NOTHING


def test_a_server_is_killed(guest: Guest) -> None:
    """Who reads waits for the next one with the same data; and without one, detach takes the device away."""
    found = ask(guest, "scene dies")
    # What it looks for while it starts the disk would be read from a server that may end: a wait without end.
    assert found["scan"] == "EINVAL"
    assert "the server of one is gone, and whoever reads it waits" in found["doctor"]
    assert found["waits"]
    assert found["reader"] == 0
    assert found["left"] == NOTHING


@pytest.mark.slow
def test_a_server_without_a_state_is_killed(guest: Guest) -> None:
    found = ask(guest, "scene without_a_state")
    assert not found["disk"]
    assert "two is not attached" in found["detach"]


@pytest.mark.slow
def test_what_is_out_is_given_up_by_force_only(guest: Guest) -> None:
    found = ask(guest, "scene forced")
    assert found["ready"] == "ready"
    assert found["out"] > 1024  # KiB
    assert (
        "the server of one is gone, and what is swapped out to /dev/ublkb0 cannot be read" in found["refused"]
    )
    assert found["left"] == NOTHING
    assert found["hog"] != 0


@pytest.mark.slow
def test_restart(guest: Guest) -> None:
    """In vain, then with other settings too while blocks are written and verified: none is lost or wrong."""
    device = ask(guest, "scene begin")["device"]
    vain = ask(guest, "scene restarts_in_vain")
    assert "is of a device of 33554432 bytes, not 67108864" in vain["bad"]
    assert "one goes on as before: the new server does not start" in vain["fails"]
    assert "one is in use over front=ublk" in vain["front"]
    assert vain["same"]
    probe.start(guest, "one", device)
    found = ask(guest, "scene restarts")
    seen = probe.stop(guest, "one")
    print(f"away: {found['away']}; slowest requests: {seen['longest']}")
    assert seen["bad"] == []
    assert seen["done"] > 200
    assert sum("ublkb0: served again after" in line for line in guest.kernel_log()) >= len(found["away"])
    assert ask(guest, "scene end")["left"] == NOTHING


@pytest.mark.slow
@pytest.mark.parametrize(("words", "says"), list(rows()))
def test_ends(guest: Guest, words: list[str], says: list[str]) -> None:
    answer = ask(guest, " ".join(words))
    _, _, _, what, end = words
    assert answer["found"] == end
    assert answer.get("right", True)
    status, sentences = answer.get("status"), answer.get("err", "").splitlines()
    assert all(line.startswith("zramd: ") for line in sentences)
    said = says[0] if says else ""
    if said == "-":
        said = "killed" if what == "KILL" else "interrupted"
    if said == "done":
        assert (status, sentences) == (0, [])
    elif said == "failed":
        assert (status, answer["out"], len(sentences)) == (1, "", 1)
    elif said == "killed":
        assert status == -signal.SIGKILL
    elif said == "interrupted":
        assert status == 128 + getattr(signal, f"SIG{what}")
        assert sentences[0].startswith("zramd: interrupted: held is ")
    if says[1:]:
        assert answer["other"][0] == (1 if says[1] == "failed" else 0), answer["other"]
        assert len(answer["other"][2].splitlines()) == (says[1] == "failed"), answer["other"]
    # What is left can be taken away, and then nothing is left.
    if "again" in answer:
        assert answer["again"][:2] == [0, "/dev/ublkb0\n"], answer["again"]
    assert answer.get("detached", [0, "", ""]) == [0, "", ""]
    assert answer["after"][0] == "nothing"
