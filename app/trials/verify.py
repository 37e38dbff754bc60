"""A model's configured engine against plain transformers in float32.

Each prompt is run alone, and all are run together. Then the engine reads the reference's answers
and says how likely it finds each token, so that numbers are compared where all tokens before are
the same; of an engine that scores no prompts it is the tokens that it wrote itself, up to the first
that differs.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.engines import registry
from app.engines.base import Generation, Sequence, TokenLogprob
from app.engines.checkpoint.models import ensure_files
from app.engines.reference import Reference
from app.engines.spec import Files
from app.errors import ConfigError
from app.jobs import Kind
from app.trials import agreement
from app.trials.agreement import Figures, Reading, Writing
from app.trials.contender import Contender
from app.trials.questions import Asked, Question, ask
from app.trials.trial import Run, Trial, to_read, with_logprobs

Tell = Callable[[str], None]

WRITERS: Final = frozenset({Kind.GENERATE, Kind.TRANSLATE})


@dataclass(frozen=True, slots=True)
class Verdict:
    """How an engine's answers compare with the reference's."""

    model: str
    engine: str
    dtype: str
    kernels: str
    num_prompts: int
    num_tokens: int  #: of the reference's answers
    alone: Figures
    company: Figures
    num_failed: int  #: prompts without an answer, in either run

    @property
    def worst(self) -> Figures:
        return agreement.worst((self.alone, self.company))


def verify(
    contender: Contender,
    questions: Seq[Question],
    num_tokens: int,
    folder: Path,
    tell: Tell,
) -> Verdict:
    """Compare with the full weights in `folder`.

    Raises `ConfigError` for a model that cannot be loaded, `RequestError` for a prompt that it does
    not take, and `EngineError` if the engine fails.
    """
    model = contender.load()
    asked = ask(questions, model, num_tokens)
    worker = contender.settings.worker
    tell(f"{contender.given}: {len(asked)} prompts with transformers in float32, one by one.")
    with Reference(folder, contender.own, model.tokenizer, worker.device, worker.threads) as plain:
        expected = [plain.answer(_sequence(each)) for each in asked]
    tell(f"{contender.given}: with the engine {contender.own.engine}, alone, then together.")
    with Trial(contender, model) as trial:
        alone, num_failed = _answers(trial.alone, trial, asked, expected)
        company, failed_together = _answers(trial.together, trial, asked, expected)
        return Verdict(
            contender.given,
            contender.own.engine,
            contender.dtype,
            trial.kernels,
            len(asked),
            sum(each.output_tokens for each in expected),
            alone,
            company,
            num_failed + failed_together,
        )


def reference_folder(contender: Contender, source: str | None = None) -> Path:
    """Where the full weights are that plain transformers runs: the model's own, or of `source`, as
    models.toml has it.

    Raises `ConfigError` that says what can be compared if there are none.
    """
    own = contender.own
    if source is None and registry.find(own.engine).files(own) is Files.NONE:
        raise ConfigError(
            f"{contender.given}: the engine {own.engine} has no weights here to be compared with; "
            "name the model that it serves with --reference, as `source` in models.toml does."
        )
    changed: dict[str, object] = {
        "engine": _PLAIN.get(own.kind, "encoder"),
        "options": {},
        "adapters": {},
    }
    if source is not None:
        changed |= {"source": source, "revision": None}
    try:
        return ensure_files(
            contender.model, own.model_copy(update=changed), Path(contender.settings.cache_dir)
        )
    except ConfigError as error:
        raise ConfigError(
            f"{error} The reference needs full weights: name others with --reference."
        ) from error


_PLAIN: Final = {Kind.GENERATE: "generate", Kind.TRANSLATE: "generate"}
"""Engines that need of a folder what transformers does."""


def _sequence(asked: Asked) -> Sequence:
    return Sequence(
        0, asked.tokens, asked.params, pooling=asked.pooling, token_type_ids=asked.type_ids
    )


def _answers(
    run: Callable[[Seq[Asked]], Run], trial: Trial, asked: Seq[Asked], expected: Seq[Generation]
) -> tuple[Figures, int]:
    """Run, and read, the same way; what is found, and how many had no answer."""
    kind = trial.contender.own.kind
    spec = registry.find(trial.contender.own.engine)
    has_numbers = spec.files(trial.contender.own) in (Files.MODEL, Files.ANY_MODEL)
    writes = kind in WRITERS and has_numbers and not spec.scores_prompts
    found = run(with_logprobs(asked) if writes else asked)
    figures = compared(kind, asked, expected, found.answers)
    if not figures:
        return figures, found.num_failed
    if writes:
        figures |= agreement.of_readings(map(_written, expected, found.answers))
    elif kind in WRITERS and spec.scores_prompts:
        tokens = [each.token_ids for each in expected]
        read = run(to_read(asked, tokens, trial.model.tokenizer.context_tokens))
        pairs = zip(asked, expected, read.answers, strict=True)
        figures |= agreement.of_readings(
            (_reading(wanted), reading_of(prompt, read)) for prompt, wanted, read in pairs
        )
    return figures, found.num_failed


def compared(
    kind: Kind,
    asked: Seq[Asked],
    first: Seq[Generation],
    second: Seq[Generation],
    *,
    by_token: bool = True,
) -> Figures:
    """How the answers agree, of those that both have; empty if that is none, or if vectors and
    classes are not the same ones. `by_token`: token ids of both mean the same."""
    triples = [
        (each.request, a, b)
        for each, a, b in zip(asked, first, second, strict=True)
        if a.error_code is None and b.error_code is None
    ]
    pairs = [(a, b) for _, a, b in triples]
    if not pairs or any(_size(a) != _size(b) for a, b in pairs):
        return {}
    match kind:
        case Kind.GENERATE | Kind.TRANSLATE:
            texts = ((_writing(a), _writing(b)) for a, b in pairs)
            return agreement.of_texts(texts, by_token=by_token)
        case Kind.EMBED:
            return agreement.of_vectors((a.embedding or [], b.embedding or []) for a, b in pairs)
        case Kind.CLASSIFY:
            return agreement.of_classes((a.scores or [], b.scores or []) for a, b in pairs)
    requests: dict[int, list[tuple[list[float], list[float]]]] = {}
    for request, a, b in triples:
        requests.setdefault(request, []).append((a.scores or [], b.scores or []))
    return agreement.of_rankings(requests.values())


def _size(answer: Generation) -> int:
    """Of a vector, or how many classes there are."""
    return len(answer.embedding or answer.scores or ())


def _writing(answer: Generation) -> Writing:
    return Writing(answer.text, tuple(answer.token_ids))


def _reading(answer: Generation) -> Reading:
    """What the reference found in its own answer."""
    return _of_tokens(answer.logprobs or [])


def reading_of(asked: Asked, found: Generation) -> Reading:
    """What was found in an answer that was read behind its prompt, as `to_read` makes them."""
    return _of_tokens((found.prompt_logprobs or [])[len(asked.tokens) - 1 :])


def _of_tokens(known: Seq[TokenLogprob]) -> Reading:
    return Reading(
        tuple(each.logprob for each in known), tuple(each.top[0][0] for each in known if each.top)
    )


def _written(expected: Generation, found: Generation) -> tuple[Reading, Reading]:
    """Of the tokens that both have written: numbers as far as they are the same, and the choice at
    the first that differs."""
    reference, written = _reading(expected), tuple(each.logprob for each in found.logprobs or ())
    common = agreement.common_prefix(expected.token_ids, found.token_ids)
    return (
        Reading(reference.logprobs[:common], tuple(expected.token_ids[: common + 1])),
        Reading(written[:common], tuple(found.token_ids[: common + 1])),
    )
