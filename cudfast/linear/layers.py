"""The last layers of student and teacher: the arguments of a call, and the logits of some classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ..options import LinearOptions, RowOptions
from ..rows.call import Constraints, Rows
from ..rows.shard import Shard


class Head(NamedTuple):
    """softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), or without the tanh."""

    weight: Tensor  # (>= V, D)
    bias: Tensor | None  # (>= V,)
    scale: float
    softcap: float | None
    block: int  # number of classes whose weights are converted at a time

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the logits, and of the products that compute them.

        On the CPU, 16-bit weights are converted to f32: the product is more accurate, and several times faster if the
        processor has no matrix unit for 16 bits.
        """
        narrow = self.weight.dtype.itemsize == 2 and self.weight.device.type == "cpu"
        return torch.float32 if narrow else self.weight.dtype

    @property
    def widens(self) -> bool:
        """Whether the weights are converted to f32, a block of classes at a time."""
        return self.dtype != self.weight.dtype

    def blocks(self, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of the classes [first, last): their positions in that range, and their weights (block, D)."""
        step = self.block if self.widens else max(1, last - first)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            yield slice(begin - first, end - first), self.weight[begin:end].to(self.dtype)

    def logits(self, hidden: Tensor, first: int, out: Tensor) -> None:
        """Writes the logits (R, C) of the classes from `first` on for hidden (R, D) in the logits' dtype."""
        for columns, weight in self.blocks(first, first + out.shape[1]):
            into = out[:, columns]
            if self.bias is None:
                into.addmm_(hidden, weight.t(), beta=0, alpha=self.scale)
            else:
                bias = self.bias[first + columns.start : first + columns.stop].to(out.dtype)
                torch.addmm(bias, hidden, weight.t(), beta=self.scale, alpha=self.scale, out=into)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)

    def uncap(self, gradient: Tensor, logits: Tensor) -> None:
        """Converts the gradient of capped logits (R, C) to that of uncapped logits, in place; overwrites the logits."""
        if self.softcap is not None:
            torch.ops.aten.tanh_backward.grad_input(gradient, logits.div_(self.softcap), grad_input=gradient)


class Problem(NamedTuple):
    """The checked arguments of a call."""

    rows: Rows  # with hidden states (..., D) as its logits, and as its target unless `teacher` is None
    student: Head
    teacher: Head | None  # None: rows.target are logits (..., >= V), or there is no teacher
    options: RowOptions
    linear: LinearOptions
    shard: Shard | None = None  # if other ranks hold more classes

    @property
    def heads(self) -> tuple[Head, ...]:
        """The layers that compute logits."""
        return (self.student,) if self.teacher is None else (self.student, self.teacher)

    @property
    def wide(self) -> torch.dtype:
        """The dtype of sums over tiles."""
        return torch.promote_types(self.linear.accumulate_dtype, self.student.weight.dtype)


def problem(
    rows: Rows,
    student: tuple[Tensor, Tensor | None],
    teacher: tuple[Tensor, Tensor | None] | None,
    options: RowOptions,
    linear: LinearOptions,
    shard: Shard | None = None,
) -> Problem:
    """The arguments of a call, from weights and biases."""

    def head(layer: tuple[Tensor, Tensor | None], scale: float, softcap: float | None) -> Head:
        block = max(64, linear.bytes // 16 // (4 * layer[0].shape[1]))
        return Head(*layer, scale, softcap, block)

    return Problem(
        rows,
        head(student, linear.scale, linear.softcap),
        None if teacher is None else head(teacher, linear.teacher_scale, linear.teacher_softcap),
        options,
        linear,
        shard,
    )


class Tensors(NamedTuple):
    """All tensors of a call that autograd has to track or that an op takes."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None
    row_weight: Tensor | None
    temperature: Tensor | None
    coefficients: Tensor | None
    class_weight: Tensor | None


def tensors_of(p: Problem) -> Tensors:
    """The tensors of a call."""
    rows, teacher = p.rows, p.teacher
    return Tensors(
        rows.logits,
        p.student.weight,
        p.student.bias,
        rows.target,
        None if teacher is None else teacher.weight,
        None if teacher is None else teacher.bias,
        rows.labels,
        rows.weight,
        rows.temperature,
        rows.coefficients,
        rows.class_weight,
    )


def problem_of(
    x: Tensors,
    scalar: float,
    num_items: float | Tensor | None,
    classes: int,
    constraints: Constraints | None,
    options: RowOptions,
    linear: LinearOptions,
    shard: Shard | None = None,
) -> Problem:
    """Inverse of `tensors_of`, with all other arguments."""
    return problem(
        Rows(
            x.hidden,
            x.target,
            x.labels,
            x.row_weight,
            x.temperature,
            x.coefficients,
            scalar,
            num_items,
            classes,
            constraints,
            x.class_weight,
        ),
        (x.weight, x.bias),
        None if x.teacher_weight is None else (x.teacher_weight, x.teacher_bias),
        options,
        linear,
        shard,
    )


class Needs(NamedTuple):
    """Which gradients are needed."""

    hidden: bool
    weight: bool
    bias: bool


NOTHING_NEEDED = Needs(False, False, False)
