"""Prompts in a file, as the commands read them that try models: text, or requests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

import click

from app.cli.lines import Source, json_object, numbered_lines, text_of
from app.jobs import Kind
from gristmill_client.errors import RequestError

if TYPE_CHECKING:
    from app.trials.questions import Question

MAX_PROMPTS: Final = 10_000

prompts_option: Final = click.option(
    "--prompts",
    "file",
    type=click.File("rb"),
    help="A prompt a line, as text or as a request in JSON; built-in ones if left out. - is stdin.",
)
tokens_option: Final = click.option(
    "--tokens",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    help="Most tokens of an answer, where a request does not say.",
)
limit_option: Final = click.option(
    "--limit", type=click.IntRange(1), help="Take the first so many prompts."
)


def questions_of(file: Source | None, limit: int | None, kind: Kind) -> list[Question]:
    """What the options name."""
    from app.trials.questions import built_in

    return (built_in(kind) if file is None else read_prompts(file))[:limit]


def read_prompts(file: Source) -> list[Question]:
    """One prompt a line: a text, or, if the first line is a JSON object, requests as `gristmill
    submit --file` takes them.

    Wrong usage if a line is neither, or there is none.
    """
    questions: list[Question] = []
    is_json: bool | None = None
    for line in numbered_lines(file):
        if line is None:
            continue
        number, raw = line
        if is_json is None:
            is_json = _is_object(raw)
        try:
            questions.append(_question(f"line {number}", raw, is_json=is_json))
        except RequestError as error:
            raise click.UsageError(f"line {number}: {error}") from None
        if len(questions) > MAX_PROMPTS:
            raise click.UsageError(f"There are more than {MAX_PROMPTS:,} prompts; take fewer.")
    if not questions:
        raise click.UsageError("The file has no prompts.")
    return questions


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _question(where: str, raw: bytes, *, is_json: bool) -> Question:
    from app.trials.questions import Question

    if not is_json:
        return Question(where, text_of(raw).strip())
    value = json_object(raw)
    body, url = value.get("body", value), value.get("url")
    if not isinstance(body, dict):
        raise RequestError("body must be a JSON object.")
    if url is not None and not isinstance(url, str):
        raise RequestError("url must be a text.")
    return Question(where, body, url)
