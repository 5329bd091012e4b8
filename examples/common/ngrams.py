"""Strings as bags of hashed character n-grams, kept in compressed rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

HASH_BITS = 14
MAX_N = 4
_EDGE = "\x00"


@dataclass(frozen=True)
class Bags:
    """S bags of n-gram numbers: bag s is ``grams[start[s] : start[s + 1]]``, each below 2**HASH_BITS.

    ``grams`` is int32 [total], which EmbeddingBag sorts faster than int64; ``start`` is int64 [S + 1].
    """

    grams: Tensor
    start: Tensor

    def __len__(self) -> int:
        return len(self.start) - 1

    def take(self, which: Tensor) -> tuple[Tensor, Tensor]:
        """Return (grams, offsets) of the bags ``which`` (int64 [N]) in the form EmbeddingBag reads."""
        begin = self.start[which]
        length = self.start[which + 1] - begin
        offsets = length.cumsum(0) - length
        positions = torch.arange(int(length.sum())) + (begin - offsets).repeat_interleave(length)
        return self.grams[positions], offsets.to(self.grams.dtype)


def encode(strings: list[str]) -> Bags:
    """Hash the character 1- to MAX_N-grams of each string, with both ends marked."""
    marked = [f"{_EDGE}{text}{_EDGE}" for text in strings]
    codes = np.frombuffer("".join(marked).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    owner = np.repeat(np.arange(len(marked)), [len(text) for text in marked])
    hashes, owners = [], []
    rolling = np.zeros(len(codes), dtype=np.uint64)
    for n in range(1, MAX_N + 1):
        windows = max(len(codes) - n + 1, 0)
        rolling = rolling[:windows] * np.uint64(0x100000001B3) + codes[n - 1 :]
        inside = owner[:windows] == owner[n - 1 :]
        # The high bits of a product depend on every lower bit of the factor; the low bits do not.
        mixed = (rolling + np.uint64(n)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(64 - HASH_BITS)
        hashes.append(mixed[inside])
        owners.append(owner[:windows][inside])
    bag = np.concatenate(owners)
    order = np.argsort(bag, kind="stable")
    start = np.concatenate([[0], np.bincount(bag, minlength=len(strings)).cumsum()])
    grams = np.concatenate(hashes)[order].astype(np.int32)
    return Bags(torch.from_numpy(grams), torch.from_numpy(start.astype(np.int64)))
