"""Python's collector of circles of objects, told what stays."""

from __future__ import annotations

import gc


def keep_what_is_there() -> None:
    """Say that what is there now stays: libraries, models, tokenizers.

    The collector would look through all of it again and again as other objects come and go, and
    hold every thread for a tenth of a second in an API or a worker, and a step of the engine
    process for a quarter.
    """
    gc.collect()
    gc.freeze()
