"""Accuracy, NLL, ECE, Brier score and AURC of predictions, and the bins of a reliability diagram."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_calibration_error

BINS = 15


@dataclass(frozen=True)
class Measure:
    """How to show a measure: title, factor, unit of a difference, decimals, and the sign of a gain."""

    title: str
    factor: float
    unit: str
    digits: int
    gain: int = -1


MEASURES = {
    "accuracy": Measure("Accuracy %", 100, " points", 2, gain=1),
    "nll": Measure("NLL nats", 1, " nats", 3),
    "ece": Measure("ECE %", 100, " points", 2),
    "brier": Measure("Brier", 1, "", 3),
    "aurc": Measure("AURC", 1, "", 3),
}
"""By the name of the field of Scores."""


@dataclass(frozen=True)
class Scores:
    """Accuracy and ECE 0 to 1, NLL in nats, Brier 0 to 2, AURC 0 to 1; only of accuracy is more better."""

    accuracy: float
    nll: float
    ece: float
    brier: float
    aurc: float


def brier(probs: Tensor, labels: Tensor) -> float:
    """Mean over N rows of the squared distance between ``probs`` [N, V] and the one-hot label."""
    right = probs.gather(1, labels[:, None])[:, 0]
    return float((probs.square().sum(1) - 2 * right + 1).mean())


def aurc(confidence: NDArray[np.float64], correct: NDArray[np.bool_]) -> float:
    """Area under the risk-coverage curve: error rate of the k most confident of N rows, averaged over k."""
    order = np.argsort(-confidence, kind="stable")
    errors = np.cumsum(~correct[order])
    return float((errors / np.arange(1, len(errors) + 1)).mean())


def score(logits: Tensor, labels: Tensor) -> Scores:
    """Score ``logits`` [N, V] against ``labels`` [N]."""
    classes = logits.shape[1]
    probs = logits.softmax(1)
    confidence, predicted = probs.max(1)
    return Scores(
        accuracy=float(multiclass_accuracy(predicted, labels, num_classes=classes, average="micro")),
        nll=float(functional.cross_entropy(logits, labels)),
        ece=float(multiclass_calibration_error(probs, labels, num_classes=classes, n_bins=BINS, norm="l1")),
        brier=brier(probs, labels),
        aurc=aurc(confidence.double().numpy(), (predicted == labels).numpy()),
    )


def reliability(logits: Tensor, labels: Tensor) -> NDArray[np.float64]:
    """Return [3, BINS]: rows per confidence bin, their summed confidence, their number of correct answers."""
    confidence, predicted = logits.softmax(1).max(1)
    which = (confidence * BINS).long().clamp_max(BINS - 1)
    weights = torch.stack([torch.ones_like(confidence), confidence, (predicted == labels).float()])
    return np.stack([np.bincount(which.numpy(), weights=w.numpy(), minlength=BINS) for w in weights])
