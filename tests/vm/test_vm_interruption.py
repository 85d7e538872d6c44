"""What is left when an attach or a detach is interrupted at any of its steps, in a real virtual machine: by a
signal to the command, to the server or to the keeper, or by a second command.

`ENDS` is the promise. Each row: during which command ("swap" is attach --swap,
"swapoff" detach --swapoff; "areas" and "areasoff" the same with three areas; "refresh" empties all of them);
at which step (see zramd.process.steps) whoever reaches it is held; who is hit there: the command, the server,
the keeper, the process at the step, that and the command; by what, a signal or another command; how the
device stands in the end; what the interrupted command says; and what the second one says.

    attached    and served, by exactly one keeper, with its data
    swapped     the same, and swapped to
    areas       the same, swapped to in three areas of descending priority
    half        the same, but some areas are not on, or not there: a refresh swaps to those that it had off,
                and detach takes all away
    alone       attached, but its keeper was killed when nobody could see to it: the next attach gives it one
    nothing     no device, no keeper, no swap, no file

    done        status 0
    interrupted status 128 + signal, and one sentence that is true
    failed      status 1, and one sentence
    killed      nothing

Rows marked * are tried each time; all of them take a quarter of an hour. ZRAMD_VM_SUITE=trixie tries them on
the kernel of that suite of Debian, instead of this machine's.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))

from guests import small_guest
from vm.guest import Guest

pytestmark = pytest.mark.timeout(600)
ROW_TIMEOUT = 300.0  # seconds
SUITE = os.environ.get("ZRAMD_VM_SUITE", "")  # read here: tests run without such variables

ENDS = """
# during  at                   whom      what             end       says         second
  attach  attach.turn          command   INT,TERM,HUP     nothing   interrupted
  attach  attach.turn          command   KILL             nothing   killed
  attach  attach.turn          server    KILL             nothing   failed
  attach  attach.turn          second    attach           attached  done         failed
  attach  attach.turn          second    detach           attached  done         failed
* attach  attach.turn          second    restart          attached  done         done
  attach  keeper.recorded      command   INT,TERM,HUP     nothing   interrupted
  attach  keeper.recorded      command   KILL             nothing   killed
  attach  keeper.recorded      process   TERM,KILL        nothing   failed
  attach  keeper.recorded      server    KILL             nothing   failed
  attach  keeper.greeted       command   INT,TERM,HUP     nothing   interrupted
  attach  keeper.greeted       command   KILL             nothing   killed
  attach  keeper.greeted       process   KILL             nothing   failed
  attach  keeper.greeted       process   TERM             nothing   failed
  attach  keeper.greeted       server    KILL             nothing   failed
  attach  keeper.connected     command   TERM             nothing   interrupted
  attach  keeper.connected     command   INT,HUP          nothing   interrupted
  attach  keeper.connected     command   KILL             nothing   killed
* attach  keeper.connected     process   KILL             nothing   failed
  attach  keeper.connected     process   TERM             nothing   failed
* attach  keeper.connected     both      KILL             alone     killed
  attach  keeper.connected     server    KILL             nothing   failed
  attach  keeper.connected     second    attach           attached  done         failed
  attach  keeper.connected     second    detach           attached  done         failed
  attach  keeper.connected     second    restart          attached  done         done
  attach  keeper.noted         command   INT,TERM,HUP     nothing   interrupted
  attach  keeper.noted         command   KILL             nothing   killed
  attach  keeper.noted         process   TERM,KILL        nothing   failed
  attach  keeper.noted         both      KILL             alone     killed
  attach  keeper.noted         server    KILL             nothing   failed
  attach  keeper.ready         command   INT,TERM,HUP     nothing   interrupted
* attach  keeper.ready         command   KILL             nothing   killed
  attach  keeper.ready         process   TERM,KILL        nothing   failed
  attach  keeper.ready         server    KILL             attached  done
  attach  attach.attached      command   TERM             nothing   interrupted
  attach  attach.attached      command   INT,HUP          nothing   interrupted
  attach  attach.attached      command   KILL             attached  killed
  attach  attach.attached      keeper    KILL             nothing   failed
  attach  attach.attached      keeper    TERM             nothing   failed
  attach  attach.attached      server    KILL             attached  done
  attach  attach.attached      second    attach           attached  done         failed
* attach  attach.attached      second    detach           nothing   failed       done
  attach  attach.attached      second    restart          attached  done         done
  attach  attach.used          command   INT,TERM,HUP     nothing   interrupted
  attach  attach.used          command   KILL             attached  killed
  swap    attach.attached      command   TERM             nothing   interrupted
  swap    attach.attached      second    detach           nothing   failed       done
  swap    swap.made            command   INT,TERM,HUP     nothing   interrupted
  swap    swap.made            command   KILL             attached  killed
* swap    swap.made            second    detach           swapped   done         failed
  swap    swap.made            second    swapoff          nothing   done         done
  swap    swap.made            second    attach           swapped   done         failed
  swap    swap.made            server    KILL             swapped   done
  swap    swap.made            second    stop             swapped   done         failed
  swap    swap.made            second    restart          swapped   done         done
  swap    attach.used          command   TERM             swapped   interrupted
  swap    attach.used          command   INT,HUP          swapped   interrupted
  swap    attach.used          command   KILL             swapped   killed
  detach  detach.begun         command   INT,TERM,HUP     attached  interrupted
  detach  detach.begun         command   KILL             attached  killed
  detach  detach.begun         keeper    TERM,KILL        nothing   done
  detach  detach.begun         server    KILL             nothing   done
  detach  detach.begun         second    detach           nothing   done         failed
  detach  detach.begun         second    attach           nothing   done         failed
  detach  detach.begun         second    restart          nothing   done         done
  detach  detach.free          command   INT,TERM,HUP     attached  interrupted
  detach  detach.free          command   KILL             attached  killed
  detach  detach.free          keeper    TERM,KILL        nothing   done
  detach  detach.free          server    KILL             nothing   done
  detach  detach.free          second    detach           nothing   done         failed
  detach  detach.free          second    restart          nothing   done         done
  detach  detach.disconnected  command   INT,TERM,HUP     nothing   done
  detach  detach.disconnected  command   KILL             nothing   killed
* detach  detach.disconnected  second    attach           attached  done         done
  detach  detach.disconnected  second    detach           nothing   done         failed
  detach  detach.disconnected  second    restart          nothing   done         done
  swapoff detach.begun         command   TERM             swapped   interrupted
  swapoff detach.begun         command   INT,HUP          swapped   interrupted
  swapoff detach.begun         command   KILL             swapped   killed
  swapoff detach.free          command   TERM             attached  interrupted
  swapoff detach.free          command   INT,HUP          attached  interrupted
  swapoff detach.free          command   KILL             attached  killed
* swapoff detach.free          second    swap             nothing   done         failed
  swapoff detach.free          second    swapoff          nothing   done         failed
  swapoff detach.disconnected  command   INT,TERM,HUP     nothing   done
  swapoff detach.disconnected  command   KILL             nothing   killed
  areas   swap.makes           command   INT,TERM,HUP     nothing   interrupted
  areas   swap.makes           command   KILL             half      killed
  areas   swap.made            command   INT,TERM,HUP     nothing   interrupted
  areas   swap.made            command   KILL             half      killed
  areas   swap.on              command   TERM             nothing   interrupted
  areas   swap.on              command   INT,HUP          nothing   interrupted
* areas   swap.on              command   KILL             half      killed
  areas   swap.on              second    areasoff         nothing   done         done
  areas   swap.on              second    refresh          areas     done         done
  areas   swap.on              second    stop             areas     done         failed
  areas   swap.on              second    restart          areas     done         done
  areas   swap.on              server    KILL             areas     done
  areas   attach.used          command   INT,TERM,HUP     areas     interrupted
  areas   attach.used          command   KILL             areas     killed
  areasoff swap.off.begun      command   INT,TERM,HUP     areas     interrupted
  areasoff swap.off.begun      command   KILL             areas     killed
  areasoff swap.off            command   TERM             areas     interrupted
  areasoff swap.off            command   INT,HUP          areas     interrupted
  areasoff swap.off            command   KILL             half      killed
  areasoff swap.off            second    refresh          nothing   done         done
  areasoff swap.off            second    stop             nothing   done         failed
  areasoff swap.off            second    restart          nothing   done         done
  areasoff swap.off            server    KILL             nothing   done
  areasoff detach.free         command   INT,TERM,HUP     attached  interrupted
  areasoff detach.free         command   KILL             attached  killed
  refresh refresh.begun        command   INT,TERM,HUP     areas     interrupted
  refresh refresh.begun        command   KILL             areas     killed
  refresh refresh.begun        second    areasoff         nothing   done         done
  refresh refresh.empties      command   INT,TERM,HUP     areas     interrupted
  refresh refresh.empties      command   KILL             areas     killed
  refresh refresh.empties      process   KILL             areas     done
  refresh refresh.empties      both      KILL             areas     killed
  refresh refresh.off          command   TERM             areas     interrupted
  refresh refresh.off          command   INT,HUP          areas     interrupted
  refresh refresh.off          command   KILL             areas     killed
  refresh refresh.off          process   KILL             areas     done
  refresh refresh.off          both      KILL             half      killed
* refresh refresh.off          server    KILL             areas     done
  refresh refresh.off          second    areasoff         nothing   done         done
  refresh refresh.off          second    refresh          areas     done         done
  refresh refresh.off          second    areas            areas     done         failed
  refresh refresh.off          second    stop             areas     done         failed
  refresh refresh.off          second    restart          areas     done         done
  refresh refresh.on           command   INT,TERM,HUP     areas     interrupted
  refresh refresh.on           command   KILL             areas     killed
  refresh refresh.on           process   KILL             areas     done
  refresh refresh.on           both      KILL             areas     killed
"""


def rows() -> Iterator[Any]:
    """The table's rows, one for each signal or command; those without a star are slow."""
    for line in ENDS.splitlines():
        if line and line[0] in " *":
            during, at, whom, whats, end, says, *second = line[1:].split()
            for what in whats.split(","):
                marks = [] if line[0] == "*" else [pytest.mark.slow]
                name = f"{during}-{at}-{whom}-{what}"
                yield pytest.param(during, at, whom, what, end, says, "".join(second), marks=marks, id=name)


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    """A booted guest, with what does the rows."""
    with small_guest(SUITE) as guest:
        guest.run(f"insmod {guest.machine.images.later_modules[-1]}")
        guest.run("mkdir -p /dev/shm && mount -t tmpfs none /dev/shm && mkfifo /tmp/ask /tmp/tell")
        program = Path(__file__).with_name("interruptions.py").read_bytes()
        guest.put("/tmp/interruptions.py", program)
        guest.run("/usr/bin/python3 /tmp/interruptions.py /tmp/ask /tmp/tell </dev/null >/tmp/log 2>&1 &")
        yield guest
        print(guest.run("cat /tmp/log"))


@pytest.mark.parametrize(("during", "at", "whom", "what", "end", "says", "second"), list(rows()))
def test_ends(
    guest: Guest, during: str, at: str, whom: str, what: str, end: str, says: str, second: str
) -> None:
    asked = f"echo {during} {at} {whom} {what} {end} >/tmp/ask; cat /tmp/tell"
    answer: dict[str, Any] = json.loads(guest.run(asked, ROW_TIMEOUT))
    print(json.dumps(answer))
    assert "error" not in answer
    assert answer["found"] == end
    assert answer.get("right", True)

    # What was said is true.
    status, out, err = answer["status"], answer["out"], answer["err"]
    lines = unwarned(err)
    sentences = [line for line in lines if line.startswith("zramd: ")]
    assert "Traceback" not in err + answer["other"][2]
    assert len(lines) == len(sentences)
    if says == "done":
        assert (status, sentences) == (0, [])
        assert during == "refresh" or out == ("/dev/nbd0\n" if during in ("attach", "swap", "areas") else "")
    elif says == "interrupted":
        assert status == 128 + getattr(signal, f"SIG{what}")
        assert out == "" or during == "refresh"
        assert sentences == [f"zramd: interrupted: {STANDS[end]}"]
    elif says == "failed":
        assert (status, out, len(sentences)) == (1, "", 1)
    elif says == "killed":
        assert status == -signal.SIGKILL
    if second:
        assert answer["other"][0] == (1 if second == "failed" else 0), answer["other"]
        assert len(unwarned(answer["other"][2])) == (second == "failed"), answer["other"]

    # What is left can be taken away, and then nothing is left.
    if during == "refresh" and end == "half":
        assert (answer["again"][0], answer["again"][2], answer["whole"]) == (0, "", "areas")
    if end == "alone":
        assert answer["again"][:2] == [0, "/dev/nbd0\n"], answer["again"]
    assert answer.get("detached", [0, "", ""]) == [0, "", ""]
    assert answer["after"][0] == "nothing"


def unwarned(said: str) -> list[str]:
    """The lines of what a command has said, but the warning of the state's place that `attach --swap` has."""
    return [line for line in said.splitlines() if "may be swapped out itself" not in line]


STANDS = {
    "nothing": "held is not attached",
    "attached": "held is attached as /dev/nbd0",
    "swapped": "held is attached as /dev/nbd0, and swapped to: 0 MiB are out",
    "areas": "held is attached as /dev/nbd0, and swapped to: 0 MiB are out",
}
