"""The terms that a loss is composed of: one file each."""

from .cross_entropy import CrossEntropy
from .entropy import Entropy, Gate
from .focal import Focal
from .forward_kl import ForwardKL
from .reverse_kl import ReverseKL
from .term import MOST, Piece, Sum, Term, Terms, Weighted, named, pieces_of
from .z_loss import ZLoss

TERMS: tuple[type[Term], ...] = (ForwardKL, ReverseKL, CrossEntropy, Focal, Entropy, ZLoss)

__all__ = [
    "MOST",
    "TERMS",
    "CrossEntropy",
    "Entropy",
    "Focal",
    "ForwardKL",
    "Gate",
    "Piece",
    "ReverseKL",
    "Sum",
    "Term",
    "Terms",
    "Weighted",
    "ZLoss",
    "named",
    "pieces_of",
]
