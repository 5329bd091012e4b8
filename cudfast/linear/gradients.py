"""Gradients of hidden states, weight and bias, summed tile by tile from those of the logits."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autograd.memory import empty
from .chunks import Chunk
from .layers import Needs, Problem

Found = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of hidden states, weight and bias; None for those that are not needed."""


class Gradients:
    """The sums. `cut`: a chunk of rows has more than one tile; `chunks`: the number of chunks."""

    def __init__(self, p: Problem, needs: Needs, *, cut: bool, chunks: int) -> None:
        self._p, self._cut, self._started = p, cut, False
        hidden, weight = p.rows.logits, p.student.weight
        self._hidden: Tensor | None = None
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._of_chunk: Tensor | None = None  # (R, D), until it is copied to the chunk's rows
        if needs.hidden:
            self._hidden = empty((p.rows.n, hidden.shape[-1]), hidden.dtype, hidden.device)
        if needs.weight:
            dtype = p.wide if chunks > 1 else weight.dtype
            self._weight = empty(weight.shape, dtype, hidden.device)
        if needs.bias:
            self._bias = torch.zeros(weight.shape[0], dtype=p.wide, device=hidden.device)

    def add(self, chunk: Chunk, hidden: Tensor, first: int, gradient: Tensor) -> None:
        """Adds a tile: hidden (R, D), and the gradient of its logits (R, C), for the classes from `first` on."""
        if self._bias is not None:
            part = self._bias[first : first + gradient.shape[1]]
            part.add_(gradient.sum(0, dtype=part.dtype), alpha=self._p.student.scale)
        if self._weight is not None:
            self._add_weight(self._weight, hidden, first, gradient)
        if self._hidden is not None:
            self._add_hidden(self._hidden, chunk, first, gradient)

    def _add_weight(self, total: Tensor, hidden: Tensor, first: int, gradient: Tensor) -> None:
        scale, last = self._p.student.scale, first + gradient.shape[1]
        if total.dtype == gradient.dtype:
            total[first:last].addmm_(gradient.t(), hidden, beta=1 if self._started else 0, alpha=scale)
            return
        for begin in range(first, last, self._p.student.block):
            end = min(begin + self._p.student.block, last)
            product = gradient[:, begin - first : end - first].t() @ hidden
            if self._started:
                total[begin:end].add_(product, alpha=scale)
            else:
                total[begin:end] = product.mul_(scale)

    def _add_hidden(self, total: Tensor, chunk: Chunk, first: int, gradient: Tensor) -> None:
        direct = not self._cut and chunk.index is None and total.dtype == gradient.dtype
        if direct:
            into = total[chunk.begin : chunk.end]
        else:
            if first == 0:
                dtype = self._p.wide if self._cut else gradient.dtype
                self._of_chunk = torch.empty((chunk.count, total.shape[1]), dtype=dtype, device=total.device)
            assert self._of_chunk is not None
            into = self._of_chunk
        head = self._p.student
        for columns, weight in head.blocks(first, first + gradient.shape[1]):
            begins = first + columns.start == 0
            if into.dtype == gradient.dtype:
                into.addmm_(gradient[:, columns], weight, beta=0 if begins else 1, alpha=head.scale)
            elif begins:
                into.copy_(gradient[:, columns] @ weight).mul_(head.scale)
            else:
                into.add_(gradient[:, columns] @ weight, alpha=head.scale)

    def end(self, chunk: Chunk) -> None:
        """Finishes a chunk, after its last tile."""
        self._started = True
        if self._of_chunk is not None:
            assert self._hidden is not None
            chunk.put(self._hidden, self._of_chunk.to(self._hidden.dtype))
            self._of_chunk = None

    def found(self, ignored: Tensor | None) -> Found:
        """The gradients in the inputs' shapes and dtypes. ignored (N,): rows whose gradient is 0."""
        rows, weight, bias = self._hidden, self._weight, self._bias
        if rows is not None:
            if ignored is not None:
                rows[ignored] = 0
            rows = rows.view(self._p.rows.logits.shape)
        if weight is not None:
            weight[self._p.rows.classes if self._started else 0 :] = 0
            weight = weight.to(self._p.student.weight.dtype)
        if bias is not None:
            bias = bias.to(self._p.student.weight.dtype)
        return rows, weight, bias
