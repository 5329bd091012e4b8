"""Calibrated Uncertainty Distillation in one pass over the logits."""

from . import functional
from ._version import __version__
from .losses import CUDLoss, DUSLoss
from .options import CUDOptions, DUSOptions, WClip

__all__ = ["CUDLoss", "CUDOptions", "DUSLoss", "DUSOptions", "WClip", "__version__", "functional"]
