"""Memory for logits and gradients: on the CPU, large tensors reuse the pages of earlier ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import backends

LARGE = 4 << 20  # bytes; malloc reuses smaller memory itself


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Like torch.empty: the contents are arbitrary."""
    numel = 1
    for size in shape:
        numel *= size
    native: Any = backends.load("native")
    if device.type != "cpu" or isinstance(native, str) or numel * dtype.itemsize < LARGE:
        return torch.empty(shape, dtype=dtype, device=device)
    memory: Tensor = native.pooled(numel, dtype).view(*shape)
    fill: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    if fill and torch.are_deterministic_algorithms_enabled():
        memory.fill_(torch.nan)
    return memory


def gradient_like(logits: Tensor) -> Tensor:
    """Memory for the gradient of logits, contiguous."""
    if logits.nbytes < LARGE:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    return empty(logits.shape, logits.dtype, logits.device)


def empty_cache() -> None:
    """Returns unused memory of the library's pool to the operating system.

    On Linux and macOS, the memory of gradients and of the buffers of fused linear losses (4 MiB and more) stays mapped
    when the tensor is deleted, and is reused for the next tensor of that size, or up to a fifth smaller: the first
    access to new pages takes as long as the loss. The system may take unused pages back at any time (MADV_FREE); until
    then they count as resident memory. At most CUDFAST_CACHE_BYTES stay unused, an environment variable that is read at
    the first call: by default a quarter of the machine's memory; 0 turns the pool off.

    Example:
        >>> import cudfast
        >>> cudfast.empty_cache()
    """
    native: Any = backends.load("native")
    if not isinstance(native, str):
        native.empty_cache()
