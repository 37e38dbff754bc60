"""What engines share whose sequences come and go while others run."""

from __future__ import annotations

from app.engines.base import NewTokens, StepStats


class JoiningEngine:
    """Owns what has been computed and not been taken yet; a subclass runs the sequences."""

    joins: bool = True

    def __init__(self) -> None:
        self._new_tokens: list[NewTokens] = []
        self._stats: dict[str, StepStats] = {}  #: by batch

    def take_tokens(self) -> list[NewTokens]:
        taken, self._new_tokens = self._new_tokens, []
        return taken

    def take_stats(self) -> list[StepStats]:
        taken, self._stats = list(self._stats.values()), {}
        return taken

    def _stats_of(self, batch_id: str) -> StepStats:
        if (stats := self._stats.get(batch_id)) is None:
            stats = self._stats[batch_id] = StepStats(batch_id)
        return stats
