"""One on standby for the server of a service: what it has of that, and what becomes of it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.manager import ServiceManager
from support.run import wait_until
from test_ublk_server import NO_RINGS, Device, gone

from zramd.contract import rundir
from zramd.control import servers
from zramd.errors import DeviceError
from zramd.launch import crashes, processes, standby, takeover
from zramd.launch.wishes import Wanted

pytestmark = pytest.mark.skipif(bool(NO_RINGS), reason=NO_RINGS)
UNIT = "zramd@u0.service"
FEWER = ["setpriv", "--inh-caps=-sys_admin", "--bounding-set=-sys_admin", "--"]
SYS_ADMIN = 21  # the capability's number


class Service(Device):
    """A device whose server a service manager starts, and whose memory it keeps."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.manager = ServiceManager(folder)
        self.servers: list[subprocess.Popen[str]] = []

    def serve(self, *words: str, state: str = "systemd") -> subprocess.Popen[str]:
        """`zramd serve` as a service without CAP_SYS_ADMIN, with the descriptors that are kept."""
        settings = ("--name", "u0", "--size", "8M", "--ublk", f"rundir={self.folder}", f"state={state}")
        command = [*FEWER, sys.executable, "-P", "-m", "zramd", "serve", *settings, *words]
        environment = {**self.environment, "PATH": os.environ["PATH"]}
        server = self.manager.start(command, environment, errors=subprocess.PIPE)
        self.servers.append(server)
        return server

    def serves(self, pid: int) -> None:
        """Return once this process answers."""

        def it_does() -> bool:
            try:
                return bool(self.health()["pid"] == pid)
            except OSError:
                return False

        wait_until(it_does)


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    if os.geteuid():
        pytest.skip("only root's services attach devices")
    made = Service(tmp_path)
    own = processes.unit_of
    # The cgroup of a test's process is no service's.
    monkeypatch.setattr(
        processes, "unit_of", lambda served, process: own(served, process) or _managed(served, process)
    )
    yield made
    for server in made.servers:
        end(server)
    for pid in (rundir.standby(str(made.folder)), rundir.holder(str(made.folder))):
        if pid:
            os.kill(pid, signal.SIGKILL)
    made.manager.close()
    made.state.unlink(missing_ok=True)


def _managed(served: servers.Served, process: "processes.peer.Process") -> str:
    environment = processes.told(served, process, "environ")
    return UNIT if any(word.startswith("NOTIFY_SOCKET=") for word in environment) else ""


def end(server: subprocess.Popen[str]) -> None:
    assert server.stderr is not None
    server.kill()
    server.wait()
    server.stderr.close()


def capabilities(pid: int) -> int:
    found = re.search(r"CapPrm:\s+([0-9a-f]+)", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1], 16)


class TestStandIn:
    @pytest.fixture
    def promoted(self, service: Service) -> tuple[int, bytes]:
        """The process that was on standby and serves, and the data that it must have."""
        server = service.serve()
        service.serves(server.pid)
        service.manager.take()
        data = service.fill()
        assert standby.wanted(servers.look(None, str(service.folder)), Wanted(swap=True))
        waiting = standby.start(None, str(service.folder))
        end(server)
        service.serves(waiting)
        assert service.save() == data
        return waiting, data

    def test_it_has_the_memory_and_no_more_rights(
        self, service: Service, promoted: tuple[int, bytes]
    ) -> None:
        assert capabilities(os.getpid()) >> SYS_ADMIN & 1
        assert capabilities(promoted[0])
        assert not capabilities(promoted[0]) >> SYS_ADMIN & 1
        served = servers.look(None, str(service.folder))
        assert processes.unit_of(served, served.process()) == UNIT
        why = f"served by one that was on standby, until {UNIT} has started the next one"
        with pytest.raises(DeviceError, match=why):
            standby.wanted(served, Wanted(standby=True))
        with pytest.raises(DeviceError, match=f"u0 is a service: run 'systemctl restart {UNIT}'"):
            takeover.restart(None, str(service.folder), [])

    @pytest.mark.parametrize("kept", ["kept", "lost", "another"])
    def test_the_next_one_of_the_service_has_the_same(
        self, service: Service, promoted: tuple[int, bytes], kept: str
    ) -> None:
        """Also where the manager has let go of the memory meanwhile, or has some that is none of it."""
        waiting, data = promoted
        if kept != "kept":
            service.manager.let_go()
        if kept == "another":
            service.manager.kept = [("zramd-state", os.memfd_create("another", 0))]
        before = service.manager.said.count("FDSTORE=1")
        server = service.serve()
        try:
            service.serves(server.pid)
            assert gone(waiting)
            assert service.save() == data
            service.manager.take()
            assert len(service.manager.kept) == 1
            assert service.manager.said.count("FDSTORE=1") - before == (kept != "kept")
            end(server)
            server = service.serve()  # by what the manager has
            service.serves(server.pid)
            assert service.save() == data
        finally:
            end(server)

    def test_no_other_is_put_on_standby_meanwhile(
        self, service: Service, promoted: tuple[int, bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        said: list[str] = []
        monkeypatch.setattr(standby.keeping.KernelLog, "say", lambda *words: said.append(words[-1]))
        assert standby.main(["u0", str(service.folder), "ublkb0"]) == 1
        assert said == []
        assert rundir.standby(str(service.folder)) is None

    @pytest.mark.parametrize(
        ("state", "job", "stays"),
        [
            ("failed", "", False),
            ("dead", "", False),
            ("auto-restart", f"12 {UNIT} stop waiting", False),
            ("auto-restart", f"12 {UNIT} start waiting", True),
            ("auto-restart-queued", "", True),
            ("start", "", True),
        ],
    )
    def test_it_ends_with_its_device_unless_another_comes(
        self,
        service: Service,
        promoted: tuple[int, bytes],
        monkeypatch: pytest.MonkeyPatch,
        state: str,
        job: str,
        stays: bool,
    ) -> None:
        monkeypatch.setattr(crashes, "_systemctl", lambda verb, *_: state if verb == "show" else job)
        crashes.end_stand_in("u0", str(service.folder))
        assert gone(promoted[0]) != stays
        assert service.folder.exists() == stays


def test_a_service_itself_is_not_ended_with_its_device(service: Service) -> None:
    server = service.serve()
    try:
        service.serves(server.pid)
        crashes.end_stand_in("u0", str(service.folder))
        assert service.health()["pid"] == server.pid
    finally:
        end(server)


def test_a_state_in_a_file_will_do(service: Service) -> None:
    server = service.serve(state=str(service.state))
    service.serves(server.pid)
    data = service.fill()
    waiting = standby.start(None, str(service.folder))
    end(server)
    service.serves(waiting)
    assert service.save() == data
    assert json.loads(service.ask("GET", "/settings")[1])["state"] == str(service.state)
