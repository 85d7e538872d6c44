"""Eight threads that write and verify blocks of a device in a guest, and how long they had to wait.

start(guest, "zram0", "/dev/nbd0")   # and then end zram0's server, again and again
found = stop(guest, "zram0")         # all threads know what must be where: found["bad"] is what was not
pauses(lines, "zram0", found)        # of the kernel's log, where the keeper tells of each new connection
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from vm.guest import Guest

# probe.py DEVICE SECONDS STOP, and one line of JSON at the end. It ends early when there is a file STOP.
_PROGRAM = """
import json, mmap, os, random, struct, sys, threading, time
fd = os.open(sys.argv[1], os.O_RDWR | os.O_DIRECT)
seconds, count = float(sys.argv[2]), 8
blocks = os.lseek(fd, 0, os.SEEK_END) // 4096
end = time.monotonic() + seconds
longest, slow, done, bad = [0.0], [], [0] * count, []
def work(n):
    page, rnd, known = mmap.mmap(-1, 4096), random.Random(n), {}
    while time.monotonic() < end and not os.path.exists(sys.argv[3]):
        block, started = rnd.randrange(n, blocks, count), time.monotonic()
        try:
            if rnd.random() < 0.6 or block not in known:
                known[block] = struct.pack("QQ", block, rnd.getrandbits(63)) * 256
                page[:] = known[block]
                os.pwritev(fd, [page], block * 4096)
            else:
                os.preadv(fd, [page], block * 4096)
                if page[:] != known[block]:
                    bad.append(f"block {block}")
        except OSError as error:
            bad.append(str(error))
            time.sleep(0.05)
        longest.append(time.monotonic() - started)
        if longest[-1] > 0.05:
            slow.append((started, longest[-1]))
        done[n] += 1
threads = [threading.Thread(target=work, args=(n,)) for n in range(count)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
slow = sorted(slow, key=lambda one: one[1])[-300:]
print(json.dumps({"done": sum(done), "bad": bad[:9], "longest": sorted(longest)[-9:], "slow": slow}))
"""


def start(guest: Guest, name: str, device: str, seconds: float = 600) -> None:
    """Start writing and verifying blocks, for so many seconds or until `stop`."""
    guest.put("/tmp/probe.py", _PROGRAM.encode())
    guest.run(f"rm -f /tmp/{name}.stop")
    guest.run(f"/usr/bin/python3 /tmp/probe.py {device} {seconds} /tmp/{name}.stop >/tmp/{name}.json 2>&1 &")


def stop(guest: Guest, name: str) -> dict[str, Any]:
    """End it now, and return what it found: see `wait`."""
    guest.run(f"touch /tmp/{name}.stop")
    return wait(guest, name)


def wait(guest: Guest, name: str) -> dict[str, Any]:
    """Return what it found, once its time is over.

    `done` requests, what was `bad`, seconds of the `longest`, when the `slow` ones began and what they took.
    """
    guest.run(f"while ! grep -q done /tmp/{name}.json; do sleep 0.1; done", 90)
    found: dict[str, Any] = json.loads(guest.run(f"cat /tmp/{name}.json"))
    print({key: found[key] for key in ("done", "bad", "longest")})
    return found


def pauses(lines: Iterable[str], name: str, found: dict[str, Any]) -> list[tuple[float, float]]:
    """For each time that the kernel was connected to `name` again: how late, and what the slowest took."""
    times = []
    for line in lines:
        if again := re.search(rf"\[ *([0-9.]+)\].* connected to {name} again after ([0-9.]+) s", line):
            end, after = float(again[1]), float(again[2])
            waited = [took for begun, took in found["slow"] if begun < end and begun + took > end - after]
            times.append((after, round(max(waited, default=0.0), 3)))
    return times
