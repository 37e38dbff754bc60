"""Languages that a model translates between, and how each kind of model is told of them.

NLLB, M2M100 and mBART have a token for each language, beside the source and at the target's
beginning. Marian's models for several targets, and MADLAD, have one before the source; T5 has a
sentence there. Others know one pair of languages, or none by name. All of it is read from the
files; nothing here imports torch or transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

from app.engines.checkpoint.json_files import read_json
from app.errors import RequestError
from app.jobs import SamplingParams

SOURCE: Final = "source_language"
TARGET: Final = "target_language"

_CODES: Final = {
    "nllb": re.compile(r"([a-z]{3}_[A-Z][a-z]{3})"),
    "mbart": re.compile(r"([a-z]{2}_[A-Z]{2})"),
    "m2m_100": re.compile(r"__([a-z]{2,3})__"),
}
"""Tokens of languages for both sides."""

_TARGETS: Final = {
    "marian": re.compile(r">>([^<>]+)<<"),
    "t5": re.compile(r"<2([A-Za-z_-]+)>"),
}
"""Tokens before a source that name its target."""

_TASK: Final = re.compile(r"translation_([a-z]+)_to_([a-z]+)")
_PREFIX: Final = re.compile(r"translate (\w+) to (\w+)")
_LEFT_TO_THE_TASK: Final = ("num_beams", "length_penalty", "early_stopping")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Direction:
    """What a translation from one language to another is, to one model."""

    around: tuple[tuple[int, ...], tuple[int, ...]] | None = None
    """Tokens before and behind a source; None is those around any text."""
    prefix: str = ""  #: text before a source
    decoder_start_token_id: int | None = None
    forced_bos_token_id: int | None = None
    search: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`, for requests that leave their search to the model."""

    def applied(self, params: SamplingParams) -> SamplingParams:
        search = self.search if params.num_beams is None else {}
        left = {name: it for name, it in search.items() if getattr(params, name) is None}
        return replace(
            params,
            decoder_start_token_id=self.decoder_start_token_id,
            forced_bos_token_id=self.forced_bos_token_id,
            **left,
        )


class Languages(Protocol):
    def direction(self, source: str | None, target: str | None) -> Direction:
        """Raises `RequestError` whose `param` names a language that is unknown or missing."""
        ...

    @property
    def names(self) -> list[str]:
        """Of target languages."""
        ...


def find_languages(folder: Path, tokens: Mapping[str, int], eos_token_id: int | None) -> Languages:
    """What a model's files say; `tokens` are its vocabulary."""
    config = read_json(folder / "config.json")
    texts = read_json(folder / "tokenizer_config.json")
    family = str(config.get("model_type", "")).replace("-moe", "")
    end = () if eos_token_id is None else (eos_token_id,)
    if family in ("m2m_100", "nllb", "mbart"):
        for pattern in _CODES.values():
            if codes := _found(pattern, tokens):
                return _CodeLanguages(codes, family, texts, end, _own_target(folder, config))
    if family in _TARGETS and (targets := _found(_TARGETS[family], tokens)):
        return _TargetLanguages(targets, end)
    if tasks := dict(_tasks(config.get("task_specific_params") or {})):
        return _TaskLanguages(tasks)
    return _OnePair(texts.get("source_lang"), texts.get("target_lang"))


def _found(pattern: re.Pattern[str], tokens: Mapping[str, int]) -> dict[str, int]:
    matches = ((pattern.fullmatch(text), token_id) for text, token_id in tokens.items())
    return {match[1]: token_id for match, token_id in matches if match}


def _own_target(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the model begins its outputs with a language of its own accord."""
    own = read_json(folder / "generation_config.json") or config
    return own.get("forced_bos_token_id") is not None


class _CodeLanguages:
    def __init__(
        self,
        codes: Mapping[str, int],
        family: str,
        texts: Mapping[str, Any],
        end: tuple[int, ...],
        has_own_target: bool,
    ) -> None:
        self._codes = codes
        self._end = end
        self._source, self._target = texts.get("src_lang"), texts.get("tgt_lang")
        self._has_own_target = has_own_target
        # mBART of 25 languages; that of 50 has its codes where the others have them.
        self._is_older = family == "mbart" and not str(texts.get("tokenizer_class")).startswith(
            "MBart50"
        )
        self._is_behind = self._is_older or bool(texts.get("legacy_behaviour"))

    def direction(self, source: str | None, target: str | None) -> Direction:
        code = (_pick(self._codes, source or self._source, SOURCE),)
        around = ((), self._end + code) if self._is_behind else (code, self._end)
        target = target or self._target
        if target is None and self._has_own_target:
            return Direction(around)
        begin = _pick(self._codes, target, TARGET)
        if self._is_older:
            return Direction(around, decoder_start_token_id=begin)
        return Direction(around, forced_bos_token_id=begin)

    @property
    def names(self) -> list[str]:
        return sorted(self._codes)


class _TargetLanguages:
    """The source's language is the model's to find out."""

    def __init__(self, targets: Mapping[str, int], end: tuple[int, ...]) -> None:
        self._targets = targets
        self._end = end

    def direction(self, source: str | None, target: str | None) -> Direction:
        return Direction(((_pick(self._targets, target, TARGET),), self._end))

    @property
    def names(self) -> list[str]:
        return sorted(self._targets)


@dataclass(frozen=True, slots=True)
class _Task:
    source: tuple[str, ...]  #: code and name
    target: tuple[str, ...]
    prefix: str
    search: Mapping[str, Any]


def _tasks(found: Mapping[str, Any]) -> Iterable[tuple[tuple[str, str], _Task]]:
    for name, params in found.items():
        if not (match := _TASK.fullmatch(name)):
            continue
        prefix = params.get("prefix") or ""
        spelled = _PREFIX.match(prefix)
        source, target = ((match[i], *([spelled[i]] if spelled else [])) for i in (1, 2))
        search = {key: params[key] for key in _LEFT_TO_THE_TASK if key in params}
        yield (match[1], match[2]), _Task(source, target, prefix, search)


class _TaskLanguages:
    def __init__(self, tasks: Mapping[tuple[str, str], _Task]) -> None:
        self._tasks = list(tasks.values())

    def direction(self, source: str | None, target: str | None) -> Direction:
        tasks = self._tasks
        for names, asked, param in (("source", source, SOURCE), ("target", target, TARGET)):
            known = {name: None for task in tasks for name in getattr(task, names)}
            if asked is None and len({getattr(task, names) for task in tasks}) == 1:
                continue
            _pick(known, asked, param)
            tasks = [
                task
                for task in tasks
                if str(asked).lower() in [name.lower() for name in getattr(task, names)]
            ]
        return Direction(prefix=tasks[0].prefix, search=tasks[0].search)

    @property
    def names(self) -> list[str]:
        return sorted({task.target[0] for task in self._tasks})


class _OnePair:
    """A model of one direction, which its files may name, by codes or by groups of languages."""

    def __init__(self, source: str | None = None, target: str | None = None) -> None:
        self._pair = {SOURCE: source, TARGET: target}

    def direction(self, source: str | None, target: str | None) -> Direction:
        for param, asked in ((SOURCE, source), (TARGET, target)):
            own = self._pair[param]
            if asked is None or asked == own:
                continue
            if own is None:
                raise RequestError(
                    "This model's files name no languages: leave them out.", param=param
                )
            if re.fullmatch(r"[a-z]{2,3}", own) and own != "mul":
                raise RequestError(f"This model's {param} is {own}.", param=param)
        return Direction()

    @property
    def names(self) -> list[str]:
        target = self._pair[TARGET]
        return [target] if target else []


class AnyLanguages:
    """Says the languages before the source, whatever they are: for tests."""

    def direction(self, source: str | None, target: str | None) -> Direction:
        return Direction(prefix=f"{source or ''}>{target or ''}: ")

    @property
    def names(self) -> list[str]:
        return []


NO_LANGUAGES: Final[Languages] = _OnePair()


def _pick(known: Mapping[str, T], asked: str | None, param: str) -> T:
    """By name, or by the part of it that names the language where one alone has it."""
    some = ", ".join(sorted(known)[:20]) + (", …" if len(known) > 20 else "")
    if asked is None:
        raise RequestError(f"This model needs a {param}: {some}.", param=param)
    same = [name for name in known if name.lower() == asked.lower()]
    same = same or [name for name in known if name.lower().partition("_")[0] == asked.lower()]
    if len(same) != 1:
        what = "Several languages of this model are" if same else "This model has no language"
        one_of = ", ".join(sorted(same)) if same else some
        raise RequestError(f"{what} so called; give one of {one_of}.", param=param)
    return known[same[0]]
