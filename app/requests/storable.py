"""Text that can be kept: what JSON can spell and Postgres' jsonb cannot hold is refused."""

from __future__ import annotations

from app.errors import RequestError


def parse_metadata(given: object) -> dict[str, str]:
    """Check a job's metadata: up to 16 pairs of text, keys to 64 and values to 512 characters."""
    if given is None:
        return {}
    if not isinstance(given, dict) or len(given) > 16:
        raise RequestError("metadata must be an object of at most 16 pairs.", param="metadata")
    for key, value in given.items():
        if not (isinstance(key, str) and 0 < len(key) <= 64):
            raise RequestError("A key of metadata has 1 to 64 characters.", param="metadata")
        if not (isinstance(value, str) and len(value) <= 512):
            raise RequestError(
                "A value of metadata is text of at most 512 characters.", param="metadata"
            )
    refuse_unstorable(given, "metadata")
    return given


def refuse_unstorable(value: object, *path: str) -> None:
    """Raise `RequestError` if a text in `value`, at any depth, cannot be kept as Postgres jsonb.

    That is text with a NUL character or half of a surrogate pair: JSON can spell both. `path`
    leads to `value` and names it in the error.
    """
    match value:
        case str():
            if "\0" in value or not is_unicode(value):
                raise RequestError(
                    "Text must not hold NUL characters or lone surrogates.", param=".".join(path)
                )
        case dict():
            for key, item in value.items():
                refuse_unstorable(key, *path)
                refuse_unstorable(item, *path, key)
        case list():
            if not set(map(type, value)) <= {int, float}:
                for index, item in enumerate(value):
                    refuse_unstorable(item, *path, str(index))


def is_unicode(text: str) -> bool:
    """Whether a text can be written: it holds no half of a surrogate pair."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def storable(text: str) -> str:
    """An answer's text, with something else for each NUL character: a model may well produce one,
    and Postgres takes none in JSON."""
    return text.replace("\0", "\ufffd")
