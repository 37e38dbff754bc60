"""API keys as text: how one is made, and what can be told from it alone. Pure but for `new_key`.

    gm_V1StGXR8Z5jd_…32 characters…1pQ9Kz
       id           secret         checksum

The prefix lets scanners of source code know one. The id is no secret: it is how a key is named in
lists and logs. The secret has 190 bits, so its digest needs neither salt nor a slow hash. The
checksum tells a key that was cut or mistyped from one that is not known, without asking anybody.
"""

from __future__ import annotations

import enum
import re
import secrets
import string
import zlib
from dataclasses import dataclass
from hashlib import sha256
from typing import Final

PREFIX: Final = "gm"
_DIGITS: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase
_ID_LENGTH, _SECRET_LENGTH, _SUM_LENGTH = 12, 32, 6
_TENANT: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_KEY: Final = re.compile(
    rf"{PREFIX}_(?P<id>[0-9A-Za-z]{{{_ID_LENGTH}}})_[0-9A-Za-z]{{{_SECRET_LENGTH}}}"
    rf"(?P<sum>[0-9A-Za-z]{{{_SUM_LENGTH}}})"
)


class Scope(enum.StrEnum):
    """What a key allows."""

    SUBMIT = "submit"
    """To make, cancel, replay and purge its tenant's jobs."""
    READ = "read"
    """To read them, and what they used."""
    ADMIN = "admin"
    """To read what belongs to no tenant: metrics, and usage of all."""


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key at the only time at which its text is known."""

    id: str
    text: str

    @property
    def digest(self) -> bytes:
        return digest_of(self.text)


def new_key() -> NewKey:
    id = _random(_ID_LENGTH)
    begin = f"{PREFIX}_{id}_{_random(_SECRET_LENGTH)}"
    return NewKey(id, begin + _checksum(begin))


def is_tenant(name: str) -> bool:
    """Whether a tenant may be called so."""
    return _TENANT.fullmatch(name) is not None


def is_shaped(text: str) -> bool:
    """Whether it means to be one of ours: other systems' keys do not."""
    return text.startswith(f"{PREFIX}_")


def id_of(text: str) -> str | None:
    """The id of a key; None if it is none, or not as it was made."""
    match = _KEY.fullmatch(text)
    if match is None or match["sum"] != _checksum(text[:-_SUM_LENGTH]):
        return None
    return match["id"]


def digest_of(text: str) -> bytes:
    """What is kept of a key."""
    return sha256(text.encode()).digest()


def _random(length: int) -> str:
    return "".join(secrets.choice(_DIGITS) for _ in range(length))


def _checksum(text: str) -> str:
    rest = zlib.crc32(text.encode())
    digits = ""
    for _ in range(_SUM_LENGTH):
        rest, digit = divmod(rest, len(_DIGITS))
        digits = _DIGITS[digit] + digits
    return digits
