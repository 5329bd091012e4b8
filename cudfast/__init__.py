"""Calibrated Uncertainty Distillation in one pass over the logits."""

import sys

from . import functional
from ._version import __version__
from .autograd.memory import empty_cache
from .classes.sets import ClassSets
from .composed import Loss
from .linear import FusedLinearCUDLoss, FusedLinearDUSLoss, FusedLinearLoss
from .losses import CUDLoss, DUSLoss
from .options import CUDOptions, DUSOptions, LinearOptions, WClip
from .targets.calibration import calibrate
from .targets.projection import Projection
from .terms import CrossEntropy, Entropy, Focal, ForwardKL, Gate, ReverseKL, ZLoss

# Objects pickled by 0.1.0 name the modules in which their classes were then.
sys.modules["cudfast.sets"] = sys.modules["cudfast.classes.sets"]
sys.modules["cudfast.projection"] = sys.modules["cudfast.targets.projection"]

__all__ = [
    "CUDLoss",
    "CUDOptions",
    "ClassSets",
    "CrossEntropy",
    "DUSLoss",
    "DUSOptions",
    "Entropy",
    "Focal",
    "ForwardKL",
    "FusedLinearCUDLoss",
    "FusedLinearDUSLoss",
    "FusedLinearLoss",
    "Gate",
    "LinearOptions",
    "Loss",
    "Projection",
    "ReverseKL",
    "WClip",
    "ZLoss",
    "__version__",
    "calibrate",
    "empty_cache",
    "functional",
]
