"""Debian 13 with systemd, and zramd-net@: devices for other machines, as docs/network.md has them set up.

The clients are in the same machine: what is shown is the unit, with its keys, its store and its user.
"""

import json
import re
import shlex

import pytest
import test_debian as debian
from test_debian import MIB, SLOW, TROUBLE, Debian, documented_drop_in, wait_for
from vm.guest import Guest

pytestmark = [pytest.mark.timeout(1200), pytest.mark.slow]

DISK = 64 * MIB
DATA = 16 * MIB
BUDGET = 24 * MIB
PORTS = {"guest1": 10809, "guest2": 10810}
CONFIGURATION = f"[zramd]\\nbudget = {BUDGET}\\n" + "".join(
    f"[{name}]\\ndisksize = {DISK}\\nattach = no\\nstate = systemd\\nlisten = 127.0.0.1:{port}\\n"
    f"tls = psk:%%d/keys.psk\\nclients = {name}\\n"
    for name, port in PORTS.items()
)


@pytest.fixture(scope="module")
def computer(tmp_path_factory: pytest.TempPathFactory) -> Debian:
    return debian.with_the_wheel("trixie", tmp_path_factory.mktemp("debian"))


def test_devices_for_other_machines(computer: Debian) -> None:
    with computer.on() as guest:
        for line in debian.SETUP.splitlines()[1:]:
            guest.run(line, SLOW)
        guest.run(f"printf '{CONFIGURATION}' >/etc/zramd.conf")
        guest.run("zramd install-units", SLOW)
        assert guest.run("systemd-analyze verify --man=no zramd-net@guest1.service", SLOW) == ""
        assert not guest.try_run("systemd-analyze security --threshold=20 zramd-net@guest1", SLOW)[0]
        guest.run(f"head -c {DATA} /dev/urandom >/run/data; mkdir -m 700 -p /etc/zramd")
        for name in PORTS:
            new_key(guest, name)
            drop_in(
                guest, f"zramd-net@{name}", documented_drop_in("network", "network").replace("guest1", name)
            )
        for step in (served, kept, new_keys, budget, stopped):
            print(step.__name__, flush=True)
            step(guest)
        assert guest.alarms() == []
        debian.end_system(guest, "poweroff")
        guest.wait_for_end(debian.SHUTDOWN_TIMEOUT)
        # The servers that were killed.
        trouble = [line for line in computer.log() if TROUBLE.search(line)]
        assert [line for line in trouble if "Failed with result 'signal'" not in line] == []


def new_key(guest: Guest, name: str) -> None:
    guest.run(f"psktool -u {name} -p /etc/zramd/{name}.psk && chmod 600 /etc/zramd/{name}.psk", SLOW)


def drop_in(guest: Guest, unit: str, text: str) -> None:
    folder = f"/etc/systemd/system/{unit}.service.d"
    lines = shlex.quote(text.replace("\n", "\\n"))  # a command is one line
    guest.run(
        f"mkdir -p {folder} && printf %b {lines} >>{folder}/override.conf && systemctl daemon-reload", SLOW
    )


def uri(device: str, key: str, client: str) -> str:
    return f"'nbds://{client}@127.0.0.1:{PORTS[device]}/{device}?tls-psk-file={key}'"


def own(name: str) -> str:
    return uri(name, f"/etc/zramd/{name}.psk", name)


def size(guest: Guest, address: str) -> int | None:
    """What a client sees of a device; None if it is refused."""
    status, output = guest.try_run(f"nbdinfo --size {address}", SLOW)
    return None if status else int(output)


def write(guest: Guest, name: str) -> tuple[int, str]:
    return guest.try_run(f"nbdcopy /run/data {own(name)} 2>&1", SLOW)


def as_written(guest: Guest, name: str) -> bool:
    read = f"nbdcopy {own(name)} - | head -c {DATA} | cmp - /run/data"
    return not guest.try_run(read, SLOW)[0]


def pid_of(name: str) -> str:
    """The command that prints it."""
    return f"systemctl show -P MainPID zramd-net@{name}"


def server(guest: Guest, name: str) -> str:
    return guest.run(pid_of(name), SLOW).strip()


def ended(guest: Guest, name: str, how: str) -> None:
    """End the server, and return when the next one is active."""
    before = server(guest, name)
    guest.run(how, SLOW)
    wait_for(guest, f'test "$({pid_of(name)})" != {before} && systemctl is-active zramd-net@{name}', "active")


def served(guest: Guest) -> None:
    """To who has the key of this device, by a user who has no right and owns nothing."""
    guest.run("systemctl start zramd-net@guest1 zramd-net@guest2", SLOW)
    assert size(guest, own("guest1")) == size(guest, own("guest2")) == DISK
    assert size(guest, f"nbd://127.0.0.1:{PORTS['guest1']}/guest1") is None
    assert size(guest, uri("guest1", "/etc/zramd/guest2.psk", "guest2")) is None
    assert size(guest, uri("guest1", "/etc/zramd/guest2.psk", "guest1")) is None
    users = {guest.run(f"stat -c %u /proc/{server(guest, name)}").strip() for name in PORTS}
    assert len(users) == 2
    assert "0" not in users
    without_rights(guest)
    assert guest.run("zramd list", SLOW).count("guest") == 2
    assert "budget" not in guest.run("zramd list", SLOW)


def without_rights(guest: Guest) -> None:
    for name in PORTS:
        status = guest.run(f"cat /proc/{server(guest, name)}/status")
        assert re.findall(r"Cap(?:Prm|Eff|Bnd|Amb):\s+(\S+)", status) == ["0" * 16] * 4, status


def kept(guest: Guest) -> None:
    """The data, and the sockets: over a restart and a crash."""
    assert write(guest, "guest1") == (0, "")
    for how in ("systemctl restart zramd-net@guest1", f"kill -9 $({pid_of('guest1')})"):
        ended(guest, "guest1", how)
        assert as_written(guest, "guest1"), how
    without_rights(guest)


def new_keys(guest: Guest) -> None:
    """A restart reads the file again, as root, and the service gets a copy."""
    guest.run("mv /etc/zramd/guest1.psk /run/old.psk")
    new_key(guest, "guest1")
    assert size(guest, uri("guest1", "/run/old.psk", "guest1")) == DISK
    ended(guest, "guest1", "systemctl restart zramd-net@guest1")
    assert size(guest, uri("guest1", "/run/old.psk", "guest1")) is None
    assert as_written(guest, "guest1")


def listed(guest: Guest) -> dict[str, int]:
    """What `zramd list` says of the budget; sizes in bytes."""
    found: dict[str, int] = json.loads(guest.run("zramd list --json --bytes", SLOW))["budget"]
    print(found, flush=True)
    return found


def budget(guest: Guest) -> None:
    """With the documented drop-in both have a part, and what a dead one has still counts."""
    guest.run("systemctl stop zramd-net@guest1 zramd-net@guest2", SLOW)
    for name in PORTS:
        drop_in(guest, f"zramd-net@{name}", documented_drop_in("budget", "network"))
    guest.run("systemctl start zramd-net@guest1 zramd-net@guest2", SLOW)
    without_rights(guest)
    assert write(guest, "guest1") == (0, "")
    status, said = write(guest, "guest2")
    assert status, "both have more than the budget"
    assert "No space left" in said
    found = listed(guest)
    assert found["devices"] == 2
    assert DATA + 4 * MIB < found["used"] <= found["budget"] == BUDGET
    ended(guest, "guest1", f"kill -9 $({pid_of('guest1')})")
    assert as_written(guest, "guest1")
    assert DATA + 4 * MIB < listed(guest)["used"] <= BUDGET
    assert write(guest, "guest2")[0], "a crash made room that is not there"
    without_rights(guest)


def stopped(guest: Guest) -> None:
    """Nothing stays behind but what the next start needs."""
    guest.run("systemctl stop zramd-net@guest1 zramd-net@guest2", SLOW)
    assert guest.run("ls /run/zramd", SLOW) == ""
    assert guest.run("pgrep nbdkit; true") == ""
