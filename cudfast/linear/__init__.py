"""The losses from hidden states: logits, loss and gradients one tile at a time, within a memory budget."""

from .functional import fused_linear_cud_loss, fused_linear_dus_loss
from .losses import FusedLinearCUDLoss, FusedLinearDUSLoss

__all__ = ["FusedLinearCUDLoss", "FusedLinearDUSLoss", "fused_linear_cud_loss", "fused_linear_dus_loss"]
