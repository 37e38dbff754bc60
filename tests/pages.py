"""The pages of documentation, as the tests read them: README.md and what is in docs/.

An example is a fenced block under a comment `<!-- example: NAME -->`; its name occurs once.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
PAGES = {file: file.read_text() for file in (README, *sorted((ROOT / "docs").glob("*.md")))}
ALL = "\n".join(PAGES.values())
NAMED = [
    (name, (language, code))
    for name, language, code in re.findall(
        r"<!-- example: ([\w ]+) -->\n```(\w+)\n(.*?)```", ALL, re.DOTALL
    )
]
EXAMPLES = dict(NAMED)


def prose(page: str) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
