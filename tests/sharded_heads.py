"""Losses of hidden states before heads whose classes are sharded over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from cudfast import FusedLinearCUDLoss, FusedLinearDUSLoss
from cudfast.distributed.group import HEADER
from examples import class_parallel

from .shards import N, Sent, V, batch, case, close, f64, groups, mine, rows_of


@case
def fused_linear_heads() -> None:
    """Heads with sharded classes: hidden states replicated or sharded; their gradient is summed once."""
    for group, widths in groups():
        rank, ranks = dist.get_rank(group), len(widths)
        sizes = [N - ranks + 1] + [1] * (ranks - 1)
        for options in (
            {"memory_budget": 1 << 20},
            {"reduction": "none", "student_logit_softcap": 5.0},
            {"save": "state"},
        ):
            _, _, labels = batch(f64)
            leaves = [torch.randn(*shape, dtype=f64) for shape in ((N, 5), (V, 5), (V,))]
            teacher = [torch.randn(*shape, dtype=f64) for shape in ((N, 7), (V, 7), (V,))]
            whole = [x.clone().requires_grad_() for x in leaves]
            names = ("teacher_hidden", "teacher_weight", "teacher_bias")
            wanted, wanted_stats = FusedLinearCUDLoss(**options)(
                *whole[:2], labels, student_bias=whole[2], **dict(zip(names, teacher)), return_stats=True
            )
            upstream = torch.rand_like(wanted) + 0.5
            wanted_grads = torch.autograd.grad(wanted, whole, upstream)
            for cut in (False, True):
                hidden, th = (rows_of(x, group, sizes) if cut else x for x in (leaves[0], teacher[0]))
                mine_ = [hidden.clone().requires_grad_()]
                mine_ += [mine(x.t(), group, widths).t().clone().requires_grad_() for x in leaves[1:]]
                parts = (th, *(mine(x.t(), group, widths).t().contiguous() for x in teacher[1:]))
                loss = FusedLinearCUDLoss(**options, process_group=group, sequence_sharded=cut)
                got, stats = loss(
                    *mine_[:2], labels, student_bias=mine_[2], **dict(zip(names, parts)), return_stats=True
                )
                close(got, wanted, (widths, options, cut))
                grads = torch.autograd.grad(got, mine_, upstream)
                expected = rows_of(wanted_grads[0], group, sizes) if cut else wanted_grads[0]
                close(grads[0], expected, ("hidden", widths, options, cut))
                for grad, of in zip(grads[1:], wanted_grads[1:]):
                    close(grad, mine(of.t(), group, widths).t(), ("weight or bias", widths, options, cut))
                close(stats.student_nll, wanted_stats.student_nll, "statistics")
        assert rank < ranks


@case
def fused_linear_teacher_and_what_it_sends() -> None:
    """DUSLoss from hidden states; all rows ignored; bytes: states forward, the hidden states' gradient backward."""
    for group, widths in groups():
        h, w = torch.randn(N, 5, dtype=f64), torch.randn(V, 5, dtype=f64)
        labels, alpha = torch.randint(V, (N,)), torch.rand(V) + 0.5
        labels[2] = -100
        for y in (labels, torch.full_like(labels, -100)):
            whole, part = (x.clone().requires_grad_() for x in (w, mine(w.t(), group, widths).t()))
            hidden = h.clone().requires_grad_()
            wanted = FusedLinearDUSLoss(alpha=alpha, logit_scale=0.5)(h, whole, y)
            with Sent() as sent:
                got = FusedLinearDUSLoss(alpha=alpha, logit_scale=0.5, process_group=group)(hidden, part, y)
            close(got, wanted, widths)
            assert sum(sent.bytes) == HEADER + int((y >= 0).sum()) * 32
            with Sent() as sent:
                got.backward()
            assert sent.bytes == [hidden.nbytes]
            wanted.backward()
            close(part.grad, mine(whole.grad.t(), group, widths).t(), widths)


@case
def example() -> None:
    losses = [value for value, _ in class_parallel.train(5000, 8, 16, torch.device("cpu"))]
    assert losses[-1] < losses[0] / 2
    said: list[Any] = [None] * 4
    dist.all_gather_object(said, losses)
    assert said == [losses] * 4
