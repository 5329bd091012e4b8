"""The terms that a loss is composed of: one file each."""

from .cross_entropy import CrossEntropy
from .entropy import Entropy, Gate
from .focal import Focal
from .forward_kl import ForwardKL
from .term import Sum, Term, Terms, Weighted, named
from .z_loss import ZLoss

TERMS: tuple[type[Term], ...] = (ForwardKL, CrossEntropy, Focal, Entropy, ZLoss)

__all__ = [
    "TERMS",
    "CrossEntropy",
    "Entropy",
    "Focal",
    "ForwardKL",
    "Gate",
    "Sum",
    "Term",
    "Terms",
    "Weighted",
    "ZLoss",
    "named",
]
