"""One fault: load on, fault in and healed, load off, all jobs awaited, everything checked."""

from __future__ import annotations

import contextlib
import json
import math
import random
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from app.jobs import FINAL_STATES
from tests.chaos import checker
from tests.chaos.evidence import Evidence, Recovery, Violation
from tests.chaos.history import History
from tests.chaos.load import Load
from tests.chaos.reflexes import measure
from tests.chaos.world import (
    LEASE_S,
    LOST_AFTER_S,
    PARTS,
    SERVERS,
    SWEEP_S,
    NotInTime,
    World,
    eventually,
)

RATE: Final = 120.0
"""Jobs submitted per second."""
QUIESCE_S: Final = 60.0
"""After this, a job that has not ended is lost."""
RESEND_S: Final = 2.0
"""How long a bare message is waited for before its producer sends it again."""
FULL_JOBS: Final = 300
"""Of one fault; a run with fewer is a short slice."""
MAX_RSS: Final = 700 << 20
MAX_CONNECTIONS: Final = {"postgres": 60, "redis": 150}


@dataclass(frozen=True, slots=True)
class Fault:
    """An entry of the catalogue."""

    number: int
    name: str
    checks: tuple[str, ...]  #: the invariants that it probes; those of every run are added
    run: Callable[[Scene], None]
    jobs_share: float = 1.0  #: of the jobs that a fault gets
    ways: tuple[str, ...] = ("http", "bulk", "message")
    extra_s: float = 0.0  #: added to the bound of recovery, for what the fault says
    needs_fresh_world: bool = False  #: it leaves the world unfit for others
    ends: tuple[str, ...] = ()  #: parts that it ends, or has a reason to end by themselves
    breaks_code: bool = False  #: what it does is a bug's doing, and may show a traceback


EVERY_RUN: Final = (*("I1", "I2", "I3", "I4", "I5", "I8", "I9", "I10", "I12", "I13", "I14", "I15"),)
FAULTS: Final[dict[int, Fault]] = {}


def fault(
    number: int, name: str, *, checks: tuple[str, ...] = (), **given: Any
) -> Callable[[Callable[[Scene], None]], Callable[[Scene], None]]:
    """Enter a function in the catalogue. It injects and heals while load runs, and returns."""

    def enter(function: Callable[[Scene], None]) -> Callable[[Scene], None]:
        assert number not in FAULTS, number
        FAULTS[number] = Fault(number, name, checks, function, **given)
        return function

    return enter


@dataclass(slots=True)
class Outcome:
    """What is reported of a fault."""

    number: int
    name: str
    jobs: int = 0
    lost: int = 0
    doubled: int = 0
    resent: int = 0  #: bare messages that their producer had to send again
    recovery_s: float = 0.0
    bound_s: float = 0.0
    took_s: float = 0.0
    checks: tuple[str, ...] = ()
    violations: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    skipped: str = ""  #: why the fault cannot be injected on this machine

    @property
    def survived(self) -> bool:
        return not self.violations and not self.skipped


class NotPossible(Exception):
    """This machine lacks what a fault needs; the text names it. Raised before anything changes."""


class Scene:
    """What a fault is given: the world, its load, chance, and a place to say what it saw."""

    def __init__(self, world: World, load: Load, rng: random.Random, *, is_full: bool) -> None:
        self.is_full = is_full  #: no short slice: a fault may last as long as it does in life
        self.world = world
        self.load = load
        self.rng = rng
        self.notes: list[str] = []
        self.found: list[Violation] = []
        self.later: list[Callable[[Evidence], None]] = []

    def note(self, text: str) -> None:
        """Tell the reader of the report: a figure, or the substitute for a tool that is missing."""
        self.notes.append(text)

    def expect(self, is_so: bool, invariant: str, text: str) -> None:
        """A check of this fault's own; `text` says what is wrong if it is not so."""
        if not is_so:
            self.found.append(Violation(invariant, text))

    def expect_soon(
        self, is_so: Callable[[], object], within_s: float, invariant: str, what: str
    ) -> None:
        """A check that may take a while to come true; `what` names it, and the time is noted."""
        began = time.monotonic()
        try:
            eventually(is_so, within_s, what)
        except NotInTime as error:
            self.expect(False, invariant, str(error))
        else:
            self.note(f"{what} after {time.monotonic() - began:.1f} s.")

    def afterwards(self, look: Callable[[Evidence], None]) -> None:
        """Look at the evidence when all has ended; `look` uses `expect` and `note`."""
        self.later.append(look)

    def pause(self, least_s: float, most_s: float) -> None:
        """A time by chance."""
        time.sleep(self.rng.uniform(least_s, most_s))


def play(
    world: World, history: History, fault: Fault, *, seed: int, jobs: int, folder: Path
) -> Outcome:
    """Run a fault to its end and check it. Leaves history, tables and texts in the folder.

    What keeps it from its end is a violation, too: others are played all the same.
    """
    try:
        return _play(world, history, fault, seed=seed, jobs=jobs, folder=folder)
    except Exception as error:
        traceback.print_exc()
        text = f"It could not be played to its end: {type(error).__name__}: {error}"
        return Outcome(fault.number, fault.name, violations=[text])


def _play(
    world: World, history: History, fault: Fault, *, seed: int, jobs: int, folder: Path
) -> Outcome:
    began = time.monotonic()
    rng = random.Random(f"{seed}/{fault.number}")
    canary = f"canary-{rng.getrandbits(64):016x}"
    history.fault = f"{fault.number}"
    since = world.now()
    load = Load(
        world,
        history,
        rng,
        jobs=round(jobs * fault.jobs_share),
        rate=RATE,
        canary=canary,
        ways=fault.ways,
        is_full=jobs >= FULL_JOBS,
    )
    scene = Scene(world, load, rng, is_full=jobs >= FULL_JOBS)
    num_hooks = len(world.receiver.hooks)
    reflexes = [_reflexes(world, history, rng, canary)]
    ended, log_sizes = dict(world.restarts), world.log_sizes()
    outcome = Outcome(fault.number, fault.name, checks=tuple(sorted({*fault.checks, *EVERY_RUN})))
    world.reload_s = 0.0
    with _sampled(world) as samples:
        with load:
            try:
                load.wait_accepted(round(jobs * fault.jobs_share * 0.1))
                outcome.skipped = _inject(fault, scene)
            except NotInTime as error:
                scene.expect(False, "I7", str(error))
            healed_at, open_ids = world.now(), _open_ids(world, since)
        outcome.resent = _quiesce(world, load, since)
        load.close()
    ended = {part: number - ended[part] for part, number in world.restarts.items()}
    logs = {} if fault.breaks_code else world.logged_since(log_sizes)
    reflexes.append(_reflexes(world, history, rng, canary))
    scene.note(_told(reflexes))
    tables = world.dump(since)
    evidence = Evidence(
        events=history.events(history.fault),
        **tables,  # type: ignore[arg-type]
        texts=world.texts(),
        hooks=[hook.event for hook in world.receiver.hooks[num_hooks:]],
        canary=canary,
        recovery=_recovery(world, fault, healed_at, open_ids),
        rss=samples["rss"],
        connections=samples["connections"],
        max_rss=MAX_RSS,
        max_connections=MAX_CONNECTIONS,
        ended=ended,
        may_end=frozenset(fault.ends),
        logs=logs,
        reflexes=reflexes,
    )
    for look in scene.later:
        look(evidence)
    _keep_evidence(folder, evidence, tables)
    return _judge(outcome, evidence, scene, took_s=time.monotonic() - began)


def _reflexes(world: World, history: History, rng: random.Random, canary: str) -> dict[str, float]:
    with contextlib.closing(Load(world, history, rng, jobs=0, rate=RATE, canary=canary)) as idle:
        return measure(world, idle)


def _told(reflexes: list[dict[str, float]]) -> str:
    before, after = reflexes
    return "; ".join(f"{what} {before[what]:.2f} s, then {after[what]:.2f} s" for what in before)


def _inject(fault: Fault, scene: Scene) -> str:
    """Do it; returns why it cannot be done here, if so."""
    try:
        fault.run(scene)
    except NotPossible as reason:
        return str(reason)
    return ""


def _judge(outcome: Outcome, evidence: Evidence, scene: Scene, took_s: float) -> Outcome:
    violations = [*scene.found, *checker.check(evidence, outcome.checks)]
    outcome.jobs = len(evidence.submissions())
    outcome.lost, outcome.doubled = len(checker.lost(evidence)), len(checker.doubled(evidence))
    if evidence.recovery is not None:
        outcome.recovery_s, outcome.bound_s = evidence.recovery.seconds, evidence.recovery.bound_s
    outcome.violations = [str(each) for each in violations]
    outcome.notes = scene.notes
    outcome.took_s = took_s
    return outcome


def _open_ids(world: World, since: str) -> list[Any]:
    found = world.rows(
        "SELECT id FROM jobs"
        " WHERE created_at >= %s AND finished_at IS NULL AND not_before <= now()",
        since,
    )
    return [row["id"] for row in found]


_PENDING: Final = """
    SELECT count(*) FROM webhook_deliveries WHERE created_at >= %s AND state = 'pending'
"""


def _quiesce(world: World, load: Load, since: str) -> int:
    """Wait until every job and batch has ended and webhooks are told; returns how many bare
    messages were sent again."""
    resent, again_at = 0, time.monotonic() + RESEND_S
    deadline = time.monotonic() + QUIESCE_S
    while True:
        states = {
            str(row["id"]): row["state"]
            for row in world.rows("SELECT id, state FROM jobs WHERE created_at >= %s", since)
        }
        missing = set(filter(None, load.accepted.values())) - states.keys()
        is_still = not missing and FINAL_STATES.issuperset(states.values())
        if is_still and load.batches.is_over and not world.value(_PENDING, since):
            break
        if time.monotonic() > deadline:
            break  # the checker will name them
        if missing and time.monotonic() > again_at:
            resent += load.send_unreceived(set(states))
            again_at = time.monotonic() + 2 * RESEND_S
        time.sleep(0.1)
    for part in PARTS:
        eventually(lambda part=part: world.is_up(part) and world.is_ready(part), 90, f"{part} up")
    return resent


def _recovery(world: World, fault: Fault, healed_at: str, open_ids: Collection[Any]) -> Recovery:
    """The bound is lease + sweep + reload + run, and what the fault adds.

    The run is that of all that ended until then, at the pace that this machine had.
    """
    last_s = world.value(
        "SELECT extract(epoch FROM max(finished_at) - CAST(%s AS timestamptz))::float8 FROM jobs"
        " WHERE id = ANY(%s)",
        healed_at,
        list(open_ids),
    )
    ended = [
        row["at"]
        for row in world.rows(
            "SELECT extract(epoch FROM finished_at - CAST(%s AS timestamptz))::float8 AS at"
            " FROM jobs WHERE finished_at > CAST(%s AS timestamptz) - interval '30 s'",
            healed_at,
            healed_at,
        )
    ]
    run_s = 1.0 + sum(0 < at <= (last_s or 0.0) for at in ended) / _pace(ended)
    bound_s = LEASE_S + 2 * SWEEP_S + LOST_AFTER_S + world.reload_s + run_s + fault.extra_s
    return Recovery(seconds=max(0.0, last_s or 0.0), bound_s=bound_s)


def _pace(ended_s: Collection[float]) -> float:
    """Jobs per second: what the best quarter of the seconds in which any ended reached."""
    by_second = sorted(Counter(math.floor(at) for at in ended_s).values())
    return float(by_second[3 * len(by_second) // 4]) if by_second else 1.0


@contextmanager
def _sampled(world: World) -> Iterator[dict[str, dict[str, list[int]]]]:
    """Memory and connections, twice a second, while the block runs."""
    samples: dict[str, dict[str, list[int]]] = {
        "rss": defaultdict(list),
        "connections": {server: [] for server in SERVERS},
    }
    ended = threading.Event()

    def sample() -> None:
        while not ended.wait(0.5):
            for kind, found in (("rss", world.rss()), ("connections", world.connections())):
                for name, number in found.items():
                    samples[kind][name].append(number)

    thread = threading.Thread(target=sample, name="sampler")
    thread.start()
    try:
        yield samples
    finally:
        ended.set()
        thread.join()


def _keep_evidence(folder: Path, evidence: Evidence, tables: dict[str, Any]) -> None:
    """So that a failure can be looked into, and checked again without a system."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tables.json").write_text(json.dumps(tables, default=str))
    recovery = asdict(evidence.recovery) if evidence.recovery else None
    samples = {"rss": evidence.rss, "connections": evidence.connections, "recovery": recovery}
    (folder / "samples.json").write_text(json.dumps(samples))
