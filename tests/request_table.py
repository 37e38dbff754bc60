"""The table of request fields in docs/requests.md: one source for the page and for the tests.

`python -m tests.request_table` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

from app.requests.bodies import BODIES, Url
from app.requests.handling import Ignored, Refused, handling_of

PAGE: Final = Path(__file__).resolve().parents[1] / "docs" / "requests.md"
BEGIN, END = "<!-- fields -->\n", "<!-- /fields -->"


def fields() -> dict[str, list[Url]]:
    """The fields that are known, and the calls that have them, in the order of these."""
    found: dict[str, list[Url]] = {}
    for url, body in BODIES.items():
        for name, field in body.model_fields.items():
            found.setdefault(field.alias or name, []).append(url)
    return dict(sorted(found.items()))


def table() -> str:
    lines = ["| field | of | |", "|---|---|---|"]
    for name, urls in fields().items():
        told: dict[str, list[str]] = {}
        for url in urls:
            told.setdefault(_told(url, name), []).append(_name(url))
        lines += [
            f"| `{name}` | {'all' if len(calls) == len(BODIES) else ', '.join(calls)} | {text} |"
            for text, calls in told.items()
        ]
    return "\n".join(lines)


def _name(url: Url) -> str:
    return url.split("/")[2]


def _told(url: Url, name: str) -> str:
    field = BODIES[url].model_fields[name]
    match handling_of(field):
        case Ignored(why):
            return f"ignored: {why}"
        case Refused(why, neutral):
            values = " or ".join(f"`{json.dumps(each)}`" for each in (*neutral, None))
            return f"refused unless {values}: {why}"
        case _:
            return f"taken: {field.description}".replace("|", "\\|")


def main() -> None:
    page = PAGE.read_text()
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
