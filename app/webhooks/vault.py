"""Secrets that have to sign later are kept, not hashed: sealed, where a key is set.

Without a key they are in the table as they are: whoever reads the database can sign. With
`webhooks.encryption_key` the table alone is of no use. Fernet is AES-128-CBC with HMAC-SHA256.
https://cryptography.io/en/latest/fernet/
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from cryptography.fernet import Fernet, InvalidToken, MultiFernet

from app.errors import ConfigError
from app.webhooks.signing import PREFIX, hint_of, new_secret

_SEALED: Final = "sealed:"


@dataclass(frozen=True, slots=True)
class Secret:
    """A signing secret as it is kept."""

    sealed: str
    hint: str  #: what of it may be shown


class Vault:
    """Seals with the first of its keys, and opens what was sealed with any, or never was."""

    def __init__(self, keys: str = "") -> None:
        """Keys in a row, with commas between. Raises `ConfigError`."""
        try:
            fernets = [Fernet(key.strip()) for key in keys.split(",") if key.strip()]
        except ValueError:
            raise ConfigError(
                "webhooks.encryption_key must be 32 bytes in URL-safe base64, or several of these "
                "with commas between. To make one: openssl rand -base64 32 | tr +/ -_"
            ) from None
        self._fernet = MultiFernet(fernets) if fernets else None

    def make(self) -> tuple[str, Secret]:
        """A new secret as its owner has to know it, once, and as it is kept."""
        secret = new_secret()
        return secret, Secret(self.seal(secret), hint_of(secret))

    def seal(self, secret: str) -> str:
        if self._fernet is None:
            return secret
        return _SEALED + self._fernet.encrypt(secret.encode()).decode()

    def open(self, kept: str) -> str:
        """Raises `ConfigError` if its key is not among ours."""
        if kept.startswith(PREFIX):
            return kept
        try:
            if self._fernet is not None:
                return self._fernet.decrypt(kept.removeprefix(_SEALED)).decode()
        except InvalidToken:
            pass
        raise ConfigError("A signing secret was sealed with a key that is not in encryption_key.")
