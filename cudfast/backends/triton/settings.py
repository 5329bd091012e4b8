"""The numbers of a loss that do not change between calls: one f64 tensor that kernels read, made once on a device.

It has the bits of ignore_index and unlabeled_index, which are int64; budget and margin of the clip; then five numbers
for each term: its coefficient and its parameters.
"""

from __future__ import annotations

import functools
import struct
import threading

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...options import RowOptions, WClip

HEADER = tl.constexpr(4)  # numbers before the terms
WIDTH = tl.constexpr(5)  # of a term


@functools.lru_cache(maxsize=64)
def _bits(options: RowOptions) -> tuple[int, ...]:
    """All numbers as int64."""
    unlabeled = options.ignore_index if options.unlabeled_index is None else options.unlabeled_index
    clip = options.calibration if isinstance(options.calibration, WClip) else WClip(0.0, 1.0)
    numbers = [clip.budget, clip.margin]
    for piece, coefficient in zip(options.pieces, options.coefficients):
        numbers += [coefficient, *piece.term.parameters]
    doubles = struct.pack(f"{len(numbers)}d", *numbers)
    return options.ignore_index, unlabeled, *struct.unpack(f"{len(numbers)}q", doubles)


@functools.cache
def _kept(bits: tuple[int, ...], device: torch.device) -> Tensor:
    """Some 100 bytes that are never freed, since CUDA graphs may read them.

    A thread of its own has no part in a memory pool that the caller's allocations go to, as in the warm-up of
    torch.compile's CUDA graphs, which would take the memory back.
    """
    found: list[Tensor] = []

    def make() -> None:
        found.append(torch.tensor(bits, dtype=torch.int64, device=device).view(torch.float64))

    if device.type == "cpu":
        make()
    else:
        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
    return found[0]


def settings_of(options: RowOptions, device: torch.device) -> Tensor:
    """(4 + 5 T,) f64 on the device."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # No copy from the host can be captured: the numbers are arguments of fills that become part of the graph.
        fills = [torch.full((1,), bits, dtype=torch.int64, device=device) for bits in _bits(options)]
        return torch.cat(fills).view(torch.float64)
    return _kept(_bits(options), device)


@triton.jit
def special(settings):
    """(ignore_index, unlabeled_index); the first one twice if there is no second."""
    return tl.load(settings).to(tl.int64, bitcast=True), tl.load(settings + 1).to(tl.int64, bitcast=True)


@triton.jit
def clip_of(settings):
    """(budget, margin)."""
    return tl.load(settings + 2), tl.load(settings + 3)
