"""Signatures: what we sign, both libraries that receivers use take."""

from __future__ import annotations

import base64
import json
from datetime import UTC, datetime

import openai
import pytest
from cryptography.fernet import Fernet
from standardwebhooks import Webhook, WebhookVerificationError

from app.errors import ConfigError
from app.webhooks.signing import PREFIX, body_of, headers_of, hint_of, new_secret
from app.webhooks.vault import Vault

ENDED_AT = datetime.now(UTC)
ID = "evt_0199e0a4f4a97c53a7b3a9f5d8f6d2ce"
BODY = body_of(ID, "response.completed", ENDED_AT, "resp_1")


def unwrap(headers: dict[str, str], body: bytes, secret: str) -> object:
    return openai.OpenAI(api_key="x").webhooks.unwrap(body, headers, secret=secret)


def test_a_signed_event_is_taken_by_both_libraries() -> None:
    secret = new_secret()
    headers = headers_of(ID, BODY, datetime.now(UTC), [secret])

    verified = Webhook(secret).verify(BODY, headers)
    event = unwrap(headers, BODY, secret)

    assert verified == json.loads(BODY)
    assert verified == {
        "id": ID, "object": "event", "type": "response.completed",
        "created_at": int(ENDED_AT.timestamp()), "data": {"id": "resp_1"},
    }  # fmt: skip
    assert isinstance(event, openai.types.webhooks.ResponseCompletedWebhookEvent)
    assert event.data.id == "resp_1"


def test_while_a_secret_is_rotated_the_old_and_the_new_one_verify() -> None:
    old, new = new_secret(), new_secret()
    headers = headers_of(ID, BODY, datetime.now(UTC), [new, old])

    assert headers["webhook-signature"].count("v1,") == 2
    for secret in (old, new):
        assert Webhook(secret).verify(BODY, headers)
        assert unwrap(headers, BODY, secret)


def test_what_was_changed_on_its_way_is_not_taken() -> None:
    secret = new_secret()
    headers = headers_of(ID, BODY, datetime.now(UTC), [secret])

    for body, changed in (
        (BODY.replace(b"resp_1", b"resp_2"), headers),
        (BODY, headers | {"webhook-id": "evt_other"}),
        (BODY, headers | {"webhook-timestamp": str(int(headers["webhook-timestamp"]) - 1)}),
        (BODY, headers_of(ID, BODY, datetime.now(UTC), [new_secret()])),
    ):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body, changed)
        with pytest.raises(openai.InvalidWebhookSignatureError):
            unwrap(changed, body, secret)


def test_secrets_are_long_and_their_hints_tell_little() -> None:
    secrets = {new_secret() for _ in range(100)}

    assert len(secrets) == 100
    for secret in secrets:
        assert 24 <= len(base64.b64decode(secret.removeprefix(PREFIX))) <= 64
        assert len(hint_of(secret)) < 14 and hint_of(secret)[-4:] in secret


def test_without_a_key_secrets_are_kept_as_they_are_and_with_one_they_are_sealed() -> None:
    secret, key, older = (
        new_secret(),
        Fernet.generate_key().decode(),
        Fernet.generate_key().decode(),
    )

    assert Vault().seal(secret) == secret == Vault().open(secret)
    sealed = Vault(older).seal(secret)
    assert secret not in sealed
    # kept before there was a key, and sealed with one that is being replaced
    assert Vault(key).open(secret) == secret
    assert Vault(f"{key}, {older}").open(sealed) == secret


@pytest.mark.parametrize("keys", ["", Fernet.generate_key().decode()], ids=["none", "another"])
def test_a_secret_whose_key_is_not_there_is_not_opened(keys: str) -> None:
    sealed = Vault(Fernet.generate_key().decode()).seal(new_secret())

    with pytest.raises(ConfigError, match="encryption_key"):
        Vault(keys).open(sealed)
    with pytest.raises(ConfigError, match="openssl rand"):
        Vault("too short")
