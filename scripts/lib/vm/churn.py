"""Programs that come and go in a guest: what it uses of its swap, and what the device still stores."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

from vm.plan import KERNEL_ZRAM, MIB, Plan
from vm.report import Result
from vm.session import Boot, Session, booted

DAEMONS, DAEMON_MIB = 16, 4
PROGRAMS, PROGRAM_MIB = 8, 24
FULL_OBJECTS = 0.91


def churn(plan: Plan, boot: Boot, result: Result) -> None:
    opts = plan.churn_options
    with booted(plan, boot, result) as session:
        areas = int(opts.get("areas", 1))
        swap_on(session, areas, opts)
        session.guest.start_workload_words(f"churn {plan.seed}")
        stop = threading.Event()
        series: list[dict[str, Any]] = []
        sampler = threading.Thread(target=_sample, args=(session, series, stop))
        sampler.start()
        faults = []
        try:
            say = session.live.step
            phase(session, f"daemons {DAEMONS} {DAEMON_MIB}")
            phase(session, f"programs {PROGRAMS} {PROGRAM_MIB}")
            end = time.monotonic() + plan.churn
            tool = opts.get("tool")
            endtool = opts.get("endtool", tool)
            while time.monotonic() < end:
                a = phase(session, "run 20")
                faults.append(a)
                c = phase(session, "clusters 512")
                say(f"{brief(series)} p99 {pct(a['took'], 99):.2f} ms faults {a['faults']} clusters {c}")
                if tool:
                    t = time.monotonic()
                    say(session.guest.run(f"{tool}", 300)[-300:])
                    say(f"   tool took {time.monotonic()-t:.1f} s; {brief(series)}")
            steady = len(series)
            phase(session, "programs 0 1")
            phase(session, "run 20")
            c = phase(session, "clusters 512")
            say(f"programs ended: {brief(series)} clusters {c}")
            after = len(series)
            if endtool:
                for i in range(int(opts.get("rounds", 2))):
                    t = time.monotonic()
                    say(session.guest.run(f"{endtool}", 300)[-900:])
                    phase(session, "run 10")
                    say(f"   tool took {time.monotonic()-t:.1f} s; {brief(series)}")
            a = phase(session, "run 10")
            say(f"at the end: {brief(series)}")
        finally:
            stop.set()
            sampler.join()
        print(json.dumps({"series": series, "steady": steady, "after": after, "faults": faults}), file=open(opts.get("out", "/tmp/churn.json"), "w"))
        s = series[60:steady]
        print(opts, "steady: dead mean %.1f %%, used mean %d, bytes/used %.0f, total mean %.1f MiB, slowest" % (
            100 * sum(x["dead"] for x in s) / len(s), sum(x["used"] for x in s) / len(s),
            sum(x["total"] for x in s) / sum(x["used"] for x in s), sum(x["total"] for x in s)/len(s)/MIB))
        lat = {}
        for a in faults:
            for k, v in a["took"].items():
                lat[k] = lat.get(k, 0) + v
        print("faults", sum(lat.values()), "p50 %.2f p99 %.2f ms" % (pct(lat, 50), pct(lat, 99)), "bad", sum(a["bad"] for a in faults), "lost", sum(a["lost"] for a in faults), "end", brief(series))
        result.expect("x", True)


def pct(took, p):
    total = sum(took.values())
    seen = 0
    for k in sorted(map(int, took)):
        seen += took[str(k)]
        if seen * 100 >= p * total:
            e, m = divmod(k, 8)
            return (8 + m + 1) * 2 ** (e - 3) / 1e6
    return 0.0


def brief(series):
    if not series:
        return "-"
    x = series[-1]
    return "used %d stored %d same %d objs %d dead %.0f %% total %.1f MiB trims %d free %d MiB avail" % (x["used"], x["stored"], x["same"], x["objs"], 100 * x["dead"], x["total"] / MIB, x["trims"], x["avail"]/MIB)


def phase(session, words):
    return session.guest.phase(words, 600)


def _sample(session: Session, series, stop) -> None:
    zram = session.plan.mode == KERNEL_ZRAM
    while not stop.wait(1.0):
        if not session.guest.beats:
            continue
        beat = session.guest.beats[-1]
        used = (beat["SwapTotal"] - beat["SwapFree"]) // 4096
        if zram:
            z = session.attachment.stats()
            objs = z["orig_data_size"] // 4096
            stats = {"total": z["total_bytes"], "stored": objs, "same": 0, "trims": z["notify_free"]}
        else:
            s = session.attachment.stats()
            objs = s["objs_used"]
            stats = {"total": s["total_bytes"], "stored": s["pages_stored"], "same": s["same_pages"], "trims": s["notify_free"], "writes": s["writes"], "reads": s["reads"]}
        dead = 1 - used * FULL_OBJECTS / objs if objs > 100 else 0.0
        series.append({"t": beat["time"], "used": used, "objs": objs, "dead": dead, "in": beat["pswpin"], "out": beat["pswpout"], "avail": beat["MemAvailable"], "oom": beat["oom_kill"], **stats})


def swap_on(session: Session, areas: int, opts) -> None:
    device = session.attachment.device
    session.attachment.attach(session.guest)
    g = session.guest
    pc = opts.get("page_cluster", "0")
    reserve = max(session.plan.memory // 32 >> 10, 4096)
    import base64
    words = base64.b64encode(open("/tmp/zg.py","rb").read()).decode()
    for k in range(0, len(words), 3000):
        g.run(f"echo {words[k:k+3000]} >>/tmp/zg.b64")
    g.run("base64 -d /tmp/zg.b64 >/tmp/zg.py")
    g.run(f"sysctl -w vm.page-cluster={pc} vm.swappiness=150 vm.min_free_kbytes={reserve} vm.overcommit_memory=1")
    disc = opts.get("discard", "both")
    option = {"both": "--discard", "pages": "--discard=pages", "once": "--discard=once", "none": ""}[disc]
    order = opts.get("order", "equal")
    if areas == 1:
        g.run(f"/usr/sbin/mkswap {device}", 60)
        g.run(f"/usr/sbin/swapon {option} --priority 100 {device}", 60)
    else:
        total = session.plan.device_size // 512
        each = total // areas // 2048 * 2048
        for i in range(areas):
            g.run(f"/usr/bin/python3 /tmp/zg.py addpart {device} {i+1} {i*each} {each}")
            g.run(f"/usr/sbin/mkswap {device}{i+1}", 60)
            prio = 100 if order == "equal" else 100 - i
            g.run(f"/usr/sbin/swapon {option} --priority {prio} {device}{i+1}", 60)
