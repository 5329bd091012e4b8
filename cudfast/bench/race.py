"""Contestants timed in turns, in the same minutes: a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .contestants import Contestant

LEAST = 3
"""Rounds of everybody who is shown."""


class Race:
    """Contestants of one benchmark. The first is ours: it runs last in every round.

    Args:
        contestants: who takes part, at least one.
        warm: untimed calls before each timed one, for work so small that caches decide.
    """

    def __init__(self, contestants: Sequence[Contestant], *, warm: int = 0) -> None:
        self.contestants = tuple(contestants)
        self.warm = warm
        self.seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
        self._order = random.Random(0)
        self._round = 0
        # Compiles, starts the threads, and tells what a round will take.
        self._first = {c.name: c.seconds(1) for c in contestants}
        self._every = {c.name: c.every for c in contestants}

    def fit(self, rounds: int, budget: float) -> int:
        """At most so many rounds, as many as end within a budget in seconds; everybody takes part in LEAST or more."""
        calls = self.warm + 1
        slow = sum(self._first[c.name] for c in self.contestants if c.every > 1) * calls
        quick = sum(self._first[c.name] for c in self.contestants if c.every == 1) * calls
        rounds = max(LEAST, min(rounds, int((budget - LEAST * slow) / quick)))
        self._every = {c.name: min(c.every, max(1, (rounds - 1) // (LEAST - 1))) for c in self.contestants}
        return rounds

    def others(self) -> None:
        """Times every peer of the next round, in a new order each time: nobody always follows the same one. Then
        prepares ours, so that its call may be timed."""
        ours, *peers = self.contestants
        for peer in self._order.sample(peers, len(peers)):
            if self._round % self._every[peer.name] == 0:
                self.seconds[peer.name].append(peer.seconds(self.warm))
        self._round += 1
        ours.prepare()
        for _ in range(self.warm):
            ours.call()

    def round(self) -> None:
        """Times everybody once."""
        ours = self.contestants[0]
        self.others()
        self.seconds[ours.name].append(ours.timed())
