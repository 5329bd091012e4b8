"""The networks: n-grams of a string or the vector of an encoder, then an MLP with one hidden layer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from .data import Split
from .ngrams import HASH_BITS


class Net(nn.Module):
    """A network with a method that reads its inputs from a Split."""

    @abstractmethod
    def read(self, rows: Split, which: Tensor) -> Tensor:
        """Logits [N, V] of the strings ``which`` (int64 [N]) of ``rows``."""


@dataclass(frozen=True)
class Size:
    """``bits``: log2 of the n-gram table's rows; ``dim``: its width; ``hidden``: width of the MLP's layer."""

    bits: int
    dim: int
    hidden: int

    def build(self, classes: int) -> Net:
        """Return a new network."""
        return NgramNet(self, classes)


@dataclass(frozen=True)
class VectorSize:
    """``dim``: width of the encoder's vectors; ``hidden``: width of the MLP's layer."""

    dim: int
    hidden: int

    def build(self, classes: int) -> Net:
        """Return a new network."""
        return VectorNet(self, classes)


TEACHER = Size(bits=HASH_BITS, dim=64, hidden=256)
STUDENT = Size(bits=12, dim=16, hidden=32)


def _mlp(dim: int, hidden: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, classes))


class NgramNet(Net):
    """Mean of n-gram vectors, then the MLP: bags of N strings -> logits [N, V]."""

    def __init__(self, size: Size, classes: int) -> None:
        super().__init__()
        self.rows = 2**size.bits
        self.bag = nn.EmbeddingBag(self.rows, size.dim, mode="mean")
        self.mlp = _mlp(size.dim, size.hidden, classes)

    def forward(self, grams: Tensor, offsets: Tensor) -> Tensor:
        """Bag n is ``grams[offsets[n] : offsets[n + 1]]``."""
        logits: Tensor = self.mlp(self.bag(grams % self.rows, offsets))
        return logits

    def read(self, rows: Split, which: Tensor) -> Tensor:
        """Reads the bags."""
        logits: Tensor = self(*rows.bags.take(which))
        return logits


class VectorNet(Net):
    """The MLP on the vectors of an encoder that is not trained: [N, D] -> logits [N, V]."""

    def __init__(self, size: VectorSize, classes: int) -> None:
        super().__init__()
        self.mlp = _mlp(size.dim, size.hidden, classes)

    def forward(self, vectors: Tensor) -> Tensor:
        """Logits of each row."""
        logits: Tensor = self.mlp(vectors)
        return logits

    def read(self, rows: Split, which: Tensor) -> Tensor:
        """Reads the vectors."""
        assert rows.vectors is not None, "a VectorNet reads a Split with vectors: pass embed= to build()"
        logits: Tensor = self(rows.vectors[which])
        return logits
