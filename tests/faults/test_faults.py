"""Every system call of a server fails: once, and for as long as it takes; nothing else may be lost.

Each phase of a server's life is recorded first: which calls are made, by which thread, on what. Then it is
run again for each of these places: with one of its calls failing, and with all failing from the first on (of
a shortage: with all others that it would meet as well) until the phase is over. plan.py says which calls and
errors, world.py what must hold after each.

    scripts/test --faults                                    all
    scripts/test --faults -k serve                           one phase
    ZRAMD_FAULTS_SECONDS=150 scripts/test --faults           a sample; ZRAMD_SEED chooses another or the same
    ZRAMD_FAULT='zramd openat(R/classes' scripts/test --faults    those rules whose text has this

What this does not reach, and why:

- What has no system call: page faults. A full tmpfs, which is SIGBUS, and the limits of cgroups are in
  test_shortages.py.
- Calls whose failure cannot happen or whose failure nobody survives: calls.EXCLUDED, calls.NBDKIT and
  plan.LEFT_OUT, each with its reason.
- What a program does before its own code runs: the loader, nbdkit's and Python's beginning.
- Two errors at once of different kinds, and each call between the first, the middle and the last of many at a
  place.
- Answers of the vDSO (the clock), and what the kernel does by itself (io_uring: there is none).
- zramd attach, detach and the keeper: they want the kernel's nbd device, so a virtual machine. There
  `Supervisor.run` works as here.
- What is asked of a block device by ioctl, as the backing here is a file: test_backingdevice.py has that.
- A server that runs already: the filter is inherited, so the program must be begun under it.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import repeat

import plan
import pytest
from backingphases import BACKING_PHASES
from phases import LASTING_PATIENCE, PHASES, Phase
from supervisor import Place, Rule
from support.run import SEED
from world import PATIENCE, Violation, World

# For all phases together, about; 0: as long as it takes. What is made follows from it, not from the clock.
SECONDS = float(os.environ.get("ZRAMD_FAULTS_SECONDS", "0"))
ONLY = os.environ.get("ZRAMD_FAULT", "")
LIFE = 30  # rules that one server lives through before it is restarted, stopped and its state looked at
WORKERS = 2 * (os.cpu_count() or 1)  # servers that live at a time: half of what they do is waiting
OVERHEAD, THOROUGH, OTHER = 3.0, 0.5, 1.5  # seconds on an idle machine: of a phase, of an injection
WARM = 2  # times that a phase runs before it is recorded
NOBODY = Rule(Place("", "", "", ""), 0, "EIO")

CASES = [
    pytest.param(phase, with_state, id=f"{phase.name} {'state' if with_state else 'plain'}".replace(" ", "-"))
    for phase in (*PHASES, *BACKING_PHASES)
    for with_state in (True, False)
    if with_state or (phase.live and phase.plain)
]


class Run:
    """One phase with all its rules."""

    def __init__(self, phase: type[Phase], with_state: bool) -> None:
        self.kind = phase
        self.phase = phase()
        self.with_state = with_state
        self.world: World | None = None
        self.made = self.missed = 0
        self.failures: list[str] = []
        self.lived: list[Rule] = []

    def begin(self) -> World:
        """A server that nothing has happened to."""
        if self.world is None:
            self.world = World(self.with_state, *self.phase.settings, disk=self.phase.disk)
            self.lived = []
            self.phase = self.kind()
            if self.phase.live:
                self.phase.begin(self.world)
                for _ in range(WARM):
                    self.once(NOBODY)
        return self.world

    def once(self, rule: Rule) -> None:
        """Prepare, act with the rule in force, judge. Raises Violation."""
        world = self.world
        assert world is not None
        self.phase.prepare(world)
        world.forget_said()
        with world.supervisor.failing(rule):
            self.phase.act(world, LASTING_PATIENCE if rule.lasting else PATIENCE)
        if world.supervisor.failure:
            raise world.supervisor.failure
        self.phase.judge(world, rule)

    def record(self) -> list[Rule]:
        """What can fail in this phase."""
        world = self.begin()
        if not self.phase.live:
            self.once(NOBODY)
        self.phase.prepare(world)
        with world.supervisor.record() as recorded:
            self.phase.act(world, PATIENCE)
        self.phase.judge(world, NOBODY)
        self.end()
        rules = plan.rules(recorded, self.phase.programs, self.phase.thorough, SEED)
        return [rule for rule in rules if ONLY in str(rule)]

    def inject(self, rule: Rule) -> None:
        """Make one injection and take note of what came of it."""
        try:
            self.begin()
            self.once(rule)
            if not rule.hits:
                self.missed += 1
                return
            self.made += 1
            self.lived.append(rule)
        except Violation as violation:
            self.made += 1
            self.failures.append(f"{rule}: {violation}")
            print(self.failures[-1], flush=True)
            self.discard()

    def end(self) -> None:
        """End the server as it should be able to: restart, stop, and the next one has all."""
        world, self.world = self.world, None
        if world is None:
            return
        try:
            if world.pid:
                if self.with_state:
                    world.check_restart()
                world.check_stop()
        except Violation as violation:
            lived = "\n      ".join(map(str, self.lived))
            self.failures.append(
                f"at the end of a server's life: {violation}\n    it had lived through\n      {lived}"
            )
            print(self.failures[-1], flush=True)
        finally:
            world.close()

    def discard(self) -> None:
        """Begin anew with another server."""
        if self.world is not None:
            self.world.close()
            self.world = None


def live(phase: type[Phase], with_state: bool, rules: list[Rule]) -> tuple[int, int, list[str]]:
    """Lead a server through these rules; return how many met a call, how many none, and what went wrong."""
    run = Run(phase, with_state)
    try:
        for rule in rules:
            run.inject(replace(rule))
        run.end()
    finally:
        run.discard()
    return run.made, run.missed, run.failures


class Table:
    """A line for each phase, printed when all is done."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print it."""
        columns = ("phase", "state", "planned", "left out", "made", "missed", "survived", "failed", "time")
        terminalreporter.section("injected faults")
        terminalreporter.line("{:<12} {:<8}{:>8}{:>10}{:>9}{:>8}{:>10}{:>8}{:>10}".format(*columns))
        for line in self.lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def fault_table(request: pytest.FixtureRequest) -> list[str]:
    """The lines of the table."""
    table = Table()
    request.config.pluginmanager.register(table)
    return table.lines


@pytest.mark.timeout(0)
@pytest.mark.parametrize(("phase", "with_state"), CASES)
def test_a_call_fails(phase: type[Phase], with_state: bool, fault_table: list[str]) -> None:
    """Whichever call fails, once or for as long as it takes: nothing else is lost."""
    started = time.monotonic()
    run = Run(phase, with_state)
    rules = run.record()
    assert rules or ONLY
    planned = len(rules)
    if SECONDS:
        room = SECONDS / len(CASES) - OVERHEAD
        rules = plan.sample(rules, SEED)[: max(3, int(room / (THOROUGH if phase.thorough else OTHER)))]
    lives = [rules[at : at + LIFE] for at in range(0, len(rules), LIFE)]
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("fork")) as pool:
        results = []
        for result in pool.map(live, repeat(phase), repeat(with_state), lives):
            results.append(result)
            print(f"{phase.name}: {len(results)} of {len(lives)} lives", flush=True)
    made = sum(result[0] for result in results)
    missed = sum(result[1] for result in results)
    failures = [failure for result in results for failure in result[2]]
    taken = time.monotonic() - started
    fault_table.append(
        f"{phase.name:<12} {'with' if with_state else 'without':<8}{planned:>8}{planned - len(rules):>10}"
        f"{made:>9}{missed:>8}{made - len(failures):>10}{len(failures):>8}{taken:>8.0f} s"
    )
    if failures:
        pytest.fail("\n".join([f"{len(failures)} of {made} injections:", *failures]), pytrace=False)
