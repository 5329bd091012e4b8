"""The two networks: one class, two sizes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from .ngrams import HASH_BITS


@dataclass(frozen=True)
class Size:
    """``bits``: log2 of the n-gram table's rows; ``dim``: its width; ``hidden``: width of the MLP's layer."""

    bits: int
    dim: int
    hidden: int


TEACHER = Size(bits=HASH_BITS, dim=64, hidden=256)
STUDENT = Size(bits=12, dim=16, hidden=32)


class NgramNet(nn.Module):
    """Mean of n-gram vectors, then an MLP with one hidden layer: bags of N strings -> logits [N, V]."""

    def __init__(self, size: Size, classes: int) -> None:
        super().__init__()
        self.rows = 2**size.bits
        self.bag = nn.EmbeddingBag(self.rows, size.dim, mode="mean")
        self.mlp = nn.Sequential(
            nn.LayerNorm(size.dim),
            nn.Linear(size.dim, size.hidden),
            nn.GELU(),
            nn.Linear(size.hidden, classes),
        )

    def forward(self, grams: Tensor, offsets: Tensor) -> Tensor:
        """Bag n is ``grams[offsets[n] : offsets[n + 1]]``."""
        logits: Tensor = self.mlp(self.bag(grams % self.rows, offsets))
        return logits
