"""How much of a device's memory the KV cache may take."""

from __future__ import annotations

from typing import Final

from app.errors import ConfigError

_MARGIN: Final = 256 * 2**20
"""Bytes for what libraries set up on first use."""


def blocks_within(free: int, peak: int, share: float, block_bytes: int) -> int:
    """Blocks of a cache that leaves room for the worst step, bytes all.

    `peak` is what the largest step took beside the weights when it was rehearsed. It is left twice:
    recorded graphs keep memory of their own for the largest step that they have.
    """
    blocks = int((free - 2 * peak - _MARGIN) * share) // block_bytes
    if blocks < 1:
        raise ConfigError(
            f"The device has {free / 2**30:.1f} GiB left beside the model, and its largest step "
            f"takes {peak / 2**30:.1f} GiB: there is no room for a KV cache. Set prefill_tokens or "
            "max_batch_size lower, or take a smaller model."
        )
    return blocks
