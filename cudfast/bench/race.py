"""Contestants timed in turns, in the same minutes: a machine whose speed drifts slows all of them alike."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .contestants import Contestant

LEAST = 3
"""Rounds of everybody who is shown."""
BUDGET = 12
"""Seconds of one race, unless LEAST rounds take longer."""


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
        self._every = dict.fromkeys(self._first, 1)

    def fit(self, rounds: int, budget: float) -> int:
        """At most so many rounds: everybody has an equal share of a budget in seconds. Ours decides how many there are;
        who is too slow for all of them takes part in every so many; everybody takes part in LEAST or more."""
        share = budget / len(self.contestants) / (self.warm + 1)
        turns = {
            name: max(LEAST, int(min(rounds, share / max(seconds, 1e-9)))) for name, seconds in self._first.items()
        }
        rounds = turns[self.contestants[0].name]
        self._every = {name: max(1, (rounds - 1) // (most - 1)) for name, most in turns.items()}
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
