"""Whether an engine answers as transformers does, alone and in company; or what it says instead."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from app.config.settings import ModelSettings
from app.engines.base import Engine, Generation, Sequence
from app.engines.registry import create
from app.errors import ConfigError
from app.jobs import Kind, SamplingParams
from tests.families.catalogue import Encoder
from tests.families.tiny import CONTEXT, VOCAB, Family
from tests.unit.tiny_encoders import auto_class, save_classifier, save_encoder
from tests.unit.tiny_models import CONTEXT as LONGEST

PROMPTS: Final = [
    tuple((7 * place + length) % VOCAB for place in range(length)) for length in (1, 7, 40, 90)
]
TEXTS: Final = [
    tuple(text.encode())
    for text in ("a", "water mills", "the old mill by the river turns all day long", "m" * LONGEST)
]
OUTPUT: Final = 20
CLOSE: Final = 2e-3
"""Of log-probabilities: batches of another shape are added up in another order."""


class Result(enum.Enum):
    EQUAL = "equal"
    REFUSED = "refused"
    WRONG = "wrong"
    NONE = "–"  # there is no such model


@dataclass(frozen=True)
class Outcome:
    result: Result
    note: str = ""  #: how it runs, or why it does not


Answers = list[tuple[list[int], list[float]]]
"""Of each prompt: tokens, and their log-probabilities."""


def try_decoder(family: Family) -> list[Outcome]:
    with TemporaryDirectory() as folder:
        family.save(Path(folder), AutoModelForCausalLM)
        expected = reference(Path(folder), AutoModelForCausalLM)
        return [try_writer(Path(folder), name, expected) for name in ("inflight", "generate")]


def try_encoder_decoder(family: Family) -> list[Outcome]:
    with TemporaryDirectory() as folder:
        family.save(Path(folder), AutoModelForSeq2SeqLM)
        expected = reference(Path(folder), AutoModelForSeq2SeqLM)
        return [try_writer(Path(folder), "generate", expected)]


def try_encoder(family: Encoder) -> list[Outcome]:
    """As an embedder and as a classifier."""
    with TemporaryDirectory() as folder:
        save_encoder(Path(folder), family.name)
        embedder = auto_class(family.name).from_pretrained(folder, dtype=torch.float32).eval()
        embedded = try_scorer(
            Path(folder), Kind.EMBED, lambda ids: embedder(ids).last_hidden_state[0].mean(0)
        )
    if not family.classifies:
        return [embedded, Outcome(Result.NONE)]
    with TemporaryDirectory() as folder:
        save_classifier(Path(folder), family.name)
        classifier = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        return [
            embedded,
            try_scorer(
                Path(folder), Kind.CLASSIFY, lambda ids: classifier(ids).logits[0].softmax(0)
            ),
        ]


def reference(folder: Path, auto_class: Any) -> Answers:
    """What `model.generate` answers greedily to each prompt alone."""
    return [_generated(_model(folder, auto_class), prompt) for prompt in PROMPTS]


def try_writer(folder: Path, engine_name: str, expected: Answers) -> Outcome:
    """A model that writes text: each prompt alone, then all together."""
    try:
        engine = load(folder, engine_name)
    except ConfigError as refusal:
        return Outcome(Result.REFUSED, refusal.message)
    for prompts in ([0], [1], [2], [3], [0, 1, 2, 3], [3, 0, 2]):
        found = _run(engine, prompts)
        for place in prompts:
            if different := _difference(found[place], expected[place]):
                company = "alone" if len(prompts) == 1 else "in company"
                return Outcome(Result.WRONG, f"{len(PROMPTS[place])} tokens {company}: {different}")
    how = _how(engine)
    engine.close()
    return Outcome(Result.EQUAL, how)


def try_scorer(folder: Path, kind: Kind, model: Callable[[Tensor], Tensor]) -> Outcome:
    """An encoder: each text alone, then all together."""
    with torch.inference_mode():
        expected = [model(torch.tensor([text])) for text in TEXTS]
    if kind is Kind.EMBED:
        expected = [normalize(vector, dim=0) for vector in expected]
    try:
        engine = load(folder, "encoder", kind)
    except ConfigError as refusal:
        return Outcome(Result.REFUSED, refusal.message)
    for places in ([0], [1], [2], [3], [0, 1, 2, 3], [3, 0, 2]):
        engine.admit("batch", [Sequence(place, TEXTS[place]) for place in places])
        for answer in _answers(engine):
            own = Tensor(answer.embedding if kind is Kind.EMBED else answer.scores or ())
            if not torch.allclose(own, expected[answer.sequence_id], atol=1e-4):
                return Outcome(Result.WRONG, f"{len(TEXTS[answer.sequence_id])} tokens of {places}")
    return Outcome(Result.EQUAL, _how(engine))


def load(folder: Path, engine_name: str, kind: Kind = Kind.GENERATE) -> Engine:
    settings = ModelSettings(
        source=str(folder),
        kind=kind,
        engine=engine_name,
        dtype="float32",
        context_tokens=CONTEXT if kind is Kind.GENERATE else LONGEST,
        max_batch_size=4,
        generation_config="none",  # some families come with beams and penalties
        options={"cache_tokens": 1024} if engine_name == "inflight" else {},
    )
    return create(engine_name, folder, settings, device="cpu", threads=1, progress=lambda: None)


def _how(engine: Engine) -> str:
    """What is worth knowing of how it runs: nothing of the usual ways."""
    said = str(getattr(engine, "kernels", "")).removeprefix("torch").lstrip(",; ")
    said = said.partition("; not packed: ")[0]
    return "" if said == "padded batches" or said.startswith("compiled") else said


def _model(folder: Path, auto_class: Any) -> Any:
    model = auto_class.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return model


def _generated(model: Any, prompt: Seq[int]) -> tuple[list[int], list[float]]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=OUTPUT,
        do_sample=False,
        pad_token_id=0,
        num_beams=1,
        encoder_no_repeat_ngram_size=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens: list[int] = out.sequences[0, -OUTPUT:].tolist()
    scores = torch.stack(out.logits, dim=1)[0].float().log_softmax(-1)
    return tokens, scores[torch.arange(OUTPUT), tokens].tolist()


def _run(engine: Engine, places: Seq[int]) -> dict[int, Generation]:
    params = SamplingParams(OUTPUT, temperature=0.0, ignore_eos=True, logprobs=0)
    engine.admit("batch", [Sequence(place, PROMPTS[place], params) for place in places])
    return {each.sequence_id: each for each in _answers(engine)}


def _answers(engine: Engine) -> Iterator[Generation]:
    while engine.has_work:
        yield from engine.step()


def _difference(found: Generation, expected: tuple[list[int], list[float]]) -> str:
    tokens, logprobs = expected
    if found.error_message:
        return found.error_message
    own = [each.logprob for each in found.logprobs or ()]
    if found.token_ids != tokens:
        first = next(
            i for i, (a, b) in enumerate(zip(found.token_ids, tokens, strict=False)) if a != b
        )
        return f"another token at {first}"
    off = (Tensor(own) - Tensor(logprobs)).abs().max().item()
    return "" if off < CLOSE else f"log-probabilities are off by {off:.3g}"
