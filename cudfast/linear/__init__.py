"""The losses from hidden states: logits, loss and gradients one tile at a time, within a memory budget."""

from .composed import FusedLinearLoss
from .functional import fused_linear_cud_loss, fused_linear_dus_loss, fused_linear_loss
from .losses import FusedLinearCUDLoss, FusedLinearDUSLoss

__all__ = [
    "FusedLinearCUDLoss",
    "FusedLinearDUSLoss",
    "FusedLinearLoss",
    "fused_linear_cud_loss",
    "fused_linear_dus_loss",
    "fused_linear_loss",
]
