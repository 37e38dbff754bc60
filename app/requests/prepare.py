"""A request in tokens: every limit of a model that is counted in them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from app.config.settings import ModelSettings
from app.engines import registry
from app.engines.checkpoint.card import NO_CARD, Card
from app.engines.checkpoint.languages import Direction
from app.engines.text.tokenizer import Encoded, Tokenizer
from app.errors import ContextLengthExceeded, RequestError
from app.jobs import WHOLE, PoolingParams, SamplingParams, int64
from app.requests.bodies import Request
from app.requests.body import Body
from app.requests.chat import ChatBody
from app.requests.conversation import Conversation
from app.requests.grammars import grammar_for
from app.requests.pooled import PooledBody
from app.requests.prompts import Pair, Prompt, Source
from app.requests.reasoning import marks_of
from app.requests.sampled import SampledBody


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request in tokens, within the model's limits."""

    prompts: tuple[tuple[int, ...], ...]  #: of the distinct prompts; each is answered n times
    max_tokens: int  #: of each answer; 0 where none is generated
    params: SamplingParams | None = None  #: of the first answer; None if none is drawn
    type_ids: tuple[tuple[int, ...], ...] = ()  #: of each prompt; () if all are 0
    pooling: PoolingParams = WHOLE  #: how the answers are given where none is generated

    def sampling(self, answer: int = 0) -> SamplingParams | None:
        """Sampling of answer number `answer`. With a seed each of the answers to a prompt gets a
        seed of its own, so that they differ; of a search it is another end."""
        if self.params is None or not answer:
            return self.params
        seed = None if self.params.seed is None else int64(self.params.seed + answer)
        return replace(self.params, seed=seed, beam=answer)

    @property
    def num_input_tokens(self) -> int:
        return sum(map(len, self.prompts))


def prepare(
    request: Request, tokenizer: Tokenizer, settings: ModelSettings, card: Card = NO_CARD
) -> Prepared:
    """The request in tokens, or the reason why the model cannot take it. One that is too long is
    cut, as little as may be, if it may be.

    Raises `ContextLengthExceeded` or another `RequestError` whose `param` names the field.
    """
    try:
        return _whole(request, tokenizer, settings, card)
    except ContextLengthExceeded:
        if not (shorter := request.sent.shorter):
            raise
    found = _whole(replace(request, sent=shorter[-1]), tokenizer, settings, card)
    too_long, fits = -1, len(shorter) - 1
    while fits - too_long > 1:
        place = (too_long + fits) // 2
        try:
            found = _whole(replace(request, sent=shorter[place]), tokenizer, settings, card)
            fits = place
        except ContextLengthExceeded:
            too_long = place
    return found


def prompts_heard(
    request: Request, tokenizer: Tokenizer, settings: ModelSettings, card: Card = NO_CARD
) -> Sequence[Sequence[int]]:
    """The distinct prompts in tokens, if they have a part in how answers are told as they come;
    otherwise empty ones. Raises as `prepare` does."""
    if _is_prompt_heard(request.body, tokenizer):
        return prepare(request, tokenizer, settings, card).prompts
    return [()] * len(request.prompts)


def _is_prompt_heard(body: Body, tokenizer: Tokenizer) -> bool:
    if isinstance(body, SampledBody) and body.num_logprobs is not None:
        return True
    template = tokenizer.template
    if not isinstance(body, ChatBody) or template is None:
        return False
    return bool(body.offer.functions) or marks_of(template.source) is not None


def _whole(request: Request, tokenizer: Tokenizer, settings: ModelSettings, card: Card) -> Prepared:
    field = request.body.PROMPT_FIELD
    if request.num_sequences > settings.max_batch_size:
        raise RequestError(
            f"The request asks for {request.num_sequences} sequences (prompts times n); this "
            f"model takes at most {settings.max_batch_size}.",
            param="n" if request.num_answers > 1 else field,
        )
    _refuse_scores(request, settings)
    least, wanted = _output(request, settings)
    if least > settings.max_output_tokens:
        raise RequestError(
            f"This model gives at most {settings.max_output_tokens} tokens.",
            param=request.body.most_tokens_field,
        )
    most = settings.max_batch_tokens // request.num_sequences
    pooling = _pooling(request.body, tokenizer, card)
    prompts, type_ids = [], []
    # The first that is too long is the last.
    for encoded, place in _encoded(request, tokenizer, card):
        tokens = encoded.ids
        room = tokenizer.context_tokens - (0 if tokenizer.separate_output else len(tokens))
        if len(tokens) > tokenizer.context_tokens or least > room:
            raise ContextLengthExceeded(
                f"The prompt has {len(tokens)} tokens and the answer may have {least}; this "
                f"model's context is {tokenizer.context_tokens} tokens.",
                param=place,
            )
        if len(tokens) + least > most:
            raise RequestError(
                f"{request.num_sequences} sequences of up to {len(tokens) + least} tokens pass "
                f"this model's limit of {settings.max_batch_tokens} tokens at once.",
                param=field,
            )
        prompts.append(tokens)
        type_ids.append(encoded.type_ids)
    longest = max(map(len, prompts))
    room = tokenizer.context_tokens - (0 if tokenizer.separate_output else longest)
    max_tokens = min(wanted, room, most - longest, settings.max_output_tokens)
    return Prepared(
        tuple(prompts),
        max_tokens,
        _params(request, max_tokens, prompts, tokenizer, settings),
        tuple(type_ids) if any(type_ids) else (),
        pooling,
    )


def _refuse_scores(request: Request, settings: ModelSettings) -> None:
    body = request.body
    if not isinstance(body, SampledBody) or body.num_prompt_logprobs is None:
        return
    if not registry.find(settings.engine).scores_prompts:
        raise RequestError(
            f"The engine {settings.engine} of this model gives no log-probabilities of a prompt; "
            "leave out echo or logprobs.",
            param="echo",
        )


def _output(request: Request, settings: ModelSettings) -> tuple[int, int]:
    """Tokens that an answer must have room for, and that it is to have if there is more."""
    body = request.body
    if not isinstance(body, SampledBody):
        return 0, 0
    least = body.most_tokens or max(1, body.min_tokens)
    return least, body.most_tokens or max(least, settings.default_max_tokens)


def _params(
    request: Request,
    max_tokens: int,
    prompts: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    settings: ModelSettings,
) -> SamplingParams | None:
    body = request.body
    if not isinstance(body, SampledBody):
        return None
    if (body.num_beams or 1) > 1 and not registry.find(settings.engine).searches:
        raise RequestError(
            f"This model's engine, {settings.engine}, does not search with beams; generate does.",
            param="num_beams",
        )
    tokenizer.check([*map(int, body.logit_bias)], "logit_bias")
    tokenizer.check(body.stop_token_ids, "stop_token_ids")
    words = [variant for word in body.bad_words for variant in _variants(word, tokenizer)]
    params = body.sampling(max_tokens, tuple(words), grammar_for(body, tokenizer, prompts))
    match body.prompts[0]:
        case Source() as source:
            return _same(_direction(source, tokenizer).applied(params))
        case _:
            return _same(params)


@lru_cache(maxsize=16)
def _same(params: SamplingParams) -> SamplingParams:
    """One object for those that are equal: most jobs are, and each travels to the engine once."""
    return params


def _direction(source: Source, tokenizer: Tokenizer) -> Direction:
    return tokenizer.languages.direction(source.source_language, source.target_language)


def _variants(word: str, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The tokens of a word at the beginning of a text, and of the same behind a blank."""
    word = word.lstrip() or word
    found = (tokenizer.encode_within(each) for each in (word, f" {word}"))
    return [each for each in dict.fromkeys(found) if each]


def encode(request: Request, tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Token ids of each distinct prompt of a request."""
    return tuple(encoded.ids for encoded, _ in _encoded(request, tokenizer, NO_CARD))


def _encoded(request: Request, tokenizer: Tokenizer, card: Card) -> Iterator[tuple[Encoded, str]]:
    """Each distinct prompt in tokens, and the field that it is in."""
    field = request.body.PROMPT_FIELD
    prompts = request.prompts
    for index, prompt in enumerate(prompts):
        place = f"{field}.{index}" if len(prompts) > 1 else field
        if isinstance(request.body, PooledBody):
            yield _encode_pooled(request.body, prompt, tokenizer, card, place), place
        else:
            tokens = _encode(tokenizer, prompt, place, request.body.parse_special)
            yield Encoded(tokens), place


def _pooling(body: Body, tokenizer: Tokenizer, card: Card) -> PoolingParams:
    """How answers are given that are not generated. Raises `RequestError` for what this model does
    not give."""
    if not isinstance(body, PooledBody):
        return WHOLE
    body.check_model(card)
    prefix = card.text(body.prefix(card))
    if card.pools_prompt or not prefix:
        return body.pooling
    # As sentence-transformers counts them: with what begins a text, without what ends one.
    tokens, around = tokenizer.encode(prefix).ids, tokenizer.encode("").ids
    has_end = bool(around) and around[-1] == tokens[-1]
    return replace(body.pooling, skip=len(tokens) - has_end)


def _encode_pooled(
    body: PooledBody, prompt: Prompt, tokenizer: Tokenizer, card: Card, field: str
) -> Encoded:
    """A text or a pair as the model's files have it, cut if that was asked for."""
    most = body.most_prompt_tokens(tokenizer.context_tokens)
    match prompt:
        case Pair(first, second):
            texts = [card.text(first), card.text(second)]
        case str():
            texts = [card.text(body.prefix(card) + prompt)]
        case _:
            return Encoded(_encode(tokenizer, prompt, field, body.parse_special)[:most])
    if most is None:
        _refuse_long(tokenizer, texts, field)
    encoded = tokenizer.encode(
        *texts,
        parse_special=body.parse_special,
        max_tokens=most,
        max_pair_tokens=body.most_pair_tokens,
    )
    if not encoded.ids:
        raise RequestError("The prompt has no tokens.", param=field)
    return encoded


def _encode(
    tokenizer: Tokenizer, prompt: Prompt, field: str, parse_special: bool
) -> tuple[int, ...]:
    assert not isinstance(prompt, Pair)  # none is in a body that generates
    if isinstance(prompt, str):
        _refuse_long(tokenizer, [prompt], field)
        tokens = tokenizer.encode_text(prompt, parse_special=parse_special)
    elif isinstance(prompt, Source):
        _refuse_long(tokenizer, [prompt.text], field)
        direction = _direction(prompt, tokenizer)
        tokens = tokenizer.encode_source(prompt.text, direction, parse_special=parse_special)
    elif isinstance(prompt, Conversation):
        chat = prompt.chat
        _refuse_long(tokenizer, chat.texts(), field)
        tokens = tokenizer.encode_chat(chat, parse_special=parse_special)
    else:
        tokens = prompt
        tokenizer.check(tokens, field)
    if not tokens:
        raise RequestError("The prompt has no tokens.", param=field)
    return tokens


def _refuse_long(tokenizer: Tokenizer, texts: Iterable[str], field: str) -> None:
    """Refuse what is too long for the context whatever it says, before any work is done for it."""
    length = sum(map(tokenizer.length, texts))
    if length > tokenizer.max_length:
        raise ContextLengthExceeded(
            f"The prompt has {length} {tokenizer.length_unit}; this model's context of "
            f"{tokenizer.context_tokens} tokens takes at most {tokenizer.max_length}.",
            param=field,
        )
