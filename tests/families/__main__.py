"""`make models`: try every family of the catalogue, and write what came of it.

Into docs/models.md, that is.

    python -m tests.families [FAMILY ...]

With families named, these alone are tried, and their rows written. Ends with status 1 if one is
wrong: neither as transformers has it, nor refused.
"""

from __future__ import annotations

import logging
import sys

from app.printable import printable
from tests.families.catalogue import DECODERS, ENCODER_DECODERS, ENCODERS
from tests.families.table import PAGE, Row, summed_up, updated
from tests.families.trial import Result, try_decoder, try_encoder, try_encoder_decoder

TRIED = (
    ("decoders", DECODERS, try_decoder),
    ("encoder-decoders", ENCODER_DECODERS, try_encoder_decoder),
    ("encoders", ENCODERS, try_encoder),
)


def main(only: list[str]) -> int:
    logging.disable(logging.CRITICAL)
    rows: list[Row] = []
    for title, families, trial in TRIED:
        for family in families:
            if only and family.name not in only and family.kind not in only:
                continue
            rows.append(Row(title, family.name, trial(family)))
            print(printable(rows[-1].line), flush=True)
    PAGE.write_text(summed_up(updated(PAGE.read_text(), rows)))
    return int(any(each.result is Result.WRONG for row in rows for each in row.outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
