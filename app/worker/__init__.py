"""The worker: a Celery worker whose pool runs a model in batches.

`celery -A app.worker worker` and Celery's other commands find the app here. It is made when first
asked for, so that importing a module of this package reads no configuration.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name not in ("app", "celery"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from app.broker.app import make_app
    from app.config.file import load

    globals()["app"] = made = make_app(load().connected())
    return made
