"""Times contestants in turns, in the same minutes, so that changes of the machine's speed affect all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from .contestants import Contestant

LEAST = 3
"""Least rounds of every contestant."""
BUDGET = 12
"""Seconds of one race, unless LEAST rounds take longer."""


class Race:
    """Contestants of one benchmark. The first is ours: it runs last in every round.

    Args:
        contestants: at least one.
        warm: number of untimed calls before each timed one, for small work that depends on caches.
    """

    def __init__(self, contestants: Sequence[Contestant], *, warm: int = 0) -> None:
        self.contestants = tuple(contestants)
        self.warm = warm
        self.seconds: dict[str, list[float]] = {c.name: [] for c in contestants}
        self._order = random.Random(0)
        self._round = 0
        # Compiles, starts the threads, and measures how long a round takes.
        self._first = {c.name: c.seconds(1) for c in contestants}
        self._every = dict.fromkeys(self._first, 1)

    def fit(self, rounds: int, budget: float) -> int:
        """At most so many rounds: all contestants have an equal share of a budget in seconds. The number of rounds is
        that of our contestant; a slower one is timed every n-th round, at least LEAST times."""
        share = budget / len(self.contestants) / (self.warm + 1)
        turns = {
            name: max(LEAST, int(min(rounds, share / max(seconds, 1e-9)))) for name, seconds in self._first.items()
        }
        rounds = turns[self.contestants[0].name]
        self._every = {name: max(1, (rounds - 1) // (most - 1)) for name, most in turns.items()}
        return rounds

    def others(self) -> None:
        """Times every peer of the next round, in a new order each time, so that none always follows the same one. Then
        prepares ours, so that its call can be timed."""
        ours, *peers = self.contestants
        for peer in self._order.sample(peers, len(peers)):
            if self._round % self._every[peer.name] == 0:
                self.seconds[peer.name].append(peer.seconds(self.warm))
        self._round += 1
        ours.prepare()
        for _ in range(self.warm):
            ours.call()

    def round(self) -> None:
        """Times every contestant of this round once."""
        ours = self.contestants[0]
        self.others()
        self.seconds[ours.name].append(ours.timed())
