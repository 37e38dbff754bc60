"""Two contenders over the same prompts: what each takes, and how far they agree.

They take turns, A B B A A B …, so that what else the machine does hits both alike, and only one is
loaded at a time, so that neither has the other's memory. A round is all prompts at once, as from a
queue that was full before, or at a rate, at times drawn once for all.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Sequence as Seq
from dataclasses import asdict, dataclass, field, replace
from decimal import Decimal
from itertools import groupby
from statistics import median
from typing import Any, Final, Literal

from app.books.cost import device_cost, upstream_cost
from app.books.energy import NJ_PER_J, EnergyMethod, worst
from app.config.settings import PriceSettings
from app.engines import registry
from app.engines.catalog import CatalogModel
from app.engines.device import machine, memory_in_use
from app.errors import ConfigError
from app.jobs import Usage
from app.trials import agreement
from app.trials.agreement import Figures, Reading
from app.trials.contender import Contender
from app.trials.questions import Asked, Question, ask
from app.trials.trial import Run, Trial, to_read
from app.trials.verify import WRITERS, compared, reading_of

Tell = Callable[[str], None]
Name = Literal["a", "b"]

WARM_UP_PROMPTS: Final = 2
WARM_UP_TOKENS: Final = 4
MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True)
class Side:
    """What one of both took. A token is one of an answer, or of a prompt where none is written."""

    name: str  #: as it was given
    engine: str
    dtype: str
    kernels: str
    digest: str  #: of its settings
    load_s: float
    num_tokens: int  #: of a round
    num_failed: int  #: prompts without an answer, of all rounds
    tokens_per_s: list[float]  #: of each round, in time by the clock
    p50_ms: float  #: of a prompt's wait and run, in company
    p95_ms: float
    device_s: float  #: of a round
    cost_per_million_tokens: float | None  #: of device time at full use, or as servers ask
    currency: str | None
    joules_per_million_tokens: float | None
    energy: str  #: how that is known: measured, estimated or absent
    peak_bytes: int | None  #: most memory of the host at once
    device_bytes: int | None  #: in use on a CUDA device at the end, by all that run there
    itself: Figures  #: how its first round agrees with its last; empty if there is but one

    @property
    def speed(self) -> float:
        return median(self.tokens_per_s)


@dataclass(frozen=True, slots=True)
class Comparison:
    machine: str
    kind: str
    prompts_digest: str
    num_prompts: int
    rate: float | None  #: prompts a second; None is all at once
    a: Side
    b: Side
    agreement: Figures

    @property
    def figures(self) -> dict[str, Any]:
        """All of it, for JSON: numbers and names, nothing of prompts or answers."""
        sides = {name: asdict(getattr(self, name)) for name in ("a", "b")}
        ratio = self.b.speed / self.a.speed if self.a.speed else None
        return sides | {
            "rate": self.rate,
            "agreement": self.agreement,
            "speed_ratio": ratio,
        }


@dataclass(slots=True)
class _Turns:
    """What one contender has done so far."""

    contender: Contender
    model: CatalogModel
    asked: Seq[Asked]
    arrivals_ns: Seq[int]
    runs: list[Run] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)  #: of the first one's answers
    loads_ns: list[int] = field(default_factory=list)
    kernels: str = ""
    peak_bytes: int = 0
    device_bytes: int | None = None

    @property
    def scores(self) -> bool:
        """Whether it can say how likely it finds a text."""
        own = self.contender.own
        return own.kind in WRITERS and registry.find(own.engine).scores_prompts

    def take(self, num_rounds: int, first: _Turns | None) -> None:
        """Load, warm up, and run so many rounds. Read the answers of the `first` to go, if it is
        told, unless that was done."""
        with Trial(self.contender, self.model) as trial:
            trial.together(_short(self.asked))
            self.runs += [trial.together(self.asked, self.arrivals_ns) for _ in range(num_rounds)]
            if first is not None and not self.readings:
                texts = [each.token_ids for each in first.runs[0].answers]
                context_tokens = self.model.tokenizer.context_tokens
                read = trial.together(to_read(self.asked, texts, context_tokens))
                self.readings = list(map(reading_of, self.asked, read.answers))
            self.loads_ns.append(trial.load_ns)
            self.kernels = trial.kernels
            self.peak_bytes = max(self.peak_bytes, trial.peak_bytes())
            self.device_bytes = memory_in_use(self.contender.settings.worker.device)

    def side(self) -> Side:
        own, price = self.contender.own, self.contender.price
        writes = own.kind in WRITERS
        counts = [run.output_tokens if writes else run.input_tokens for run in self.runs]
        latencies = sorted(each / 1e6 for run in self.runs for each in run.latencies_ns)
        total = sum(counts)
        cost = _cost(self.runs, price) if price else None
        method = worst(run.energy.method for run in self.runs)
        nj = sum(run.energy.nj for run in self.runs)
        return Side(
            name=self.contender.given,
            engine=own.engine,
            dtype=self.contender.dtype,
            kernels=self.kernels,
            digest=self.contender.digest(self.model.folder),
            load_s=median(self.loads_ns) / 1e9,
            num_tokens=counts[0],
            num_failed=sum(run.num_failed for run in self.runs),
            tokens_per_s=[
                n / (run.wall_ns / 1e9) for n, run in zip(counts, self.runs, strict=True)
            ],
            p50_ms=percentile(latencies, 0.5),
            p95_ms=percentile(latencies, 0.95),
            device_s=median(run.device_ns for run in self.runs) / 1e9,
            cost_per_million_tokens=(
                None if cost is None or not total else float(cost * MILLION / total)
            ),
            currency=price.currency if price else None,
            joules_per_million_tokens=(
                nj / NJ_PER_J * MILLION / total
                if total and method is not EnergyMethod.ABSENT
                else None
            ),
            energy=method.value,
            peak_bytes=self.peak_bytes or None,
            device_bytes=self.device_bytes,
            itself=(
                compared(own.kind, self.asked, self.runs[0].answers, self.runs[-1].answers)
                if len(self.runs) > 1
                else {}
            ),
        )


def compare(
    a: Contender,
    b: Contender,
    questions: Seq[Question],
    num_tokens: int,
    num_rounds: int,
    rate: float | None,
    tell: Tell,
) -> Comparison:
    """`rate` is prompts a second; None is all at once.

    Raises `ConfigError` for models that cannot be compared or loaded, `RequestError` for a
    prompt that one does not take, and `EngineError` if an engine fails."""
    if a.own.kind is not b.own.kind:
        raise ConfigError(
            f"{a.given} is of kind {a.own.kind} and {b.given} of kind {b.own.kind}: two of one "
            "kind can be compared."
        )
    first, second = (_turns_of(each, questions, num_tokens, rate) for each in (a, b))
    both: dict[Name, _Turns] = {"a": first, "b": second}
    by_token = _same_tokens(first, second)
    reads = by_token and all(each.scores for each in (first, second))
    for name, rounds in turns(num_rounds):
        tell(f"{both[name].contender.given}: {rounds} of {2 * num_rounds} rounds.")
        both[name].take(rounds, first if reads else None)
    return Comparison(
        machine=machine(),
        kind=a.own.kind.value,
        prompts_digest=_digest(questions, num_tokens, rate),
        rate=rate,
        num_prompts=len(first.asked),
        a=first.side(),
        b=second.side(),
        agreement=compared(
            a.own.kind,
            first.asked,
            first.runs[0].answers,
            second.runs[0].answers,
            by_token=by_token,
        )
        | agreement.of_readings(zip(first.readings, second.readings, strict=True)),
    )


def _turns_of(
    contender: Contender, questions: Seq[Question], num_tokens: int, rate: float | None
) -> _Turns:
    model = contender.load()
    asked = ask(questions, model, num_tokens)
    return _Turns(contender, model, asked, arrivals_ns(len(asked), rate) if rate else ())


def arrivals_ns(count: int, rate: float) -> list[int]:
    """Times of so many prompts that come independently of each other, the first at 0; always the
    same, for a rate in prompts a second."""
    drawn = random.Random(0)
    gaps = (drawn.expovariate(rate) for _ in range(count - 1))
    return [0, *(int(1e9 * each) for each in itertools.accumulate(gaps))]


def turns(num_rounds: int) -> Iterator[tuple[Name, int]]:
    """Who runs how many rounds in a row: A, B B, A A, …"""
    order: list[Name] = [
        name for number in range(num_rounds) for name in _PAIRS[number % len(_PAIRS)]
    ]
    for name, rounds in groupby(order):
        yield name, len(list(rounds))


_PAIRS: Final[tuple[tuple[Name, Name], ...]] = (("a", "b"), ("b", "a"))


def percentile(ordered: Seq[float], share: float) -> float:
    """The smallest value that so large a share of all does not pass (nearest rank)."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def _cost(runs: Seq[Run], price: PriceSettings) -> Decimal:
    """As a job's bill is made."""
    usage = Usage(
        sum(run.input_tokens for run in runs),
        sum(run.output_tokens for run in runs),
        sum(each.cached_tokens for run in runs for each in run.answers),
    )
    asked = [each.charge for run in runs for each in run.answers if each.charge is not None]
    device_ns = sum(run.device_ns for run in runs)
    return device_cost(device_ns, price.per_device_hour) + (
        upstream_cost(price, usage, asked) or Decimal(0)
    )


def _short(asked: Seq[Asked]) -> list[Asked]:
    return [
        replace(
            each,
            params=each.params
            and replace(each.params, max_tokens=min(WARM_UP_TOKENS, each.params.max_tokens)),
        )
        for each in asked[:WARM_UP_PROMPTS]
    ]


def _same_tokens(first: _Turns, second: _Turns) -> bool:
    """Whether token ids of both mean the same, as far as these prompts tell."""
    sizes = {each.model.tokenizer.vocab_size for each in (first, second)}
    same = all(a.tokens == b.tokens for a, b in zip(first.asked, second.asked, strict=True))
    return same and len(sizes) == 1


def _digest(questions: Seq[Question], num_tokens: int, rate: float | None) -> str:
    """Hex SHA-256: equal for the same work."""
    told = [num_tokens, rate, *([each.url, each.given] for each in questions)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def speed_in(figures: Mapping[str, Any], name: str) -> float | None:
    """The median speed of a side in figures that were kept, by whatever version; None if they do
    not say."""
    side = figures.get(name)
    rounds = side.get("tokens_per_s") if isinstance(side, dict) else None
    if not isinstance(rounds, list) or not rounds:
        return None
    return median(rounds) if all(isinstance(each, int | float) for each in rounds) else None
