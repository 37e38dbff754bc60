"""A job's events as the chunks of OpenAI's streams. Pure.

    begun ─▶ a first delta for each choice, with its role
    tokens ─▶ what is certain of a choice's text, with its log-probabilities
    ended ─▶ what was not told, calls, why each choice ended, the usage

Where an answer is begun anew, after its worker was lost, nothing is told twice: the new one has to
begin with what was told, which greedy answers and those with a seed do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from app.api.live.events import NewTokens
from app.engines.text.tokenizer import Tokenizer
from app.requests.bodies import Request
from app.requests.chat import ChatBody
from app.requests.completion import CompletionBody
from app.requests.logprobs import Running, Spelling
from app.requests.saying import Saying, Told


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a caller wants to hear beside the answer."""

    usage: bool = False  #: at the end
    running_usage: bool = False  #: with each chunk, as load generators want it


class Chunks:
    """Owner of what one caller was told of a job."""

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        head: dict[str, Any],
        wanted: Wanted,
        num_prompt_tokens: int,
    ) -> None:
        """`prompts` are the distinct ones in tokens, or their ends; `head` is in every chunk."""
        self._head, self._wanted = head, wanted
        self._num_prompt_tokens, self._num_tokens = num_prompt_tokens, 0
        self._has_begun = False
        spellings = [Spelling(tokenizer, prompt) for prompt in prompts]
        places = range(request.num_sequences)
        match request.body:
            case ChatBody() as chat:
                self._choices: list[_Choice] = [
                    _ChatChoice(place, chat, spellings[0]) for place in places
                ]
            case CompletionBody() as asked:
                self._choices = [
                    _CompletionChoice(place, asked, spellings[place // request.num_answers])
                    for place in places
                ]
            case _:
                raise NotImplementedError(request.url)

    def begun(self) -> Iterator[dict[str, Any]]:
        """The engine has begun, perhaps anew. Raises `Restarted`."""
        for choice in self._choices:
            if self._has_begun:
                choice.again()
            else:
                yield from self._told(choice.first())
        self._has_begun = True

    def tokens(self, new: NewTokens) -> Iterator[dict[str, Any]]:
        """Raises `Restarted`."""
        if not self._has_begun:
            yield from self.begun()
        self._num_tokens += len(new.tokens.token_ids)
        if new.index < len(self._choices):
            yield from self._told(self._choices[new.index].take(new))

    def ended(self, response: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The job has completed, with this response. Raises `Restarted`."""
        if not self._has_begun:
            yield from self.begun()
        usage = response["usage"]
        self._num_tokens = usage["completion_tokens"]
        for choice, whole in zip(self._choices, response["choices"], strict=True):
            yield from self._told(choice.rest(whole))
        if self._wanted.usage:
            yield self._head | {"choices": [], "usage": usage}

    def _told(self, choices: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for choice in choices:
            chunk = self._head | {"choices": [choice]}
            if self._wanted.running_usage:
                chunk["usage"] = self._usage()
            elif self._wanted.usage:
                chunk["usage"] = None
            yield chunk

    def _usage(self) -> dict[str, Any]:
        prompt, answer = self._num_prompt_tokens, self._num_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": answer,
            "total_tokens": prompt + answer,
        }


class _Choice(Protocol):
    def first(self) -> Iterator[dict[str, Any]]: ...
    def again(self) -> None: ...
    def take(self, new: NewTokens) -> Iterator[dict[str, Any]]: ...
    def rest(self, whole: dict[str, Any]) -> Iterator[dict[str, Any]]: ...


class _ChatChoice:
    def __init__(self, index: int, body: ChatBody, spelling: Spelling) -> None:
        self._index = index
        self._saying = Saying(body, spelling.tokenizer, spelling.prompt_token_ids)
        self._scores = Running(spelling) if body.logprobs else None
        self._scored: list[dict[str, Any]] = []  #: whose text is not told yet
        self._num_scored = 0  #: that were told

    def first(self) -> Iterator[dict[str, Any]]:
        yield self._choice({"role": "assistant", "content": ""})

    def again(self) -> None:
        self._saying.again()
        self._scores, self._scored = None, []  # what is missing comes at the end

    def take(self, new: NewTokens) -> Iterator[dict[str, Any]]:
        if self._scores is not None:
            self._scored += self._scores.of_chat(new.tokens.logprobs)
        said = self._saying.take(new.text, new.tokens.token_ids)
        if said.content or said.reasoning:
            yield self._delta(said.content, said.reasoning)

    def rest(self, whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
        message, scores = whole["message"], whole.get("logprobs")
        said = self._saying.rest(message["content"], message.get("reasoning_content"))
        self._scored = scores["content"][self._num_scored :] if scores else []
        if said.content or said.reasoning or self._scored:
            yield self._delta(said.content, said.reasoning)
        for place, call in enumerate(message.get("tool_calls", ())):
            yield self._choice({"tool_calls": [{"index": place} | call]})
        yield self._choice({}) | {"finish_reason": whole["finish_reason"]}

    def _delta(self, content: str, reasoning: str) -> dict[str, Any]:
        delta = {"reasoning_content": reasoning} if reasoning else {}
        if content or not reasoning:
            delta["content"] = content
        scored, self._scored = self._scored, []
        self._num_scored += len(scored)
        return self._choice(delta, {"content": scored, "refusal": None} if scored else None)

    def _choice(
        self, delta: dict[str, Any], scores: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        return {"index": self._index, "delta": delta, "logprobs": scores, "finish_reason": None}


class _CompletionChoice:
    """What is echoed is told at the end, with the scores that are known then."""

    def __init__(self, index: int, body: CompletionBody, spelling: Spelling) -> None:
        self._index = index
        self._told = Told()
        self._is_told = not body.echo
        self._scores = Running(spelling) if body.logprobs is not None else None
        self._num_scored = 0

    def first(self) -> Iterator[dict[str, Any]]:
        yield from ()

    def again(self) -> None:
        self._told.again()
        self._scores = None

    def take(self, new: NewTokens) -> Iterator[dict[str, Any]]:
        if not self._is_told:
            return
        scores = None
        if self._scores is not None and new.tokens.logprobs:
            scores = self._scores.of_completion(new.tokens.logprobs)
            self._num_scored += len(new.tokens.logprobs)
        text = self._told.say(new.text)
        if text or scores:
            yield self._choice(text, scores)

    def rest(self, whole: dict[str, Any]) -> Iterator[dict[str, Any]]:
        scores = whole.get("logprobs")
        if scores is not None:
            scores = {name: each[self._num_scored :] for name, each in scores.items()}
        text = self._told.rest(whole["text"])
        yield self._choice(text, scores) | {"finish_reason": whole["finish_reason"]}

    def _choice(self, text: str, scores: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": self._index, "text": text, "logprobs": scores, "finish_reason": None}
