"""Memory for logits and gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.empty; on the CPU in huge pages where the native core can ask for them."""
    native: Any = backends.load("native")
    if device.type == "cpu" and not isinstance(native, str):
        memory: Tensor = native.fresh(shape, dtype)
        return memory
    return torch.empty(shape, dtype=dtype, device=device)
