"""Work for the benchmarks: real prompts of various kinds, and how long their answers shall be.

Everything follows from the seed, so that every contestant and every run has the same work. Outputs
have a fixed length and do not end early: else the contestants would do different work.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

Encode = Callable[[str], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Request:
    prompt: tuple[int, ...]
    num_tokens: int  #: of the answer


_SUBJECTS: Final = (
    *("the water wheel", "a letter from the bank", "photosynthesis", "the history of Lisbon"),
    *("a broken washing machine", "sorting algorithms", "the night train to Vienna", "sourdough"),
    *("a customer's refund", "the moons of Jupiter", "container shipping", "a school timetable"),
    *("the rules of chess", "solar panels on a flat roof", "an overdue invoice", "coral reefs"),
)
_TASKS: Final = (
    "Write one sentence about {}.",
    "Explain {} to a child of seven, with an example from daily life.",
    "List three questions that somebody who reads about {} for the first time would ask.",
    "Translate into French: we talked about {} for an hour and could not agree.",
    "Give a title for an article on {}.",
    "Classify the following message as complaint, question or praise. Message: I have been "
    "waiting for two weeks now, and nobody could tell me anything about {}. Please call me back "
    "before Friday, I am at home in the mornings. Class:",
    "Summarise in two sentences: Last spring we began to look into {}. At first it seemed simple, "
    "and the first results were good. Then the numbers did not add up, two of the people who knew "
    "most about it left, and we had to start again with what was written down. It took until "
    "autumn to be where we had been. Since then it goes well, and we would do it again. Summary:",
    "Continue the story. The old miller had never cared for {}, but on the morning when the river "
    "stood still he",
    "What are the advantages and the drawbacks of {}? Answer as a table with two columns.",
    "Write a polite e-mail of four lines that puts off a meeting about {} to next Thursday.",
)


def mixed(encode: Encode, count: int, rng: random.Random) -> list[Request]:
    """Prompts of 7 to 110 tokens and answers of 4 to 256, most of them short."""
    return [
        Request(encode(_prompt(place, rng)), min(256, 4 + int(rng.expovariate(1 / 60))))
        for place in range(count)
    ]


def short(encode: Encode, count: int, rng: random.Random) -> list[Request]:
    """As of a classifier: answers of 1 to 8 tokens."""
    return [Request(encode(_prompt(place, rng)), rng.randint(1, 8)) for place in range(count)]


def long_prompt(encode: Encode, count: int, rng: random.Random) -> list[Request]:
    """As of extraction from documents: prompts of 1,500 tokens, answers of 8; a tenth as many."""
    return [Request(_text(encode, 1500, rng), 8) for _ in range(max(1, count // 10))]


def long_answer(encode: Encode, count: int, rng: random.Random) -> list[Request]:
    """As of stories: prompts of 8 tokens, answers of 400; half as many."""
    return [Request(_text(encode, 8, rng), 400) for _ in range(max(1, count // 2))]


def chat(encode: Encode, count: int, rng: random.Random) -> list[Request]:
    """As people chat: lengths spread log-normally, prompts about 70 and answers about 160 tokens;
    half as many."""
    return [
        Request(
            _text(encode, int(min(2000, max(8, rng.lognormvariate(4.2, 1.1)))), rng),
            int(min(800, max(4, rng.lognormvariate(5.1, 0.8)))),
        )
        for _ in range(max(1, count // 2))
    ]


def shared_prefix(encode: Encode, count: int, rng: random.Random) -> list[Request]:
    """The same 500 tokens of instructions before each prompt; answers of 32."""
    system = _text(encode, 500, rng)
    return [Request(system + encode(_prompt(place, rng)), 32) for place in range(count)]


def one_giant(encode: Encode, count: int, rng: random.Random) -> list[Request]:
    """Short work, and in the midst of it one prompt of 7,000 tokens."""
    requests = short(encode, count, rng)
    requests[count // 3] = Request(_text(encode, 7000, rng), 64)
    return requests


WORKLOADS: Final = {
    "mixed": mixed,
    "short": short,
    "long-prompt": long_prompt,
    "long-answer": long_answer,
    "chat": chat,
    "shared-prefix": shared_prefix,
    "one-giant": one_giant,
}


def make(name: str, encode: Encode, count: int, seed: int = 0) -> list[Request]:
    """`count` requests, fewer where each is much work, in order of arrival."""
    return WORKLOADS[name](encode, count, random.Random(seed))


def _prompt(place: int, rng: random.Random) -> str:
    """No two begin alike for long: the task follows its number."""
    task = rng.choice(_TASKS).format(rng.choice(_SUBJECTS))
    return f"{place}. {task}"


def _text(encode: Encode, num_tokens: int, rng: random.Random) -> tuple[int, ...]:
    """Running text of this length."""
    tokens: tuple[int, ...] = ()
    while len(tokens) < num_tokens:
        tokens += encode(_prompt(rng.randrange(1000), rng) + "\n")
    return tokens[:num_tokens]


def words(count: int, rng: random.Random) -> list[str]:
    """Running text of so many words."""
    found: list[str] = []
    while len(found) < count:
        found += _prompt(rng.randrange(1000), rng).split()
    return found[:count]
