"""Measures of predictions, from four numbers a row: with weights, as a bootstrap needs them, or with all weights 1."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

BINS = 15
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Outcome:
    """What N answers amount to: each float64 [N]; ``correct`` is 0 or 1, ``nll`` in nats, ``brier`` 0 to 2."""

    confidence: Array
    correct: Array
    nll: Array
    brier: Array

    def take(self, which: NDArray[np.bool_] | NDArray[np.int64]) -> Outcome:
        """Return the rows ``which``."""
        return Outcome(**{name: values[which] for name, values in asdict(self).items()})

    def __len__(self) -> int:
        return len(self.correct)


def outcome(logits: Tensor, labels: Tensor, chunk: int = 4096) -> Outcome:
    """Reduce ``logits`` [N, V] and ``labels`` [N] to what the measures read."""
    found = []
    for z, y in zip(logits.split(chunk), labels.split(chunk), strict=True):
        probs = z.softmax(1)
        confidence, predicted = probs.max(1)
        nll = functional.cross_entropy(z, y, reduction="none")
        brier = probs.square().sum(1) - 2 * probs.gather(1, y[:, None])[:, 0] + 1
        found.append(torch.stack([confidence, (predicted == y).float(), nll, brier]).double())
    return Outcome(*torch.cat(found, 1).numpy())


def accuracy(rows: Outcome, weights: Array) -> Array:
    """Share of correct rows. Here and below ``weights`` is [B, N], the result [B]."""
    return _mean(rows.correct, weights)


def nll(rows: Outcome, weights: Array) -> Array:
    """Mean of −log p_y."""
    return _mean(rows.nll, weights)


def brier(rows: Outcome, weights: Array) -> Array:
    """Mean squared distance between probabilities and the one-hot label."""
    return _mean(rows.brier, weights)


def ece(rows: Outcome, weights: Array) -> Array:
    """Calibration error over bins of equal width."""
    return _calibration_error(rows, weights, _bin(rows.confidence))


def adaptive_ece(rows: Outcome, weights: Array) -> Array:
    """Calibration error over bins of equally many rows (those of weights 1)."""
    rank = np.empty(len(rows), dtype=np.int64)
    rank[np.argsort(rows.confidence, kind="stable")] = np.arange(len(rows))
    return _calibration_error(rows, weights, rank * BINS // len(rows))


def aurc(rows: Outcome, weights: Array) -> Array:
    """Area under the risk-coverage curve: error rate of the k most confident rows, averaged over k."""
    order = np.argsort(-rows.confidence, kind="stable")
    ordered = weights[:, order]
    covered = ordered.cumsum(1)
    errors = (ordered * (1 - rows.correct[order])).cumsum(1)
    risk = np.divide(errors, covered, out=np.zeros_like(errors), where=covered > 0)
    return _ratio((ordered * risk).sum(1), covered[:, -1])


def auroc(rows: Outcome, weights: Array) -> Array:
    """Chance that a correct row is more confident than a wrong one, ties counting half; NaN without either kind."""
    order = np.argsort(rows.confidence, kind="stable")
    _, start = np.unique(rows.confidence[order], return_index=True)
    ordered = weights[:, order]
    right = np.add.reduceat(ordered * rows.correct[order], start, axis=1)
    wrong = np.add.reduceat(ordered, start, axis=1) - right
    below = wrong.cumsum(1) - wrong / 2
    return _ratio((right * below).sum(1), right.sum(1) * wrong.sum(1))


def _mean(values: Array, weights: Array) -> Array:
    return _ratio(weights @ values, weights.sum(1))


def _ratio(above: Array, below: Array) -> Array:
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below != 0)


def _bin(confidence: Array) -> NDArray[np.int64]:
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def _calibration_error(rows: Outcome, weights: Array, bins: NDArray[np.int64]) -> Array:
    gaps = np.zeros((len(rows), BINS))
    gaps[np.arange(len(rows)), bins] = rows.confidence - rows.correct
    return _ratio(np.abs(weights @ gaps).sum(1), weights.sum(1))


@dataclass(frozen=True)
class Measure:
    """How to show a measure: title, factor, unit of a difference, decimals, and the sign of a gain."""

    title: str
    factor: float
    unit: str
    digits: int
    of: Callable[[Outcome, Array], Array]
    gain: int = -1

    def text(self, value: float, sign: str = "") -> str:
        """Format a value; ``sign`` is "+" for differences."""
        return f"{self.factor * value:{sign}.{self.digits}f}"


MEASURES = {
    "accuracy": Measure("Accuracy %", 100, " points", 2, accuracy, gain=1),
    "nll": Measure("NLL nats", 1, " nats", 3, nll),
    "ece": Measure("ECE %", 100, " points", 2, ece),
    "adaptive_ece": Measure("Adaptive ECE %", 100, " points", 2, adaptive_ece),
    "brier": Measure("Brier", 1, "", 3, brier),
    "aurc": Measure("AURC", 1, "", 3, aurc),
    "auroc": Measure("AUROC", 1, "", 3, auroc, gain=1),
}
"""By the name of the field of Scores."""


@dataclass(frozen=True)
class Scores:
    """Each measure of one run; only of accuracy and AUROC (of confidence for correctness) is more better."""

    accuracy: float
    nll: float
    ece: float
    adaptive_ece: float
    brier: float
    aurc: float
    auroc: float


def score(rows: Outcome) -> Scores:
    """Return every measure of an outcome."""
    ones = np.ones((1, len(rows)))
    return Scores(**{name: float(measure.of(rows, ones)[0]) for name, measure in MEASURES.items()})


def reliability(rows: Outcome) -> Array:
    """Return [3, BINS]: rows per confidence bin, their summed confidence, their number of correct answers."""
    weights = (np.ones(len(rows)), rows.confidence, rows.correct)
    return np.stack([np.bincount(_bin(rows.confidence), weights=w, minlength=BINS) for w in weights])
