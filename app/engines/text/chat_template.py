"""Conversations as text, by a model's own chat template.

A template is a program that came with the model, written for the library transformers. It runs in
the same environment as there, and is given the same: `messages`, `tools`, whether the assistant's
next turn is to be begun, and variables of its own.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NoReturn

import jinja2
import jinja2.meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from app.errors import ConfigError, RequestError

Put = Callable[[str], str]
"""What stands in the place of a text that a user wrote."""

_END: Final = "\U0010fffe"
"""Behind the last message that is to be continued: no character, so that nothing strips it."""


@dataclass(frozen=True, slots=True)
class Chat:
    """What is put through a template. Messages and tools are as transformers documents them, each
    message with `role` and `content`, and arguments of calls as objects."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    variables: Mapping[str, Any] = field(default_factory=dict)  #: of the template, by its name
    hints: Mapping[str, Any] = field(default_factory=dict)  #: the same, for those that know them
    ending: Literal["answer", "continued", "closed"] = "answer"
    """Whether the assistant's turn is begun, its last message goes on, or neither."""

    def texts(self) -> Iterator[str]:
        """All that users wrote, at any depth."""
        yield from _texts([self.messages, self.tools, self.variables])

    def with_texts(self, put: Put) -> Chat:
        """The same with each of its texts replaced."""
        return replace(
            self,
            messages=_mapped(self.messages, put),
            tools=_mapped(self.tools, put),
            variables=_mapped(self.variables, put),
        )


class ChatTemplate:
    def __init__(self, sources: Mapping[str, str], special_texts: Mapping[str, str]) -> None:
        """`sources` by name: `default`, and perhaps `tool_use`. `special_texts` are the model's
        special tokens by name, as `eos_token`. Raises `ConfigError` if a template is wrong."""
        self.source = "\n".join(sources.values())
        compiled = {name: _compile(source) for name, source in sources.items()}
        self._plain = compiled.get("default") or next(iter(compiled.values()))
        self._with_tools = compiled.get("tool_use") or self._plain
        self._special_texts = special_texts
        self._variables = _variables(self.source)
        self._takes_parts = not self._shows("quern") and self._shows(_part("quern"))

    @property
    def takes_tools(self) -> bool:
        return "tools" in self._variables

    def knows(self, variable: str) -> bool:
        return variable in self._variables

    def render(self, chat: Chat) -> str:
        """Raises `RequestError` if the template refuses the messages or fails on them."""
        self._refuse_unknown(chat.variables)
        template = self._with_tools if chat.tools else self._plain
        try:
            text = template.render(
                messages=self._messages(chat),
                add_generation_prompt=chat.ending == "answer",
                tools=chat.tools or None,
                documents=None,
                **{
                    **{name: it for name, it in chat.hints.items() if self.knows(name)},
                    **chat.variables,
                    **self._special_texts,
                },
            )
        except TemplateRefusal as error:
            raise RequestError(
                f"The model's chat template refuses these messages: {error}.", param="messages"
            ) from None
        except Exception as error:  # a template is a program; what it says may quote the prompt
            raise RequestError(
                f"The model's chat template failed on these messages ({type(error).__name__}).",
                param="messages",
            ) from None
        return _cut_behind_last_message(text) if chat.ending == "continued" else text

    def _messages(self, chat: Chat) -> list[dict[str, Any]]:
        messages = [dict(each) for each in chat.messages]
        if chat.ending == "continued":
            messages[-1]["content"] = (messages[-1]["content"] or "") + _END
        for each in messages:
            if each["role"] == "developer" and "developer" not in self.source:
                each["role"] = "system"
            if self._takes_parts and each["content"] is not None:
                each["content"] = _part(each["content"])
        return messages

    def _refuse_unknown(self, variables: Mapping[str, Any]) -> None:
        """What is off needs no variable to be turned off by."""
        for name, value in variables.items():
            if value and not self.knows(name):
                raise RequestError(
                    "This model's chat template has no such variable.",
                    param=f"chat_template_kwargs.{name}",
                )

    def _shows(self, content: Any) -> bool:
        """Whether a message of such content is in the text."""
        messages = [{"role": "user", "content": content}]
        options = {"add_generation_prompt": True, "tools": None, "documents": None}
        try:
            text = self._plain.render(messages=messages, **options, **self._special_texts)
        except Exception:  # it takes none
            return False
        return "quern" in text


def find_template(
    folder: Path, tokenizer_config: Mapping[str, Any], special_texts: Mapping[str, str]
) -> ChatTemplate | None:
    """From chat_template.jinja, else from tokenizer_config.json; each may have several."""
    given = tokenizer_config.get("chat_template")
    sources: dict[str, str] = {}
    if isinstance(given, str):
        sources["default"] = given
    elif isinstance(given, list):
        sources |= {each["name"]: each["template"] for each in given}
    file = folder / "chat_template.jinja"
    if file.is_file():
        sources["default"] = file.read_text(encoding="utf-8")
    tool_use = folder / "additional_chat_templates" / "tool_use.jinja"
    if tool_use.is_file():
        sources["tool_use"] = tool_use.read_text(encoding="utf-8")
    known = {name: it for name, it in sources.items() if name in ("default", "tool_use")}
    return ChatTemplate(known, special_texts) if known else None


class TemplateRefusal(Exception):
    """The template itself says that it cannot render these messages."""


class GenerationTag(Extension):
    """Templates for training mark the assistant's words with this tag; here it only encloses."""

    tags = {"generation"}  # noqa: RUF012  (as Jinja declares it)

    def parse(self, parser: Parser) -> list[Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    """The same as in transformers, for which templates are written."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.now(UTC).strftime(form)
    return environment


def _compile(source: str) -> jinja2.Template:
    try:
        return _environment().from_string(source)
    except jinja2.TemplateSyntaxError as error:
        said = str(error).rstrip(".")
        raise ConfigError(f"The chat template is wrong in line {error.lineno}: {said}.") from None


def _variables(source: str) -> frozenset[str]:
    environment = _environment()
    return frozenset(jinja2.meta.find_undeclared_variables(environment.parse(source)))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape HTML characters."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _refuse(reason: str) -> NoReturn:
    raise TemplateRefusal(reason)


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _cut_behind_last_message(text: str) -> str:
    end = text.rfind(_END)
    if end < 0:
        raise RequestError(
            "The model's chat template does not show the last message, so that it cannot be "
            "continued.",
            param="continue_final_message",
        )
    return text[:end]


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case Mapping():
            yield from _texts([*value, *value.values()])
        case list() | tuple():
            for item in value:
                yield from _texts(item)


def _mapped(value: Any, put: Put) -> Any:
    """Names, as those of roles and fields, hold no special token and stay what they are."""
    match value:
        case str():
            return value if value.isidentifier() else put(value)
        case Mapping():
            return {_mapped(key, put): _mapped(item, put) for key, item in value.items()}
        case list() | tuple():
            return [_mapped(item, put) for item in value]
        case _:
            return value
