"""Which tokens and numbers of two models are held against each other."""

from __future__ import annotations

import pytest

from app.engines.base import Generation, TokenLogprob
from app.jobs import FinishReason, Kind, SamplingParams
from app.trials import agreement
from app.trials.questions import Asked
from app.trials.trial import to_read
from app.trials.verify import _reading, _written, compared, reading_of


def generation(tokens: list[int], logprobs: list[float], **fields: object) -> Generation:
    """Text whose tokens were each the likeliest."""
    told = [
        TokenLogprob(token, logprob, ((token, logprob),))
        for token, logprob in zip(tokens, logprobs, strict=True)
    ]
    text = " ".join(map(str, tokens))
    found = Generation(0, FinishReason.STOP, token_ids=tokens, text=text, logprobs=told)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


def asked(*tokens: int, request: int = 0) -> Asked:
    return Asked(request, tokens, SamplingParams(8, temperature=0.0))


def test_what_an_engine_wrote_counts_up_to_its_first_other_token_and_that_as_another_choice() -> (
    None
):
    expected = generation([1, 2, 3], [-0.1, -0.2, -0.3])
    found = generation([1, 9, 3], [-0.3, -5.0, -0.3])

    figures = agreement.of_readings([_written(expected, found)])

    assert figures["same_token"] == 0.5
    assert figures["logprob_max"] == pytest.approx(0.2)


def test_what_an_engine_has_read_counts_from_the_first_token_of_the_answer_on() -> None:
    # given a prompt of two tokens, whose second has a number as well, and an answer of two
    expected = generation([5, 6], [-0.5, -0.6])
    found = Generation(0, FinishReason.LENGTH, token_ids=[0])
    found.prompt_logprobs = [
        TokenLogprob(4, -9.0, ((8, -0.1),)),
        TokenLogprob(5, -0.5, ((5, -0.5),)),
        TokenLogprob(6, -0.8, ((7, -0.4),)),
    ]

    figures = agreement.of_readings([(_reading(expected), reading_of(asked(3, 4), found))])

    assert figures["same_token"] == 0.5
    assert figures["logprob_mean"] == pytest.approx(0.1)


def test_an_answer_is_read_as_far_as_the_context_has_room_for_one_token_more() -> None:
    [whole], [cut] = (to_read([asked(1, 2)], [[3, 4, 5]], size) for size in (6, 5))

    assert (whole.tokens, cut.tokens) == ((1, 2, 3, 4, 5), (1, 2, 3, 4))
    assert whole.params is not None
    assert (whole.params.max_tokens, whole.params.prompt_logprobs) == (1, 1)


def test_prompts_without_an_answer_and_vectors_of_another_size_are_not_compared() -> None:
    good, bad = generation([1], [-0.1]), generation([], [], error_code="not_finite")
    short, long = Generation(0, FinishReason.STOP), Generation(0, FinishReason.STOP)
    short.embedding, long.embedding = [1.0, 0.0], [1.0, 0.0, 0.0]

    both = [asked(1), asked(2)]
    assert compared(Kind.GENERATE, both, [good, good], [good, bad])["identical"] == 1
    assert compared(Kind.GENERATE, both, [good, bad], [bad, good]) == {}
    assert compared(Kind.EMBED, [asked(1)], [short], [long]) == {}


def test_documents_are_ranked_within_their_own_request() -> None:
    def scored(score: float) -> Generation:
        found = Generation(0, FinishReason.STOP)
        found.scores = [score]
        return found

    places = [asked(1, request=0), asked(1, request=0), asked(1, request=1), asked(1, request=1)]
    first = [scored(each) for each in (0.1, 0.2, 0.9, 0.8)]
    second = [scored(each) for each in (0.1, 0.2, 0.8, 0.9)]

    assert compared(Kind.RERANK, places, first, second)["same_order"] == 0.5
