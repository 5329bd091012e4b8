"""Calibrated Uncertainty Distillation in one pass over the logits."""

from . import functional
from ._version import __version__
from .calibration import calibrate
from .linear import FusedLinearCUDLoss, FusedLinearDUSLoss
from .losses import CUDLoss, DUSLoss
from .memory import empty_cache
from .options import CUDOptions, DUSOptions, LinearOptions, WClip
from .projection import Projection
from .sets import ClassSets

__all__ = [
    "CUDLoss",
    "CUDOptions",
    "ClassSets",
    "DUSLoss",
    "DUSOptions",
    "FusedLinearCUDLoss",
    "FusedLinearDUSLoss",
    "LinearOptions",
    "Projection",
    "WClip",
    "__version__",
    "calibrate",
    "empty_cache",
    "functional",
]
