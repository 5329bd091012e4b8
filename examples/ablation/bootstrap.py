"""Paired bootstrap: how far a difference between two methods would move with other test strings and other seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..common.metrics import MEASURES, Array, Outcome

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A difference and the ends of its interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether both ends are on one side of 0."""
        return self.low > 0 or self.high < 0


def compare(
    outcomes: Mapping[str, Sequence[Outcome]],
    baseline: str,
    string: NDArray[np.int64],
    resamples: int,
    seed: int = 0,
) -> dict[str, dict[str, Interval]]:
    """Return [method][measure] of every method minus ``baseline``.

    ``outcomes`` has one entry per seed; row i is of string ``string[i]``. Strings are drawn with replacement, all rows
    of a string together and the same ones for all methods; then seeds, both methods' alike.
    """
    rng = np.random.default_rng(seed)
    _, string = np.unique(string, return_inverse=True)
    strings, seeds = int(string.max()) + 1, len(outcomes[baseline])
    counts = rng.multinomial(strings, np.full(strings, 1 / strings), size=resamples)
    weights = np.concatenate([np.ones((1, len(string))), counts[:, string]])
    drawn = rng.integers(seeds, size=(resamples, seeds))
    values = {name: _values(runs, weights) for name, runs in outcomes.items()}
    return {
        name: {measure: _interval(values[name][measure] - values[baseline][measure], drawn) for measure in MEASURES}
        for name in outcomes
        if name != baseline
    }


def _values(runs: Sequence[Outcome], weights: Array) -> dict[str, Array]:
    """Each measure [seeds, 1 + B]: of the sample, then of the resamples."""
    return {name: np.stack([measure.of(rows, weights) for rows in runs]) for name, measure in MEASURES.items()}


def _interval(difference: Array, drawn: NDArray[np.int64]) -> Interval:
    sample, resampled = difference[:, 0], difference[:, 1:]
    means = resampled[drawn, np.arange(len(drawn))[:, None]].mean(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(sample.mean()), float(low), float(high))
