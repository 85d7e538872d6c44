"""What a swapping kernel's requests cost a server in its own machine, what it takes, and when it stops."""

from __future__ import annotations

from vm import smaps
from vm.attach import RUNDIR, Local
from vm.session import Session
from zramd.core.device.device import state_layout

FAULTS_WANTED = 0.01  # page faults for each request: the server's own housekeeping may have one now and then
CLOSE = 0.01  # by how much of what the server says of its pool the kernel may say more or less
SLACK = 256 << 10  # bytes: what else lies next to it; the refiller goes on meanwhile
GROUPS = "/run/cgroup2"  # in the guest
SECONDS = 6  # of load while system calls are counted
# By these a program gets memory from the kernel or changes what is mapped.
MEMORY_CALLS = ("brk", "mmap", "mremap", "munmap", "mprotect", "clone", "clone3")


def measure(session: Session) -> None:
    """Count the server's page faults and system calls while the guest swaps in and out."""
    result, guest = session.result, session.guest
    _load(session)  # the first time, its threads and buffers are new
    before, early = session.attachment.stats(), session.beat()
    _load(session)
    after, late = session.attachment.stats(), session.beat()
    requests = sum(after[key] - before[key] for key in ("reads", "writes", "trims", "zeroes"))
    faults = late["daemon_minor"] + late["daemon_major"] - early["daemon_minor"] - early["daemon_major"]
    # What the refiller makes ready ahead of need is not counted as faults: the kernel does it in one call.
    misses = after["reserve_misses"] - before["reserve_misses"]
    result.requests = {"requests": requests, "faults": faults, "reserve_misses": misses}
    per_request = faults / max(requests, 1)
    result.expect(
        "requests need no memory", per_request < FAULTS_WANTED, f"{faults} faults in {requests} requests"
    )
    result.expect("the reserve is never empty", misses == 0, f"{misses} pages were not ready")
    counts = "/tmp/strace"
    pid = early["daemon_pid"]
    # strace stops the server at each call. Its own memory must not be swapped to that, or both wait for ever.
    guest.run(
        f"mkdir -p {GROUPS} && mount -t cgroup2 none {GROUPS}"
        f" && echo +memory >{GROUPS}/cgroup.subtree_control"
        f" && mkdir -p {GROUPS}/strace && echo 0 >{GROUPS}/strace/memory.swap.max"
    )
    guest.run(
        f"sh -c 'echo $$ >{GROUPS}/strace/cgroup.procs; exec /usr/sbin/strace -f -c -o {counts} -p {pid}' "
        ">/dev/null 2>&1 & echo $! >/tmp/strace.pid"
    )
    _load(session)
    guest.run(
        "pid=$(cat /tmp/strace.pid); kill -INT $pid; while kill -0 $pid 2>/dev/null; do sleep 1; done",
        60,
    )
    guest.run(f"rmdir {GROUPS}/strace; umount {GROUPS}")
    calls = system_calls(guest.run(f"cat {counts}"))
    result.requests["system_calls"] = calls
    found = {name: calls[name] for name in MEMORY_CALLS if name in calls}
    result.expect(
        "no system call takes memory or changes mappings", calls and not found, found or f"{len(calls)} kinds"
    )


def _load(session: Session) -> None:
    session.phase(f"churn seconds {SECONDS}", "counting what requests cost while the guest swaps")


def system_calls(table: str) -> dict[str, int]:
    """Return how often each system call was made, from strace's summary."""
    calls = {}
    for line in table.splitlines():
        words = line.split()
        if len(words) >= 5 and words[0].replace(".", "").isdigit() and words[-1] != "total":
            calls[words[-1]] = int(words[3])
    return calls


def expect_resident(session: Session) -> None:
    """See that pool, reserve and tables take what the server says, as the guest's kernel counts them.

    The reserve makes all of the pool writable, and so one mapping with those of its tables that lie next to
    it; how many do depends on how the kernel aligns what it maps.
    """
    stats = session.attachment.stats()
    least, most = stats["mem_used_total"] + stats["reserve_bytes"], stats["total_bytes"]
    lines = session.guest.run(f"grep -E '^[0-9a-f]+-|^[RP]ss:' /proc/$(cat {RUNDIR}/pid)/smaps")
    layout = state_layout(session.attachment.size)
    found, _ = smaps.arena(lines, layout["spans"] * layout["span_size"])
    close = (1 - CLOSE) * least - SLACK <= found <= (1 + CLOSE) * most + SLACK
    session.result.expect(
        "the pool takes what the server says",
        close,
        f"{found >> 10} KiB resident, {least >> 10} to {most >> 10} KiB said",
    )


def stop_waits_for_swapoff(session: Session) -> None:
    """Swap on again, ask the server to stop, and see that it waits until swap is off."""
    result, guest = session.result, session.guest
    assert isinstance(session.attachment, Local)
    device = session.attachment.device
    pid = guest.run(f"cat {RUNDIR}/pid").strip()
    guest.run(f"/usr/sbin/swapon --discard {device}", 60)
    guest.run(f"kill {pid}; sleep 2")
    waits = guest.try_run(f"kill -0 {pid}")[0] == 0
    guest.run(f"/usr/sbin/swapoff {device}", 60)
    ends = (
        guest.try_run(f"(for i in 1 2 3 4 5 6 7 8 9; do kill -0 {pid} || exit 0; sleep 1; done; exit 1)", 60)[
            0
        ]
        == 0
    )
    log = " ".join(line for line in session.attachment.log().splitlines() if "in use as swap" in line)
    result.expect(
        "a stop waits for swapoff, and says so", waits and ends and log, log or f"waits {waits}, ends {ends}"
    )
