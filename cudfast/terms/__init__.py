"""The terms that a loss is composed of: one file each."""

from .cross_entropy import CrossEntropy
from .entropy import Entropy, Gate
from .focal import Focal
from .forward_kl import ForwardKL
from .term import Sum, Term, Terms, Weighted, named

TERMS: tuple[type[Term], ...] = (ForwardKL, CrossEntropy, Focal, Entropy)

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
    "named",
]
