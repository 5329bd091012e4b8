"""Chunks of rows: their parts of every vector and matrix of a call, without a copy if possible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..rows.call import Part, Rows


def flat(x: Tensor) -> Tensor | None:
    """(N, width) as a view of (..., width) if possible, otherwise a copy."""
    try:
        return x.view(-1, x.shape[-1])
    except RuntimeError:
        return None


@dataclass(frozen=True)
class Chunk:
    """Rows [begin, end) of the rows that are not ignored."""

    begin: int
    end: int
    index: Tensor | None  # (R,) flat rows; None if no row of the call is ignored

    @property
    def count(self) -> int:
        """R."""
        return self.end - self.begin

    def vector(self, x: Tensor) -> Tensor:
        """The chunk's part (R, ...) of (N, ...)."""
        return x[self.begin : self.end] if self.index is None else x[self.index]

    def matrix(self, x: Tensor) -> Tensor:
        """The chunk's rows (R, width) of (..., width)."""
        rows = flat(x)
        if rows is not None:
            return rows[self.begin : self.end] if self.index is None else rows.index_select(0, self.index)
        return x[torch.unravel_index(self._index(x.device), x.shape[:-1])]

    def put(self, to: Tensor, values: Tensor) -> None:
        """Writes values (R, ...) into the chunk's part of (N, ...)."""
        if self.index is None:
            to[self.begin : self.end] = values
        else:
            to[self.index] = values

    def rows(self, rows: Rows, divisors: Tensor) -> Rows:
        """The call for these rows alone, without logits yet."""
        constraints = rows.constraints
        if constraints is not None:
            constraints = constraints._replace(bounds=self.vector(constraints.bounds))
        return rows._replace(
            labels=self._optional(rows.labels),
            weight=self._optional(rows.weight),
            temperature=self._optional(rows.temperature),
            coefficients=self._coefficients(rows.coefficients),
            num_items=divisors,
            constraints=constraints,
            part=Part(self._index(rows.logits.device), rows.logits.shape[:-1]),
        )

    def _coefficients(self, x: Tensor | None) -> Tensor | None:
        """The chunk's part (T, R) of (T, N); (T, 1) is that of all rows."""
        if x is None or x.shape[1] == 1:
            return x
        return (x[:, self.begin : self.end] if self.index is None else x[:, self.index]).contiguous()

    def _optional(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.vector(x)

    def _index(self, device: torch.device) -> Tensor:
        return torch.arange(self.begin, self.end, device=device) if self.index is None else self.index


def chunks(count: int, index: Tensor | None, size: int) -> Iterator[Chunk]:
    """`count` rows, all of a call or those of `index`, `size` at a time."""
    for begin in range(0, count, size):
        end = min(begin + size, count)
        yield Chunk(begin, end, None if index is None else index[begin:end])
