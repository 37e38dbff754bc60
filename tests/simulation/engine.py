"""An engine process without a process: what the engine host would spawn, on the simulated clock.

A prompt says what its row does, and after how many steps: `good 3`, `nan 2`, `poison 1` (the
process dies), `hang 1` (no step ends any more), `oom 2` (does not fit with more than so many rows).
Of a job's several rows some take a step or two longer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from app.books.shares import share
from app.engines import base
from app.engines.base import NOT_FINITE, Generation, StepStats
from app.jobs import FinishReason
from app.worker.energy.meter import EnergyMeter
from app.worker.engine.ends import Ends
from app.worker.engine.host import EngineHost
from app.worker.engine.page import PAGE_BYTES, PROGRESS, Phase, shown
from app.worker.engine.wire import (
    Admit,
    Cancel,
    Command,
    DidNotFit,
    EngineFacts,
    Event,
    LoadModels,
    Ready,
    Recall,
    Recalled,
    Stepped,
)
from tests.simulation.broken import expect

LOAD_NS: Final = 1_500_000_000
STEP_NS: Final = 50_000_000
MAX_ROWS: Final = 4

JOINS: Final = {"static": False, "joins": True}
MODELS: Final = tuple(JOINS)


def answer_to(prompt: str) -> str:
    return f"answer to {prompt}"


@dataclass(slots=True)
class _Row:
    sequence: base.Sequence
    model: str
    batch_id: str
    prompt: str
    verb: str
    number: int
    answer: Generation
    steps: int = 0
    is_over: bool = False


class _Page(bytearray):
    """The shared page of progress."""

    def close(self) -> None:
        pass


class SimulatedProcess:
    """Plays the parts that `EngineHost` keeps: the process and its connection; it has the page.

    Whoever drives it calls `run` when `next_ns` has come.
    """

    def __init__(
        self,
        now_ns: Callable[[], int],
        pid: int = 1,
        thawed: Callable[[], object] = lambda: None,
        began: list[Admit] | None = None,
        page: bytearray | None = None,
    ) -> None:
        """`began` gets what it begins."""
        self.pid = pid
        self.page = page or _Page(PAGE_BYTES)
        self.answered: list[tuple[str, int]] = []  #: prompts, and what their answers took
        self.is_alive = True
        self.is_hung = False
        self.frozen_until_ns: int | None = None
        self.next_ns: int | None = None
        self._now_ns = now_ns
        self._thawed = thawed
        self._facts: dict[str, EngineFacts] = {}
        self._unread: list[Command] = []  #: what was sent while it was frozen
        self._loaded = False
        self._rows: list[_Row] = []
        self._waiting: list[Admit] = []  #: for their model's rows to end
        self._began = [] if began is None else began
        self._said: list[Event] = []
        self._ends: dict[str, Ends] = {}
        self._held: list[_Row] = []  #: they have ended, and it has not said so
        self._cancelled: set[int] = set()
        self._num_steps = 0
        self._status = 0

    # ── as the host sees it ──────────────────────────────────────────────────────────────────

    def send(self, command: Command) -> None:
        if not self.is_alive:
            raise BrokenPipeError
        if self.is_frozen:
            self._unread.append(command)
        else:
            self._read(command)

    def _read(self, command: Command) -> None:
        match command:
            case LoadModels(models):
                self._facts = {
                    model.name: EngineFacts(model.settings.max_batch_size, JOINS[model.name])
                    for model in models
                }
                self._ends = {
                    name: Ends(each.max_rows, joins=each.joins)
                    for name, each in self._facts.items()
                }
                self.next_ns = self._now_ns() + LOAD_NS
            case Admit(model) as admit:
                expect(
                    all(each.model != model for each in self._waiting),
                    "I12: more than one batch waits for one that runs",
                )
                self._waiting.append(admit)
                self._begin(model)
                if self._rows and self.next_ns is None and not self.is_hung:
                    self.next_ns = self._now_ns() + STEP_NS
            case Recall(model):
                self._give_back(model)
            case Cancel(_, sequence_id):
                self._cancelled.add(sequence_id)

    def _begin(self, model: str) -> None:
        """Let in what waits, if it can join or nothing runs."""
        if JOINS[model] or all(row.model != model for row in self._rows):
            for admit in self._take_waiting(model):
                self._began.append(admit)
                if not self._rows:
                    self._turn(Phase.STEP)
                self._rows += [self._row(model, admit.batch_id, each) for each in admit.sequences]
        inside = sum(row.model == model for row in self._rows)
        expect(inside <= self._facts[model].max_rows, "I8: more rows than there is room")

    def _take_waiting(self, model: str) -> list[Admit]:
        taken = [each for each in self._waiting if each.model == model]
        self._waiting = [each for each in self._waiting if each.model != model]
        return taken

    def _give_back(self, model: str) -> None:
        admits = self._take_waiting(model)
        ids = tuple(each.id for admit in admits for each in admit.sequences)
        self._said.append(Recalled(model, ids))

    def flush(self) -> None:
        pass

    def poll(self) -> bool:
        return bool(self._said) or not self.is_alive

    def recv(self) -> Event:
        if self._said:
            return self._said.pop(0)
        raise EOFError

    def kill(self, status: int = -9) -> None:
        if self.is_alive:
            self.is_alive, self.next_ns, self._status = False, None, status

    @property
    def exit_status(self) -> int | None:
        return None if self.is_alive else self._status

    def close(self) -> None:
        pass

    # ── as it runs ───────────────────────────────────────────────────────────────────────────

    @property
    def inside(self) -> set[str]:
        """The prompts that it runs, and would if it had read them."""
        busy = {row.model for row in self._rows}
        prompts = {row.prompt for row in self._rows + self._held}
        for command in self._unread:
            if isinstance(command, Admit) and (JOINS[command.model] or command.model not in busy):
                busy.add(command.model)
                prompts |= set(map(_prompt_of, command.sequences))
        return prompts

    @property
    def is_frozen(self) -> bool:
        return self.frozen_until_ns is not None

    def freeze(self, until_ns: int) -> None:
        """SIGSTOP, and SIGCONT later: it reads nothing, says nothing and does nothing."""
        self.frozen_until_ns = self.next_ns = until_ns

    def _thaw(self) -> None:
        self._thawed()
        self.frozen_until_ns, unread, self._unread = None, self._unread, []
        if not self._loaded and self._facts:
            self.next_ns = self._now_ns() + LOAD_NS
        elif self._rows and not self.is_hung:
            self.next_ns = self._now_ns() + STEP_NS
        for command in unread:
            self._read(command)

    def run(self) -> None:
        """What happens at `next_ns`: the models are loaded, or a step ends."""
        self.next_ns = None
        if self.is_frozen:
            self._thaw()
            return
        if not self._loaded:
            self._loaded = True
            self._turn(Phase.IDLE)
            self._said.append(Ready(dict(self._facts), LOAD_NS))
        busy = list(dict.fromkeys(row.model for row in self._rows))
        for model in busy:
            if self.is_alive:
                rows = [row for row in self._rows if row.model == model]
                self._step(model, rows, STEP_NS // len(busy))
        if not self._rows and self.is_alive:
            self._turn(Phase.IDLE)
        if self._rows and self.is_alive and not self.is_hung:
            self.next_ns = self._now_ns() + STEP_NS

    def _row(self, model: str, batch_id: str, sequence: base.Sequence) -> _Row:
        expect(bool(sequence.prompt_token_ids), "I8: a job that cannot run is in the engine")
        prompt = _prompt_of(sequence)
        verb, number, *_ = prompt.split()
        answer = Generation(
            sequence.id,
            FinishReason.STOP,
            input_tokens=len(sequence.prompt_token_ids),
            started_ns=self._now_ns(),
        )
        steps = int(number) + (sequence.id % 3 if verb == "good" and " x" in prompt else 0)
        return _Row(sequence, model, batch_id, prompt, verb, steps, answer)

    def _step(self, model: str, rows: Sequence[_Row], lasts_ns: int) -> None:
        if any(row.verb == "oom" and len(rows) > row.number for row in rows):
            self._tell_ends(model)
            self._rows = [row for row in self._rows if row not in rows]
            if not JOINS[model]:
                self._give_back(model)
            took_ns = sum(row.answer.device_ns for row in rows)
            took_ns += self._turn(Phase.STEP, in_vain=True)
            dropped = tuple(row.sequence.id for row in rows)
            self._said.append(DidNotFit(model, dropped, took_ns))
            return
        shares = share(lasts_ns, [1] * len(rows))
        for row, device_ns in zip(rows, shares, strict=True):
            row.answer.device_ns += device_ns
            if not row.is_over:
                row.steps += 1
                row.is_over = self._is_over(row)
        if not self.is_alive or self.is_hung:
            return
        self._turn(Phase.STEP, lasts_ns)
        self._num_steps += 1
        PROGRESS.pack_into(self.page, 0, self._num_steps, STEP_NS)
        over = [row for row in rows if row.is_over]
        if over and (JOINS[model] or len(over) == len(rows)):
            self._rows = [row for row in self._rows if row not in over]
            self._ends[model].add(map(self._answer, over), {})
            self._held += over
            self._begin(model)
        inside = sum(row.model == model for row in self._rows)
        if self._ends[model].are_due(self._now_ns(), inside):
            self._tell_ends(model)

    def _tell_ends(self, model: str) -> None:
        """Say what has ended, as the process does."""
        if ended := self._ends[model].take(self._now_ns()):
            told = [row for row in self._held if row.model == model]
            self._held = [row for row in self._held if row.model != model]
            self.answered += [(row.prompt, row.answer.device_ns) for row in told]
            self._said.append(Stepped(model, ended, _stats(told)))

    def _is_over(self, row: _Row) -> bool:
        if row.sequence.id in self._cancelled:
            row.answer.finish_reason = FinishReason.CANCELLED
            return True
        if row.steps < row.number and row.verb != "oom":
            return False
        match row.verb:
            case "poison":
                self.kill(status=70)
            case "hang":
                self.is_hung = True
            case "nan":
                row.answer.finish_reason = FinishReason.ERROR
                row.answer.error_code, row.answer.error_message = NOT_FINITE
        return True

    def _answer(self, row: _Row) -> Generation:
        answer = row.answer
        answer.text, answer.token_ids = answer_to(row.prompt), [1] * row.steps
        answer.first_token_ns = answer.finished_ns = self._now_ns()
        return answer

    def _turn(self, phase: Phase, given: int = 0, *, in_vain: bool = False) -> int:
        clock = shown(self.page)
        wasted = clock.turn(phase, self._now_ns(), given, in_vain=in_vain)
        clock.show(self.page)
        return wasted


def _prompt_of(sequence: base.Sequence) -> str:
    return bytes(sequence.prompt_token_ids).decode()


def _stats(rows: Sequence[_Row]) -> list[StepStats]:
    return [StepStats(row.batch_id, 1, row.steps, row.steps, row.answer.device_ns) for row in rows]


class _Popen:
    """The process as `subprocess` shows it; its connection is another thing."""

    def __init__(self, process: SimulatedProcess) -> None:
        self.pid, self.kill = process.pid, process.kill
        self._process = process

    def poll(self) -> int | None:
        return self._process.exit_status


class SimulatedHost(EngineHost):
    """The real host with a simulated process in place of a spawned one."""

    def __init__(
        self,
        *given: Any,
        frozen_with: Callable[[set[str]], None],
        thawed: Callable[[], object],
        **named: Any,
    ) -> None:
        """`frozen_with` is told what a frozen process held when it was given up."""
        super().__init__(*given, **named)
        self._thawed = thawed
        self._frozen_with = frozen_with
        self.process: SimulatedProcess | None = None
        self.meter: EnergyMeter  #: of its worker
        self.began: list[Admit] = []  #: what its processes have begun
        self.answered: list[list[tuple[str, int]]] = []  #: by each of its processes
        self.lost_with: list[set[str]] = []  #: prompts inside each process that ended by itself

    def _spawn(self) -> None:
        page = _Page(PAGE_BYTES)
        self.hours.begin(page)
        self.process = SimulatedProcess(
            self._now_ns, thawed=self._thawed, began=self.began, page=page
        )
        self.answered.append(self.process.answered)
        self._process = _Popen(self.process)  # type: ignore[assignment]
        self._connection = self.process  # type: ignore[assignment]
        self._progress = self.process.page  # type: ignore[assignment]

    def kill(self) -> None:
        if self._process is not None and self.process and not self.process.is_alive:
            self.lost_with.append(self.process.inside)
        elif self._process is not None and self.process and self.process.is_frozen:
            self._frozen_with(self.process.inside)
        super().kill()

    @property
    def owed_ns(self) -> int:
        """What the last process gave and has not paid, though it is dead with its worker."""
        return self.hours.owed_ns if self._progress is None else shown(self._progress).owed

    @property
    def num_runs(self) -> int:
        """Batches that an engine began."""
        return len(self.began)
