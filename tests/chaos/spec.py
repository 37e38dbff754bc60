"""Jobs as the clients of a fault make them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from tests.chaos.world import MODELS

COMPLETED: Final = ("completed",)


@dataclass(frozen=True, slots=True)
class Spec:
    """A job to submit, and how it may end: states, and the error code of a failure."""

    nonce: str
    prompt: str
    model: str = MODELS[0]
    priority: int = 0
    deadline_s: float | None = None
    fields: dict[str, Any] = field(default_factory=dict)  #: more of the request's body
    expect: tuple[str, ...] = COMPLETED
    cancel_after_s: float | None = None
    webhook_url: str | None = None

    @property
    def body(self) -> dict[str, Any]:
        return {"model": self.model, "prompt": self.prompt, **self.fields}

    def submission(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            "body": self.body,
            "idempotency_key": self.nonce,
            "priority": self.priority,
        }
        if self.deadline_s is not None:
            given["deadline"] = (datetime.now(UTC) + timedelta(seconds=self.deadline_s)).isoformat()
        if self.webhook_url is not None:
            given["webhook_url"] = self.webhook_url
        return given


def by_chance(rng: random.Random, canary: str, last_line: str = "", **given: Any) -> Spec:
    """A job whose prompt has the canary in it, and ends with a line that the stub engine obeys."""
    nonce = f"n{rng.getrandbits(64):016x}"
    text = f"{canary} {nonce} {'x' * rng.randrange(40)}"
    return Spec(nonce, f"{text}\n{last_line}" if last_line else text, **given)
