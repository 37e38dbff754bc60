"""`python -m app.bench NAME [options]`: a table, and one line of JSON to keep."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Final

from app.errors import ConfigError

BENCHES: Final = (
    "engine",
    "books",
    "step",
    "embeddings",
    "pipeline",
    "jobs",
    "batches",
    "latency",
    "streams",
    "policy",
    "eta",
    "outside",
    "overload",
    "fairness",
    "turns",
    "retention",
    "history",
    "usage",
    "recovery",
    "poison",
    "workers",
    "machines",
)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name not in BENCHES:
        sys.exit(f"usage: python -m app.bench {{{','.join(BENCHES)}}} [--help]")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    importlib.import_module("app.engines")  # before torch: it says how memory is taken
    try:
        importlib.import_module(f"app.bench.{name}").main(sys.argv[2:])
    except ConfigError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
